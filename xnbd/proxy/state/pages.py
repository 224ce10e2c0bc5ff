"""Pages of the bitmap after a kill: each is looked at before its first use, and not all of them at the start.

On a page without a mark, live bitmap and durable copy are alike, and the written map has the
checksum that was noted (`proxy.state.checkpoint`). If that is not so, a file was damaged
or replaced since the servers died. Then:

- Clean blocks that only one of the copies has count as missing: the origin has them.
- Written blocks that one of the copies has are local.
- If the checksum is wrong, all that is local counts as written.
- If it is wrong and the copies differ, nobody can tell what is right: neither reads nor
  writes of the page succeed.

All processes share what was looked at: one byte for each page, behind the map of checked
blocks. A page is looked at before a lock on its blocks is taken, so nobody changes it meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from typing import Iterator, Set, Tuple

from ...logs import log
from ...storage import space
from ...storage.bitmap import Bitmap, bitmap_size
from ...system.file_locks import RangeLocks, do_nothing
from .copies import Region, differences
from .format import LOOKING, PAGE, PAGE_SHIFT, SUM, Layout
from .mending import misfits
from .written import DirtyMarks

_UNSEEN = re.compile(rb"\x00")
_PATIENCE = 10.0


def checked_size(layout: Layout) -> int:
    """Bytes of the file ``.checked``: the map of checked blocks, and a byte for each page."""
    return bitmap_size(layout.blocks) + layout.pages


class Pages:
    """The pages of *bitmap* and *written* in one process; *checked* is mapped with the bytes behind it."""

    def __init__(
        self, fds: Tuple[int, int], layout: Layout, marks: DirtyMarks, bitmap: Bitmap, written: Bitmap, checked: Bitmap
    ) -> None:
        """*fds* are of the live bitmap and the state file."""
        self._bitmap_fd, self._state_fd = fds
        self._layout = layout
        self._marks = marks
        self._live = bitmap.octets
        self._written = written.octets
        self._seen = checked.octets
        self._at = bitmap_size(layout.blocks)
        self._locks = RangeLocks(self._state_fd)
        self._told: Set[int] = set()

    def look(self, first: int, end: int) -> None:
        """Return when the bits of these blocks, one at least, may be believed. Raises `OSError`."""
        seen, at = self._seen, self._at
        start, last = first >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        if start == last and seen[at + start]:
            return
        for page in range(start, last + 1):
            if not seen[at + page]:
                self._look(page)

    def look_at_all(self) -> Iterator[None]:
        """The same for all blocks, with pauses; what was never written to is not read. Raises `OSError`."""
        at, layout = self._at, self._layout
        unseen = {match.start() for match in _UNSEEN.finditer(self._seen[at : at + layout.pages])}
        if not unseen:
            return
        doubtful = set(misfits(Region(self._state_fd, layout, layout.written), self._state_fd, layout))
        yield
        doubtful.update(difference.page for difference in differences(self._bitmap_fd, self._state_fd, layout))
        yield
        for page in unseen:
            if page in doubtful:
                self._look(page)
            else:
                self._seen[at + page] = 1

    def require(self, first: int, end: int) -> None:
        """Raises `OSError` if one who is about to change bits of these blocks has decided on what was not believed."""
        seen, at = self._seen, self._at
        start, last = first >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
        if start == last and seen[at + start]:
            return
        for page in range(start, last + 1):
            if not seen[at + page] and self._look(page):
                raise OSError(errno.EAGAIN, "the bitmap was mended meanwhile")

    def _look(self, page: int) -> bool:
        """Whether something was mended."""
        mended = False
        if not self._fits(page):
            self._locks.acquire(LOOKING, 1, do_nothing, _PATIENCE)
            try:  # somebody else may have looked at it, and changed it since
                if not self._seen[self._at + page] and not self._fits(page):
                    self._mend(page)
                    mended = True
            finally:
                self._locks.release(LOOKING, 1)
        self._seen[self._at + page] = 1
        return mended

    def _fits(self, page: int) -> bool:
        live, durable, written = self._copies(page)
        return live == durable and self._has_sum(page, written)

    def _copies(self, page: int) -> Tuple[bytes, bytes, bytes]:
        start, stop = self._span(page)
        durable = space.read_exactly(self._state_fd, stop - start, self._layout.durable + start, "state file")
        return self._live[start:stop], durable, self._written[start:stop]

    def _span(self, page: int) -> Tuple[int, int]:
        return page * PAGE, min((page + 1) * PAGE, self._layout.bitmap_size)

    def _has_sum(self, page: int, written: bytes) -> bool:
        noted = os.pread(self._state_fd, SUM.size, self._layout.sums + SUM.size * page)
        return noted == SUM.pack(zlib.crc32(written))

    def _mend(self, page: int) -> None:
        live, durable, written = self._copies(page)
        if self._has_sum(page, written):
            local = _believed(live, durable, written)
        elif live == durable:
            local = written = live
        else:
            self._refuse(page)
        start, stop = self._span(page)
        self._marks.mark(page)
        self._written[start:stop] = written
        self._live[start:stop] = local
        self._marks.mark(page)  # a checkpoint may have come in between, and sees no lock
        log.warning(
            "the bitmap of the cache, from byte %d of the disk on, was damaged since its servers died, and was mended",
            page << PAGE_SHIFT << 12,
        )

    def _refuse(self, page: int) -> None:
        if page not in self._told:
            self._told.add(page)
            log.error(
                "the bitmap of the cache and what vouches for it contradict each other from byte %d of the disk on: "
                "put the right files back, or believe the bitmap with --adopt-cache",
                page << PAGE_SHIFT << 12,
            )
        raise OSError(errno.EIO, "the bitmap was damaged")


def _believed(live: bytes, durable: bytes, written: bytes) -> bytes:
    """Clean blocks that both have, and written ones that one has."""
    one, other, marks = (int.from_bytes(octets, "little") for octets in (live, durable, written))
    return (one & other | (one | other) & marks).to_bytes(len(live), "little")
