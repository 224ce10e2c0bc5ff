"""Locks on blocks, by the bytes of the bitmap that speak for them, where several tasks of one process share a byte."""

from __future__ import annotations

from typing import Dict, Tuple

from .locks import RangeLocks


def lock_of(first: int, end: int) -> Tuple[int, int]:
    """The bytes that speak for the blocks from *first* up to *end*: the first one, and where they end."""
    return first >> 3, (end + 7) >> 3


class BlockLocks:
    """The locks of this process on the bitmap behind *fd*; see `RangeLocks`.

    What is *held* is counted, so that a byte is released with its last holder. What is
    *claimed* is given back before anything else happens, and counts nothing.
    """

    def __init__(self, fd: int) -> None:
        self._locks = RangeLocks(fd)
        self._held: Dict[int, int] = {}

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

    def let_go(self, first: int, end: int) -> None:
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

    def claim(self, first: int, end: int) -> bool:
        """Lock like `hold`, for a moment."""
        start = first >> 3
        return self._locks.try_acquire(start, ((end + 7) >> 3) - start)

    def give_back(self, first: int, end: int) -> None:
        """The end of a `claim`."""
        self._release_but_held(first >> 3, (end + 7) >> 3)

    def _release_but_held(self, start: int, stop: int) -> None:
        for byte in sorted(byte for byte in self._held if start <= byte < stop):
            if byte > start:
                self._locks.release(start, byte - start)
            start = byte + 1
        if start < stop:
            self._locks.release(start, stop - start)
