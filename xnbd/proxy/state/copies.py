"""The two copies of a bitmap, live and durable: compared, and made alike."""

from __future__ import annotations

import os
import re
import zlib
from bisect import bisect_right
from typing import Iterator, List, NamedTuple, Optional, Tuple

from ...storage import space
from ...storage.bitmap import count_beyond, count_bits
from ...storage.blocks import steps
from ...storage.extents import file_extents
from .files import failure_record
from .format import PAGE, Layout

_CHUNK = 256 * PAGE
"""Read at once."""

_MARK = re.compile(rb"[^\x00]")

Span = Tuple[int, int]
"""The first page of some, and the end."""


class Region:
    """A bitmap at *offset* of the file behind *fd*. Much of a large one was never written to: that is not read.

    That has to be found out before: what the kernel reads ahead does not count as a hole any more.
    """

    def __init__(self, fd: int, layout: Layout, offset: int, data: Optional[List[Span]] = None) -> None:
        """*data*, if it is given: where to look at all."""
        self._fd = fd
        self._offset = offset
        self._size = layout.bitmap_size
        self.data = _data(fd, layout, offset) if data is None else data
        """Where it may have bits, in ascending order."""

    def read(self, first: int, end: int) -> bytes:
        """These pages; the last one of all may be shorter. Raises `OSError`."""
        start, stop = first * PAGE, min(end * PAGE, self._size)
        at = bisect_right(self.data, (first, self._size)) - 1
        if (at < 0 or self.data[at][1] <= first) and (at + 1 == len(self.data) or self.data[at + 1][0] >= end):
            return bytes(stop - start)
        return space.read_exactly(self._fd, stop - start, self._offset + start)


