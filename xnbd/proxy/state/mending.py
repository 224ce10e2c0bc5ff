"""The written map at a start (`proxy.state.written`): made, mended where it is in doubt, or made of the bitmap.

Nobody else uses the files meanwhile. What was found is durable before the pages count as
not exposed any more.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import Iterator

from ...storage import space
from ...storage.bitmap import count_bits
from .copies import Region, pieces
from .files import clear, read_failure, write_back
from .format import PAGE, SUM, Layout
from .verdict import Trust

_MARK = re.compile(rb"[^\x00]")


def make_empty(state_fd: int, layout: Layout) -> None:
    """The map of a new bitmap, in a state file of zeros. Not yet durable."""
    _note_zeros(state_fd, layout, 0, layout.pages)


def make_of_bitmap(bitmap_fd: int, state_fd: int, layout: Layout) -> None:
    """Count all that is local as written. Durable on return. Raises `OSError`."""
    marks, bits = Region(state_fd, layout, layout.written), Region(bitmap_fd, layout, 0)
    done = 0
    for first, end in pieces(marks, bits):
        _note_zeros(state_fd, layout, done, first)
        _replace(state_fd, layout, first, bits.read(first, end))
        done = end
    _note_zeros(state_fd, layout, done, layout.pages)
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
    marks, bits = Region(state_fd, layout, layout.written), Region(bitmap_fd, layout, 0)
    doubtful = set(misfits(marks, state_fd, layout))
    if trust is Trust.UNEXPOSED:
        doubtful.update(match.start() for match in _MARK.finditer(exposed))
    elif not closed:
        doubtful = {page for page in doubtful if not _is_marked(state_fd, layout, page)}
    blocks = 0
    for page in doubtful:
        local, written = bits.read(page, page + 1), marks.read(page, page + 1)
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


def _is_marked(state_fd: int, layout: Layout, page: int) -> bool:
    """Whether no checkpoint has saved *page* since it was changed: its checksum is of another day."""
    return any(os.pread(state_fd, 1, start + page) != b"\0" for start in (layout.dirty, layout.claimed))


def misfits(marks: Region, state_fd: int, layout: Layout) -> Iterator[int]:
    """The pages of the written map, *marks*, that do not have their checksums."""
    noted = space.read_exactly(state_fd, SUM.size * layout.pages, layout.sums)
    done = 0
    for first, end in pieces(marks):
        yield from _differing(noted, done, _sums_of_zeros(layout, done, first))
        yield from _differing(noted, first, _sums_of(marks.read(first, end)))
        done = end
    yield from _differing(noted, done, _sums_of_zeros(layout, done, layout.pages))


def _differing(noted: bytes, first: int, sums: bytes) -> Iterator[int]:
    """The pages from *first* on with these *sums* that have others in *noted*, which is of all."""
    start = SUM.size * first
    if noted[start : start + len(sums)] == sums:
        return
    for at in range(0, len(sums), SUM.size):
        if noted[start + at : start + at + SUM.size] != sums[at : at + SUM.size]:
            yield first + at // SUM.size


def _sums_of(content: bytes) -> bytes:
    """The checksums of these pages."""
    return b"".join([SUM.pack(zlib.crc32(content[at : at + PAGE])) for at in range(0, len(content), PAGE)])


def _sums_of_zeros(layout: Layout, first: int, end: int) -> bytes:
    """The checksums of these pages if they are zeros; the last one of all may be shorter."""
    sums = _sums_of(bytes(PAGE)) * (end - first)
    if first < end == layout.pages:
        sums = sums[: -SUM.size] + _sums_of(bytes(layout.bitmap_size - (end - 1) * PAGE))
    return sums


def _note_zeros(state_fd: int, layout: Layout, first: int, end: int) -> None:
    space.write_all(state_fd, memoryview(_sums_of_zeros(layout, first, end)), layout.sums + SUM.size * first)


def _replace(state_fd: int, layout: Layout, first: int, content: bytes) -> None:
    """Have the pages from *first* on have this *content*."""
    space.write_all(state_fd, memoryview(content), layout.written + first * PAGE)
    space.write_all(state_fd, memoryview(_sums_of(content)), layout.sums + SUM.size * first)
