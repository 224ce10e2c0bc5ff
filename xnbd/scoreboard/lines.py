"""The lines of the scoreboard: each belongs to one process, which tells there what it does.

A dead process is recognised by the lock on its line, which ends with it. Its counts stay: the next process in the line
goes on from them, so the sum of all lines is what the disk's processes have ever counted.
 A process id means something in one PID namespace only, and there as long as the process lives. So a line has the
namespace beside the id, and a second lock that is taken when both are written: `Lines.wake_all` signals no other
process.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from contextlib import suppress
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from ..system.file_locks import RangeLocks
from .counters import Counts, new_counts, wrapped
from .layout import LINE, LINE_LOCKS, LINE_SIZE, LINES_AT, NAME_LOCKS, ORIGINS, put

_UNUSED = 64
"""Lines without a process in a row after which there are no more: the first free one is always taken."""

_PID_AT, _PID = LINE.at["pid"], LINE.form["pid"]
_NAMESPACE_AT, _NAMESPACE = LINE.at["namespace"], LINE.form["namespace"]
_COUNTERS_AT, _COUNTERS = LINE.at["counters"], LINE.form["counters"]
_NOBODY = bytes(_PID.size)
_VISIT = [slice(LINE.at[name], LINE.at[name] + LINE.form[name].size) for name in ("peer", "since", "counters_before")]


def clock() -> float:
    """Seconds since the boot, sleep included: the same for all processes, whatever is done to the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def text_of(padded: bytes) -> str:
    """A text of a field that is padded with zeros."""
    return padded.rstrip(b"\0").decode("utf-8", "replace")


class Line(NamedTuple):
    """What one process tells: its client, *since* when (as of `clock`), and the *counts* since then."""

    pid: int
    mode: int
    since: float
    counts: Counts
    origin: int
    queued_requests: int
    queued_bytes: int
    peer: str
    trouble: str
    namespace: int
    identity: str
    encryption: str
    origins: Tuple[Tuple[int, int], ...]
    """Of several origins, the health (`layout.REACHED` and its like) and the microseconds to an answer."""


class Lines:
    """All lines in *memory*, for a process of the PID namespace *namespace*."""

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, namespace: int) -> None:
        self._map = memory
        self._locks = locks
        self._namespace = namespace
        self._count = (len(memory) - LINES_AT) // LINE_SIZE

    def take(self) -> int:
        """The offset of a line that is this process's from now on. Raises `OSError` if all are taken."""
        for number in range(self._count):
            if self._locks.try_acquire(LINE_LOCKS + number, 1):
                return LINES_AT + number * LINE_SIZE
        raise OSError(f"more than {self._count} processes use this disk")

    def tell_name(self, at: int) -> None:
        """The line at *at* has this process's id from now on: it can be woken."""
        put(self._map, at + _NAMESPACE_AT, _NAMESPACE, self._namespace)
        put(self._map, at + _PID_AT, _PID, os.getpid())
        self._locks.try_acquire(NAME_LOCKS + _number(at), 1)  # a process that is not named is not woken

    def living(self) -> List[Line]:
        """What all living processes tell; of each what is of one client, or of none."""
        return [self._read(at) for at in self.used() if self.is_alive(at)]

    def totals(self) -> Counts:
        """What all processes have counted, dead ones too."""
        total = Counts(new_counts())
        for at in self.used():
            total = total.plus(Counts(_COUNTERS.unpack_from(self._map, at + _COUNTERS_AT)))
        return total

    def origin_bytes(self) -> List[int]:
        """What each of several origins has sent to all processes, dead ones too."""
        rows = [self._get(at, "origin_bytes") for at in self.used()]
        return [sum(numbers) for numbers in zip(*rows)] if rows else [0] * ORIGINS

    def used(self) -> Iterator[int]:
        """The offsets of the lines that a process has, or has had."""
        unused = 0
        for at in range(LINES_AT, LINES_AT + self._count * LINE_SIZE, LINE_SIZE):
            if self._map[at + _PID_AT : at + _PID_AT + _PID.size] != _NOBODY:
                unused = 0
                yield at
            elif (unused := unused + 1) == _UNUSED:
                return

    def is_alive(self, at: int) -> bool:
        """Whether the process of the line at *at* is."""
        return self._locks.held_by_server(LINE_LOCKS + _number(at), 1)

    def pid(self, at: int) -> int:
        return int(_PID.unpack_from(self._map, at + _PID_AT)[0])

    def wake_all(self) -> None:
        """Send SIGUSR2 to all processes that have a line and are of this one's PID namespace.

        Where the system or its owner's rights do not allow that, one finds out when its client wants something.
        """
        for at in self.used():
            pid = self.pid(at)
            with suppress(OSError):
                handle = os.pidfd_open(pid)
                try:
                    if self._is_named(at, pid):  # so *handle* is of the process that lives there
                        signal.pidfd_send_signal(handle, signal.SIGUSR2)
                finally:
                    os.close(handle)

    def _is_named(self, at: int, pid: int) -> bool:
        """Whether the line's process is alive, and is *pid* in this namespace."""
        (namespace,) = self._get(at, "namespace")
        if not self._namespace or self._namespace != namespace:
            return False
        return pid == self.pid(at) and self._locks.held_elsewhere(NAME_LOCKS + _number(at), 1)

    def _read(self, at: int) -> Line:
        while True:
            visit = self._visit(at)
            told = {name: form.unpack_from(self._map, at + LINE.at[name]) for name, form in LINE.form.items()}
            if self._visit(at) == visit:
                return _line(told)

    def _visit(self, at: int) -> List[bytes]:
        """What is another one with each client."""
        return [self._map[at + place.start : at + place.stop] for place in _VISIT]

    def _get(self, at: int, name: str) -> Tuple[Any, ...]:
        return LINE.form[name].unpack_from(self._map, at + LINE.at[name])


def _line(told: Dict[str, Tuple[Any, ...]]) -> Line:
    requests, buffered = told["queue"]
    fields: Dict[str, Any] = {name: told[name][0] for name in ("pid", "mode", "since", "origin", "namespace")}
    fields.update({name: text_of(told[name][0]) for name in ("peer", "trouble", "identity", "encryption")})
    counts = wrapped(Counts(told["counters"]).minus(Counts(told["counters_before"])))
    numbers = told["origins"]
    origins = tuple(zip(numbers[::2], numbers[1::2]))
    return Line(counts=counts, origins=origins, queued_requests=requests, queued_bytes=buffered, **fields)


def _number(at: int) -> int:
    return (at - LINES_AT) // LINE_SIZE
