"""How long requests take, for metrics: from the receipt of a request to the departure of its reply.

It costs a look at the clock when a batch has been received, one when its replies have been sent, and a
sum for all of its requests of one command. So all of them count as long as the batch took. Requests that
the session does one by one, or puts aside, are noted one by one.
"""

from __future__ import annotations

from time import monotonic
from typing import List, Tuple

from ...protocol.constants import CMD_READ, CMD_WRITE
from ...scoreboard.tally import Tally
from .parking import ParkedRequest, Where


class Timing:
    """Books the requests of one client in the *tally*. The session tells when its batch has ``arrived``."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.arrived = monotonic()
        self._held: List[Tuple[int, int, float, bool]] = []

    def depart(self, reads: int, writes: int, now: float) -> None:
        """All replies have left: those of so many READs and WRITEs of this batch, and those that were noted."""
        self._tally.answered(reads, writes, now - self.arrived)
        if self._held:
            self.depart_held(now)

    def hold(self, reads: int, writes: int) -> None:
        """So many READs and WRITEs are answered, whose replies may leave before the rest of the batch is done."""
        for command, count in ((CMD_READ, reads), (CMD_WRITE, writes)):
            if count:
                self._held.append((command, count, self.arrived, True))

    def hold_one(self, command: int, where: Where) -> None:
        """A request of this batch, for *where*, is answered."""
        self._held.append((command, 1, self.arrived, True))

    def hold_parked(self, request: ParkedRequest) -> None:
        """A request that had to wait, for blocks or for its turn, is answered."""
        self._held.append((request.command, 1, request.arrived, False))

    def depart_held(self, now: float) -> None:
        """What was noted has left."""
        for command, count, arrived, hit in self._held:
            self._tally.answered_some(command, count, now - arrived, hit=hit)
        self._held.clear()
