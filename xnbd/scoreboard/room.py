"""How much room the clean blocks of a cache take, and how much they may: counted by all processes together.

- Blocks are counted **before** they come (`Room.take`), under the lock `ROOM`. So there are never more than are
  counted, and never more are counted than the limit allows.
- One process, which lets blocks go (`proxy.evictor`), counts those that went. A number has one writer at a time.
- Who dies in between leaves a count that is too high, and so does a client that writes over a clean block. The process
  that lets blocks go counts them anew now and then. So it has to know how many are on their way: each process shows
  that in its line.
"""

from __future__ import annotations

import mmap
from time import sleep
from typing import Tuple

from ..system.file_locks import RangeLocks
from .layout import HEAD, LINE, ROOM, put
from .lines import Lines

_LIMIT_AT, _FORM = HEAD.at["room"], HEAD.form["room"]
_NUMBER = HEAD.form["copy_rate"]
_CAME_AT, _WENT_AT, _LET_GO_AT = (_LIMIT_AT + _NUMBER.size * place for place in (1, 2, 3))
_COMING_AT, _COMING = LINE.at["coming"], LINE.form["coming"]
_LARGEST = (1 << 64) - 1

_LEAST_HEADROOM = 128
"""Blocks: room for two of the largest fetches."""

_ATTEMPTS = 20
_NAP = 5e-5


class Room:
    """The room of one cache. All numbers are blocks."""

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, lines: Lines) -> None:
        self._map = memory
        self._locks = locks
        self._lines = lines

    @property
    def limit(self) -> int:
        """How many clean blocks there may be; 0 if there is no limit."""
        return self._get(_LIMIT_AT)

    @limit.setter
    def limit(self, limit: int) -> None:
        self._put(_LIMIT_AT, limit)

    @property
    def high(self) -> int:
        """So many there may be before some are let go."""
        return self.limit - self._headroom()

    @property
    def low(self) -> int:
        """So many are left then at most."""
        return self.high - self._headroom()

    def _headroom(self) -> int:
        limit = self.limit
        return max(limit >> 5, min(limit >> 2, _LEAST_HEADROOM))

    def fill(self) -> None:
        """Nobody knows yet how many there are: until they are counted there is no room for more."""
        self._put(_WENT_AT, -self.limit)

    @property
    def is_counted(self) -> bool:
        """Whether somebody knows how many there are; False too if they are just as many as there may be."""
        return self._get(_WENT_AT) != -self.limit & _LARGEST

    @property
    def used(self) -> int:
        """How many there are at most."""
        _, came, went, _ = _FORM.unpack_from(self._map, _LIMIT_AT)
        used = int(came - went) & _LARGEST
        return 0 if used > _LARGEST >> 1 else used  # a count that was wrong: the next one finds what there is

    @property
    def has_let_go(self) -> int:
        """How many were let go since the first of the servers was started."""
        return self._get(_LET_GO_AT)

    @property
    def came(self) -> int:
        """How many have come; another number whenever some have."""
        return self._get(_CAME_AT)

    def take(self, count: int) -> bool:
        """Count *count* blocks that are about to come; False if there is no room for them, or it cannot be said."""
        if not self._lock():
            return False
        try:
            if self.used + count > self.limit:
                return False
            self._put(_CAME_AT, self.came + count)
            return True
        finally:
            self._locks.release(ROOM, 1)

    def give_back(self, count: int) -> None:
        """So many of them have not come. Where that cannot be said, they count until the next count."""
        if self._lock():
            self._put(_CAME_AT, self.came - count)
            self._locks.release(ROOM, 1)

    def _lock(self) -> bool:
        """The lock is held for microseconds, unless its process was stopped: that is not waited for."""
        for _ in range(_ATTEMPTS):
            if self._locks.try_acquire(ROOM, 1):
                return True
            sleep(_NAP)
        return False

    # For the one process that lets blocks go

    def let_go(self, count: int) -> None:
        """So many were let go."""
        self._put(_WENT_AT, self._get(_WENT_AT) + count)
        self._put(_LET_GO_AT, self.has_let_go + count)

    def expected(self) -> Tuple[int, int]:
        """How many have come, and how many of those are still on their way. While nobody is inside the gate."""
        lines = [at for at in self._lines.used() if self._lines.is_alive(at)]
        return self.came, sum(int(_COMING.unpack_from(self._map, at + _COMING_AT)[0]) for at in lines)

    def correct(self, expected: Tuple[int, int], found: int) -> None:
        """So many were *found* since that was *expected*."""
        came, coming = expected
        self._put(_WENT_AT, came - coming - found)

    def _get(self, at: int) -> int:
        return int(_NUMBER.unpack_from(self._map, at)[0])

    def _put(self, at: int, number: int) -> None:
        put(self._map, at, _NUMBER, number & _LARGEST)
