"""What the service manager shows of a proxy: the master tells it, and hears from here how the disk is doing."""

from __future__ import annotations

import os
from time import monotonic

from ...scoreboard.layout import COMPLETE, TARGET, UNREACHABLE
from ...system.service_manager import ServiceManager
from .duty import Cache, Context, Duty

_EVERY = 1.0


class Telling(Duty):
    """Looks once a second, if there is a service manager."""

    def __init__(self, context: Context, cache: Cache) -> None:
        self._scoreboard = context.scoreboard
        self._source = cache.source
        self._master = context.master if ServiceManager(os.environ).listens else None
        self._told = ""
        self._look_at = 0.0

    def progress(self) -> None:
        now = monotonic()
        if self._master is None or now < self._look_at:
            return
        self._look_at = now + _EVERY
        state = self._state()
        if state != self._told and self._master.tell_state(state):
            self._told = state

    def _state(self) -> str:
        scoreboard = self._scoreboard
        if scoreboard.mode == TARGET:
            return "a target since the switch"
        if scoreboard.mode == COMPLETE:
            return "all blocks are cached"
        unreachable = any(line.origin == UNREACHABLE for line in scoreboard.lines.living())
        origin = scoreboard.origin.address or self._source.address
        return f"proxy of {origin}{', which cannot be reached' if unreachable else ''}"
