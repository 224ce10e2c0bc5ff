"""A disk every sector of which tells its own number and version, and what it may hold after a power failure."""

from __future__ import annotations

import struct
import threading
from typing import List

SECTOR = 512
_RECORD = struct.Struct("<QQ")


def sectors(first: int, versions: List[int]) -> bytes:
    """The content of consecutive sectors from number *first* on."""
    return b"".join(_RECORD.pack(first + i, version) * (SECTOR // 16) for i, version in enumerate(versions))


class Versions:
    """What clients have written to *count* sectors that had version 0, and what of it has to last.

    Each sector is written by one thread at a time. A sector may hold, after a power
    failure, the last version that was answered before a flush that was answered, or
    any later one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._newest = [0] * count
        self._answered = [0] * count
        self._lasting = [0] * count

    def begin_write(self, first: int, count: int) -> bytes:
        """What to write there; from now on it may be on the disk."""
        with self._lock:
            for sector in range(first, first + count):
                self._newest[sector] += 1
            return sectors(first, self._newest[first : first + count])

    def end_write(self, first: int, count: int, lasting: bool = False) -> None:
        """That write was answered; *lasting* if it had the FUA flag."""
        with self._lock:
            self._answered[first : first + count] = self._newest[first : first + count]
            if lasting:
                self._lasting[first : first + count] = self._newest[first : first + count]

    def begin_flush(self) -> List[int]:
        """What the flush that is sent now covers."""
        with self._lock:
            return list(self._answered)

    def end_flush(self, covered: List[int]) -> None:
        with self._lock:
            self._lasting = [max(pair) for pair in zip(self._lasting, covered)]

    def content(self, first: int, count: int) -> bytes:
        """What a client reads, when nobody writes there."""
        return sectors(first, self._newest[first : first + count])

    def recover(self, first: int, data: bytes) -> List[str]:
        """What is not as promised in *data*, which was read after a power failure from sector *first* on.

        From now on the sectors hold what was read: it came from the disk, so it lasts.
        """
        wrong = []
        for i in range(len(data) // SECTOR):
            sector, content = first + i, data[i * SECTOR : (i + 1) * SECTOR]
            lasting, newest = self._lasting[sector], self._newest[sector]
            found, version = _RECORD.unpack_from(content)
            if content == sectors(sector, [version]) and lasting <= version <= newest:
                self._newest[sector] = self._answered[sector] = self._lasting[sector] = version
            else:
                what = describe(content, found, version)
                wrong.append(f"sector {sector}: should be version {lasting}..{newest}, is {what}")
        return wrong


def describe(content: bytes, sector: int, version: int) -> str:
    if not any(content):
        return "zeros"
    return f"version {version} of sector {sector}" if content == sectors(sector, [version]) else "torn"
