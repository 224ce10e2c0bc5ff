"""The scoreboard of a cache, ``CACHE_BITMAP_IMAGE.board``: joined, or made anew by the first server that comes."""

from __future__ import annotations

import os
from contextlib import closing, suppress

from ...errors import ConfigurationError
from ...logs import log
from ...making import file_mode, is_own_file
from ...origin.address import overrules
from ...scoreboard.layout import OtherVersion, check_header, create_scoreboard, scoreboard_size, write_header
from ...scoreboard.scoreboard import Scoreboard
from ...storage.space import NO_SPACE
from ...storage.target import reopen
from ...system.process import closed_on_error
from . import files
from .entry import Entry
from .format import SCOREBOARD_SUFFIX, Steering

MAXIMUM_PROCESSES = 8192
"""Processes of all servers together that may use a cache."""


def open_scoreboard(entry: Entry, state_fd: int) -> int:
    """A descriptor of the scoreboard, made anew if nobody uses the files."""
    path = entry.path + SCOREBOARD_SUFFIX
    if not files.is_alone(state_fd):
        return _join_scoreboard(entry, path, state_fd)
    steering = _renew_steering(state_fd, entry.origin)
    fd = _clear_scoreboard(entry, path, state_fd)
    with closed_on_error(fd):
        write_header(fd)
        with closing(Scoreboard(reopen(fd, readonly=False))) as scoreboard:
            scoreboard.origin.address = steering.address
    return fd


def _renew_steering(state_fd: int, origin: str) -> Steering:
    """What still holds for a server that was started with *origin*. Raises `ConfigurationError`."""
    steering = files.read_steering(state_fd)
    address = origin if overrules(origin, steering.address) else steering.address
    renewed = Steering(switched=False, address=address)
    if renewed != steering:
        try:
            files.write_steering(state_fd, renewed)
        except ValueError as error:
            raise ConfigurationError(f"origin {origin}: {error}") from error
    return renewed


def refuse_other_version(entry: Entry) -> None:
    """Servers that use the files share a scoreboard, of which they have to mean the same.

    Before anything is believed that it says, and anything changed. Raises `ConfigurationError`.
    """
    with suppress(FileNotFoundError):  # `open_scoreboard` tells that
        fd = files.open_regular(entry.path + SCOREBOARD_SUFFIX)
        try:
            check_header(fd)
        except OtherVersion:
            raise ConfigurationError(
                f"cache bitmap {entry.path} is in use by another version of xnbd-server: stop that one first"
            ) from None
        finally:
            os.close(fd)


def _join_scoreboard(entry: Entry, path: str, state_fd: int) -> int:
    """A descriptor of the scoreboard of the servers that use the files already."""
    try:
        fd = files.open_regular(path)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} is gone, which the servers that use {entry.path} share: stop them all first"
        ) from None
    with closed_on_error(fd):
        if not _is_own(entry, fd, state_fd) or os.fstat(fd).st_size != scoreboard_size(MAXIMUM_PROCESSES):
            raise ConfigurationError(
                f"{path} is not the one that the servers that use {entry.path} share: stop them all first"
            )
    return fd


def _clear_scoreboard(entry: Entry, path: str, state_fd: int) -> int:
    """A descriptor of a scoreboard of zeros; a former one's space is used again, for there may be no other.

    Without space it is one in memory, which other servers cannot share.
    """
    with suppress(OSError, ConfigurationError):
        return _clear_former_scoreboard(entry, path, state_fd)
    try:
        fd = files.make_new(path)
        with closed_on_error(fd):
            files.allocate(fd, scoreboard_size(MAXIMUM_PROCESSES))
        return fd
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        files.remove_strange(path)
        log.warning("no space for %s: until the next start no other server can use %s too", path, entry.path)
        return create_scoreboard(MAXIMUM_PROCESSES)


def _clear_former_scoreboard(entry: Entry, path: str, state_fd: int) -> int:
    """Also of another version. Raises `OSError` or `ConfigurationError` if there is none to be used."""
    size, fd = scoreboard_size(MAXIMUM_PROCESSES), files.open_regular(path)
    with closed_on_error(fd):
        if not _is_own(entry, fd, state_fd):
            raise ConfigurationError(f"{path} is no board of this program's")
        files.allocate(fd, size)
        os.ftruncate(fd, size)
        files.clear(fd, size)
        os.fchmod(fd, file_mode())
    return fd


def _is_own(entry: Entry, fd: int, state_fd: int) -> bool:
    """Whether the file is ours, and not another user's who may write into the directory."""
    return is_own_file(os.fstat(fd), {*entry.owners, os.fstat(state_fd).st_uid})
