"""Which blocks clients have written: these are nowhere else, while the origin has all others that are local.

The **written map** is a bitmap at the end of the state file, which all processes map. A
mark too many does no harm: the block is kept for good. A mark too few loses what a client
has written. So there is one copy of the map, and no mark is taken back while anybody uses
the files. The rules:

- Marks are set under the locks of their bytes of the bitmap. A missing block is marked
  after its data and before its bit, a local one before its data.
- Pages of marks become durable with the checkpoints that save the bits. A checkpoint also
  notes the checksum of each page that it saves.
- What clients write may be on the disk sooner than its mark. So a page is **exposed**
  before the first mark on it: that is durable before the bit, and before the data of a
  block that was local. After a power failure all that is local on an exposed page counts
  as written. A page on which nothing was marked for a while is covered again.

What becomes of the map at a start is decided in `proxy.state.verdict` and done in
`proxy.state.mending`.
"""

from __future__ import annotations

import mmap
import re
import zlib
from contextlib import suppress
from typing import Callable, Dict

from ...storage.bitmap import Bitmap
from ...storage.writeback import WriteBackFailed
from .format import PAGE, PAGE_SHIFT, SUM, Layout

_PERHAPS, _DURABLY = 1, 2
"""Of a page that is exposed: not yet on the disk for sure, and there."""

_EXPOSED = re.compile(b"\x02")

_MOST_AT_ONCE = 64
"""Pages that are exposed with one sync: 8 GiB of a disk."""


class DirtyMarks:
    """Marks for pages of the bitmap and the written map that the next checkpoint has to save, in *memory* from *at* on.

    They are set before the bits.
    """

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory = memory
        self._at = at
        self.require: Callable[[int, int], None] = _any_blocks

    def mark(self, page: int) -> None:
        """Something is about to be changed on *page*."""
        self._memory[self._at + page] = 1

    def note(self, first: int, end: int) -> None:
        """Something is about to be set for these blocks, one at least. Raises what ``require`` raises."""
        self.require(first, end)
        start = self._at + (first >> PAGE_SHIFT)
        last = self._at + ((end - 1) >> PAGE_SHIFT)
        if start == last:
            self._memory[start] = 1
        else:
            self._memory[start : last + 1] = b"\x01" * (last + 1 - start)


def _any_blocks(first: int, end: int) -> None:
    """Of any page it is known that its bits may be believed."""


class MarkingBitmap(Bitmap):
    """The live bitmap behind *fd*, which marks the pages that it changes."""

    def __init__(self, fd: int, blocks: int, marks: DirtyMarks) -> None:
        super().__init__(fd, blocks)
        self._marks = marks

    def set(self, first: int, end: int) -> None:
        """Set the bits of these blocks, one at least. The caller holds the lock of their bytes."""
        self._marks.note(first, end)
        Bitmap.set(self, first, end)

    def clear(self, first: int, end: int) -> None:
        """Take them back: see `Bitmap.clear`."""
        self._marks.note(first, end)
        Bitmap.clear(self, first, end)


class WrittenMap(Bitmap):
    """The written map in the state file behind *fd*, which *sync* makes durable: that raises `WriteBackFailed`."""

    def __init__(self, fd: int, layout: Layout, marks: DirtyMarks, sync: Callable[[int], None]) -> None:
        super().__init__(fd, layout.blocks, at=layout.written)
        self._fd = fd
        self._marks = marks
        self._sync = sync
        self._pages, self._size = layout.pages, layout.bitmap_size
        self._sums = layout.sums - layout.exposed
        self._tail = mmap.mmap(fd, self._sums + SUM.size * layout.pages, offset=layout.exposed)
        self._at_once = 1

    def set(self, first: int, end: int) -> None:
        """Mark these blocks, one at least, as written. The caller holds the lock of their bytes."""
        self._marks.note(first, end)
        for page in range(first >> PAGE_SHIFT, ((end - 1) >> PAGE_SHIFT) + 1):
            if self._tail[page] != _DURABLY:
                self._expose(page)
        Bitmap.set(self, first, end)

    def _expose(self, page: int) -> None:
        """And its neighbours, ever more of them: a sync takes long. After a failed write-back it means nothing."""
        tail, start = self._tail, page - page % self._at_once
        neighbours = range(start, min(start + self._at_once, self._pages))
        self._at_once = min(2 * self._at_once, _MOST_AT_ONCE)
        pages = [page, *(other for other in neighbours if not tail[other])]
        for one in pages:
            tail[one] = _PERHAPS
        with suppress(WriteBackFailed):
            self._sync(self._fd)
            for one in pages:
                tail[one] = _DURABLY

    def exposed(self) -> Dict[int, bytes]:
        """The pages that are, with their checksums: as long as one stays the same, nothing was marked."""
        found = _EXPOSED.finditer(self._tail[: self._pages])
        return {match.start(): self._tail[self._sum(match.start())] for match in found}

    def cover(self, page: int) -> None:
        """Expose *page* no longer. All of its marks are durable, and the caller holds the locks of all its bytes."""
        if self._tail[page] == _DURABLY:
            self._tail[page] = 0

    def note_sum(self, page: int) -> None:
        """Note the checksum of *page*, for the checkpoint that saves it."""
        content = self.octets[page * PAGE : min((page + 1) * PAGE, self._size)]
        self._tail[self._sum(page)] = SUM.pack(zlib.crc32(content))

    def _sum(self, page: int) -> slice:
        at = self._sums + SUM.size * page
        return slice(at, at + SUM.size)

    def close(self) -> None:
        """Let go of the mappings."""
        self.octets.close()
        self._tail.close()
