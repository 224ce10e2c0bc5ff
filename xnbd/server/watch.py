"""What ends a worker besides its client: a signal to stop, and the master's death.

A signal handler only sets a flag; the wake-up pipe that Python writes to makes a
sleeping worker look at it. The lifeline is a pipe of which the master alone holds
the writing end, so that it breaks however the master ends.
"""

from __future__ import annotations

import os
import select
import signal
from time import monotonic
from typing import Callable, Optional, Sequence

GRACE = 2.0
"""Seconds that a message under way may still take once the worker is to stop."""


class Stop(Exception):
    """This worker has to leave now."""


class Watch:
    """Made after the fork, in the process that it watches over."""

    def __init__(self, lifeline: Optional[int] = None) -> None:
        """*lifeline* is the pipe's reading end, or None for a process without a master."""
        self.stopping = False
        self.farewell: Callable[[], None] = lambda: None
        """What the process has to let go of before it takes leave of its last client."""
        self._deadline = float("inf")
        self._parent = os.getppid() if lifeline is not None else None
        wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._wake = wake
        self._lifeline = -1 if lifeline is None else lifeline
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)
        if lifeline is not None:
            self._poll.register(lifeline, select.POLLIN)

    def _on_stop(self, _number: int, _frame: object) -> None:
        if not self.stopping:
            self.stopping = True
            self._deadline = monotonic() + GRACE

    def check(self, *, mid_message: bool = False) -> None:
        """Raises `Stop` when the worker is to leave, like `wait`. Cheap: a busy worker asks all the time."""
        if self._parent is not None and os.getppid() != self._parent:
            raise Stop("the master is gone")
        if self.stopping and not (mid_message and monotonic() < self._deadline):
            raise Stop("told to stop")

    def wait(
        self, fds: Sequence[int], events: int, timeout: Optional[float] = None, *, mid_message: bool = False
    ) -> bool:
        """Sleep until one of *fds* shows *events*; False if *timeout* seconds passed before.

        Raises `Stop` when the worker is to leave: at once if the master is gone,
        after `GRACE` if the wait is in the middle of a message.
        """
        poll = self._poll
        for fd in fds:
            poll.register(fd, events)
        try:
            return self._sleep(fds, None if timeout is None else monotonic() + timeout, mid_message)
        finally:
            for fd in fds:
                poll.unregister(fd)

    def pause(self, seconds: float) -> None:
        """Sleep; raises `Stop` like `wait`."""
        self.wait((), 0, seconds)

    def _sleep(self, fds: Sequence[int], until: Optional[float], mid_message: bool) -> bool:
        while True:
            self.check(mid_message=mid_message)
            ready = self._poll.poll(self._milliseconds(until))
            for fd, _ in ready:
                if fd in fds:
                    return True
                if fd == self._wake:
                    os.read(self._wake, 4096)
                elif fd == self._lifeline:
                    raise Stop("the master is gone")
            if not ready and until is not None and monotonic() >= until:
                return False

    def _milliseconds(self, until: Optional[float]) -> Optional[float]:
        if self.stopping:
            until = self._deadline if until is None else min(until, self._deadline)
        return None if until is None else max(0.0, (until - monotonic()) * 1000)
