"""How much of a disk is local, and how fast that changes."""

from __future__ import annotations

import mmap
import struct
from time import monotonic
from typing import TYPE_CHECKING, Callable, List, Optional, Tuple

from ...errors import TaskFailed
from ...proxy.state.format import PAGE
from ...storage.bitmap import Bitmap, bitmap_size, count_bits
from ...storage.blocks import BLOCK, BLOCKS_PER_BYTE

if TYPE_CHECKING:
    from .child import Child

_WINDOW = 5.0
_SHORTEST = 0.1
_LONGER = 20
"""Times as long as it took to count is a figure good enough."""

_COUNTED_INLINE = 4 << 20
"""Bytes of a bitmap that are counted by whoever asks: that of 128 GiB takes a tenth of a second at worst."""

_COUNT = struct.Struct("=H")


class Progress:
    """How many blocks of one disk are set in a bitmap.

    Counting takes long on a large disk. There it is the work of a child, page by page
    into memory that both have, and `keep_up` has to be called until it says so.
    """

    def __init__(self, bitmap: Bitmap, size: int) -> None:
        self.blocks = bitmap.blocks
        self.size = size
        self._bitmap = bitmap
        self._counted = 0
        self._count_again = 0.0
        self._missing_at = 0
        self._complete_until = 0.0
        self._shares: List[float] = []
        self._share_again = 0.0
        self._pages: Optional[Pages] = Pages(bitmap) if bitmap_size(bitmap.blocks) > _COUNTED_INLINE else None
        self.counter: Optional[Child] = None
        self._count_began = 0.0

    @property
    def complete(self) -> bool:
        """Whether every block is local. Of a large disk that may have been so a moment ago: bits are taken back too."""
        if self._missing_at == self.blocks:
            return monotonic() < self._complete_until or self.look_again()
        self._missing_at = self._bitmap.first_missing(self._missing_at)
        return self._missing_at == self.blocks and self.look_again()

    def look_again(self) -> bool:
        """What `complete` tells, as of now, whatever was found before."""
        began = monotonic()
        self._missing_at = self._bitmap.first_missing(0)
        self._complete_until = monotonic() + _LONGER * (monotonic() - began)
        return self._missing_at == self.blocks

    def keep_up(self, start: Callable[[Callable[[], None]], Child]) -> bool:
        """Have the blocks of a large disk counted, if that was long ago, by what *start* makes; False while that lasts.

        Where there can be no more processes this one counts.
        """
        if self._pages is None or self.complete:
            return True
        if self.counter is not None:
            if not self.counter.is_done():
                return False
            if self.counter.status == 0:
                self._note(self._pages.total(), monotonic() - self._count_began)
            self.counter = None
        if monotonic() < self._count_again:
            return True
        self._count_began = monotonic()
        try:
            self.counter = start(self._pages.count)
            return False
        except TaskFailed:
            self._pages.count()
            self._note(self._pages.total(), monotonic() - self._count_began)
            return True

    @property
    def counted(self) -> bool:
        """Whether `missing` has a figure: of a large disk that has to be counted it does not at first."""
        return self._pages is None or self._count_again > 0 or self.complete

    def missing(self) -> int:
        """Blocks that are not local; 0 only if none is. It may be a figure of a moment ago."""
        if self.complete:
            return 0
        began = monotonic()
        if self._pages is None and began >= self._count_again:
            self._note(self._bitmap.count(), monotonic() - began)
        return max(1, self.blocks - self._counted)

    def _note(self, counted: int, duration: float) -> None:
        self._counted = counted
        self._count_again = monotonic() + max(_SHORTEST, _LONGER * duration)

    def cached_bytes(self) -> int:
        return max(0, self.size - self.missing() * BLOCK)

    def shares(self, cells: int) -> List[float]:
        """Which share of each of at most *cells* parts of the disk is local. It may be a figure of a moment ago."""
        cells = min(cells, self.blocks)
        if self._pages is not None and self.complete:
            return [1.0] * cells
        if self._pages is not None:
            return self._pages.shares(cells)
        began = monotonic()
        if len(self._shares) != cells or began >= self._share_again:
            self._shares = self._bitmap.shares(cells)
            self._share_again = monotonic() + _LONGER * (monotonic() - began)
        return self._shares


class Pages:
    """How many blocks are set in each page of a large bitmap, as the last `count` of any process has found."""

    def __init__(self, bitmap: Bitmap) -> None:
        self._bitmap = bitmap
        self._size = bitmap_size(bitmap.blocks)
        self._number = -(-self._size // PAGE)
        self._memory = mmap.mmap(-1, self._number * _COUNT.size)

    def count(self) -> None:
        octets, size, pack = self._bitmap.octets, self._size, _COUNT.pack_into
        for number, at in enumerate(range(0, size, PAGE)):
            pack(self._memory, number * _COUNT.size, count_bits(octets[at : min(at + PAGE, size)]))

    def total(self) -> int:
        with memoryview(self._memory) as memory, memory.cast("H") as counts:
            return sum(counts)

    def shares(self, cells: int) -> List[float]:
        """To the page; 1 only of what is whole."""
        blocks, each = self._bitmap.blocks, PAGE * BLOCKS_PER_BYTE
        with memoryview(self._memory) as memory, memory.cast("H") as counts:
            shares = []
            for cell in range(cells):
                first, end = blocks * cell // cells // each, -(-(blocks * (cell + 1) // cells) // each)
                there, found = min(end * each, blocks) - first * each, sum(counts[first:end])
                shares.append(1.0 if found == there else min(found / there, 0.999))
            return shares


class Rate:
    """How fast a number of bytes grows: bytes per second over the last moments."""

    def __init__(self) -> None:
        self._samples: List[Tuple[float, int]] = []

    def of(self, amount: int) -> Optional[float]:
        """The rate, now that *amount* has been reached; None at the first time.

        Who asks seldom gets the rate since the time before.
        """
        now = monotonic()
        recent = [sample for sample in self._samples if now - sample[0] < _WINDOW] or self._samples[-1:]
        self._samples = [*recent, (now, amount)]
        first_time, first_amount = self._samples[0]
        return max(0.0, (amount - first_amount) / (now - first_time)) if now > first_time else None