def _data(fd: int, layout: Layout, offset: int) -> List[Span]:
    at, data = 0, []
    for extent in file_extents(fd, offset, layout.bitmap_size):
        if not extent.hole:
            data.append((at // PAGE, -(-(at + extent.length) // PAGE)))
        at += extent.length
    return data


def pieces(*regions: Region) -> Iterator[Span]:
    """Where one of the *regions*, all of one size, may have bits: pages to read at once, in ascending order."""
    done = 0
    for first, end in sorted(span for region in regions for span in region.data):
        for at, count in steps(max(first, done), max(0, end - max(first, done)), _CHUNK // PAGE):
            yield at, at + count
        done = max(done, end)


class Difference(NamedTuple):
    """A page of the live bitmap that is not as in the durable copy."""

    page: int
    live: bytes
    durable: bytes

    @property
    def forgotten(self) -> int:
        """How many bits are set in the live bitmap only."""
        live, durable = (int.from_bytes(octets, "little") for octets in (self.live, self.durable))
        return bin(live & ~durable).count("1")

    @property
    def missing(self) -> int:
        """How many bits are set in the durable copy only."""
        live, durable = (int.from_bytes(octets, "little") for octets in (self.live, self.durable))
        return bin(durable & ~live).count("1")


class Comparison(NamedTuple):
    """How many bits only the live bitmap has, and how many only the durable copy.

    *explained*: so they may differ between two checkpoints, as far as marked pages tell; what is missing was clean.
    *pages*: those that differ.
    """

    forgotten: int
    missing: int
    explained: bool
    pages: List[int]

    @property
    def alike(self) -> bool:
        return not self.forgotten and not self.missing


def compare(
    bitmap_fd: int, state_fd: int, layout: Layout, *, told: bool, pages: Optional[List[int]] = None
) -> Comparison:
    """What `differences` finds, in sum. *told*: there is a written map, so that clean blocks may have been let go."""
    forgotten, missing, explained, different = 0, 0, True, []
    for difference in differences(bitmap_fd, state_fd, layout, pages):
        different.append(difference.page)
        forgotten += difference.forgotten
        missing += difference.missing
        let_go = not difference.missing or (told and _are_clean(state_fd, layout, difference))
        explained = explained and let_go and _is_marked(state_fd, layout, difference.page)
    return Comparison(forgotten, missing, explained, different)


def marked_pages(state_fd: int, layout: Layout) -> List[int]:
    """Those that were changed since the last checkpoint, or that one has not saved; in ascending order."""
    maps = [space.read_exactly(state_fd, layout.pages, start) for start in (layout.dirty, layout.claimed)]
    return sorted({mark.start() for marks in maps for mark in _MARK.finditer(marks)})


def _are_clean(state_fd: int, layout: Layout, difference: Difference) -> bool:
    """Whether clients have written none of the blocks that are set in the durable copy only."""
    marks = space.read_exactly(state_fd, len(difference.live), layout.written + difference.page * PAGE)
    live, durable, written = (int.from_bytes(o, "little") for o in (difference.live, difference.durable, marks))
    return not durable & ~live & written


def _is_marked(state_fd: int, layout: Layout, page: int) -> bool:
    marks = (os.pread(state_fd, 1, start + page) for start in (layout.dirty, layout.claimed))
    return any(mark != b"\0" for mark in marks)


def differences(
    bitmap_fd: int, state_fd: int, layout: Layout, pages: Optional[List[int]] = None
) -> Iterator[Difference]:
    """Those of *pages* that differ, else of all: some 0.1 s for a disk of 4 TiB whose bits are spread over it."""
    spans = None if pages is None else [(page, page + 1) for page in pages]
    live_region, durable_region = Region(bitmap_fd, layout, 0, spans), Region(state_fd, layout, layout.durable, spans)
    for first, end in pieces(live_region, durable_region):
        live, durable = live_region.read(first, end), durable_region.read(first, end)
        if live == durable:
            continue
        for page in range(first, end):
            at = (page - first) * PAGE
            both = live[at : at + PAGE], durable[at : at + PAGE]
            if both[0] != both[1]:
                yield Difference(page, *both)


def count_set(fd: int, layout: Layout, offset: int) -> int:
    """How many blocks are set in the bitmap at *offset*."""
    region = Region(fd, layout, offset)
    last_word = space.read_exactly(fd, 8, offset + layout.bitmap_size - 8)
    return sum(count_bits(region.read(*piece)) for piece in pieces(region)) - count_beyond(last_word, layout.blocks)


def checksum(fd: int, layout: Layout, offset: int) -> int:
    """CRC-32 of the bitmap at *offset*."""
    result = 0
    for part in _parts(fd, layout, offset):
        result = zlib.crc32(part, result)
    return result


def _parts(fd: int, layout: Layout, offset: int) -> Iterator[bytes]:
    """All of it, holes too."""
    region = Region(fd, layout, offset)
    for first, count in steps(0, layout.pages, _CHUNK // PAGE):
        yield region.read(first, first + count)


def save_live(state_fd: int, layout: Layout, difference: Difference) -> None:
    """Put the live page into the durable copy."""
    space.write_all(state_fd, memoryview(difference.live), layout.durable + difference.page * PAGE)


def restore_durable(bitmap_fd: int, difference: Difference) -> None:
    """Put the durable page into the live bitmap."""
    space.write_all(bitmap_fd, memoryview(difference.durable), difference.page * PAGE)


def forget_failure(bitmap_fd: int, state_fd: int, layout: Layout) -> None:
    """The live bitmap is as the durable copy now: make both so on stable storage, and clear the failure.

    All of both is written again: pages may be clean in memory that are not on stable
    storage, and older bits would come back when memory gets short. Raises `OSError`.
    """
    for fd, start in ((bitmap_fd, 0), (state_fd, layout.durable)):
        _write_again(fd, layout, start)
        os.fdatasync(fd)
    failure_record(state_fd).clear()


def _write_again(fd: int, layout: Layout, offset: int) -> None:
    at = offset
    for part in _parts(fd, layout, offset):
        space.write_all(fd, memoryview(part), at)
        at += len(part)


def claim(state_fd: int, layout: Layout, page: int) -> None:
    """Have the next checkpoint save *page*."""
    space.write_all(state_fd, memoryview(b"\x01"), layout.claimed + page)
