"""Data of the cache that no bit speaks for: of fetches, and of blocks that were let go, whose process has died."""

from __future__ import annotations

import errno
import os
from typing import Iterator, Tuple

from ..storage.bitmap import Bitmap
from ..storage.blocks import BLOCK_SHIFT, touched
from .fetch_queue import PIECE


def pieces_with_leftovers(cache_fd: int, size: int, bitmap: Bitmap) -> Iterator[int]:
    """The pieces of the cache, of *size* bytes, that have some, or have a block that is on its way."""
    told = -1
    for offset, length in _data(cache_fd, size):
        for first, end, local in bitmap.runs(*touched(offset, length)):
            for piece in () if local else range(max(told + 1, first // PIECE), (end - 1) // PIECE + 1):
                told = piece
                yield piece


def takes(cache_fd: int) -> int:
    """Blocks that the cache takes on its file system."""
    return os.fstat(cache_fd).st_blocks * 512 >> BLOCK_SHIFT


def _data(fd: int, size: int) -> Iterator[Tuple[int, int]]:
    """Where the file is no hole, as far as its file system can tell; of a device nothing. Raises `OSError`."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EINVAL):
                return
            raise
        if start < end:
            yield start, end - start
