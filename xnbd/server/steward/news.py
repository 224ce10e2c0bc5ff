"""Passing on what other servers have changed."""

from __future__ import annotations

from typing import Tuple

from ...scoreboard.layout import TARGET
from .duty import Context, Duty


class News(Duty):
    """Wakes this server's processes if somebody has changed the disk, maybe a server whose signals do not get here."""

    def __init__(self, context: Context) -> None:
        self._scoreboard = context.scoreboard
        self._seen: Tuple[object, ...] = (None,)

    def progress(self) -> None:
        """Nobody needs to wake up because a snapshot has begun."""
        scoreboard, seen = self._scoreboard, self._seen
        changes = scoreboard.gate.changes if scoreboard.snapshots.current is None else seen[-1]
        self._seen = scoreboard.mode == TARGET, scoreboard.origin.generation, changes
        if self._seen != seen:
            scoreboard.lines.wake_all()
