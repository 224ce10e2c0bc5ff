"""The files of a cache's bitmap, one by one: opened safely, locked, published; and the fields of the state file.

`proxy.state.opening` and its neighbours decide on the steps.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from time import time_ns
from typing import Container, Iterator, Optional

from ...errors import ConfigurationError
from ...making import is_at, is_own_file, make_afresh, open_or_make
from ...storage import space
from ...storage.blocks import steps
from ...storage.extents import file_extents
from ...storage.failure import Failure
from ...storage.space import NO_SPACE
from ...storage.writeback import Record, WriteBack
from ...system.file_locks import RangeLocks, do_nothing
from ...system.process import closed_on_error
from .belonging import SESSION_SIZE, UNKNOWN
from .format import (
    BEGUN,
    FAILURE,
    HEADER_SIZE,
    NUMBER,
    OPENING,
    PAGE,
    SHOWN,
    STEERING,
    STEERING_SIZE,
    SUCCEEDED,
    USERS,
    USERS_COUNT,
    Header,
    Steering,
    Times,
    pack_header,
    pack_steering,
    parse_header,
    parse_steering,
)

NEW = ".new"
"""What is appended to the name of a file that is not yet whole."""

_CHUNK = 256 * PAGE

_OPENING_TIME = 60.0
"""Seconds that somebody may take to open or close the files: a slow disk has a lot to sync then."""

LEAVING_TIME = 10.0
_TRIES = 10


def open_regular(path: str) -> int:
    """Open *path* for reading and writing. Raises `ConfigurationError` if it is no regular file."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigurationError(f"{path} is not a regular file: name another one for the bitmap")
    return fd


def open_locked(path: str) -> int:
    """Open *path* with its byte `OPENING` locked; waits for whoever has it."""
    while True:
        fd = open_regular(path)
        if _lock_opening(path, fd):
            return fd


def _lock_opening(path: str, fd: int) -> bool:
    """Lock the byte `OPENING`; False, and *fd* is closed, if the file is not the one at *path* any more."""
    with closed_on_error(fd):
        RangeLocks(fd).acquire(OPENING, 1, do_nothing, _OPENING_TIME)
        if is_at(path, fd):
            return True
    os.close(fd)
    return False


def open_new_locked(path: str, owners: Container[int]) -> int:
    """What `open_locked` does with a file that is made, or was left by who died over it, or is made by a sibling.

    What is none of *owners*', or no file of one name, is not touched but removed.
    Raises `ConfigurationError` if it cannot be.
    """
    for _ in range(_TRIES):
        fd = _open_own(path, owners)
        if fd is None:
            remove_strange(path)
        elif _lock_opening(path, fd):
            return fd
    raise _in_the_way(path)


def _open_own(path: str, owners: Container[int]) -> Optional[int]:
    try:
        fd = open_or_make(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO, errno.EISDIR):
            return None
        raise
    if is_own_file(os.fstat(fd), owners):
        return fd
    os.close(fd)
    return None


def remove_strange(path: str) -> None:
    """Remove what stands where a file of ours belongs. Raises `ConfigurationError` if that is not possible."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _in_the_way(path) from error


def _in_the_way(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is in the way, which is another user's or a link: remove it, or keep the bitmap in another directory"
    )


def make_new(path: str) -> int:
    """A descriptor of a new file that stands at *path* before it is whole. Raises `ConfigurationError`, `OSError`."""
    try:
        return make_afresh(path)
    except (PermissionError, FileExistsError, IsADirectoryError) as error:
        raise _in_the_way(path) from error


@contextmanager
def opening(state_fd: int) -> Iterator[None]:
    """Hold the lock of those who open or close the files."""
    locks = RangeLocks(state_fd)
    locks.acquire(OPENING, 1, do_nothing, LEAVING_TIME)
    try:
        yield
    finally:
        locks.release(OPENING, 1)


def is_alone(state_fd: int) -> bool:
    """Whether no other process uses the files; if so, others have to wait until `become_user` or `leave`.

    Raises `LockHeld` if somebody is in the way who does not use them.
    """
    return RangeLocks(state_fd).acquire_unless_used(USERS, USERS_COUNT)


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


def read_section(state_fd: int, at: int, length: int) -> bytes:
    return os.pread(state_fd, length, at)


def write_section(state_fd: int, at: int, data: bytes) -> None:
    """Replace a section, durably. `OPENING` is locked. Raises `OSError`."""
    space.write_all(state_fd, memoryview(data), at)
    write_back(state_fd).sync(state_fd)


def write_back(state_fd: int) -> WriteBack:
    """Write-back of the cache and of the files, as far as a process without an image of its own is concerned."""
    return WriteBack(failure_record(state_fd))


def failure_record(state_fd: int) -> Record:
    return Record(state_fd, FAILURE, lasting=True)


def read_failure(state_fd: int) -> Optional[Failure]:
    """The first write-back that failed since the last recovery; the durable copy is what counts then."""
    return failure_record(state_fd).read()


def shown_session(state_fd: int) -> bytes:
    """The session that was put on the cache image; means something while one system runs."""
    return os.pread(state_fd, SESSION_SIZE, SHOWN)


def note_shown(state_fd: int, session: bytes) -> None:
    space.write_all(state_fd, memoryview(session), SHOWN)


def stamp(fd: int) -> int:
    """Give a file a time of change that no later change will give it: in ns, or 0 where that cannot be."""
    now = time_ns() | 1  # the kernel's own times are those of its ticks
    with suppress(PermissionError):
        os.utime(fd, ns=(now, now))
    return now if os.fstat(fd).st_mtime_ns == now else UNKNOWN


def write_closed_header(state_fd: int, header: Header) -> None:
    """Replace the header for the last time, durably, and with it the time at which it says that this was."""
    header = header._replace(closed=header.closed._replace(state=stamp(state_fd)))
    write_header(state_fd, header)
    if header.closed.state:
        os.utime(state_fd, ns=(header.closed.state, header.closed.state))
        write_back(state_fd).sync(state_fd, metadata=True)


def times_of(bitmap_fd: int, state_fd: int) -> Times:
    """When the files were changed last."""
    return Times(os.fstat(bitmap_fd).st_mtime_ns, os.fstat(state_fd).st_mtime_ns)


def allocate(fd: int, size: int) -> None:
    """Have the file system keep space for *size* bytes: storing into the mapping must not fail for want of it."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # A full one may want some for its own books before it sees that all is there.
        if error.errno not in NO_SPACE or os.fstat(fd).st_blocks * 512 < size:
            raise


def clear(fd: int, size: int, offset: int = 0) -> None:
    """Make *size* bytes at *offset* zeros, which takes no space that is not there already."""
    start = offset
    for extent in list(file_extents(fd, offset, size)):
        for at, length in () if extent.hole else steps(start, extent.length, _CHUNK):
            if os.pread(fd, length, at).strip(b"\0"):
                space.write_zero_bytes(fd, at, length)
        start += extent.length


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


def succeeded(state_fd: int) -> int:
    """The number of the last checkpoint that succeeded."""
    return int(NUMBER.unpack(space.read_exactly(state_fd, NUMBER.size, SUCCEEDED))[0])


def reset_numbers(state_fd: int) -> None:
    """Count checkpoints from zero; nobody else may be waiting for one."""
    space.write_zero_bytes(state_fd, BEGUN, 16)
