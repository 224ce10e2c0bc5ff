"""Keeping the cache of a proxy below its limit, if it has one: by a child that lives as long as the steward."""

from __future__ import annotations

from functools import partial
from logging import ERROR, WARNING
from time import monotonic
from typing import Optional

from ...errors import TaskFailed
from ...logs import ToldOnce
from ...proxy.source import ProxySource
from ...scoreboard.layout import EVICTING, PROXY
from ...scoreboard.scoreboard import Scoreboard
from ...storage.target import reopen
from ...system.process import set_title
from ..process_loop import ProcessLoop
from .child import Child
from .duty import Cache, Context, Duty

_AGAIN = 5.0
_LONGEST_PAUSE = 10.0


class Evicting(Duty):
    """Has one process of all servers of *cache* let go of what was not used for the longest time (`proxy.evictor`)."""

    def __init__(self, context: Context, cache: Cache) -> None:
        self._context = context
        self._scoreboard = context.scoreboard
        self._source = cache.source
        self._child: Optional[Child] = None
        self._start_at = 0.0
        self._failure = ToldOnce()
        self._leaving = False

    def progress(self) -> None:
        if self._child is not None and self._child.is_done():
            self._on_end(self._child)
            self._child = None
        if self._child is None and self._is_wanted():
            self._start()

    def _is_wanted(self) -> bool:
        scoreboard = self._scoreboard
        if not scoreboard.room.limit or self._leaving or self._context.loop.stopping or monotonic() < self._start_at:
            return False
        return scoreboard.mode == PROXY and not scoreboard.is_locked(EVICTING)

    def _start(self) -> None:
        self._start_at = monotonic() + _AGAIN
        try:
            self._child = self._context.children.start(partial(_evict, self._context, self._source))
        except TaskFailed as failure:
            self._failure.log(ERROR, f"nothing is let go of the cache: {failure}")

    def _on_end(self, child: Child) -> None:
        if child.status and not child.was_stopped:
            self._failure.log(ERROR, f"nothing is let go of the cache: {child.message or f'status {child.status}'}")

    def leave(self) -> None:
        """The other steward goes on with it."""
        self._leaving = True
        if self._child is not None:
            self._child.stop()
            self._child.wait()
            self._child = None


def _evict(context: Context, source: ProxySource) -> None:
    """The work of the child. Raises `OSError`, and `Stop`."""
    set_title("keeping below its limit the cache of", source.name)
    loop = ProcessLoop(context.loop.lifeline)
    scoreboard = Scoreboard(reopen(context.service.scoreboard_fd, readonly=False))
    evictor = source.open_evictor(scoreboard) if scoreboard.try_lock(EVICTING) else None
    failure, patience = ToldOnce(), 0.0
    while evictor is not None and scoreboard.mode == PROXY:
        try:
            pause = evictor.step()
            failure.passed()
            patience = 0.0
        except OSError as error:
            failure.log(WARNING, f"nothing can be let go of the cache at present: {error.strerror or error}")
            pause = patience = min(_LONGEST_PAUSE, 2 * patience or 0.25)
        loop.pause(pause)
