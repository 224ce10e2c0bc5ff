"""Locks on blocks, by the bytes of the bitmap that speak for them, where several tasks of one process share a byte."""

from __future__ import annotations

from time import monotonic
from typing import Dict, Optional, Tuple

from ..system.file_locks import PATIENCE_WITH_SHARED, LockHeld, RangeLocks

_LOOK_EVERY = 0.1


def lock_of(first: int, end: int) -> Tuple[int, int]:
    """The bytes that speak for the blocks from *first* up to *end*: the first one, and where they end."""
    return first >> 3, (end + 7) >> 3


class BlockLocks:
    """The locks of this process on the bitmap behind *fd*; see `RangeLocks`.

    What is *held* is counted, so that a byte is released with its last holder. What is
    *borrowed* is given back before anything else happens, and counts nothing.
    """

    def __init__(self, fd: int) -> None:
        self._locks = RangeLocks(fd)
        self._held: Dict[int, int] = {}
        self._strange: Dict[int, float] = {}
        self._look_at = 0.0

    def hold(self, first: int, end: int) -> bool:
        """Lock the blocks from *first* up to *end*; False if another process has some of their bytes."""
        held, start = self._held, first >> 3
        count = ((end + 7) >> 3) - start
        if count == 1 and start in held:
            held[start] += 1
            return True
        if not self._locks.try_acquire(start, count):
            return False
        if count == 1:
            held[start] = 1
            return True
        for byte in range(start, start + count):
            held[byte] = held.get(byte, 0) + 1
        return True

    def release(self, first: int, end: int) -> None:
        """The end of a `hold`."""
        held, start = self._held, first >> 3
        count = ((end + 7) >> 3) - start
        if count == 1 and held[start] == 1:
            del held[start]
            self._locks.release(start, 1)
            return
        free = 0
        for byte in range(start, start + count):
            if held[byte] == 1:
                del held[byte]
                free += 1
            else:
                held[byte] -= 1
        if free == count:
            self._locks.release(start, count)
        elif free:
            self._release_but_held(start, start + count)

    def borrow(self, first: int, end: int) -> bool:
        """Lock like `hold`, for a moment."""
        start = first >> 3
        return self._locks.try_acquire(start, ((end + 7) >> 3) - start)

    def give_back(self, first: int, end: int) -> None:
        """The end of a `borrow`."""
        start, stop = first >> 3, (end + 7) >> 3
        if self._held:
            self._release_but_held(start, stop)
        else:
            self._locks.release(start, stop - start)

    def held_by_stranger(self, first: int, end: int) -> Optional[LockHeld]:
        """To be asked when `hold` or `borrow` was in vain: what to fail with, instead of trying again.

        That is so if for some seconds it was a shared lock, which no server takes. The
        kernel is asked now and then, unless there is a suspicion.
        """
        now, start = monotonic(), first >> 3
        if not self._strange and now < self._look_at:
            return None
        self._look_at = now + _LOOK_EVERY
        count = ((end + 7) >> 3) - start
        if not self._locks.is_shared(start, count):
            self._strange.clear()
            return None
        if now - self._strange.setdefault(start, now) < PATIENCE_WITH_SHARED:
            return None
        return self._locks.complaint(start, count)

    def _release_but_held(self, start: int, stop: int) -> None:
        for byte in sorted(byte for byte in self._held if start <= byte < stop):
            if byte > start:
                self._locks.release(start, byte - start)
            start = byte + 1
        if start < stop:
            self._locks.release(start, stop - start)
