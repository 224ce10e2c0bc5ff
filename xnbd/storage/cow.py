"""A disk over a base image that never changes: what is written goes to an overlay.

The overlay is a sparse file without a name, so that it is gone however the server
ends; the bitmap tells which blocks live in it and has no file at all. All workers
of one server share both.

The base may become shorter under the server: what clients have written is served on,
the rest behind its end is an I/O error.

A block moves to the overlay under the lock of its bitmap byte: first the data, old
bytes from the base around the new ones, then the bit. From then on it is written in
place without any lock. Bits are never taken back: trimmed blocks are holes of the
overlay that hide the base.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from ..making import give, make_file
from ..system.file_locks import RangeLocks
from ..system.kept import Kept
from . import image_use, space
from .bitmap import Bitmap, bitmap_size
from .blocks import BLOCK, block_count, block_start, block_stop, bytes_of, covered, steps, touched
from .extents import file_data_until, file_extents
from .image import Buffer, Extent, Identity, Image, Shared, Source, file_identity
from .target import Sync, map_disk, map_trouble, open_disk, reopen
from .writeback import Record, WriteBack

_SLOW_STEP = 1 << 20
"""Bytes zeroed under one lock where zeros have to be written."""

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class CowSource(Source[Shared]):
    """The base image at *path* with an empty overlay in *directory*.

    Without a directory the overlay lies beside the base, or in ``$TMPDIR`` where
    nothing can be written there. Raises `ConfigurationError`.
    """

    mode = "cow"

    def __init__(self, path: str, *, readonly: bool, directory: Optional[str] = None) -> None:
        self._base = open_disk(path, readonly=True)
        image_use.use_as_disk(self._base, path)
        self._describe(path, space.device_size(self._base), readonly=readonly)
        self._overlay = _open_overlay(directory, os.path.dirname(path), self.size)
        try:
            self._abilities = _try_out(self._overlay)
        except OSError as error:
            raise ConfigurationError(f"cannot keep changes in {directory or 'a file'}: {error.strerror}") from error
        self._bitmap = os.memfd_create("xnbd-cow-bitmap")
        os.ftruncate(self._bitmap, bitmap_size(block_count(self.size)))
        try:
            self._open(_do_not_hear).close()
        except (OSError, OverflowError) as error:
            raise ConfigurationError(map_trouble(path, self.size, error)) from error

    def _describe(self, path: str, size: int, *, readonly: bool) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.description = f"copy-on-write disk over {self.name}"
        self.size = size
        self.readonly = readonly

    def pack(self, kept: Kept) -> Dict[str, Any]:
        fds = {"base": kept(self._base), "overlay": kept(self._overlay), "bitmap": kept(self._bitmap)}
        return {**fds, "size": self.size, "abilities": self._abilities._asdict()}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], path: str, *, readonly: bool) -> CowSource:
        """The disk as the master's program before had it, with what clients have written."""
        source = cls.__new__(cls)
        source._base, source._overlay, source._bitmap = packed["base"], packed["overlay"], packed["bitmap"]
        source._abilities = _Abilities(**packed["abilities"])
        source._describe(path, packed["size"], readonly=readonly)
        return source

    def open(self, shared: Shared) -> CowImage:
        return self._open(self.write_back(shared).hear)

    def _open(self, hear: Sync) -> CowImage:
        return CowImage(
            reopen(self._base, readonly=True),
            reopen(self._overlay, readonly=False),
            reopen(self._bitmap, readonly=False),
            self.size,
            self._abilities,
            readonly=self.readonly,
            hear=hear,
        )

    def write_back(self, shared: Shared) -> WriteBack:
        return WriteBack(Record(shared.fd, shared.failure_at), witness=self._overlay)

    def length(self) -> int:
        return space.device_size(self._base)

    def identity(self) -> Identity:
        return file_identity(self._overlay)

    def allocated(self) -> int:
        return sum(os.fstat(fd).st_blocks * 512 for fd in (self._base, self._overlay))

    def flush(self, shared: Shared) -> None:
        """Nothing but to tell of a failure: the overlay ends with the server."""
        self.write_back(shared).check()

    def close(self) -> None:
        for fd in (self._base, self._overlay, self._bitmap):
            os.close(fd)


