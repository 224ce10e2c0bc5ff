"""The files that tell that clean blocks are right, when a server starts: ``.sums`` and ``.checked`` beside the bitmap.

The sums belong to a cache as its state file does: by id and session. Sums that are gone,
damaged, of another cache or of another day are made anew, empty. Nothing is refused for
that: clean blocks without a sum count as damaged, and are fetched again when they are read.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Tuple

from ...errors import ConfigurationError
from ...logs import log
from ...making import is_own_file
from ...storage import space
from ...system.process import closed_on_error
from . import files
from .belonging import NO_SESSION
from .entry import Entry
from .format import CHECKED_SUFFIX, NUMBER, SUMS_SUFFIX, BadHeader
from .memory_file import MemoryFile
from .pages import checked_size
from .sums import HEADER_SIZE, NUMBER_AT, SumsHeader, pack_sums_header, parse_sums_header, sums_size

_NO_FILE_OF_OURS = (errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""What opening a link, a FIFO or a directory ends with."""


def open_integrity(entry: Entry, state_fd: int) -> Tuple[int, int]:
    """Descriptors of the sums and of the map of checked blocks; entry's tie is that of the session that begins."""
    alone = files.is_alone(state_fd)
    sums_fd = _open_sums(entry, state_fd) if alone else _join_sums(entry, state_fd)
    with closed_on_error(sums_fd):
        file = MemoryFile(entry, CHECKED_SUFFIX, checked_size(entry.layout), state_fd)
        return sums_fd, _note_seen(entry, file.make()) if alone else file.join()


def _note_seen(entry: Entry, checked_fd: int) -> int:
    """Which pages of the bitmap have been looked at (`proxy.state.pages`)."""
    with closed_on_error(checked_fd):
        seen = bytearray(entry.layout.pages) if entry.seen is not None else bytearray(b"\x01" * entry.layout.pages)
        for page in entry.seen or ():
            seen[page] = 1
        space.write_all(checked_fd, memoryview(seen), checked_size(entry.layout) - entry.layout.pages)
    return checked_fd


def sync_sums(entry: Entry) -> None:
    """Make durable what former servers have left, before bits are that it speaks for. Raises `OSError`."""
    try:
        fd = files.open_regular(entry.path + SUMS_SUFFIX)
    except (OSError, ConfigurationError):
        return
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def last_checkpoint(entry: Entry) -> Tuple[bytes, int]:
    """The session that the sums are of, and the number of its last checkpoint, as far as they are there and tell it."""
    try:
        fd = files.open_regular(entry.path + SUMS_SUFFIX)
    except (OSError, ConfigurationError):
        return NO_SESSION, 0
    try:
        return _read(entry, fd).session, int(NUMBER.unpack(space.read_exactly(fd, NUMBER.size, NUMBER_AT))[0])
    except BadHeader:
        return NO_SESSION, 0
    finally:
        os.close(fd)


def forget_checkpoints(entry: Entry) -> None:
    """Checkpoints are about to be counted from zero again. Raises `OSError`."""
    with suppress(FileNotFoundError, ConfigurationError, BadHeader):
        fd = files.open_regular(entry.path + SUMS_SUFFIX)
        try:
            _read(entry, fd)
            space.write_zero_bytes(fd, NUMBER_AT, NUMBER.size)
        finally:
            os.close(fd)


def _header(entry: Entry) -> SumsHeader:
    tie = entry.header.tie
    return SumsHeader(entry.header.disk_size, tie.id, tie.session)


def _join_sums(entry: Entry, state_fd: int) -> int:
    """Raises `ConfigurationError`."""
    path = entry.path + SUMS_SUFFIX
    try:
        fd = _open_own(entry, state_fd)
        with closed_on_error(fd):
            if _read(entry, fd) == _header(entry):
                return fd
        os.close(fd)
    except (OSError, BadHeader):
        pass
    raise ConfigurationError(f"{path} is not the one that the servers that use {entry.path} share: stop them all first")


def _open_sums(entry: Entry, state_fd: int) -> int:
    """What is there if it is of this cache; else a new file, and the log has why if that matters."""
    try:
        fd = _open_own(entry, state_fd)
        with closed_on_error(fd):
            _check(entry, _read(entry, fd))
            os.ftruncate(fd, sums_size(entry.layout.blocks))
            _begin_session(entry, fd)
        return fd
    except FileNotFoundError:
        reason = "is gone"
    except (BadHeader, ConfigurationError) as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in _NO_FILE_OF_OURS:
            raise
        reason = "is no regular file"
    if entry.has_clean_blocks:
        told = "%s %s: blocks that clients have not written are fetched again when they are read"
        log.warning(told, entry.path + SUMS_SUFFIX, reason)
    return _make(entry)


def _open_own(entry: Entry, state_fd: int) -> int:
    """Raises `OSError`, and `ConfigurationError` if it is no file of ours."""
    fd = files.open_regular(entry.path + SUMS_SUFFIX)
    with closed_on_error(fd):
        if not is_own_file(os.fstat(fd), {*entry.owners, os.fstat(state_fd).st_uid}):
            raise ConfigurationError("is another user's")
    return fd


def _read(entry: Entry, fd: int) -> SumsHeader:
    """Raises `BadHeader`."""
    header = parse_sums_header(os.pread(fd, HEADER_SIZE, 0))
    if os.fstat(fd).st_size < sums_size(entry.layout.blocks):
        raise BadHeader("is too short")
    return header


def _check(entry: Entry, found: SumsHeader) -> None:
    """Raises `BadHeader` unless the sums are of this cache, and of its last session."""
    if found.disk_size != entry.header.disk_size or found.id != entry.header.tie.id:
        raise BadHeader("is of another cache")
    if found.session not in entry.former_sessions:
        raise BadHeader("is an older copy")


def _begin_session(entry: Entry, fd: int) -> None:
    space.write_all(fd, memoryview(pack_sums_header(_header(entry))), 0)
    os.fdatasync(fd)


def _make(entry: Entry) -> int:
    """Durable on return."""
    fd = files.make_new(entry.path + SUMS_SUFFIX)
    with closed_on_error(fd):
        os.ftruncate(fd, sums_size(entry.layout.blocks))
        _begin_session(entry, fd)
        space.sync_directory(os.path.dirname(entry.path))
    return fd
