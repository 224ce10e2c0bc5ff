"""Locks on ranges of a file's bytes, between processes.

These are record locks of the "open file description" kind (``fcntl(2)``): they end
with the process that holds them, whatever happens to it, and unlike the older kind
not by closing some other descriptor of the same file. A fork shares them, so every
process needs a descriptor that it has opened itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from typing import Callable, Optional

_FLOCK = struct.Struct("hhqqi4x")
_BUSY = (errno.EAGAIN, errno.EACCES)
_LONGEST_PAUSE = 1e-3


def do_nothing() -> None:
    """For callers of what may wait who do not mind."""


class RangeLocks:
    """Exclusive locks on bytes of the file behind *fd*, opened for writing by this very process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def try_acquire(self, start: int, count: int) -> bool:
        """Lock *count* bytes from *start* on, all or none of them; False if some are locked elsewhere."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0))
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
        return True

    def acquire(self, start: int, count: int, on_wait: Optional[Callable[[], None]] = None) -> None:
        """Lock like `try_acquire`, again and again until it works; *on_wait* is called before every pause.

        A process may wait here only while it holds no other lock.
        """
        pause = 0.0
        while not self.try_acquire(start, count):
            if on_wait is not None:
                on_wait()
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause + 1e-5)

    def release(self, start: int, count: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, count, 0))

    def held_elsewhere(self, start: int, count: int) -> bool:
        """Whether some of these bytes are locked through another descriptor than this one."""
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, question)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
