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
from .parking import ParkedRequest


class Timing:
    """Books the requests of one client in the *tally*.

    The session tells when its batch has ``arrived``. Plain READs and WRITEs of a batch it books itself, by
    ``answered``; other requests are ``held`` here until their replies have left.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.answered = tally.answered
        self.arrived = monotonic()
        self.held: List[Tuple[int, int, float, bool]] = []

    def hold(self, reads: int, writes: int) -> None:
        """So many READs and WRITEs are answered, whose replies may leave before the rest of the batch is done."""
        for command, count in ((CMD_READ, reads), (CMD_WRITE, writes)):
            if count:
                self.held.append((command, count, self.arrived, False))

    def hold_one(self, command: int) -> None:
        """A request of this batch is answered."""
        self.held.append((command, 1, self.arrived, False))

    def hold_parked(self, request: ParkedRequest) -> None:
        """A request that had to wait, for blocks or for its turn, is answered."""
        self.held.append((request.command, 1, request.arrived, True))

    def depart_held(self, now: float) -> None:
        """What was noted has left."""
        for command, count, arrived, waited in self.held:
            self._tally.answered_some(command, count, now - arrived, waited=waited)
        self.held.clear()
