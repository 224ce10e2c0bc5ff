"""The clients of the old workers move to new ones, one after the other; one that takes long keeps no others waiting.

However slow the computer is, whoever can move does: there is no limit to the time of an upgrade, or of
one move. What ends is patience with silence, in which no process has said anything.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from time import monotonic
from typing import Collection, Dict, List, Mapping, Optional, Protocol, Set

from ... import __version__
from ...logs import log
from ...system.forking import HAND_OVER
from ..reports import Report
from .outcome import Outcome

WAITING = 4
"""New workers that wait for clients, so that none has to wait for a fork."""

_QUICK = 0.1
"""Seconds after an order within which no other one is given: processes take the processors from each other."""

_TRIES = 3
_PATIENCE = 5.0
"""Seconds of silence after which who has not answered keeps no place from others any more."""

_LAST_PATIENCE = 10.0
"""Seconds of silence after which who has not answered keeps its client: one that is stopped, or whose disk hangs."""

_LOOK_AGAIN = 0.05


class Roster(Protocol):
    """Processes by their ids: a server's `Crew`, or what a wrapper has, which makes `dismissed` and `clients` anew."""

    spares: Set[int]
    unproven: Set[int]
    moves: List[Report]

    @property
    def dismissed(self) -> Collection[int]:
        """Those of the program before."""

    @property
    def clients(self) -> Collection[int]:
        """The processes that have one."""

    def __contains__(self, pid: int) -> bool: ...


class _Silence:
    """For how many seconds nothing was heard.

    Time in which this process could not look, because it was stopped or the computer had no time for it, hardly
    counts: others could say nothing then either.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._looked = monotonic()

    def look(self, now: float, *, heard: bool) -> None:
        self.seconds = 0.0 if heard else self.seconds + min(now - self._looked, 2 * _LOOK_AGAIN)
        self._looked = now


class Moves:
    """All moves of one upgrade; *crew* has the old workers, which are dismissed, and the new ones."""

    def __init__(self, crew: Roster) -> None:
        self._crew = crew
        self._ordered: Dict[int, float] = {}
        """The workers that were ordered to hand over, and those that are about to take a client; and since when."""
        self._late: Set[int] = set()
        """Those of them that patience was lost with, though they may answer yet."""
        self._silence = _Silence()
        self._left = len(crew.dismissed)
        self._tries: Counter[int] = Counter()
        self.moved = 0
        self.longest_pause: Optional[float] = None
        """In seconds."""
        self.staying: Dict[int, str] = {}
        """Old workers whose clients stay, and why."""

    @property
    def remaining(self) -> int:
        """Clients that are to move yet."""
        return len(self._waiting()) + len(self._ordered)

    def _waiting(self) -> List[int]:
        dismissed, settled = self._crew.dismissed, {*self._ordered, *self.staying}
        return [pid for pid in self._crew.clients if pid in dismissed and pid not in settled]

    @property
    def are_over(self) -> bool:
        """Whether every client has moved, or stays. An old worker without a client may be just about to have one."""
        clients = self._crew.clients
        idle = any(pid not in clients for pid in self._crew.dismissed)
        return not self.remaining and not (idle and self._silence.seconds < _PATIENCE)

    def deadline(self) -> float:
        """When `progress` wants to be called (monotonic seconds)."""
        return monotonic() + _LOOK_AGAIN

    def progress(self) -> None:
        """Book what has come of the orders, and give the next ones."""
        crew, now = self._crew, monotonic()
        moves, crew.moves = crew.moves, []
        for report in moves:
            self._book(report)
        for pid in [pid for pid in self._ordered if pid not in crew]:
            del self._ordered[pid]
        before, self._left = self._left, len(crew.dismissed)
        self._silence.look(now, heard=bool(moves) or self._left != before)
        self._lose_patience()
        if self._may_order(now):
            self._order(now)

    def _lose_patience(self) -> None:
        if self._silence.seconds > _PATIENCE:
            self._late.update(self._ordered)
        if self._silence.seconds > _LAST_PATIENCE:
            self.staying.update((pid, "busy") for pid in self._ordered if pid in self._crew.clients)
            self._ordered.clear()

    def _may_order(self, now: float) -> bool:
        """Whether there is a process for one more client."""
        is_quick = any(since > now - _QUICK for since in self._ordered.values())
        prompt = sum(1 for pid in self._ordered if pid not in self._late)
        return not is_quick and len(self._crew.spares - self._crew.unproven) > prompt

    def _order(self, now: float) -> None:
        """Have the next client handed over; who has failed to do so comes after all others."""
        pid = min(self._waiting(), key=lambda pid: self._tries[pid], default=None)
        if pid is not None:
            self._ordered[pid] = now
            self._tries[pid] += 1
            self._late.discard(pid)
            self._silence.look(now, heard=True)
            with suppress(ProcessLookupError):
                os.kill(pid, HAND_OVER)

    def outcome(self, before: str, others: Mapping[str, int]) -> Outcome:
        """What came of the upgrade from the version *before*; so many *others* stay, too, for each reason."""
        clients = self._crew.clients
        reasons = Counter(reason for pid, reason in self.staying.items() if pid in clients)
        reasons.update(others)
        pause = None if self.longest_pause is None else 1000 * self.longest_pause
        outcome = Outcome(before, __version__, self.moved, reasons, pause)
        log.info("upgraded, %s", outcome)
        return outcome

    def _book(self, report: Report) -> None:
        was_ordered = self._ordered.pop(report.moved_from or report.pid, None) is not None
        if report.moved_to:
            if was_ordered:  # the other one has not told of it yet
                self._ordered[report.moved_to] = monotonic()
        elif report.moved_from:
            self._ordered.pop(report.pid, None)
            self.moved += 1
            self.longest_pause = max(report.pause, self.longest_pause or 0.0)
        elif not was_ordered or self._tries[report.pid] >= _TRIES:
            self.staying[report.pid] = report.stays
