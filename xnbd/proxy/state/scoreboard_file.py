"""The scoreboard of a cache, ``CACHE_BITMAP_IMAGE.board``: joined, or made anew by the first server that comes."""

from __future__ import annotations

import os
from contextlib import closing, suppress

from ...errors import ConfigurationError
from ...origin.address import overrules
from ...scoreboard.layout import OtherVersion, check_header, scoreboard_size, write_header
from ...scoreboard.scoreboard import Scoreboard
from ...storage.target import reopen
from ...system.process import closed_on_error
from . import files
from .entry import Entry
from .format import SCOREBOARD_SUFFIX, Steering
from .memory_file import MemoryFile

MAXIMUM_PROCESSES = 8192
"""Processes of all servers together that may use a cache."""


def open_scoreboard(entry: Entry, state_fd: int) -> int:
    """A descriptor of the scoreboard, made anew if nobody uses the files."""
    file = MemoryFile(entry, SCOREBOARD_SUFFIX, scoreboard_size(MAXIMUM_PROCESSES), state_fd)
    if not files.is_alone(state_fd):
        return file.join()
    steering = _renew_steering(state_fd, entry.origin)
    fd = file.make()
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
