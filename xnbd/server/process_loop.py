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
from typing import Callable, Container, Dict, Iterator, Optional, Sequence, Tuple

from ..storage.image import Background
from ..system.polling import poll_patiently
from .disk import Disk

GRACE = 2.0
"""Seconds that a message under way may still take once the worker is to stop."""

_POLLS = 16


class Stop(Exception):
    """This worker has to leave now."""


class ProcessLoop:
    """Made after the fork, in the process that it watches over."""

    def __init__(self, lifeline: Optional[int] = None) -> None:
        """*lifeline* is the pipe's reading end, or None for a process without a master."""
        self.stopping = False
        self.farewell: Callable[[], None] = lambda: None
        """What the process has to let go of before it takes leave of its last client."""
        self.disk: Optional[Disk] = None
        """The disk whose background goes on while the process sleeps, and whose gate is left for that."""
        self._woken = False
        self._key: object = None
        self._side_poll = select.poll()
        self._deadline = float("inf")
        self._parent = os.getppid() if lifeline is not None else None
        wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR2, self._on_wake)
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._wake = wake
        self.lifeline = -1 if lifeline is None else lifeline
        self._polls: Dict[Tuple[Sequence[int], int], select.poll] = {}

    def _on_stop(self, _number: int, _frame: object) -> None:
        if not self.stopping:
            self.stopping = True
            self._deadline = monotonic() + GRACE

    def _on_wake(self, _number: int, _frame: object) -> None:
        self._woken = True

    def check(self, *, mid_message: bool = False) -> None:
        """Raises `Stop` when the worker is to leave, like `wait`. Cheap: a busy worker asks all the time."""
        if self._parent is not None and os.getppid() != self._parent:
            raise Stop("the master is gone")
        if self.stopping and not (mid_message and monotonic() < self._deadline):
            raise Stop("told to stop")

    def wait(
        self,
        fds: Sequence[int],
        events: int,
        timeout: Optional[float] = None,
        *,
        mid_message: bool = False,
        results: bool = False,
    ) -> bool:
        """Sleep until one of *fds* shows *events*; False if *timeout* seconds passed before.

        With *results* returns False also as soon as the background has some, or
        somebody has woken this process because the disk has changed. Raises `Stop` when the worker is to leave: at once
        if the master is gone, after `GRACE` if the wait is in the middle of a message.
        """
        until = None if timeout is None else monotonic() + timeout
        disk = self.disk
        if disk is None:
            return self._sleep(fds, events, until, mid_message, results)
        place, background = disk.place, disk.image.background
        inside = place.inside
        place.tell()
        place.leave()
        try:
            if background is None or not background.busy:
                return self._sleep(fds, events, until, mid_message, results)
            return self._work_and_sleep(disk, fds, events, until, mid_message, results)
        finally:
            if inside:
                place.enter()

    def wait_for(self, interests: Sequence[Tuple[int, int]], timeout: Optional[float]) -> None:
        """Sleep until one of *interests*, each with its events, is ready, or a signal has come.

        Raises `Stop` like `wait`.
        """
        self.check()
        poll = select.poll()
        for fd, events in (*self._own_interests(), *interests):
            poll.register(fd, events)
        until = None if timeout is None else monotonic() + timeout
        self._attend({fd for fd, _ in poll_patiently(poll, self._milliseconds(until))})

    def pause(self, seconds: float) -> None:
        """Sleep; raises `Stop` like `wait`."""
        self.wait((), 0, seconds)

    def _sleep(self, fds: Sequence[int], events: int, until: Optional[float], mid_message: bool, results: bool) -> bool:
        poll = self._plain_poll(fds, events)
        while True:
            self.check(mid_message=mid_message)
            if self._woken and self.disk is not None:
                self.disk.let_go()
            ready = {fd for fd, _ in poll_patiently(poll, self._milliseconds(until))}
            self._attend(ready)
            if not ready.isdisjoint(fds):
                return True
            if results and self._woken:
                self._woken = False
                return False
            if not ready and until is not None and monotonic() >= until:
                return False

    def _plain_poll(self, fds: Sequence[int], events: int) -> select.poll:
        """Polls for these *events*, and for what every sleep ends by: made once for each of the few there are."""
        poll = self._polls.get((fds, events))
        if poll is None:
            if len(self._polls) >= _POLLS:
                self._polls.clear()
            poll = self._polls[fds, events] = select.poll()
            for fd, wanted in (*self._own_interests(), *((fd, events) for fd in fds)):
                poll.register(fd, wanted)
        return poll

    def _work_and_sleep(
        self, disk: Disk, fds: Sequence[int], events: int, until: Optional[float], mid_message: bool, results: bool
    ) -> bool:
        background = disk.image.background
        assert background is not None
        while True:
            self.check(mid_message=mid_message)
            disk.place.enter()
            if disk.outdated:
                if results:
                    return False
                disk.place.leave()
                return self._sleep(fds, events, until, mid_message, results)
            background.progress()
            disk.tell_health()
            disk.place.tell()
            disk.place.leave()
            if results and background.finished:
                return False
            poll = self._poll_for((*fds, -1, events, *background.interests()), fds, events, background)
            times = [time for time in (until, background.deadline()) if time is not None]
            ready = {fd for fd, _ in poll_patiently(poll, self._milliseconds(min(times) if times else None))}
            self._attend(ready)
            if not ready.isdisjoint(fds):
                return True
            if until is not None and monotonic() >= until:
                return False

    def _poll_for(self, key: object, fds: Sequence[int], events: int, background: Background) -> select.poll:
        """What to poll for; the same as the last time more often than not."""
        if key != self._key:
            self._key = key
            self._side_poll = select.poll()
            for fd, wanted in (*self._own_interests(), *((fd, events) for fd in fds), *background.interests()):
                self._side_poll.register(fd, wanted)
        return self._side_poll

    def _own_interests(self) -> Iterator[Tuple[int, int]]:
        yield self._wake, select.POLLIN
        if self.lifeline >= 0:
            yield self.lifeline, select.POLLIN

    def _attend(self, ready: Container[int]) -> None:
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self.lifeline in ready:
            raise Stop("the master is gone")

    def _milliseconds(self, until: Optional[float]) -> Optional[float]:
        if self.stopping:
            until = self._deadline if until is None else min(until, self._deadline)
        return None if until is None else max(0.0, (until - monotonic()) * 1000)
