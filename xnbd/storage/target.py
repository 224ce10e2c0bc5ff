"""A disk that is one file or one block device.

Reads are slices of a shared mapping, writes are ``pwrite(2)``: both see the one
page cache, so every process that serves the file sees what any of them wrote.
"""

from __future__ import annotations

import errno
import mmap
import os
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping

from ..errors import ConfigurationError
from ..making import make_file
from ..system.kept import Kept
from ..text import one_line
from . import image_use, space
from .extents import file_data_until, file_extents
from .failure import drop_cached, vouch_anew
from .image import Buffer, Extent, Identity, Image, Shared, Source, file_identity
from .writeback import Record, WriteBack, WriteBackFailed

LARGEST_FILE = (1 << 63) - 1
"""Bytes that a file can have at all (``off_t``)."""

Sync = Callable[[int], None]


def create_sparse(path: str, size: int) -> bool:
    """Make a sparse file of *size* bytes unless *path* exists; tell whether it was made.

    Raises `ConfigurationError` if it cannot be made.
    """
    try:
        fd = make_file(path)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigurationError(f"cannot create {path}: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.unlink(path)
        raise ConfigurationError(f"cannot create {path} with {size} bytes: {error.strerror}") from error
    finally:
        os.close(fd)
    return True


def open_disk(path: str, *, readonly: bool) -> int:
    """A descriptor of the file or block device at *path*, checked to be a disk.

    Raises `ConfigurationError` with what to do about it.
    """
    try:
        # Without O_NONBLOCK the opening of a FIFO waits for somebody at its other end.
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC)
        if not readonly and space.is_write_protected(fd):
            os.close(fd)
            raise OSError(errno.EROFS, "the device is write-protected")
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigurationError(f"cannot open {path}: its directory does not exist") from error
        if error.errno == errno.ENOENT and os.path.islink(path):
            there = one_line(os.readlink(path))
            raise ConfigurationError(f"cannot open {path}: it is a link to {there}, which does not exist") from error
        advice = "" if readonly and error.errno != errno.ENOENT else _ADVICE.get(error.errno or 0, "")
        raise ConfigurationError(f"cannot open {path}: {error.strerror}{advice}") from error
    try:
        if not space.device_size(fd):
            raise ConfigurationError(f"{path} is empty: truncate -s 1G {path} makes it a disk of 1 GiB")
    except OSError as error:
        os.close(fd)
        raise ConfigurationError(f"{path} is not a disk image: {error.strerror}") from error
    except ConfigurationError:
        os.close(fd)
        raise
    return fd


_ADVICE = {
    errno.ENOENT: " (truncate -s SIZE makes a new image, and so does --create SIZE of xnbd-server)",
    errno.EPERM: " (--readonly serves what cannot be written)",
    errno.EACCES: " (--readonly serves what cannot be written)",
    errno.EROFS: " (--readonly serves what cannot be written)",
}


def usable_size(path: str, *, readonly: bool) -> int:
    """Bytes of the disk at *path*, if a target could serve it. Raises `ConfigurationError` like `TargetSource`."""
    fd = open_disk(path, readonly=readonly)
    try:
        image_use.refuse_cache(fd, path)
        return space.device_size(fd)
    finally:
        os.close(fd)


