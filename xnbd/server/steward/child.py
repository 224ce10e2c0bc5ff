"""The processes that a steward forks, each to do one thing."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import Callable, List, Optional, Tuple

from ...errors import TaskFailed
from ...system.forking import fork_with_pipe, reset_signals
from ...system.polling import read_pipe
from ..process_loop import Stop

_LONGEST = 32 << 10
_PATIENCE = 2.0
"""Seconds until a process that was told to end is killed: less than the master gives the steward."""


class Child:
    """A process that does one thing; ``message`` is what it came to, or why it failed."""

    def __init__(self, close_first: Callable[[], None], work: Callable[[], Optional[str]]) -> None:
        """In the process *close_first* lets go of what is its parent's. Raises `TaskFailed` if there can be no more."""
        try:
            self.pid, self._reading = fork_with_pipe("a child of the steward", partial(_do, close_first, work))
        except OSError as error:
            raise TaskFailed(f"the server cannot start a process: {error.strerror}") from error
        os.set_blocking(self._reading, False)
        self.status: Optional[int] = None
        self.message = ""

    def fileno(self) -> int:
        """A descriptor that becomes readable when it is about to end."""
        return self._reading

    def is_done(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.message = read_pipe(self._reading, _LONGEST).decode("utf-8", "replace")
                os.close(self._reading)
        return self.status is not None

    @property
    def was_stopped(self) -> bool:
        """Whether it was told to end, as by Ctrl-C to all processes, and did not fail."""
        return self.status in (-signal.SIGTERM, -signal.SIGINT)

    def stop(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Until it has ended, for who has called `stop`; one that does not end in time, as after a SIGSTOP, is killed.

        Nothing is lost by that: any of them may die at any time.
        """
        until = monotonic() + _PATIENCE
        while not self.is_done():
            if monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            sleep(0.005)


class Children:
    """The children of one steward, which wakes up when one of them ends."""

    def __init__(self) -> None:
        self.let_go: List[Callable[[], None]] = []
        """What a child does first: it closes what has to end with the steward."""
        self._running: List[Child] = []

    def start(self, work: Callable[[], Optional[str]]) -> Child:
        """Raises `TaskFailed` if there can be no more processes."""
        child = Child(self._close, work)
        self._running.append(child)
        return child

    def _close(self) -> None:
        for close in self.let_go:
            close()

    def interests(self) -> List[Tuple[int, int]]:
        """What to poll for."""
        return [(child.fileno(), select.POLLIN) for child in self._running if child.status is None]

    def bury(self) -> bool:
        """Whether any has ended since this was asked last."""
        before = len(self._running)
        self._running = [child for child in self._running if not child.is_done()]
        return len(self._running) < before

    def end(self) -> None:
        """Stop all of them."""
        for child in self._running:
            child.stop()
        for child in self._running:
            child.wait()


def _do(close_first: Callable[[], None], work: Callable[[], Optional[str]], writing: int) -> int:
    """Life of the process: its exit status."""
    reset_signals(signal.SIGTERM, signal.SIGINT)  # until it has a `ProcessLoop` of its own
    close_first()
    status, message = 1, ""
    try:
        message = work() or ""
        status = 0
    except Stop:
        status = 0
    except TaskFailed as failure:
        status, message = failure.status, str(failure)
    except OSError as error:
        message = error.strerror or str(error)
    with suppress(BrokenPipeError):  # the steward has ended first
        os.write(writing, message.encode("utf-8", "backslashreplace")[:_LONGEST])
    return status
