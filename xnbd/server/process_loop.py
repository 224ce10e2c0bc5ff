"""Where a process sleeps, and all that wakes it: descriptors, its companion's work, signals, the master's death.

A signal handler only sets a flag; the wake-up pipe that Python writes to makes a
sleeping process look at it. The lifeline is a pipe of which the master alone holds
the writing end, so that it breaks however the master ends.

What goes on while a process sleeps is handed to its loop as a `Companion`. The loop
knows nothing of disks and clients.

The process may be *called*: by the signal `HAND_OVER`, or by what it gave to
`ProcessLoop.heed`. That ends sleeps between two requests, and in the middle of
replies, and no other ones.
"""

from __future__ import annotations

import os
import select
import signal
from abc import ABC, abstractmethod
from time import monotonic
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from ..system.forking import HAND_OVER
from ..system.polling import poll_patiently

GRACE = 2.0
"""Seconds that a message under way may still take once the process is to stop."""

_POLLS = 16

Interests = Sequence[Tuple[int, int]]
"""Descriptors to wait for, each with its poll events."""


class Stop(Exception):
    """This process has to leave now."""


class Companion(ABC):
    """Work that goes on in a process while the process sleeps in `ProcessLoop.wait`."""

    @abstractmethod
    def fall_asleep(self) -> None:
        """The process sleeps from now on until `wake_up`."""

    @abstractmethod
    def wake_up(self) -> None:
        """The sleep is over."""

    @abstractmethod
    def progress(self) -> bool:
        """Do all that can be done without waiting; True if whoever waits for results has to look."""

    @abstractmethod
    def interests(self) -> Interests:
        """What `progress` waits for, as it said the last time."""

    @abstractmethod
    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called in any case, in monotonic seconds."""

    at_work = True
    """Whether `interests` and `deadline` say anything; not to ask them makes a short sleep cheaper."""


class ProcessLoop:
    """Where one process sleeps. It is made in that process, after the fork."""

    def __init__(self, lifeline: Optional[int] = None, *, handle_signals: bool = True) -> None:
        """*lifeline* is the pipe's reading end, or None for a process without a master.

        Without *handle_signals* they do what they did before, as in a process that may
        simply be killed, or in a thread.
        """
        self.stopping = False
        self.farewell: Callable[[], None] = lambda: None
        """What the process has to let go of before it takes leave of its last client."""
        self.companion: Optional[Companion] = None
        self.called = False
        """Whether those who sleep with *calls* are to return, until somebody sets it back."""
        self.ordered = False
        """Whether the master wants another process to go on with the client."""
        self._heeded: Optional[int] = None
        self._call_at: Optional[float] = None
        self._reminders: List[Tuple[float, Callable[[], None]]] = []
        self._alarm_at: Optional[float] = None
        """When the first of all these is due."""
        self._woken = False
        self._key: object = None
        self._side_poll = select.poll()
        self._deadline = float("inf")
        self._parent = os.getppid() if lifeline is not None else None
        self._wake = self._handle_signals() if handle_signals else -1
        self.lifeline = -1 if lifeline is None else lifeline
        self._polls: Dict[Tuple[Sequence[int], int], select.poll] = {}

    def _handle_signals(self) -> int:
        """Install the handlers; the wake-up pipe's reading end."""
        wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR2, self._on_wake)
        signal.signal(HAND_OVER, self._on_order)
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return wake

    def _on_stop(self, _number: int, _frame: object) -> None:
        if not self.stopping:
            self.stopping = self._woken = True
            self._deadline = monotonic() + GRACE

    def _on_wake(self, _number: int, _frame: object) -> None:
        self._woken = True

    def _on_order(self, _number: int, _frame: object) -> None:
        self.ordered = self.called = True

    def heed(self, fd: Optional[int], until: Optional[float] = None) -> None:
        """Call the process once, as soon as *fd* is readable, at *until* (monotonic seconds) at the latest.

        What was to be heeded before is not any more.
        """
        self._heeded, self._call_at = fd, until
        self._set_alarm()
        self._polls.clear()
        self._key = None

    def remind(self, at: float, do: Callable[[], None]) -> None:
        """Do something at that time (monotonic seconds), or as soon as the process sleeps or `check` is called then."""
        self._reminders.append((at, do))
        self._set_alarm()

    def _set_alarm(self) -> None:
        times = [at for at, _ in self._reminders]
        self._alarm_at = min(times if self._call_at is None else (*times, self._call_at), default=None)

    def _ring(self) -> bool:
        """Do what is due; whether the process is to be called."""
        now = monotonic()
        due = [do for at, do in self._reminders if at <= now]
        self._reminders = [(at, do) for at, do in self._reminders if at > now]
        self._set_alarm()
        for do in due:
            do()
        return self._call_at is not None and now >= self._call_at

    def check(self, *, mid_message: bool = False) -> None:
        """Raises `Stop` when the process is to leave, like `wait`. Cheap: a busy worker asks all the time."""
        if self._reminders and self._alarm_at is not None and monotonic() >= self._alarm_at:
            self._attend(())
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
        calls: bool = False,
    ) -> bool:
        """Sleep until one of *fds* shows *events*; False if *timeout* seconds passed before.

        With *results* returns False also as soon as the companion has some, or somebody
        has woken this process, with *calls* as long as it is called. Raises `Stop` when
        the process is to leave: at once if the master is gone, after `GRACE` if the wait
        is in the middle of a message.
        """
        until = None if timeout is None else monotonic() + timeout
        companion = self.companion
        if companion is None:
            return self._sleep(fds, events, until, mid_message, results, calls)
        companion.fall_asleep()
        try:
            return self._sleep(fds, events, until, mid_message, results, calls)
        finally:
            companion.wake_up()

    def wait_for(self, interests: Interests, timeout: Optional[float]) -> None:
        """Sleep until one of *interests*, each with its events, is ready, or a signal has come.

        Raises `Stop` like `wait`.
        """
        self.check()
        poll = select.poll()
        for fd, events in (*self._own_interests(), *interests):
            poll.register(fd, events)
        until = None if timeout is None else monotonic() + timeout
        self._attend(poll_patiently(poll, self._milliseconds(until)))

    def pause(self, seconds: float) -> None:
        """Sleep; raises `Stop` like `wait`."""
        self.wait((), 0, seconds)

    def _sleep(
        self, fds: Sequence[int], events: int, until: Optional[float], mid_message: bool, results: bool, calls: bool
    ) -> bool:
        companion = self.companion
        while True:
            if self.stopping:  # the master's death is seen by the poll
                self.check(mid_message=mid_message)
            if calls and self.called:
                return False
            if companion is not None and companion.progress() and results:
                return False
            if companion is not None and companion.at_work:
                poll = self._poll_beside(fds, events, companion.interests())
                wake_at = _earlier(until, companion.deadline())
            else:
                poll, wake_at = self._polls.get((fds, events)) or self._new_poll(fds, events), until
            ready = poll_patiently(poll, self._milliseconds(wake_at))
            if len(ready) == 1 and ready[0][0] in fds:
                return True
            if self._attend(ready, fds):
                return True
            if results and self._woken:
                self._woken = False
                return False
            if until is not None and monotonic() >= until:
                return False

    def _new_poll(self, fds: Sequence[int], events: int) -> select.poll:
        """Polls for these *events*, and for what every sleep ends by: made once for each of the few there are."""
        if len(self._polls) >= _POLLS:
            self._polls.clear()
        poll = self._polls[fds, events] = select.poll()
        for fd, wanted in (*self._own_interests(), *((fd, events) for fd in fds)):
            poll.register(fd, wanted)
        return poll

    def _poll_beside(self, fds: Sequence[int], events: int, interests: Interests) -> select.poll:
        """Polls for the companion's *interests* too, which are the same as the last time more often than not."""
        key = (*fds, -1, events, *interests)
        if key != self._key:
            self._key = key
            self._side_poll = select.poll()
            for fd, wanted in (*self._own_interests(), *((fd, events) for fd in fds), *interests):
                self._side_poll.register(fd, wanted)
        return self._side_poll

    def _own_interests(self) -> Iterator[Tuple[int, int]]:
        if self._wake >= 0:
            yield self._wake, select.POLLIN
        if self.lifeline >= 0:
            yield self.lifeline, select.POLLIN
        if self._heeded is not None:
            yield self._heeded, select.POLLIN

    def _attend(self, ready: Sequence[Tuple[int, int]], fds: Sequence[int] = ()) -> bool:
        """Attend to what is *ready*; whether one of *fds* is."""
        found, heeded = False, self._heeded
        called = self._alarm_at is not None and monotonic() >= self._alarm_at and self._ring()
        for fd, _ in ready:
            if fd == self._wake:
                os.read(fd, 4096)
            elif fd == self.lifeline:
                raise Stop("the master is gone")
            called = called or fd == heeded
            found = found or fd in fds
        if called:
            self.heed(None)
            self.called = True
        return found

    def _milliseconds(self, until: Optional[float]) -> Optional[float]:
        if self.stopping:
            until = self._deadline if until is None else min(until, self._deadline)
        if self._alarm_at is not None:
            until = self._alarm_at if until is None else min(until, self._alarm_at)
        return None if until is None else max(0.0, (until - monotonic()) * 1000)


def _earlier(one: Optional[float], other: Optional[float]) -> Optional[float]:
    """None is never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
