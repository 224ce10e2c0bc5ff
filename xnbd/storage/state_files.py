"""The files of a cache's bitmap, step by step: `storage.state` decides on the steps."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import Iterator, NamedTuple, Optional

from ..errors import ConfigurationError
from ..process import closed_on_error
from . import space
from .bitmap import count_bits
from .locks import RangeLocks, do_nothing
from .state_format import (
    BEGUN,
    FAILURE,
    HEADER_SIZE,
    OPENING,
    PAGE,
    STEERING,
    STEERING_SIZE,
    USERS,
    USERS_COUNT,
    Header,
    Layout,
    Steering,
    pack_header,
    pack_steering,
    parse_header,
    parse_steering,
)
from .writeback import Failure, Record, WriteBack

NEW = ".new"
"""What is appended to the name of a file that is not yet whole."""

_CHUNK = 256 * PAGE


def open_regular(path: str, flags: int = 0) -> int:
    """Open *path* for reading and writing. Raises `ConfigurationError` if it is no regular file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigurationError(f"{path} is not a regular file: name another one for the bitmap")
    return fd


def open_locked(path: str, flags: int = 0) -> int:
    """Open *path* with its byte `OPENING` locked; waits for whoever has it."""
    while True:
        fd = open_regular(path, flags)
        with closed_on_error(fd):
            RangeLocks(fd).acquire(OPENING, 1, do_nothing)
            if _is_at(path, fd):
                return fd
        os.close(fd)


def _is_at(path: str, fd: int) -> bool:
    """Whether the file behind *fd* has not been replaced or renamed."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextmanager
def opening(state_fd: int) -> Iterator[None]:
    """Hold the lock of those who open or close the files."""
    locks = RangeLocks(state_fd)
    locks.acquire(OPENING, 1, do_nothing)
    try:
        yield
    finally:
        locks.release(OPENING, 1)


def is_alone(state_fd: int) -> bool:
    """Whether no other process uses the files; if so, others have to wait until `become_user` or `leave`."""
    return RangeLocks(state_fd).try_acquire(USERS, USERS_COUNT)


def become_user(state_fd: int) -> None:
    """Show that this process uses the files; the descriptor's end takes it back."""
    leave(state_fd)
    RangeLocks(state_fd).acquire(USERS + int.from_bytes(os.urandom(7), "little"), 1, do_nothing)


def leave(state_fd: int) -> None:
    RangeLocks(state_fd).release(USERS, USERS_COUNT)


def read_header(state_fd: int) -> Header:
    """Raises `BadHeader`."""
    return parse_header(os.pread(state_fd, HEADER_SIZE, 0))


def write_header(state_fd: int, header: Header) -> None:
    """Replace the header, durably. `OPENING` is locked."""
    put_header(state_fd, header)
    write_back(state_fd).sync(state_fd)


def put_header(state_fd: int, header: Header) -> None:
    """Replace the header in memory. `OPENING` is locked."""
    space.write_all(state_fd, memoryview(pack_header(header)), 0)


def read_steering(state_fd: int) -> Steering:
    return parse_steering(os.pread(state_fd, STEERING_SIZE, STEERING))


def write_steering(state_fd: int, steering: Steering) -> None:
    """Replace it, durably. `OPENING` is locked. Raises `ValueError` for an address that is too long."""
    space.write_all(state_fd, memoryview(pack_steering(steering)), STEERING)
    write_back(state_fd).sync(state_fd)


def write_back(state_fd: int) -> WriteBack:
    """Write-back of the cache and of the files, as far as a process without an image of its own is concerned."""
    return WriteBack(failure_record(state_fd))


def failure_record(state_fd: int) -> Record:
    return Record(state_fd, FAILURE, lasting=True)


def read_failure(state_fd: int) -> Optional[Failure]:
    """The first write-back that failed since the last recovery; the durable copy is what counts then."""
    return failure_record(state_fd).read()


def allocate(fd: int, size: int) -> None:
    """Have the file system keep space for *size* bytes: storing into the mapping must not fail for want of it."""
    os.posix_fallocate(fd, 0, size)


def publish(path: str) -> None:
    """Put the new file, which is whole and synced, into the place of *path*; durable on return."""
    os.rename(path + NEW, path)
    space.sync_directory(os.path.dirname(path))


def remove_unfinished(path: str) -> None:
    """Remove the new file that was to become *path*, if there is one."""
    try:
        os.unlink(path + NEW)
    except FileNotFoundError:
        pass


class Difference(NamedTuple):
    """A page of the live bitmap that is not as in the durable copy."""

    page: int
    live: bytes
    durable: bytes

    @property
    def forgotten(self) -> int:
        """How many bits are set in the live bitmap only."""
        live, durable = (int.from_bytes(octets, "little") for octets in (self.live, self.durable))
        return bin(live & ~durable).count("1")


def differences(bitmap_fd: int, state_fd: int, layout: Layout) -> Iterator[Difference]:
    """All pages that differ, by reading both in full: some 0.1 s for a disk of 4 TiB."""
    for start in range(0, layout.bitmap_size, _CHUNK):
        length = min(_CHUNK, layout.bitmap_size - start)
        live = space.read_exactly(bitmap_fd, length, start)
        durable = space.read_exactly(state_fd, length, layout.durable + start)
        if live == durable:
            continue
        for at in range(0, length, PAGE):
            pages = live[at : at + PAGE], durable[at : at + PAGE]
            if pages[0] != pages[1]:
                yield Difference((start + at) // PAGE, *pages)


def count_set(fd: int, length: int, offset: int) -> int:
    """How many bits are set in *length* bytes at *offset*."""
    parts = (space.read_exactly(fd, min(_CHUNK, length - at), offset + at) for at in range(0, length, _CHUNK))
    return sum(map(count_bits, parts))


def save_live(state_fd: int, layout: Layout, difference: Difference) -> None:
    """Put the live page into the durable copy."""
    space.write_all(state_fd, memoryview(difference.live), layout.durable + difference.page * PAGE)


def restore_durable(bitmap_fd: int, difference: Difference) -> None:
    """Put the durable page into the live bitmap."""
    space.write_all(bitmap_fd, memoryview(difference.durable), difference.page * PAGE)


def forget_failure(bitmap_fd: int, state_fd: int, layout: Layout) -> None:
    """The live bitmap is as the durable copy now: make both so on stable storage, and clear the failure.

    All of the durable copy is written again: pages of it may be clean in memory that
    are not on stable storage. Raises `OSError`.
    """
    os.fdatasync(bitmap_fd)
    for start in range(0, layout.bitmap_size, _CHUNK):
        at, length = layout.durable + start, min(_CHUNK, layout.bitmap_size - start)
        space.write_all(state_fd, memoryview(space.read_exactly(state_fd, length, at)), at)
    os.fdatasync(state_fd)
    failure_record(state_fd).clear()


def claim(state_fd: int, layout: Layout, page: int) -> None:
    """Have the next checkpoint save *page*."""
    space.write_all(state_fd, memoryview(b"\x01"), layout.claimed + page)


def reset_numbers(state_fd: int) -> None:
    """Count checkpoints from zero; nobody else may be waiting for one."""
    space.write_zero_bytes(state_fd, BEGUN, 16)
