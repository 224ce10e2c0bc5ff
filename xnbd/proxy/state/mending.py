"""The written map at a start (`proxy.state.written`): made, mended where it is in doubt, or made of the bitmap.

Nobody else uses the files meanwhile. What was found is durable before the pages count as
not exposed any more.
"""

from __future__ import annotations

import os
import zlib
from typing import Iterator, List, Tuple

from ...storage import space
from ...storage.bitmap import count_bits
from .copies import Region
from .files import clear, read_failure, write_back
from .format import PAGE, SUM, Layout
from .verdict import Trust

_PAGES_AT_ONCE = 256


def make_empty(state_fd: int, layout: Layout) -> None:
    """The map of a new bitmap, in a state file of zeros. Not yet durable."""
    whole = SUM.pack(zlib.crc32(bytes(PAGE))) * (layout.pages - 1)
    last = SUM.pack(zlib.crc32(bytes(_length_of(layout, layout.pages - 1))))
    space.write_all(state_fd, memoryview(whole + last), layout.sums)


def make_of_bitmap(bitmap_fd: int, state_fd: int, layout: Layout) -> None:
    """Count all that is local as written. Durable on return. Raises `OSError`."""
    for page, _, local in _pages(bitmap_fd, state_fd, layout):
        _replace(state_fd, layout, page, local)
    _end_exposure(state_fd, layout)


def settle(bitmap_fd: int, state_fd: int, layout: Layout, trust: Trust, *, closed: bool) -> int:
    """Have the map tell no less than clients have written; the number of blocks that count as written for doubt.

    The bitmap is as it will be. *closed*: the files were closed cleanly, so that all checksums count. Durable on
    return, unless nothing was in doubt. Raises `OSError`.
    """
    if trust is Trust.NOTHING:
        make_of_bitmap(bitmap_fd, state_fd, layout)
        return 0
    exposed = space.read_exactly(state_fd, layout.pages, layout.exposed)
    doubtful = exposed if trust is Trust.UNEXPOSED else bytes(layout.pages)
    excused = bytes(layout.pages) if closed or trust is Trust.UNEXPOSED else _marked(state_fd, layout)
    sums = _sums(state_fd, layout)
    blocks = 0
    for page, written, local in _pages(bitmap_fd, state_fd, layout):
        if doubtful[page] or (not excused[page] and zlib.crc32(written) != sums[page]):
            blocks += max(0, count_bits(local) - count_bits(written))
            _replace(state_fd, layout, page, local)
    if any(exposed) and (closed or trust is Trust.UNEXPOSED):
        _end_exposure(state_fd, layout)
    return blocks


def end_exposure(state_fd: int, layout: Layout) -> None:
    """Of a map that is durable, and right."""
    if any(space.read_exactly(state_fd, layout.pages, layout.exposed)):
        clear(state_fd, layout.pages, layout.exposed)


def _end_exposure(state_fd: int, layout: Layout) -> None:
    if read_failure(state_fd) is None:
        write_back(state_fd).sync(state_fd)
    else:  # all of the map has just been written again
        os.fdatasync(state_fd)
    end_exposure(state_fd, layout)


def _marked(state_fd: int, layout: Layout) -> bytes:
    """The pages that no checkpoint has saved since they were changed: their checksums are of another day."""
    dirty, claimed = (space.read_exactly(state_fd, layout.pages, at) for at in (layout.dirty, layout.claimed))
    return bytes(one | other for one, other in zip(dirty, claimed))


def _sums(state_fd: int, layout: Layout) -> List[int]:
    table = space.read_exactly(state_fd, SUM.size * layout.pages, layout.sums)
    return [checksum for (checksum,) in SUM.iter_unpack(table)]


def _pages(bitmap_fd: int, state_fd: int, layout: Layout) -> Iterator[Tuple[int, bytes, bytes]]:
    """All pages: number, content in the written map, content in the bitmap."""
    marks, bits = Region(state_fd, layout, layout.written), Region(bitmap_fd, layout, 0)
    for first in range(0, layout.pages, _PAGES_AT_ONCE):
        at = first * PAGE
        length = min(_PAGES_AT_ONCE * PAGE, layout.bitmap_size - at)
        written, local = marks.read(at, length), bits.read(at, length)
        for start in range(0, length, PAGE):
            yield first + start // PAGE, written[start : start + PAGE], local[start : start + PAGE]


def _length_of(layout: Layout, page: int) -> int:
    return min(PAGE, layout.bitmap_size - page * PAGE)


def _replace(state_fd: int, layout: Layout, page: int, content: bytes) -> None:
    space.write_all(state_fd, memoryview(content), layout.written + page * PAGE)
    os.pwrite(state_fd, SUM.pack(zlib.crc32(content)), layout.sums + SUM.size * page)
