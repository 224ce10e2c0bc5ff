"""How fast clients may be, export by export, in memory that all processes of a server or a wrapper share.

A limit is a bucket, kept as the time at which all that was done is paid for: each byte or request adds
its part of a second to it. A client goes on as soon as that time is no more than the burst ahead. Who
has done much at once is in debt, and sleeps it off.

- The buckets of one client are its process's (`Bucket`). Those of an export are here, for all its clients.
- An export's bucket is shared fairly: a client that takes no more than its equal part of it never waits
  for others. The others share the rest, in the order in which they have come.
- How many clients there are is told by a ring of windows: whoever does something, or sleeps, counts
  itself once in each window until it goes on. So nobody is counted for long after its death.
- A lock is held for some instructions, and never waited for: what cannot be booked now is booked later.

`create_rates` makes the file before the forks. It outlives an upgrade.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from typing import List, NamedTuple, Optional, Sequence

from ..system.file_locks import RangeLocks
from ..system.process import closed_on_error
from .layout import put

DEFAULT_BURST = 0.1

LONGEST_BURST = 60.0
LARGEST_LIMIT = (1 << 63) - 1


class Rates(NamedTuple):
    """Bytes and requests a second, for each client and for all of an export together; 0 is no limit.

    In *burst* seconds' worth of each may be done at once by who has been idle.
    """

    rate: int = 0
    iops: int = 0
    rate_total: int = 0
    iops_total: int = 0
    burst: float = DEFAULT_BURST

    @property
    def is_limited(self) -> bool:
        return any(self[:4])

    def __str__(self) -> str:
        parts = [f"{name.replace('_', '-')} {number:g}" for name, number in self._asdict().items() if number]
        return ", ".join(parts) if self.is_limited else "none"


NO_LIMITS = Rates()

_MAGIC = b"XNBDRATE"
_VERSION = 1
_HEADER = struct.Struct("=8sII")
_SLOTS_AT = 4096
_SLOT_SIZE = 8192

_GENERATION = slice(0, 4)
_NUMBER = struct.Struct("=I")
_RATES_AT, _RATES = 8, struct.Struct("=4Qd")
_PAID_AT, _PAID = 64, struct.Struct("=2d")
_RING_AT, _WINDOW_ENTRY = 2048, struct.Struct("=II")
_NAME_AT = 4096
_LONGEST_NAME = 4092

_WINDOWS = 256
_WINDOW = 0.25
"""Seconds for which a client that has done something is taken into account."""

_MEMORY = 1.0
"""Seconds for which a client that has had more than its part, because others left it, has to let them go first."""

_PATIENCE = 1.0
_NAP = 1e-4


class Bucket:
    """*rate* a second, paid for up to the time *until* (monotonic seconds)."""

    __slots__ = ("rate", "until")

    def __init__(self) -> None:
        self.rate = 0
        self.until = 0.0

    def change(self, rate: int, now: float) -> None:
        """What is owed takes its time at the new *rate*."""
        self.until = rescaled(self.until, self.rate, rate, now)
        self.rate = rate

    def charge(self, amount: float, now: float) -> float:
        """So much was done: the seconds that this takes."""
        if not self.rate:
            return 0.0
        seconds = amount / self.rate
        self.until = max(self.until, now) + seconds
        return seconds


def rescaled(until: float, old: int, new: int, now: float) -> float:
    """When a debt that would be paid at *until* is paid at another rate."""
    return now + (until - now) * old / new if old and new and until > now else 0.0


def create_rates(exports: int) -> int:
    """A descriptor of a new file with room for so many exports; only those that are used take memory."""
    fd = os.memfd_create("xnbd-rates")
    with closed_on_error(fd):
        os.ftruncate(fd, _SLOTS_AT + exports * _SLOT_SIZE)
        os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, exports), 0)
    return fd


def inherited_rates(fd: Optional[int], exports: int) -> int:
    """What the program before has left, if this one can go on with it; else a new file."""
    if fd is not None and os.pread(fd, _HEADER.size, 0)[:12] == _HEADER.pack(_MAGIC, _VERSION, 0)[:12]:
        return fd
    return create_rates(exports)


def read_rates(fd: int, export: str) -> Optional[Rates]:
    """What holds for *export*; None if nobody has used it yet."""
    name = _name_bytes(export)
    for at in _probe(fd, name):
        found = _name_at(fd, at)
        if found == name:
            return Rates(*_RATES.unpack(os.pread(fd, _RATES.size, at + _RATES_AT)))
        if found is None:
            return None
    return None


def _name_bytes(export: str) -> bytes:
    return export.encode("utf-8", "surrogateescape")[:_LONGEST_NAME]


def _probe(fd: int, name: bytes) -> Sequence[int]:
    """The offsets of the slots where *name* may be, one after the other."""
    (_, _, count) = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    first = zlib.crc32(name) % count
    return [_SLOTS_AT + (first + step) % count * _SLOT_SIZE for step in range(min(count, 64))]


def _name_at(fd: int, at: int) -> Optional[bytes]:
    """The export of the slot at *at*; None: it has none yet."""
    data = os.pread(fd, _NUMBER.size + _LONGEST_NAME, at + _NAME_AT)
    (length,) = _NUMBER.unpack_from(data)
    return data[_NUMBER.size : _NUMBER.size + length - 1] if length else None


class RateBoard:
    """The limits of one export, as one process has them open, in the file behind *fd*; made after the fork."""

    def __init__(self, fd: int, export: str, rates: Rates) -> None:
        """*rates* hold if nobody has used the export before. Raises `OSError`, also if there is no more room."""
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        with closed_on_error(self._fd):
            self._locks = RangeLocks(self._fd)
            self._at = self._take(_name_bytes(export), rates)
            self._map = mmap.mmap(self._fd, _NAME_AT, offset=self._at)
        self._counted_until = 0
        self._rates = self.rates

    def _take(self, name: bytes, rates: Rates) -> int:
        """The offset of the export's slot."""
        for at in _probe(self._fd, name):
            found = _name_at(self._fd, at)
            if found is None:
                self._locks.acquire(at, 1, timeout=_PATIENCE)
                found = _name_at(self._fd, at)
                if found is None:
                    os.pwrite(self._fd, _RATES.pack(*rates), at + _RATES_AT)
                    os.pwrite(self._fd, name, at + _NAME_AT + _NUMBER.size)
                    os.pwrite(self._fd, _NUMBER.pack(len(name) + 1), at + _NAME_AT)
                    found = name
                self._locks.release(at, 1)
            if found == name:
                return at
        raise OSError("there are more exports than can be limited")

    @property
    def generation(self) -> bytes:
        """Another one whenever the limits are others."""
        return self._map[_GENERATION]

    @property
    def rates(self) -> Rates:
        """What holds now."""
        return Rates(*_RATES.unpack_from(self._map, _RATES_AT))

    def change(self, rates: Rates) -> None:
        """From now on *rates* hold, for debts too. Raises `OSError`."""
        self._locks.acquire(self._at, 1, timeout=_PATIENCE)
        try:
            before, now = self.rates, time.monotonic()
            paid = _PAID.unpack_from(self._map, _PAID_AT)
            changed = [rescaled(t, old, new, now) for t, old, new in zip(paid, before[2:4], rates[2:4])]
            put(self._map, _PAID_AT, _PAID, *changed)
            put(self._map, _RATES_AT, _RATES, *rates)
            (number,) = _NUMBER.unpack_from(self._map, 0)
            put(self._map, 0, _NUMBER, (number + 1) & 0xFFFFFFFF)
        finally:
            self._locks.release(self._at, 1)

    def charge(self, amounts: Sequence[int], parts: Sequence[Bucket], now: float) -> Optional[float]:
        """One client has done so many bytes and requests: when all are paid for; None: nothing could be booked.

        *parts* are the client's own equal parts of the buckets: it need not wait longer than for those.
        """
        if not self._locks.try_acquire(self._at, 1):
            return None
        try:
            clients = self._attend(now, now + _WINDOW)
            go_at, paid = now, list(_PAID.unpack_from(self._map, _PAID_AT))
            for number, (amount, part) in enumerate(zip(amounts, parts)):
                if part.rate:
                    paid[number] = max(paid[number], now) + amount / part.rate
                    seconds = part.charge(amount * clients, now)
                    part.until = min(part.until, now + seconds + _MEMORY)
                    go_at = max(go_at, min(paid[number], part.until))
            put(self._map, _PAID_AT, _PAID, *paid)
            self._attend(now, go_at + _WINDOW)
            return go_at
        finally:
            self._locks.release(self._at, 1)

    def _attend(self, now: float, until: float) -> int:
        """This process has a client, in all windows *until* then; how many there are now."""
        window = int(now / _WINDOW)
        for number in range(max(window, self._counted_until), min(int(until / _WINDOW), window + _WINDOWS - 1) + 1):
            put(self._map, _entry_at(number), _WINDOW_ENTRY, number & 0xFFFFFFFF, self._count(number) + 1)
            self._counted_until = number + 1
        return max(1, self._count(window))

    def _count(self, window: int) -> int:
        """Clients in that window."""
        number, count = _WINDOW_ENTRY.unpack_from(self._map, _entry_at(window))
        return int(count) if number == window & 0xFFFFFFFF else 0

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


def _entry_at(window: int) -> int:
    return _RING_AT + window % _WINDOWS * _WINDOW_ENTRY.size


def merged(rates: Rates, before: Rates, after: Rates) -> Rates:
    """*rates* with what differs between *before* and *after* as it is there."""
    changed: List[float] = [new if new != old else now for now, old, new in zip(rates, before, after)]
    return Rates(*changed)  # type: ignore[arg-type]
