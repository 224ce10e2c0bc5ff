"""Zeros and holes in files and block devices, by the means the kernel has for each.

Python offers no ``fallocate(2)`` with a mode. The same operations are reached by
``ioctl(2)``: ``FS_IOC_UNRESVSP64`` and ``FS_IOC_ZERO_RANGE`` for regular files
(``ioctl_xfs``; every file system since Linux 5.6), ``BLKDISCARD`` and
``BLKZEROOUT`` for block devices (``linux/fs.h``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from functools import partial
from typing import Callable, Tuple

from .blocks import steps

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKROGET = 0x125E
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_FS_IOC_UNRESVSP64 = 0x4030582B
_FS_IOC_ZERO_RANGE = 0x40305839
_SPACE_RESV = struct.Struct("=hh4xqqiI16x")

STEP = 64 << 20
"""Bytes zeroed by one call: the kernel holds the file's lock for so long, and other writers wait."""

_KEEP_SIZE, _PUNCH_HOLE = 1, 2

_PREFETCH = 128 << 10

_ZEROS = bytes(256 << 10)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors that say that there is no room: of the file system, or of the user's share."""

BAD_PLACE = (errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ, errno.EBADMSG, errno.EUCLEAN)
"""Errors by which a disk, or its file system, tells that it cannot read or write a certain place."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


def device_size(fd: int) -> int:
    """Size in bytes of a regular file or a block device.

    Raises `OSError` (ENODEV) for anything else.
    """
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        (size,) = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
        return int(size)
    raise OSError(errno.ENODEV, "neither a regular file nor a block device")


def is_write_protected(fd: int) -> bool:
    """Whether *fd* is a block device that was set read-only: such a one opens for writing all the same."""
    if not _is_block_device(fd):
        return False
    (protected,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    return bool(protected)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """``pwrite(2)`` until all of *data* is written; raises `OSError` if it cannot be."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def read_exactly(fd: int, length: int, offset: int, what: str = "file") -> bytes:
    """``pread(2)`` of a file that has all of these bytes; raises `OSError` (EIO) if *what* it is has shrunk."""
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise OSError(errno.EIO, f"the {what} has shrunk")
    return data


def sync_directory(path: str) -> None:
    """Make the names in the directory *path* durable. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_zero_bytes(fd: int, offset: int, length: int) -> None:
    """Zeros the slow way, which works everywhere."""
    zeros = memoryview(_ZEROS)
    for position, count in steps(offset, length, len(_ZEROS)):
        write_all(fd, zeros[:count], position)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Zeros that take no space. Raises `OSError` (EOPNOTSUPP) where that is not possible."""
    if _is_block_device(fd):
        _zero_device(fd, offset, length, _punch_device)
    else:
        _change_space(fd, _FS_IOC_UNRESVSP64, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Zeros that stay allocated. Raises `OSError` (EOPNOTSUPP) where only writing makes them."""
    if _is_block_device(fd):
        _zero_device(fd, offset, length, partial(_device_ioctl, request=_BLKZEROOUT))
    else:
        _change_space(fd, _FS_IOC_ZERO_RANGE, offset, length)


def discard(fd: int, offset: int, length: int) -> None:
    """Give space back; the bytes read as zeros in a file, as anything on a block device."""
    if not _is_block_device(fd):
        punch_hole(fd, offset, length)
        return
    start, end = _whole_sectors(fd, offset, length)
    if start < end:
        _in_steps(partial(_device_ioctl, fd, request=_BLKDISCARD), start, end - start)


def _change_space(fd: int, request: int, offset: int, length: int) -> None:
    def change(at: int, count: int) -> None:
        fcntl.ioctl(fd, request, _SPACE_RESV.pack(0, os.SEEK_SET, at, count, 0, 0))

    _in_steps(change, offset, length)


def zeroes_fast(fd: int) -> bool:
    """Whether `zero_range` is worth trying in a hurry: the kernel does the writing for a device that cannot zero."""
    if not _is_block_device(fd):
        return True
    device = os.fstat(fd).st_rdev
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{place}/queue", f"{place}/../queue"):  # a partition has its disk's
        try:
            with open(f"{queue}/write_zeroes_max_bytes") as file:
                return int(file.read()) > 0
        except FileNotFoundError:
            continue
    return False


def prefetch(fd: int, offset: int, length: int) -> None:
    """Begin to read; in pieces, for the kernel cuts a long one to the device's read-ahead."""
    if length <= _PREFETCH:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        return
    for at, count in steps(offset, length, _PREFETCH):
        os.posix_fadvise(fd, at, count, os.POSIX_FADV_WILLNEED)


def _zero_device(fd: int, offset: int, length: int, zero: Callable[[int, int, int], None]) -> None:
    """Whole sectors by the device, the ragged ends by writing."""
    start, end = _whole_sectors(fd, offset, length)
    if start >= end:
        write_zero_bytes(fd, offset, length)
        return
    _in_steps(partial(zero, fd), start, end - start)
    write_zero_bytes(fd, offset, start - offset)
    write_zero_bytes(fd, end, offset + length - end)


def _device_ioctl(fd: int, offset: int, length: int, *, request: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))


def _punch_device(fd: int, offset: int, length: int) -> None:
    """``fallocate(2)`` itself: no ioctl lets a device unmap and promises zeros."""
    import ctypes

    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _in_steps(change: Callable[[int, int], None], offset: int, length: int) -> None:
    """*change* all of the range; what "not supported" looks like is the same for every caller."""
    try:
        for position, count in steps(offset, length, STEP):
            change(position, count)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
        raise


def _whole_sectors(fd: int, offset: int, length: int) -> Tuple[int, int]:
    (sector,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return -(-offset // sector) * sector, (offset + length) // sector * sector


def _is_block_device(fd: int) -> bool:
    return stat.S_ISBLK(os.fstat(fd).st_mode)
