"""The limit of a cache when a server starts, and the file ``CACHE_BITMAP_IMAGE.used`` that it needs.

The first server that comes says whether there is a limit. Those that come later follow it, and
may say another one; but they cannot make one where there is none, for the others would not
heed it.
"""

from __future__ import annotations

from contextlib import closing
from typing import Optional

from ...errors import ConfigurationError
from ...logs import log
from ...scoreboard.room import Room
from ...scoreboard.scoreboard import Scoreboard
from ...storage.blocks import BLOCK, BLOCK_SHIFT
from ...storage.target import reopen
from ...text import as_option
from . import files
from .entry import Entry
from .format import USE_MAP_SUFFIX
from .memory_file import MemoryFile
from .use_map import use_map_size


def open_use_map(entry: Entry, state_fd: int, scoreboard_fd: int) -> Optional[int]:
    """A descriptor of the file if the cache has a limit, which is on the scoreboard then."""
    limit = _limit_of(entry)
    alone = files.is_alone(state_fd)
    with closing(Scoreboard(reopen(scoreboard_fd, readonly=False))) as scoreboard:
        room = scoreboard.room
        if not alone and not _agree(entry, room, limit):
            return None
        if not limit and alone:
            return None
        file = MemoryFile(entry, USE_MAP_SUFFIX, use_map_size(entry.header.disk_size), state_fd)
        if not alone:
            return file.join()
        fd = file.make()
        room.limit = limit
        room.fill()
        return fd


def _limit_of(entry: Entry) -> int:
    """Blocks; 0 if all of the disk may be local."""
    limit, size = entry.cache_limit, entry.header.disk_size
    if limit is None:
        return 0
    if limit >= size:
        log.info("--cache-limit limits nothing: the disk has %d bytes", size)
        return 0
    return limit >> BLOCK_SHIFT


def _agree(entry: Entry, room: Room, limit: int) -> bool:
    """Whether the cache that others use already has a limit, which is *limit* from now on if that is not 0."""
    if limit and not room.limit:
        raise ConfigurationError(
            f"cache bitmap {entry.path} is in use by servers without --cache-limit: stop them first, or leave it out"
        )
    if limit and limit != room.limit:
        new, old = as_option(limit * BLOCK), as_option(room.limit * BLOCK)
        log.info("the limit of the cache is another one from now on: %s, not %s", new, old)
        room.limit = limit
    return bool(room.limit)
