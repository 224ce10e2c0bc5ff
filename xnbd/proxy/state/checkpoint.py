"""The bitmap of a cache in one process with its written map, and how their bits become durable.

Whoever sets bits marks their pages dirty **before** the bits, and holds the locks of
their bytes from before the mark until after the bits. A checkpoint, one at a time:

1. claims the dirty pages: notes them as claimed, then takes the mark away;
2. looks which of them are locked by others, then copies all of them;
3. syncs the cache image, and the checksums: the data of all bits in the copies;
4. notes the checksums of their pages of the written map, writes the copies to the
   durable copy of the bitmap, and syncs the state file: copy, written map, checksums;
5. lets go of the claimed pages that were not locked in step 2.

So a bit that anyone can see is in the durable copy, or the next checkpoint finds its
page: if step 1 took a mark whose bit is still to come, the lock shows it in step 2,
and a lock that is gone by then has left the bit for the copy. That holds when the
process in question dies at any point, because the lock goes with it. A mark after
the bit would not do: another process may see the bit, write to the block and have it
flushed before the mark is there, or the mark may never come.

A process does not see its own locks: it must not begin a checkpoint in the middle of
setting bits, from a thread or a signal handler.

A checkpoint that dies leaves its pages claimed: the next one takes them too. So does one
that fails for another reason than a write-back; after that there is none any more.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
from typing import Callable, Iterable, List, Optional

from ...storage import space
from ...system.file_locks import RangeLocks, do_nothing
from .files import write_back
from .format import BEGUN, CHECKPOINT, NUMBER, PAGE, SUCCEEDED, Layout
from .pages import Pages
from .sums import Integrity
from .versions import Versions
from .written import DirtyMarks, MarkingBitmap, WrittenMap

_PAGES_AT_ONCE = 4096
_MARKS = re.compile(rb"[^\x00]+")
_MARK = re.compile(rb"[^\x00]")


class ProcessState:
    """The bitmap for this process, which owns both descriptors from now on.

    ``fd`` is the live bitmap: locks on its bytes have to be taken through it.
    """

    def __init__(self, bitmap_fd: int, state_fd: int, layout: Layout, integrity: Optional[Integrity] = None) -> None:
        """Who only makes checkpoints needs no *integrity*, which is owned too."""
        self.fd = bitmap_fd
        self._state_fd = state_fd
        self._layout = layout
        self._head = mmap.mmap(state_fd, layout.durable)
        marks = DirtyMarks(self._head, layout.dirty)
        self.bitmap = MarkingBitmap(bitmap_fd, layout.blocks, marks)
        self._fills = RangeLocks(bitmap_fd)
        self._locks = RangeLocks(state_fd)
        self.write_back = write_back(state_fd)
        self.versions = Versions(state_fd)
        self.written = WrittenMap(state_fd, layout, marks, self.write_back.sync)
        self._integrity = integrity
        if integrity is not None:
            self.pages = Pages((bitmap_fd, state_fd), layout, marks, self.bitmap, self.written, integrity.checked)
            marks.require = self.pages.require

    @property
    def integrity(self) -> Integrity:
        """The checksums, and which blocks are known to be right."""
        assert self._integrity is not None
        return self._integrity

    @property
    def changed(self) -> bool:
        """Whether there may be bits that are not yet in the durable copy."""
        head, layout = self._head, self._layout
        maps = (layout.dirty, layout.dirty_end), (layout.claimed, layout.claimed_end)
        return any(_MARK.search(head, start, end) is not None for start, end in maps)

    def dirty_pages(self) -> int:
        """Pages of the bitmap that the next checkpoint has to save; each speaks for 128 MiB."""
        return self._layout.count_marks(self._head)

    def checkpoint(self, cache_fd: int, on_wait: Callable[[], None] = do_nothing, timeout: float = math.inf) -> None:
        """Return when all that was in the cache image before the call is durable, data and bits.

        *cache_fd* is this process's own descriptor of the image. Waits, with *on_wait*
        before every pause, for the checkpoint of another process, which waits for
        nobody, *timeout* seconds; one that has begun after this call serves both. Raises
        `WriteBackFailed` if any write-back of the disk has ever failed; after another
        `OSError` nothing is lost, and the next call tries the same again.
        """
        self.write_back.check()
        begun = self._number(BEGUN)
        self._locks.acquire(CHECKPOINT, 1, on_wait, timeout)
        try:
            if self._number(SUCCEEDED) <= begun:
                self._make_durable(cache_fd)
        finally:
            self._locks.release(CHECKPOINT, 1)
        self.write_back.check()

    def cover(self, pages: Iterable[int]) -> None:
        """Expose these pages of the written map no longer where nobody is at work, and all is durable.

        For a process that holds no locks on blocks.
        """
        head, layout = self._head, self._layout
        for page in pages:
            if self._fills.try_acquire(page * PAGE, PAGE):
                if not head[layout.dirty + page] and not head[layout.claimed + page]:
                    self.written.cover(page)
                self._fills.release(page * PAGE, PAGE)

    def sync_live(self) -> None:
        """Have the kernel write the live bitmap, and hear whether it can: a page it could not would come back old."""
        self.write_back.sync(self.fd)

    def abandon_checkpoint(self) -> None:
        """A process that was forked from this one has died in a checkpoint: its lock is this one's too, and left."""
        self._locks.release(CHECKPOINT, 1)

    def _make_durable(self, cache_fd: int) -> None:
        number = self._number(BEGUN) + 1
        # By system call: whoever still reads the old number has set its marks where the claim sees them.
        os.pwrite(self._state_fd, NUMBER.pack(number), BEGUN)
        pages = self._claim()
        if not pages:
            self._sync_cache(cache_fd)
        for at in range(0, len(pages), _PAGES_AT_ONCE):
            self._save(pages[at : at + _PAGES_AT_ONCE], cache_fd)
        os.pwrite(self._state_fd, NUMBER.pack(number), SUCCEEDED)
        if self._integrity is not None:
            self._integrity.sums.note_checkpoint(number)

    def _claim(self) -> List[int]:
        """The pages this checkpoint has to save: the dirty ones, and those an earlier one has not let go."""
        head, layout = self._head, self._layout
        shift = layout.claimed - layout.dirty
        for marks in list(_MARKS.finditer(head, layout.dirty, layout.dirty_end)):
            start, stop = marks.span()
            head[start + shift : stop + shift] = b"\x01" * (stop - start)
            head[start:stop] = bytes(stop - start)
        return [mark.start() - layout.claimed for mark in _MARK.finditer(head, layout.claimed, layout.claimed_end)]

    def _save(self, pages: List[int], cache_fd: int) -> None:
        live, head, layout = self.bitmap.octets, self._head, self._layout
        free = [page for page in pages if not self._fills.held_elsewhere(page * PAGE, PAGE)]
        copies = [live[page * PAGE : (page + 1) * PAGE] for page in pages]
        self._sync_cache(cache_fd)
        if self._integrity is not None:
            self._integrity.sums.sync(self.write_back.sync)
        for page, copy in zip(pages, copies):
            self.written.note_sum(page)
            space.write_all(self._state_fd, memoryview(copy), layout.durable + page * PAGE)
        self.write_back.sync(self._state_fd)
        for page in free:
            head[layout.claimed + page] = 0

    def _sync_cache(self, cache_fd: int) -> None:
        """Raises `OSError`, also (EIO) if the cache image is too short: what was there is lost."""
        self.write_back.sync(cache_fd)
        if os.lseek(cache_fd, 0, os.SEEK_END) < self._layout.disk_size:
            raise OSError(errno.EIO, "the cache image has shrunk")

    def _number(self, offset: int) -> int:
        return int(NUMBER.unpack_from(self._head, offset)[0])

    def close(self) -> None:
        self.bitmap.octets.close()
        self.written.close()
        if self._integrity is not None:
            self._integrity.close()
        self._head.close()
        os.close(self.fd)
        os.close(self._state_fd)
