"""What a BLOCK_STATUS tells, by meta context.

``base:allocation`` is the NBD specification's: of a proxy's disk, what is not here counts as
data. ``xnbd:cached`` says which blocks are here, ``xnbd:written`` which of these are nowhere
else. For a plain target, as which a proxy may end, that is all of them.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, Iterator, List, Tuple

from ...protocol import constants as c
from ...storage.image import Image

Status = Tuple[int, int]
"""Length in bytes, and the status in the context."""


def status(context: str, image: Image, offset: int, length: int, limit: int) -> List[Status]:
    """At most *limit* extents of *image*, from *offset* on, in the *context* of this name."""
    merged: List[Status] = []
    for count, flags in _CONTEXTS[context](image, offset, length):
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + count, flags)
        elif len(merged) == limit:
            break
        else:
            merged.append((count, flags))
    return merged


def _allocation(image: Image, offset: int, length: int) -> Iterator[Status]:
    for extent in image.extents(offset, length):
        yield extent.length, c.STATE_HOLE | c.STATE_ZERO if extent.hole else 0


def _cached(image: Image, offset: int, length: int) -> Iterator[Status]:
    for count, so in image.cached(offset, length):
        yield count, c.STATE_SO if so else 0


def _written(image: Image, offset: int, length: int) -> Iterator[Status]:
    for count, so in image.written(offset, length):
        yield count, c.STATE_SO if so else 0


_CONTEXTS: Dict[str, Callable[[Image, int, int], Iterable[Status]]] = {
    c.BASE_ALLOCATION: _allocation,
    c.XNBD_CACHED: _cached,
    c.XNBD_WRITTEN: _written,
}