class CowImage(Image):
    """The disk for one process, which owns the three descriptors from now on.

    *hear* raises `OSError` if the overlay, whose descriptor it is called with, has lost something.
    """

    def __init__(
        self, base: int, overlay: int, bitmap: int, size: int, abilities: _Abilities, *, readonly: bool, hear: Sync
    ) -> None:
        self.size = size
        self._hear = hear
        self.readonly = readonly
        self._base, self._overlay = base, overlay
        self._bitmap_fd = bitmap
        self._abilities = abilities
        self._bitmap = Bitmap(bitmap, block_count(size))
        self._locks = RangeLocks(bitmap)
        self._octets = self._bitmap.octets
        self._overlay_view = map_disk(overlay, size)
        self.readable: Callable[[], int] = self._look_at_base
        self._base_view = memoryview(b"")
        self._look_at_base()

    def _look_at_base(self) -> int:
        """See how much there is of the base, and map it: done again and again while the file is too short.

        Whatever that is, in the overlay all of the disk can be.
        """
        self._base_end = os.lseek(self._base, 0, os.SEEK_END)
        if len(self._base_view) < min(self._base_end, self.size):
            self._base_view = map_disk(self._base, self.size)
        return self.size

    def pread(self, offset: int, length: int) -> bytes:
        parts = self._parts(offset, length)
        return b"".join(space.read_exactly(fd, count, at, "base image") for fd, at, count in parts)

    # A byte of the bitmap speaks for 32 KiB (1 << 15). Most requests lie within one, and most such
    # bytes are all set or all clear: reads and writes look there first.

    def read(self, offset: int, length: int) -> List[memoryview]:
        stop = offset + length
        byte = offset >> 15
        if (stop - 1) >> 15 == byte:
            octet = self._octets[byte]
            if not octet and stop <= self._base_end:
                return [self._base_view[offset:stop]]
            if octet == 0xFF:
                return [self._overlay_view[offset:stop]]
        pieces = []
        first, end = touched(offset, length)
        for run_first, run_end, local in self._bitmap.runs(first, end):
            view = self._overlay_view if local else self._base_view
            piece_stop = min(stop, block_start(run_end))
            if not local and piece_stop > self._base_end:
                raise _shrunk()
            pieces.append(view[max(offset, block_start(run_first)) : piece_stop])
        return pieces

    def write(self, offset: int, data: Buffer) -> None:
        length = len(data)
        byte = offset >> 15
        if not length:
            return
        if self._octets[byte] == 0xFF and (offset + length - 1) >> 15 == byte:
            self._write_overlay(offset, data)
            return
        first, end = touched(offset, length)
        if not self._bitmap.all_set(first, end):
            start, count = bytes_of(first, end)
            self._locks.acquire(start, count, self.on_wait)
            try:
                self._write_locked(offset, data, first, end)
            finally:
                self._locks.release(start, count)
        else:
            self._write_overlay(offset, data)

    def _write_locked(self, offset: int, data: Buffer, first: int, end: int) -> None:
        """Write *data*, with what the base has around it in blocks that were not local."""
        stop = offset + len(data)
        head, tail = block_start(first), block_stop(end - 1, self.size)
        if offset == head or first in self._bitmap:
            head = offset
        if stop == tail or end - 1 in self._bitmap:
            tail = stop
        if head != offset or tail != stop:
            data = b"".join((self._read_base(head, offset), data, self._read_base(stop, tail)))
        self._write_overlay(head, data)
        self._bitmap.set(first, end)

    def _write_overlay(self, offset: int, data: Buffer) -> None:
        written = os.pwrite(self._overlay, data, offset)
        if written != len(data):
            space.write_all(self._overlay, memoryview(data)[written:], offset + written)

    def _read_base(self, offset: int, stop: int) -> bytes:
        return space.read_exactly(self._base, stop - offset, offset, "base image")

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        if not self._abilities.can(may_trim):
            if fast:
                raise OSError(errno.EOPNOTSUPP, "the overlay's file system can only write zeros")
            make_zeros, step = space.write_zero_bytes, _SLOW_STEP
        else:
            make_zeros, step = space.punch_hole if may_trim else space.zero_range, space.STEP
        for at, count in steps(offset, length, step):
            self._zero(at, count, make_zeros)

    def trim(self, offset: int, length: int) -> None:
        if self._abilities.punch:
            self.write_zeroes(offset, length, may_trim=True, fast=False)

    def _zero(self, offset: int, length: int, make_zeros: Callable[[int, int, int], None]) -> None:
        """Whole blocks with *make_zeros*, what is left of a block at either end by writing."""
        stop = offset + length
        first, end = covered(offset, length, self.size)
        if first >= end:
            self.write(offset, bytes(length))
            return
        head, tail = block_start(first), block_stop(end - 1, self.size)
        self.write(offset, bytes(head - offset))
        start, count = bytes_of(first, end)
        self._locks.acquire(start, count, self.on_wait)
        try:
            make_zeros(self._overlay, head, tail - head)
            self._bitmap.set(first, end)
        finally:
            self._locks.release(start, count)
        self.write(tail, bytes(stop - tail))

    def flush(self) -> None:
        """Nothing is synced, for no crash leaves anything that could be durable; but what was lost is heard of."""
        self._hear(self._overlay)

    def prefetch(self, offset: int, length: int) -> None:
        for at, count, local in self._bitmap.parts(offset, length):
            space.prefetch(self._overlay if local else self._base, at, count)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for fd, at, count in self._parts(offset, length):
            yield from file_extents(fd, at, count)

    def data_until(self, offset: int) -> int:
        at, count, local = next(self._bitmap.parts(offset, self.size - offset))
        return min(file_data_until(self._overlay if local else self._base, at), at + count)

    def _parts(self, offset: int, length: int) -> Iterator[Tuple[int, int, int]]:
        """*length* bytes at *offset* by where they live: descriptor, offset, length. Raises `OSError` behind it."""
        for at, count, local in self._bitmap.parts(offset, length):
            if not local and at + count > self._base_end:
                raise _shrunk()
            yield self._overlay if local else self._base, at, count

    def close(self) -> None:
        self._base_view.release()
        self._overlay_view.release()
        self._octets.close()
        for fd in (self._base, self._overlay, self._bitmap_fd):
            os.close(fd)


