"""Where a file has data and where it has holes: ``lseek(2)``, SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import errno
import os
from typing import Iterator

from .image import Extent

_NEVER = 1 << 63


def file_extents(fd: int, offset: int, length: int) -> Iterator[Extent]:
    """What *length* bytes at *offset* are made of; beyond the file's end there is a hole.

    A file system that cannot tell says that all is data, and so does this of a block device.
    """
    end = offset + length
    while offset < end:
        data = min(_seek_data(fd, offset), end)
        if data > offset:
            yield Extent(data - offset, hole=True)
            offset = data
            continue
        hole = min(_seek_hole(fd, offset), end)
        if hole > offset:  # else another process has just punched a hole here
            yield Extent(hole - offset, hole=False)
        offset = hole


def file_data_until(fd: int, offset: int) -> int:
    """Where the data at *offset* ends; *offset* itself if a hole is there.

    On some file systems this takes as long as there is data: what comes back is
    worth remembering.
    """
    return _seek_hole(fd, offset) if _seek_data(fd, offset) == offset else offset


def _seek_data(fd: int, offset: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return _NEVER
        if error.errno == errno.EINVAL:
            return offset
        raise


def _seek_hole(fd: int, offset: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO):
            return _NEVER
        raise
