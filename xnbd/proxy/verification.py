"""Whether clean blocks of the cache are as they came, looked at before anybody reads them.

A block that clients have not written has a checksum (`proxy.state.sums`). One that does
not fit is damaged: it counts as missing from then on, so that it is fetched again.

- Only blocks that a request wants are read from a disk for this. What is in memory
  besides, up to `RUN` blocks in a row, is checked along: a lock costs more than a sum.
- Blocks are noted as checked, or found damaged, under their lock. Where another process
  has that, a block that fits is right all the same, and is not noted.
- What is looked at is a copy (``preadv(2)``): a page that cannot be read would kill who looks.
"""

from __future__ import annotations

import errno
import mmap
import os
from enum import Enum
from logging import WARNING
from typing import Callable, Iterator, List, Optional, Tuple

from ..log_turns import DAMAGE, Line, RationedLines
from ..logs import about
from ..scoreboard.counters import DAMAGED, new_counts
from ..storage.bitmap import Bitmap, bitmap_size
from ..storage.blocks import BLOCK, BLOCK_SHIFT, BLOCKS_PER_BYTE, block_start
from ..storage.image import NotLocal
from ..storage.target import TargetImage
from .locking import Locking
from .state.checkpoint import ProcessState
from .state.sums import RUN, sums_of_each

