"""Reads of what this process has not touched yet, of a large disk that is in memory.

The first touch of a place of the mapping is a page fault, which takes as long as several
copies of the page; only later reads of the same 64 KiB are for nothing. So while most reads
are first touches they are copied, with ``pread(2)``. Every so often the mapping has its turn,
which tells whether that is still so.

It is no use for a disk of which all can be touched within a second or so, and for a client
that reads on and on, which after a number of copies gets the mapping for good. Nothing that
would have to be waited for is copied: for that there is `server.session.page_prefetch`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from functools import partial
from typing import Callable, List, Optional

from ...storage.image import Image

LARGE = 16 << 30
"""Bytes of a disk whose first touches take a second and more altogether."""

_LONGEST = 8 << 10
"""Bytes of one read; to copy more takes as long as a fault."""

_SAMPLE, _COPIES, _PAUSE = 512, 4096, 8192
"""Requests by the mapping to learn from; by copies after that; and until the next sample where that does not pay."""

_OFTEN = 0.25
"""Faults of a request from which on copies take less time."""

_MOST = 64 * _COPIES
"""Requests after which the mapping is used for good."""

_NEVER = 1 << 62

Reader = Callable[[int, int], List[memoryview]]


class FirstTouch:
    """Decides for one session whether reads are copied: ``active``, until ``due`` requests are counted."""

    def __init__(self, image: Image, requests: int) -> None:
        """*requests* have been counted so far."""
        self.active = False
        self.due = requests + _SAMPLE if image.size >= LARGE else _NEVER
        self._requests, self._faults = requests, page_faults()
        self._left = _MOST
        self._waits = 0
        self._flags: Optional[int] = None

    def look(self, image: Image, requests: int) -> None:
        """As many *requests* are counted now as were ``due``: decide how the next ones are done."""
        if self.active:
            self._left -= _COPIES
            if self._waits > _COPIES // 4:
                self._left = 0  # a disk that is not in memory
            self.active = False
            self.due = requests + _SAMPLE
        else:
            often = page_faults() - self._faults >= _OFTEN * (requests - self._requests)
            self.active = often and self._can_copy(image)
            self.due = requests + (_COPIES if self.active else _SAMPLE if often else _PAUSE)
        if self._left <= 0:
            self.due = _NEVER
        self._waits = 0
        self._requests, self._faults = requests, page_faults()

    def _can_copy(self, image: Image) -> bool:
        if image.flat_fd is None:
            return False
        if self._flags is None:
            self._flags = how_not_to_wait(image.flat_fd)
            if self._flags is None:
                self._left = 0
        return self._flags is not None

    def reader(self, image: Image) -> Reader:
        """In the place of ``image.read``, while it is ``active``."""
        return partial(self._read, image) if image.flat_fd is not None else image.read

    def _read(self, image: Image, offset: int, length: int) -> List[memoryview]:
        if length <= _LONGEST:
            data = bytearray(length)
            try:
                if os.preadv(image.flat_fd or 0, (data,), offset, self._flags or 0) == length:
                    return [memoryview(data)]
            except OSError:
                pass  # not in memory, or not to be had: the mapping is how such replies wait, or fail
            self._waits += 1
        return image.read(offset, length)


def page_faults() -> int:
    """Of this process so far (``getrusage(2)``)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def how_not_to_wait(fd: int) -> Optional[int]:
    """The flags for ``preadv2(2)`` to read of *fd* only what is in memory; None if that cannot be said."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        return 0 if error.errno == errno.EOPNOTSUPP and _lives_in_memory(fd) else None
    return os.RWF_NOWAIT


def _lives_in_memory(fd: int) -> bool:
    """Whether *fd* is a file of tmpfs: no other file system knows of seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
