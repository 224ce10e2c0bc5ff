"""Threads that make calls which wait, for an origin that must not; and how what threads have comes to the loop.

A call cannot be broken off. So `Pool.close` waits for none: a thread that is in a call ends after it, and
hands its result to nobody.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import deque
from queue import SimpleQueue
from typing import Callable, Deque, Generic, List, Optional, Tuple, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Results with their numbers. Any thread may `put` one; all else is for the thread that takes them."""

    def __init__(self) -> None:
        self._results: Deque[Tuple[int, T]] = deque()
        self._bell = _Bell()

    def fileno(self) -> int:
        """A descriptor that is readable when there are results."""
        return self._bell.reading

    @property
    def is_closed(self) -> bool:
        return self._bell.is_closed

    def put(self, number: int, result: T) -> None:
        """Nobody has it if the inbox is closed."""
        self._results.append((number, result))
        self._bell.ring()

    def take(self) -> List[Tuple[int, T]]:
        """The results that have come since the last time."""
        self._bell.silence()
        taken = []
        while self._results:
            taken.append(self._results.popleft())
        return taken

    def close(self) -> None:
        """Twice does nothing more."""
        self._bell.close()


class Pool(Generic[T]):
    """At most *most* threads, each of which is started when all others are in a call. Used by one thread.

    After `close` the last thread calls *at_end* before it ends, when no thread is in a call any more.
    """

    def __init__(self, most: int, at_end: Callable[[], None] = lambda: None) -> None:
        self._most = most
        self._at_end = at_end
        self._jobs: SimpleQueue[Optional[Tuple[int, Callable[[], T]]]] = SimpleQueue()
        self._inbox: Inbox[T] = Inbox()
        self._threads = 0
        self._calls = 0
        self._living = 0
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """A descriptor that is readable when there are results."""
        return self._inbox.fileno()

    def call(self, number: int, job: Callable[[], T]) -> None:
        """Have a thread call *job*, which raises nothing; its result comes with *number*.

        Raises `OSError` if there can be no thread at all.
        """
        self._calls += 1
        if self._calls > self._threads and self._threads < self._most:
            self._start()
        self._jobs.put((number, job))

    def take(self) -> List[Tuple[int, T]]:
        """The results that have come since the last time."""
        taken = self._inbox.take()
        self._calls -= len(taken)
        return taken

    def close(self) -> None:
        """Forget all calls; twice does nothing more."""
        self._inbox.close()
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0

    def _start(self) -> None:
        """The thread takes no signal, and neither do those that a library starts in it."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with self._lock:
                threading.Thread(target=self._live, daemon=True).start()
                self._threads += 1
                self._living += 1
        except RuntimeError as error:
            if not self._threads:
                raise OSError(errno.EAGAIN, "there can be no more threads") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _live(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None or self._inbox.is_closed:
                break
            number, call = job
            self._inbox.put(number, call())
        with self._lock:
            self._living -= 1
            is_last = not self._living
        if is_last:
            self._at_end()


class _Bell:
    """A pipe that any thread may ring. Its descriptors may be another file's once it is closed: nobody rings then."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.is_closed = self._rung = False
        self._lock = threading.Lock()

    def ring(self) -> None:
        with self._lock:
            if not self._rung and not self.is_closed:
                self._rung = True
                os.write(self._writing, b".")

    def silence(self) -> None:
        with self._lock:
            if self._rung and not self.is_closed:
                self._rung = False
                os.read(self.reading, 1)

    def close(self) -> None:
        with self._lock:
            if not self.is_closed:
                self.is_closed = True
                os.close(self.reading)
                os.close(self._writing)