_ALL = b"\xff" * (RUN // BLOCKS_PER_BYTE)
_NONE = bytes(len(_ALL))
"""The bits of a unit."""

_WITHOUT_NOWAIT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Verify(Enum):
    """When clean blocks are checked: not at all, once while servers run, or whenever they are read."""

    NEVER = "never"
    FIRST = "first"
    ALWAYS = "always"


class Verification:
    """Checks blocks of *cache*, the image *name*, for one process whose locks are *locking*.

    ``trusted`` has the blocks that may be read without asking here.
    """

    def __init__(
        self,
        cache: TargetImage,
        state: ProcessState,
        locking: Locking,
        verify: Verify,
        name: str,
        on_damage: Callable[[], None],
    ) -> None:
        """*on_damage* is called once damaged blocks count as missing."""
        self.counts: List[int] = new_counts()
        self._cache = cache
        self._pages = state.pages
        self._bitmap = state.bitmap
        self._written = state.written
        self._sums = state.integrity.sums
        self._checked = state.integrity.checked
        self._locking = locking
        self._on_damage = on_damage
        self._remembers = verify is not Verify.ALWAYS
        self.trusted: Bitmap = self._checked
        if verify is Verify.NEVER:
            self.trusted = state.bitmap
        elif verify is Verify.ALWAYS:
            self.trusted = _NoBlocks(state.bitmap.blocks)
        self._read = _Buffer(cache)
        self._lines = RationedLines(WARNING, DAMAGE, name, lambda at, do: None)
        self._first_unchecked = 0

    def trusts_all(self) -> bool:
        """Whether no block has to be looked at any more, as far as is known."""
        self._first_unchecked = self.trusted.first_missing(self._first_unchecked)
        return self._first_unchecked == self.trusted.blocks

    def check(self, first: int, end: int) -> None:
        """Return once all of these blocks that are local are right; the others are not local any more.

        Raises `NotLocal` if that has to wait for another process, and `OSError`.
        """
        self._pages.look(first, end)
        while first < end:
            unit = first - first % RUN
            stop = min(end, unit + RUN)
            if self._bitmap.any_set(first, stop):
                self._check_unit(unit, first, stop)
            first = stop

    def check_again(self, first: int, end: int) -> Optional[List[int]]:
        """Check blocks of one unit, also those that are checked: the damaged ones, which count as missing now.

        None if another process has some of them in hand. Raises `OSError`.
        """
        self._read.forget()
        self._read.blocks(first, end)
        if not self._locking.borrow(first, end):
            return None
        damaged: List[int] = []
        try:
            for run_first, run_end, local in list(self._bitmap.runs(first, end)):
                if local:
                    damaged += self._check_run(run_first, run_end)
        finally:
            self._locking.give_back(first, end)
        return damaged

    def written_among(self, first: int, end: int) -> int:
        """How many of these blocks clients have written: they have no checksums."""
        return sum(stop - start for start, stop, written in self._written.runs(first, end) if written)

    def _check_unit(self, unit: int, first: int, end: int) -> None:
        """Blocks *first* up to *end* of a unit, and those beside them that are in memory."""
        self._read.forget()
        unit_end = min(unit + RUN, self._bitmap.blocks)
        along = self._remembers and (self._written.all_set(unit, unit_end) or self._read.in_memory(unit, unit_end))
        if along and self._locking.borrow(unit, unit_end):
            first, end = unit, unit_end
        else:
            self._read.blocks(first, end)
            if not self._locking.borrow(first, end):
                self._check_unlocked(first, end)
                return
        try:
            if end - first < RUN or not self._check_whole(first, end):
                for run_first, run_end in self._unchecked_runs(first, end):
                    self._check_run(run_first, run_end)
        finally:
            self._locking.give_back(first, end)

    def _check_whole(self, first: int, end: int) -> bool:
        """The most frequent case at once: all blocks of a unit are clean and right, and none of them is checked."""
        word = slice(first >> 3, end >> 3)
        if self._bitmap.octets[word] != _ALL or self._written.octets[word] != _NONE:
            return False
        if not self._remembers or self._checked.octets[word] != _NONE:
            return False
        if self._sums.misfits(first, self._read.sums(first, end)):
            return False
        self._checked.octets[word] = _ALL
        return True

    def _check_unlocked(self, first: int, end: int) -> None:
        """What fits is right at this moment, whoever has the lock."""
        for run_first, run_end in self._unchecked_runs(first, end):
            if self._damaged(run_first, run_end):
                raise NotLocal(self._locking.next_turn(first, end))

    def _check_run(self, first: int, end: int) -> List[int]:
        """The damaged ones of local blocks, whose locks this process has. They count as missing from now on."""
        damaged = self._damaged(first, end)
        for block in damaged:
            self._locking.mark_missing(block)
        if damaged:
            self._on_damage()
            self.counts[DAMAGED] += len(damaged)
            self._tell(damaged)
        if self._remembers:
            for block in (*damaged, end):
                if first < block:
                    self._checked.set(first, block)
                first = block + 1
        return damaged

    def _unchecked_runs(self, first: int, end: int) -> Iterator[Tuple[int, int]]:
        """Runs of local blocks that are not known to be right."""
        for run_first, run_end, local in list(self._bitmap.runs(first, end)):
            if local and not self._remembers:
                yield run_first, run_end
            elif local:
                for some_first, some_end, checked in list(self._checked.runs(run_first, run_end)):
                    if not checked:
                        yield some_first, some_end

    def _damaged(self, first: int, end: int) -> List[int]:
        """Which of these blocks, which have been read, are clean and do not fit their sums. Raises `OSError`."""
        if not self._written.any_set(first, end):
            return self._sums.misfits(first, self._read.sums(first, end))
        damaged: List[int] = []
        for run_first, run_end, written in list(self._written.runs(first, end)):
            if not written:
                damaged += self._sums.misfits(run_first, self._read.sums(run_first, run_end))
        return damaged

    def _tell(self, damaged: List[int]) -> None:
        offset = block_start(damaged[0])
        told = "the cache image is damaged: the block at byte %d is not as it was fetched, and counts as missing"
        self._lines.say(Line(told, (offset,), about(offset=offset)), count=len(damaged))

    def close(self) -> None:
        self._lines.rest()


class _NoBlocks(Bitmap):
    """A bitmap without a bit, which takes no memory."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.octets = mmap.mmap(-1, bitmap_size(blocks), flags=flags, prot=mmap.PROT_READ)


class _Buffer:
    """What was read last of *cache*, up to `RUN` blocks."""

    def __init__(self, cache: TargetImage) -> None:
        self._fd = cache.fd
        self._size = cache.size
        self._memory = memoryview(mmap.mmap(-1, RUN * BLOCK))
        self._views = [self._memory[at : at + BLOCK] for at in range(0, RUN * BLOCK, BLOCK)]
        self._no_wait = os.RWF_NOWAIT
        self._first = self._end = 0

    def forget(self) -> None:
        """What was read has been looked at."""
        self._first = self._end = 0

    def in_memory(self, first: int, end: int) -> bool:
        """Read these blocks if all of them are in memory, or it cannot be known."""
        try:
            if not self._fill(first, end, self._no_wait):
                return False
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._no_wait or error.errno not in _WITHOUT_NOWAIT:
                return False
            self._no_wait = 0
            return self.in_memory(first, end)
        self._first, self._end = first, end
        return True

    def blocks(self, first: int, end: int) -> None:
        """Read these blocks, unless that is done. Raises `OSError` (EIO) if the cache has shrunk."""
        if self._first <= first and end <= self._end:
            return
        if not self._fill(first, end, 0):
            raise OSError(errno.EIO, "the cache image has shrunk")
        self._first, self._end = first, end

    def _fill(self, first: int, end: int, flags: int) -> bool:
        start = first << BLOCK_SHIFT
        length = min(end << BLOCK_SHIFT, self._size) - start
        return os.preadv(self._fd, [self._memory[:length]], start, flags) == length

    def sums(self, first: int, end: int) -> bytes:
        """Of blocks that were read."""
        views = self._views[first - self._first : end - self._first]
        if end << BLOCK_SHIFT > self._size:
            views[-1] = views[-1][: self._size % BLOCK]
        return sums_of_each(views)
