"""The gate: makes a moment in which no request of any process is half done.

- A process shows in its own line that it works on requests (`Door.enter`). It takes that back before it sleeps
  (`Door.leave`). That costs two stores and a look for every batch, and no system call.
- A process that needs the moment (`Gate.closed`) takes the lock `GATE`, raises the flag and waits until every process
  is outside. A process that comes meanwhile waits at its door.
- A process stores first that it is inside, and looks at the flag then. The one that closes raises the flag first, and
  looks at the lines then. Between the two it waits until every processor sees the store, for Python has no memory
  barrier.
- A dead process counts as outside: its line's lock has ended with it. If the flag stands and nobody has the lock, the
  one that had raised it is dead, and whoever finds that takes the flag down.
- What is changed behind the closed gate counts as a change (`Gate.note_change`): each process compares that number
  after it has entered (`Door.disturbed`). A process that dies behind the gate may not have counted its change, so its
  finder counts.
"""

from __future__ import annotations

import mmap
import time
from contextlib import contextmanager
from typing import Callable, Iterator

from ..system.file_locks import RangeLocks, do_nothing
from .layout import GATE, HEAD, LINE, put
from .lines import Lines

_FLAG = HEAD.at["flag"]
_CHANGES, _NUMBER = HEAD.at["changes"], HEAD.form["changes"]
_CHANGES_END = _CHANGES + _NUMBER.size
_INSIDE = LINE.at["inside"]

SETTLE = 1e-3
"""Seconds after which a store of one processor is seen by all others, many times over."""

_NAP = 1e-4


class Door:
    """The way of one process through the gate; its line is at *at*. Begins outside."""

    def __init__(self, memory: mmap.mmap, at: int, locks: RangeLocks) -> None:
        self._map = memory
        self._inside = at + _INSIDE
        self._locks = locks
        self.inside = False
        self.before_wait: Callable[[], None] = do_nothing
        """Is called before this process waits at its door, perhaps in the middle of a send."""
        memory[self._inside] = 0

    @property
    def changes(self) -> bytes:
        """Another number whenever mode or snapshot are others."""
        return self._map[_CHANGES:_CHANGES_END]

    def disturbed(self, changes: bytes) -> bool:
        """Whether a process that is inside has to leave: the gate is to close, or there are other *changes*."""
        memory = self._map
        return bool(memory[_FLAG]) or memory[_CHANGES:_CHANGES_END] != changes

    def enter(self) -> None:
        """From now on until `leave` the gate cannot be closed.

        Waits while it is; who was inside already counts as outside then. Calls nobody but `before_wait`: this happens
        in the middle of sends.
        """
        self._map[self._inside] = 1
        self.inside = True
        if self._map[_FLAG]:
            self._wait_outside()

    def leave(self) -> None:
        self._map[self._inside] = 0
        self.inside = False

    def _wait_outside(self) -> None:
        self.before_wait()
        while self._map[_FLAG]:
            self._map[self._inside] = 0
            if self._locks.try_acquire(GATE, 1):  # the process that had raised the flag is dead
                _count_change(self._map)  # it may have changed something and told nobody yet
                self._map[_FLAG] = 0
                self._locks.release(GATE, 1)
            else:
                time.sleep(_NAP)
            self._map[self._inside] = 1


class Gate:
    """The gate for a process that closes it, or looks what was changed behind it."""

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, lines: Lines) -> None:
        self._map = memory
        self._locks = locks
        self._lines = lines

    @property
    def changes(self) -> bytes:
        """Another number whenever mode or snapshot are others."""
        return self._map[_CHANGES:_CHANGES_END]

    def note_change(self) -> None:
        """Mode or snapshot are others now."""
        _count_change(self._map)

    @contextmanager
    def closed(self, timeout: float, on_wait: Callable[[], None] = do_nothing) -> Iterator[None]:
        """Hold all processes outside. Raises `TimeoutError` if one does not come out in *timeout* seconds."""
        until = time.monotonic() + timeout
        while not self._locks.try_acquire(GATE, 1):
            _nap(until, on_wait, "somebody else holds the gate")
        try:
            if self._map[_FLAG]:
                _count_change(self._map)  # which the dead process that has raised it perhaps had yet to do
            self._map[_FLAG] = 1
            time.sleep(SETTLE)
            for at in self._lines.used():
                while self._map[at + _INSIDE] and self._lines.is_alive(at):
                    _nap(until, on_wait, f"process {self._lines.pid(at)} is busy")
            yield
        finally:
            self._map[_FLAG] = 0
            self._locks.release(GATE, 1)


def _count_change(memory: mmap.mmap) -> None:
    (number,) = _NUMBER.unpack_from(memory, _CHANGES)
    put(memory, _CHANGES, _NUMBER, (number + 1) & 0xFFFFFFFF)


def _nap(until: float, on_wait: Callable[[], None], reason: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(reason)
    on_wait()
    time.sleep(_NAP)
