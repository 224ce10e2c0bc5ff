"""Fetching what is about to be sent, while the image turns out not to be in memory.

The kernel reads mapped memory page by page when it is sent, one after the other:
right for a disk that is in the page cache, hopeless for one that is not. So when
replies take long to send because pages had to be read, the reads of the next batches
are all announced to the image before the first of them is sent, and a sequential
reader's next ones too.

Time alone does not tell: a client that takes nothing, or a neighbour that takes the
processor, makes a send as slow.
"""

from __future__ import annotations

import resource
from typing import Callable

from ...storage.image import Image

QUICK = 1e-4
"""Seconds: who has sent faster than this need not tell of it, unless pages are announced already."""

_SLOW_PIECE, _SLOW_BYTE = 1e-5, 1e-9
"""Seconds beyond `QUICK` for each piece of a batch and for each byte; what takes longer may come from the disk."""

_ENCRYPTED_BYTE = 5e-9
"""Instead of the latter, where sending a byte means to encrypt it."""

_BATCHES = 64
_WINDOW = 2 << 20


def pages_read() -> int:
    """Grows whenever this process has waited for a mapped page to be read, or the kernel has read ahead for it.

    Both come from ``getrusage(2)``; file systems without a block device know the first alone.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_inblock


class PagePrefetch:
    """Announces reads to the image while its pages have to be read; ``active`` tells whether that is so."""

    def __init__(self, image: Image, *, encrypted: bool = False, pages_read: Callable[[], int] = pages_read) -> None:
        """*encrypted* tells what it takes to send bytes that are in memory."""
        self.active = False
        self._pages_read = pages_read
        self._read_before = pages_read()
        self._slow_byte = _ENCRYPTED_BYTE if encrypted else _SLOW_BYTE
        self._prefetch, self._size = image.prefetch, image.size
        self._batches = 0
        self._expected = 0
        self._reach = 0

    def announce(self, offset: int, length: int) -> None:
        """A read of *length* bytes at *offset* is about to be answered."""
        stop = offset + length
        if offset == self._expected:
            self._announce_next(stop)
        else:
            self._reach = stop
            self._prefetch(offset, length)
        self._expected = stop

    def _announce_next(self, stop: int) -> None:
        """The reader goes on from where it was: stay half a window ahead of it."""
        if self._reach - stop < _WINDOW // 2 and self._reach < self._size:
            reach = min(max(self._reach, stop) + _WINDOW, self._size)
            self._prefetch(self._reach, reach - self._reach)
            self._reach = reach

    def sent(self, pieces: int, length: int, seconds: float) -> None:
        """It took so long to send a batch of so many *pieces*, of *length* bytes in all."""
        slow = QUICK + pieces * _SLOW_PIECE + length * self._slow_byte
        if seconds > slow and self._has_read_pages():
            self.active = True
            self._batches = _BATCHES
        elif self._batches:
            self._batches -= 1
            self.active = self._batches > 0

    def _has_read_pages(self) -> bool:
        """Since it was asked the last time."""
        before, self._read_before = self._read_before, self._pages_read()
        return self._read_before != before
