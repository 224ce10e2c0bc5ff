"""A cache's bitmap for who only looks: mapped for reading, no locks are taken, and nothing is written."""

from __future__ import annotations

import mmap
import os
from typing import List, Optional

from ...storage.bitmap import Bitmap, bitmap_size, count_beyond, count_bits
from ...storage.blocks import BLOCK
from . import files
from .format import PAGE, SUFFIX, BadHeader, Layout, layout_of

_STEP = 64
"""Pages of the bitmap that are counted at once: a few milliseconds, if half of their bits are set."""

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class CacheView:
    """The bitmap, and which of its pages the next checkpoint has to save. Owns both descriptors."""

    def __init__(self, bitmap_fd: int, state_fd: int, layout: Layout) -> None:
        self._fds = (bitmap_fd, state_fd)
        self._layout = layout
        self.bitmap = Bitmap(bitmap_fd, layout.blocks, readonly=True)
        self._head = mmap.mmap(state_fd, layout.durable, prot=mmap.PROT_READ)
        self.progress = LocalBlocks(self.bitmap, layout.disk_size)
        self._marks = _marks(state_fd, layout)
        self.written = None if self._marks is None else LocalBlocks(self._marks, layout.disk_size)
        """Those that clients have written; None of a state file that does not tell."""

    def count(self) -> bool:
        """Count some pages of both; whether that was the end of a round."""
        if self.written is not None:
            self.written.work()
        return self.progress.work()

    def dirty_pages(self) -> int:
        """Pages of the bitmap that the next checkpoint has to save."""
        return self._layout.count_marks(self._head)

    def write_back_failed(self) -> bool:
        """Whether the state file says so."""
        return files.failure_record(self._fds[1]).read() is not None

    def is_at(self, path: str) -> bool:
        """Whether these are still the files of the bitmap at *path*."""
        try:
            found = (os.stat(path), os.stat(path + SUFFIX))
        except OSError:
            return False
        return all(os.path.samestat(os.fstat(fd), status) for fd, status in zip(self._fds, found))

    def close(self) -> None:
        self.bitmap.octets.close()
        if self._marks is not None:
            self._marks.octets.close()
        self._head.close()
        for fd in self._fds:
            os.close(fd)


def _marks(state_fd: int, layout: Layout) -> Optional[Bitmap]:
    if os.fstat(state_fd).st_size < layout.size:
        return None
    return Bitmap(state_fd, layout.blocks, at=layout.written, readonly=True)


def view_of(bitmap_path: str) -> Optional[CacheView]:
    """The bitmap at *bitmap_path*; None if there is none that can be used."""
    path, fds = os.path.realpath(bitmap_path), []
    try:
        for name in (path, path + SUFFIX):
            fds.append(os.open(name, _OPEN))
        layout = layout_of(files.read_header(fds[1]).disk_size)
        if os.fstat(fds[0]).st_size >= layout.bitmap_size and os.fstat(fds[1]).st_size >= layout.durable:
            return CacheView(fds[0], fds[1], layout)
    except (OSError, BadHeader):
        pass
    for fd in fds:
        os.close(fd)
    return None


class LocalBlocks:
    """How many blocks of a disk of *size* bytes are set, counted page by page whenever there is time for `work`."""

    def __init__(self, bitmap: Bitmap, size: int) -> None:
        self.blocks = bitmap.blocks
        self.size = size
        self._bitmap = bitmap
        self._bytes = bitmap_size(bitmap.blocks)
        self._counts = [0] * -(-self._bytes // PAGE)
        self._next = 0
        self.rounds = 0
        """How often all has been counted."""

    def work(self) -> bool:
        """Count some pages; whether that was the end of a round."""
        octets, first = self._bitmap.octets, self._next
        end = self._next = min(first + _STEP, len(self._counts))
        for page in range(first, end):
            self._counts[page] = count_bits(octets[page * PAGE : min((page + 1) * PAGE, self._bytes)])
        if end < len(self._counts):
            return False
        self._counts[-1] -= count_beyond(octets[self._bytes - 8 : self._bytes], self.blocks)
        self._next = 0
        self.rounds += 1
        return True

    def missing(self) -> int:
        """Blocks that are not set, as far as was counted last."""
        return self.blocks - sum(self._counts)

    def cached_bytes(self) -> int:
        return max(0, self.size - self.missing() * BLOCK)

    def shares(self, cells: int) -> List[float]:
        """Which share of each of at most *cells* parts of the disk is local; of a large disk to the page."""
        cells = min(cells, self.blocks)
        if len(self._counts) <= _STEP:
            return self._bitmap.shares(cells)
        each = 8 * PAGE
        shares = []
        for cell in range(cells):
            first, end = self.blocks * cell // cells // each, -(-(self.blocks * (cell + 1) // cells) // each)
            there, found = min(end * each, self.blocks) - first * each, sum(self._counts[first:end])
            shares.append(1.0 if found == there else min(found / there, 0.999))
        return shares
