"""The clients of the old workers move to new ones, one after the other; one that takes long keeps no others waiting."""

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
"""Seconds for a worker to answer: one that is stopped, or whose disk hangs, does not."""

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


class Moves:
    """All moves of one upgrade; *crew* has the old workers, which are dismissed, and the new ones."""

    def __init__(self, crew: Roster) -> None:
        self._crew = crew
        self._until: Dict[int, float] = {}
        """The workers that were ordered to hand over, and those that are about to take a client; and until when."""
        self._tries: Counter[int] = Counter()
        self.moved = 0
        self.longest_pause: Optional[float] = None
        """In seconds."""
        self.staying: Dict[int, str] = {}
        """Old workers whose clients stay, and why."""
        self._patience = monotonic() + _PATIENCE

    @property
    def remaining(self) -> int:
        """Clients that are to move yet."""
        return len(self._waiting()) + len(self._until)

    def _waiting(self) -> List[int]:
        dismissed = self._crew.dismissed
        return [
            pid for pid in self._crew.clients if pid in dismissed and not (pid in self._until or pid in self.staying)
        ]

    @property
    def are_over(self) -> bool:
        """Whether every client has moved, or stays. An old worker without a client may be just about to have one."""
        clients = self._crew.clients
        idle = any(pid not in clients for pid in self._crew.dismissed)
        return not self.remaining and not (idle and monotonic() < self._patience)

    def deadline(self) -> float:
        """When `progress` wants to be called (monotonic seconds)."""
        return monotonic() + _LOOK_AGAIN

    def progress(self) -> None:
        """Book what has come of the orders, and give the next ones."""
        crew = self._crew
        moves, crew.moves = crew.moves, []
        for report in moves:
            self._book(report)
        now = monotonic()
        for pid in [pid for pid, until in self._until.items() if pid not in crew or now > until]:
            del self._until[pid]
            if pid in crew.clients:
                self.staying[pid] = "busy"
        is_quick = any(until > now + _PATIENCE - _QUICK for until in self._until.values())
        if not is_quick and len(crew.spares - crew.unproven) > len(self._until):
            for pid in self._waiting()[:1]:
                self._order(pid, now)

    def _order(self, pid: int, now: float) -> None:
        self._until[pid] = now + _PATIENCE
        self._tries[pid] += 1
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
        was_ordered = self._until.pop(report.moved_from or report.pid, None) is not None
        if report.moved_to:
            if was_ordered:  # the other one has not told of it yet
                self._until[report.moved_to] = monotonic() + _PATIENCE
        elif report.moved_from:
            self._until.pop(report.pid, None)
            self.moved += 1
            self.longest_pause = max(report.pause, self.longest_pause or 0.0)
        elif not was_ordered or self._tries[report.pid] >= _TRIES:
            self.staying[report.pid] = report.stays
