"""What there is to see of one disk, from a process that serves nobody."""

from __future__ import annotations

import os
from time import monotonic
from typing import List, Optional, Sequence

from ...origin.address import members_of, parse_origin
from ...proxy.state.view import CacheView
from ...scoreboard.counters import BYTES_FETCHED
from ...scoreboard.layout import TARGET
from ...scoreboard.lines import Line, clock
from ...scoreboard.place import COPYING_PEER
from ...scoreboard.scoreboard import Scoreboard
from ...storage.blocks import BLOCK
from ..steward.origin_figures import OriginFigures
from .figures import CacheNow, LimitNow, OriginNow

_SHORTEST_ROUND = 1.0
IDLE = 20
"""Times as long as a step of counting took, nothing is counted: that costs a twentieth of a processor at most."""


class Counting:
    """Keeps the figure of what is local in a cache up to date, step by step, as long as something changes there."""

    def __init__(self, view: CacheView, scoreboard: Optional[Scoreboard]) -> None:
        self._view = view
        self._scoreboard = scoreboard
        self._seen: object = None
        self._is_counting = True
        self.due = 0.0
        """When `work` wants to be called (monotonic seconds)."""
        self.work()  # which is all for a small disk

    def work(self) -> None:
        """One step."""
        began = monotonic()
        if not self._is_counting:
            seen = self._look()
            self._is_counting, self._seen = seen != self._seen, seen
        is_over = self._is_counting and self._view.count()
        self._is_counting = self._is_counting and not is_over
        now = monotonic()
        pause = 0.0 if self._is_counting else _SHORTEST_ROUND
        self.due = now + max(pause, IDLE * (now - began))

    def _look(self) -> object:
        """Another one when something may have become local."""
        return None if self._scoreboard is None else self._scoreboard.lines.totals()

    @property
    def cached_bytes(self) -> Optional[int]:
        """None before the first count is over."""
        return self._view.progress.cached_bytes() if self._view.progress.rounds else None

    @property
    def written_bytes(self) -> Optional[int]:
        """None before the first count is over, and of files that do not tell."""
        written = self._view.written
        return (written.blocks - written.missing()) * BLOCK if written is not None and written.rounds else None


def cache_now(
    scoreboard: Optional[Scoreboard], view: Optional[CacheView], counting: Optional[Counting], first: str
) -> CacheNow:
    """What is known of a cache whose origin is at *first* unless it has moved.

    Nobody serves it where there is no scoreboard of it, or only a dead one.
    """
    lines = [] if scoreboard is None else scoreboard.lines.living()
    cached = None if counting is None else counting.cached_bytes
    if scoreboard is None or not lines:
        return CacheNow(cached, None, None, copying=False, copied_bytes=0, reads_through=False)
    switched = scoreboard.mode == TARGET
    _, last = scoreboard.checkpoints()
    copier = next((line for line in lines if line.peer == COPYING_PEER), None)
    return CacheNow(
        cached_bytes=view.progress.size if switched and view is not None else cached,
        dirty_pages=None if switched or view is None else view.dirty_pages(),
        checkpoint_age=None if switched or last is None else max(0.0, clock() - last),
        copying=copier is not None,
        copied_bytes=0 if copier is None else copier.counts[BYTES_FETCHED],
        reads_through=scoreboard.reads_through and not switched,
        origins=[] if switched else _origins(scoreboard, lines, scoreboard.origin.address or first),
        written_bytes=None if switched or counting is None else counting.written_bytes,
        limit=_limit(scoreboard),
    )


def _origins(scoreboard: Scoreboard, lines: Sequence[Line], address: str) -> List[OriginNow]:
    if " " not in address:
        return []
    places = members_of(parse_origin(address))
    told = OriginFigures(scoreboard, lines).of(places, [None] * len(places))
    return [
        OriginNow(one["address"], one["state"] in ("connected", "idle"), one["latency"], one["bytes"]) for one in told
    ]


def _limit(scoreboard: Scoreboard) -> Optional[LimitNow]:
    room = scoreboard.room
    limit = room.limit
    if not limit:
        return None
    return LimitNow(limit * BLOCK, min(room.used, limit) * BLOCK, room.has_let_go * BLOCK)


def available_bytes(path: str) -> Optional[int]:
    """Space that is left on the file system of the file *path*; None for a device, which is no file on one."""
    try:
        status, found = os.stat(path), os.statvfs(path)
    except OSError:
        return None
    return None if status.st_rdev else found.f_bavail * found.f_frsize
