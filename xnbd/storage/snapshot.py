"""A disk as it was at one instant, while clients go on writing.

Where the file system can, the snapshot is a clone (``ioctl_ficlone(2)``). Elsewhere
it is copied in the background, and until that is done every process that is about to
change a block copies the old one first. Whoever copies a block holds the lock of its
byte of the snapshot's bitmap, from before it looks at the bit until after it has set
it; a block whose bit is set is left alone. The bitmap lies in memory: it ends with
the snapshot.

The file has no name until it is whole and on stable storage.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from typing import Callable, List, NamedTuple, Optional, Tuple

from ..making import WIDEST
from ..scoreboard.scoreboard import SnapshotPlace
from ..system.file_locks import RangeLocks, do_nothing
from . import space
from .bitmap import Bitmap, bitmap_size
from .blocks import BLOCK, BLOCKS_PER_BYTE, block_count, block_start, block_stop, bytes_of, steps, touched
from .filter import FilterImage
from .image import Buffer, Image
from .target import reopen

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")
_STEP = 64 * BLOCK
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.ENOSYS)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
_MAXIMUM_NAMES = 1000


class SnapshotFiles(NamedTuple):
    """Descriptors of the snapshot and of its bitmap."""

    output: int
    bitmap: int


class Keeper:
    """Copies blocks of *image* to the snapshot in *files*, for this process, which has opened both."""

    def __init__(self, image: Image, files: SnapshotFiles) -> None:
        self._image = image
        self._output = files.output
        self._bitmap_fd = files.bitmap
        self._failed = bitmap_size(block_count(image.size))
        self.bitmap = Bitmap(files.bitmap, block_count(image.size), spare=1)
        self._locks = RangeLocks(files.bitmap)
        self._closed = False

    @property
    def failed(self) -> int:
        """The errno because of which the snapshot is void, 0 as long as it is not."""
        return self.bitmap.octets[self._failed]

    def keep(self, offset: int, length: int, on_wait: Callable[[], None] = do_nothing) -> None:
        """Return when the old blocks in which *length* bytes at *offset* lie are in the snapshot, or it has failed."""
        first, end = touched(offset, length)
        if self._closed or self.bitmap.all_set(first, end) or self.failed:
            return
        for start in range(first - first % BLOCKS_PER_BYTE, end, _STEP // BLOCK):
            self._keep_blocks(max(first, start), min(end, start + _STEP // BLOCK), on_wait)

    def keep_at_once(self, offset: int, length: int, on_wait: Callable[[], None]) -> None:
        """What `keep` does, under one lock: for what takes no long time."""
        self._keep_blocks(*touched(offset, length), on_wait)

    def _keep_blocks(self, first: int, end: int, on_wait: Callable[[], None]) -> None:
        start, count = bytes_of(first, end)
        self._locks.acquire(start, count, on_wait)
        try:
            for run_first, run_end, kept in self.bitmap.runs(first, end):
                if not kept:
                    self._copy(block_start(run_first), block_stop(run_end - 1, self._image.size))
                    self.bitmap.set(run_first, run_end)
        except OSError as error:
            self.void(error.errno or 0)
        finally:
            self._locks.release(start, count)

    def _copy(self, offset: int, stop: int) -> None:
        """A short piece is read to see whether it is zeros: that takes less time than asking where holes are."""
        if stop - offset <= _STEP:
            self._copy_data(offset, stop - offset)
            return
        for extent in self._image.extents(offset, stop - offset):
            if not extent.hole:
                for at, count in steps(offset, extent.length, _STEP):
                    self._copy_data(at, count)
            offset += extent.length

    def _copy_data(self, offset: int, length: int) -> None:
        data = self._image.pread(offset, length)
        if data != bytes(length):
            space.write_all(self._output, memoryview(data), offset)

    def void(self, number: int) -> None:
        """Give the snapshot up because of the errno *number*, and its space back."""
        self.bitmap.octets[self._failed] = number if 0 < number < 256 else errno.EIO
        os.ftruncate(self._output, 0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.bitmap.octets.close()
        os.close(self._output)
        os.close(self._bitmap_fd)


class KeepingImage(FilterImage):
    """*image* while a snapshot of it is made: what is changed goes to *keeper* first."""

    def __init__(self, image: Image, keeper: Keeper) -> None:
        super().__init__(image)
        self._keeper = keeper

    def write(self, offset: int, data: Buffer) -> None:
        self._keeper.keep(offset, len(data), self.on_wait)
        try:
            self.image.write(offset, data)
        except OSError as error:
            if error.errno != errno.ENOSPC or self._keeper.failed:
                raise
            self._keeper.void(errno.ENOSPC)  # the disk's space counts for more than the snapshot's
            self.image.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        if fast:
            raise OSError(errno.EOPNOTSUPP, "a snapshot is being made")
        self._keeper.keep(offset, length, self.on_wait)
        self.image.write_zeroes(offset, length, may_trim=may_trim, fast=fast)

    def trim(self, offset: int, length: int) -> None:
        self._keeper.keep(offset, length, self.on_wait)
        self.image.trim(offset, length)

    def close(self) -> None:
        super().close()
        self._keeper.close()

    def let_go(self) -> None:
        """The snapshot has ended: its file need not be held open, nor its space."""
        self._keeper.close()

    def release(self) -> Image:
        """The image without the snapshot."""
        self._keeper.close()
        return self.image


def open_output(path: str, size: int) -> int:
    """A file of *size* bytes that has no name, beside *path*. Raises `OSError`."""
    directory = os.path.dirname(path)
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            raise OSError(error.errno, "the file system has no nameless files (O_TMPFILE)") from error
        raise
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def create_bitmap(size: int) -> int:
    """The bitmap of a snapshot of *size* bytes, and one byte that tells whether it has failed."""
    fd = os.memfd_create("xnbd-snapshot")
    os.ftruncate(fd, bitmap_size(block_count(size)) + 1)
    return fd


def can_clone(source_fd: int, output: int) -> bool:
    """Whether the file system has clones; tried with one block."""
    try:
        fcntl.ioctl(output, _FICLONERANGE, _CLONE_RANGE.pack(source_fd, 0, BLOCK, 0))
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def clone(source_fd: int, output: int) -> None:
    """Make *output* a clone of the file behind *source_fd*."""
    fcntl.ioctl(output, _FICLONE, source_fd)


def let_in(output: int, image: os.stat_result) -> None:
    """Give the nameless file the mode of the *image*, as far as that lets in nobody who may not read that.

    Where it cannot have the image's group, its own one gets no more than everybody.
    """
    mode = image.st_mode & WIDEST
    if os.fstat(output).st_gid != image.st_gid:
        try:
            os.fchown(output, -1, image.st_gid)
        except OSError:
            mode &= ~0o070 | mode << 3
    os.fchmod(output, mode)


def publish(output: int, path: str) -> str:
    """Sync the nameless file and give it the first free name of *path* and *path*.1, .2, ...: durable on return."""
    os.fsync(output)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = _link(output, path, directory)
        try:
            os.fsync(directory)
        except OSError:
            os.unlink(name)
            raise
    finally:
        os.close(directory)
    return name


def _link(output: int, path: str, directory: int) -> str:
    """Python follows the link in ``/proc`` only if it is given a directory (``linkat(2)``)."""
    for number in range(_MAXIMUM_NAMES):
        name = f"{path}.{number}" if number else path
        try:
            os.link(f"/proc/self/fd/{output}", name, src_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, "too many snapshots in one second")


def snapshot_name(path: str) -> str:
    return f"{path}.snapshot.{int(time.time())}"


def place_of(files: SnapshotFiles, namespace: int) -> SnapshotPlace:
    """Where others find *files* of this process, which is of the PID *namespace*."""
    return SnapshotPlace(os.getpid(), files.output, files.bitmap, namespace, _identities(files))


def _identities(files: SnapshotFiles) -> Tuple[int, int, int, int]:
    output, bitmap = (os.fstat(fd) for fd in files)
    return output.st_dev, output.st_ino, bitmap.st_dev, bitmap.st_ino


def open_files(place: SnapshotPlace) -> Optional[SnapshotFiles]:
    """The files of the snapshot that is made at *place*, of this PID namespace; None if they are not there any more.

    Another process may have the number by now, and its descriptors are nobody's
    business: they are opened as a path only, and looked at first. Raises `OSError`.
    """
    looked_at: List[int] = []
    try:
        for number in (place.output, place.bitmap):
            looked_at.append(os.open(f"/proc/{place.pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC))
        found = SnapshotFiles(*looked_at)
        return duplicate(found) if _identities(found) == place.files else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
    finally:
        for fd in looked_at:
            os.close(fd)


def duplicate(files: SnapshotFiles) -> SnapshotFiles:
    """The same files, opened once more: locks belong to a descriptor."""
    return SnapshotFiles(reopen(files.output, readonly=False), reopen(files.bitmap, readonly=False))