def reopen(fd: int, *, readonly: bool) -> int:
    """A second, independent descriptor of the file behind *fd*, also if it was renamed since."""
    try:
        return os.open(f"/proc/self/fd/{fd}", (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.isdir("/proc/self/fd"):
            raise
        raise OSError(errno.ENOENT, "/proc is not mounted, and is needed") from None


def map_trouble(path: str, size: int, error: Exception) -> str:
    """Why a process could not open the disk once more and map it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"cannot map {path} ({size} bytes) into memory: {reason}"


def map_disk(fd: int, size: int) -> memoryview:
    """The disk of *size* bytes behind *fd* as shared memory to read from; less of it if the file has shrunk.

    The kernel is told not to read around what is touched: what is needed next, the
    request loop knows better (`server.session.page_prefetch`).
    """
    while True:
        length = min(size, os.lseek(fd, 0, os.SEEK_END))
        if not length:
            return memoryview(b"")
        try:
            mapping = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except ValueError:  # it has shrunk since
            if os.lseek(fd, 0, os.SEEK_END) < length:
                continue
            raise
        mapping.madvise(mmap.MADV_RANDOM)
        return memoryview(mapping)


class TargetSource(Source[Shared]):
    """The disk image at *path*. Raises `ConfigurationError` if it cannot be served."""

    mode = "target"

    def __init__(self, path: str, *, readonly: bool) -> None:
        self._fd = open_disk(path, readonly=readonly)
        image_use.use_as_disk(self._fd, path)
        self._describe(path, space.device_size(self._fd), readonly=readonly)
        try:
            vouch_anew(self._fd, path, readonly=readonly)
            self._witness = reopen(self._fd, readonly=readonly)
            self._open(os.fdatasync).close()
        except (OSError, OverflowError) as error:
            raise ConfigurationError(map_trouble(path, self.size, error)) from error

    def _describe(self, path: str, size: int, *, readonly: bool) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.description = f"disk image {self.name}"
        self.size = size
        self.readonly = readonly

    def pack(self, kept: Kept) -> Dict[str, Any]:
        return {"image": kept(self._fd), "witness": kept(self._witness), "size": self.size}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], path: str, *, readonly: bool) -> TargetSource:
        """The disk as the master's program before had it."""
        source = cls.__new__(cls)
        source._fd, source._witness = packed["image"], packed["witness"]
        source._describe(path, packed["size"], readonly=readonly)
        return source

    def open(self, shared: Shared) -> TargetImage:
        return self._open(self.write_back(shared).sync)

    def _open(self, sync: Sync) -> TargetImage:
        return TargetImage(reopen(self._fd, readonly=self.readonly), self.size, readonly=self.readonly, sync=sync)

    def write_back(self, shared: Shared) -> WriteBack:
        return WriteBack(Record(shared.fd, shared.failure_at), self._fd, self._witness)

    def flush(self, shared: Shared) -> None:
        try:
            self.write_back(shared).sync(self._fd)
        except WriteBackFailed:
            drop_cached(self._fd)
            raise

    def identity(self) -> Identity:
        return file_identity(self._fd)

    def allocated(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._witness)


class TargetImage(Image):
    """The disk of *size* bytes behind the descriptor *fd*, which this object owns from now on, and *sync* syncs."""

    def __init__(self, fd: int, size: int, *, readonly: bool, sync: Sync = os.fdatasync) -> None:
        self.fd = self.flat_fd = fd
        self._sync = sync
        self.size = size
        self.readonly = readonly
        self.readable: Callable[[], int] = self._map
        self._map()

    def _map(self) -> int:
        """Map the disk, as much as there is of it: done again and again while the file is too short."""
        self.flat = map_disk(self.fd, self.size)
        if len(self.flat) == self.size:
            self.readable = partial(os.lseek, self.fd, 0, os.SEEK_END)
        return len(self.flat)

    def read(self, offset: int, length: int) -> List[memoryview]:
        assert self.flat is not None
        return [self.flat[offset : offset + length]]

    def pread(self, offset: int, length: int) -> bytes:
        return space.read_exactly(self.fd, length, offset, "disk image")

    def write(self, offset: int, data: Buffer) -> None:
        written = os.pwrite(self.fd, data, offset)
        if written != len(data):
            space.write_all(self.fd, memoryview(data)[written:], offset + written)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        if may_trim and self._try(space.punch_hole, offset, length):
            return
        if fast and not space.zeroes_fast(self.fd):
            raise OSError(errno.EOPNOTSUPP, "zeros have to be written here")
        if not self._try(space.zero_range, offset, length):
            if fast:
                raise OSError(errno.EOPNOTSUPP, "zeros have to be written here")
            space.write_zero_bytes(self.fd, offset, length)

    def _try(self, change: Callable[[int, int, int], None], offset: int, length: int) -> bool:
        """Do what changes space; False if that is not possible here, and nothing was changed."""
        try:
            change(self.fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def trim(self, offset: int, length: int) -> None:
        self._try(space.discard, offset, length)

    def flush(self) -> None:
        self._sync(self.fd)

    def prefetch(self, offset: int, length: int) -> None:
        space.prefetch(self.fd, offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return file_extents(self.fd, offset, length)

    def data_until(self, offset: int) -> int:
        return file_data_until(self.fd, offset)

    def close(self) -> None:
        if self.flat is not None:
            self.flat.release()
        os.close(self.fd)
