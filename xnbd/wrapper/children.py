"""The wrapper's child processes: forked, remembered, buried.

A child runs one function, or another program in its place.
"""

from __future__ import annotations

import os
import signal
from typing import Callable, Dict, Iterable, List

from ..logs import about, log
from ..system import forking
from ..system.service_manager import without_manager

Body = Callable[[], int]
OnEnd = Callable[[int], None]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
"""What the wrapper has handlers for."""

_CANNOT_EXECUTE = 127


class Children:
    """All children; *after_fork* closes what none of them may keep."""

    def __init__(self, after_fork: Callable[[], None]) -> None:
        self._after_fork = after_fork
        self._on_end: Dict[int, OnEnd] = {}

    def __len__(self) -> int:
        return len(self._on_end)

    def start(self, body: Body, on_end: OnEnd) -> int:
        """Fork a child that runs *body* and leaves with its result; *on_end* gets the exit code (negative: a signal).

        Raises `OSError` if there can be no more processes.
        """

        def live() -> int:
            self._after_fork()
            _reset_signals()
            return body()

        pid = forking.fork("a process of the wrapper", live)
        self._on_end[pid] = on_end
        return pid

    def adopt(self, pid: int, on_end: OnEnd) -> None:
        """A child that was started otherwise, or by the program before."""
        self._on_end[pid] = on_end

    def reap(self) -> None:
        """Bury all that have ended."""
        while self._on_end:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            on_end = self._on_end.pop(pid, None)
            if on_end:
                on_end(os.waitstatus_to_exitcode(status))

    def signal(self, number: int, pids: Iterable[int]) -> None:
        for pid in pids:
            if pid in self._on_end:
                os.kill(pid, number)

    def pids(self) -> List[int]:
        return list(self._on_end)


def _reset_signals() -> None:
    """Signals as a program finds them at its start."""
    forking.reset_signals(*forking.SIGNALS)


def execute(words: List[str]) -> int:
    """Run the program *words* in place of this process; returns, with a status, only if that is not possible."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ignored by Python, and would stay so
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _reset_signals()
    try:
        os.execvpe(words[0], words, without_manager(os.environ))
    except OSError as error:
        log.error("cannot run %s: %s", words[0], error.strerror, extra=about(error=error))
    return _CANNOT_EXECUTE
