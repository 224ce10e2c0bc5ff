"""The new program's arrival: from the exec until the operator who has ordered the upgrade has an answer.

Old processes go on under the new program as its children, and report as before. Clients move from
them to new ones, which are forked ahead, one after the other (`server.upgrade.moves`). An old
process ends when its client has moved or left.
"""

from __future__ import annotations

from collections import Counter
from time import monotonic
from typing import Optional

from ...server.upgrade.moves import WAITING, Moves
from ...server.upgrade.outcome import Outcome
from .movers import Movers

_MOST_FAILURES = 10
"""Processes in a row that could not start, after which all clients that have not moved stay: some seconds."""

_LOOK_AGAIN = 0.05


class Arrival:
    """What has to be done once, where version *version* was; ``outcome`` is there when it is done."""

    def __init__(self, version: str, movers: Movers) -> None:
        self._version = version
        self._movers = movers
        movers.begin()
        self._moves = Moves(movers)
        self.outcome: Optional[Outcome] = None

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return monotonic() + _LOOK_AGAIN

    def progress(self) -> None:
        """Take the next step."""
        movers, moves = self._movers, self._moves
        moves.progress()
        movers.keep(min(WAITING, moves.remaining))
        if moves.are_over or movers.failures >= _MOST_FAILURES:
            self._end()

    @property
    def is_over(self) -> bool:
        return self.outcome is not None

    def _end(self) -> None:
        moves, movers = self._moves, self._movers
        others: Counter[str] = Counter()
        others["negotiating"] = len([pid for pid in movers.dismissed if pid not in movers.clients])
        others["no process for them"] = moves.remaining
        self.outcome = moves.outcome(self._version, +others)
        movers.dismiss()

    def stop(self) -> None:
        """The wrapper ends."""
        self._movers.dismiss()
