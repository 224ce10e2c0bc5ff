"""How a client that reads is told of holes: by chunks without data."""

from __future__ import annotations

from typing import Iterator, Tuple

from ...storage.image import Image

HOLE_MINIMUM = 32 << 10
"""Holes shorter than this cost less as zeros on the wire than as a chunk of their own."""


class Holes:
    """Where an image has holes.

    It remembers where the last look found none: to look takes long on some file systems.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._data_from = self._data_until = 0

    def forget(self) -> None:
        """There may be holes where there were none."""
        self._data_until = 0

    def parts(self, offset: int, length: int) -> Iterator[Tuple[bool, int, int]]:
        """*length* bytes at *offset* as (hole?, offset, length); short holes count as data."""
        if not self._data_from <= offset < self._data_until:
            self._data_from, self._data_until = offset, self._image.data_until(offset)
        if offset + length <= self._data_until:
            yield False, offset, length
            return
        data_from = position = offset
        for extent in self._image.extents(offset, length):
            if extent.hole and extent.length >= HOLE_MINIMUM:
                if position > data_from:
                    yield False, data_from, position - data_from
                yield True, position, extent.length
                data_from = position + extent.length
            position += extent.length
        if position > data_from:
            yield False, data_from, position - data_from
