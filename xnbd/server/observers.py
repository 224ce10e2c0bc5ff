"""The process that answers ``--metrics``, as its parent knows it: started, started again, replaced by another one."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from logging import ERROR, INFO
from time import monotonic
from typing import TYPE_CHECKING, Callable, Iterable, List, Optional, Set

from ..logs import about, log
from ..system.listen import Listeners
from .endings import reason_of
from .retries import FIRST, Pauses

if TYPE_CHECKING:
    from .observer.process import Observed

Start = Callable[[Callable[[], int]], int]
"""Forks a process that runs the function, without anything that is its parent's alone; returns its id."""

_LASTING = 60.0
"""Seconds after which a process that dies is not taken for one that cannot live."""


class Observers:
    """The observer at *listeners*, for which *observed* opens what it observes, in its process.

    ``former`` are the process ids of those that were told to end and have not yet, or that a program before has left.
    """

    def __init__(
        self,
        listeners: Optional[Listeners],
        start: Start,
        observed: Callable[[], Observed],
        title: str,
        former: Iterable[int] = (),
    ) -> None:
        """Without *listeners* there is none."""
        if listeners is not None:  # later the files of the next program may stand where those of this one do
            from .observer import process  # noqa: F401

        self._listeners = listeners
        self._start = start
        self._observed = observed
        self._title = title
        self._pid: Optional[int] = None
        self._started_at = 0.0
        self._start_at = 0.0 if listeners is not None else float("inf")
        self._pauses = Pauses()
        self.former: Set[int] = set()
        for pid in former:
            self._dismiss(pid)

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        is_wanted = self._listeners is not None and self._pid is None and self._start_at < float("inf")
        return self._start_at if is_wanted else None

    def progress(self, lifeline: int) -> None:
        """Start one if there is none; it ends with *lifeline*."""
        if self._listeners is None or self._pid is not None or monotonic() < self._start_at:
            return
        try:
            self._pid = self._start(partial(self._live, self._listeners, lifeline))
            self._started_at = monotonic()
        except OSError as error:
            pause = self._pauses.next()
            log.error(
                "metrics: no process can be started, trying again in %g s: %s",
                pause,
                error.strerror,
                extra=about(error=error),
            )
            self._start_at = monotonic() + pause

    def _live(self, listeners: Listeners, lifeline: int) -> int:
        from .observer.process import observe

        return observe(lifeline, listeners.sockets, self._observed, self._title)

    def replace(self) -> None:
        """What is observed has changed: another process goes on. Who is about to be answered is not cut off."""
        if self._pid is not None:
            self._dismiss(self._pid)
            self._pid = None
            self._start_at = 0.0

    def _dismiss(self, pid: int) -> None:
        self.former.add(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def pids(self) -> List[int]:
        """All that have not ended."""
        return [*self.former, *([] if self._pid is None else [self._pid])]

    def bury(self, pid: int, exit_code: int, *, stopping: bool) -> None:
        """A child of this process has ended."""
        self.former.discard(pid)
        if pid != self._pid:
            return
        self._pid = None
        if stopping:
            self._start_at = float("inf")
            return
        if monotonic() - self._started_at > _LASTING:
            self._pauses.failures = 0
        pause = self._pauses.next() if exit_code else FIRST
        what = f"died: {reason_of(exit_code)}" if exit_code else "was told to end"
        log.log(ERROR if exit_code else INFO, "the process for metrics %s; the next one starts in %g s", what, pause)
        self._start_at = monotonic() + pause