def _do_not_hear(_fd: int) -> None:
    """For an image that is opened to see whether that works."""


def _shrunk() -> OSError:
    return OSError(errno.EIO, "the base image has shrunk")


class _Abilities(NamedTuple):
    """What the overlay's file system can do without writing: make holes, make allocated zeros."""

    punch: bool
    zero_range: bool

    def can(self, may_trim: bool) -> bool:
        return self.punch if may_trim else self.zero_range


def _try_out(overlay: int) -> _Abilities:
    """Find out on the *overlay* while it is still empty; it is empty again afterwards."""
    return _Abilities(
        zero_range=_works(space.zero_range, overlay),
        punch=_works(space.punch_hole, overlay),
    )


def _works(make_zeros: Callable[[int, int, int], None], fd: int) -> bool:
    try:
        make_zeros(fd, 0, BLOCK)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        if error.errno != errno.ENOSPC:  # which says that it was understood
            raise
    return True


def _open_overlay(directory: Optional[str], beside: str, size: int) -> int:
    """A sparse file of *size* bytes that has no name. Raises `ConfigurationError`."""
    places = [directory] if directory else [beside, os.environ.get("TMPDIR", "/tmp")]
    for place in places:
        try:
            fd = _open_nameless(place)
            os.ftruncate(fd, size)
            return fd
        except OSError as error:
            if error.errno in _NOT_WRITABLE and place != places[-1]:
                continue
            raise ConfigurationError(
                f"cannot keep changes in {place}: {error.strerror} (--cow-dir names another directory)"
            ) from error
    raise AssertionError("unreachable")


def _open_nameless(directory: str) -> int:
    """``O_TMPFILE``, or a file whose name is removed at once where the file system has none."""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
        give(fd)
        return fd
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not os.path.isdir(directory):
            raise
    path = os.path.join(directory, f".xnbd-cow.{os.getpid()}.{os.urandom(8).hex()}")
    fd = make_file(path)
    os.unlink(path)
    return fd
