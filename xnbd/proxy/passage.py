"""Reading through: what was fetched, and finds no room in the cache, goes to those who wait for it and is not kept.

Such blocks come in a `Parcel` with the ticket of each request that needs them, and are
gone with the last of those. While a process reads through it tries once in a while
whether there is room again. All processes of a disk tell the log together, once when
the first of them finds no room, and once when there is some again: the scoreboard knows.
"""

from __future__ import annotations

import os
from time import monotonic
from typing import Sequence

from ..logs import log
from ..scoreboard.scoreboard import Scoreboard
from ..storage.image import Parcel

_TRY_EVERY = 1.0
_LEAST = 256 << 10
"""Bytes that have to be free, where the file system can tell, before it is worth trying."""


class Passage:
    """The way through for one process, beside the files behind *fds*. ``held`` is the bytes of its parcels."""

    def __init__(self, fds: Sequence[int], scoreboard: Scoreboard) -> None:
        self.held = 0
        self.is_open = False
        self._fds = fds
        self._scoreboard = scoreboard
        self._try_at = 0.0

    def may_keep(self) -> bool:
        """Whether it is worth trying to write what has come to the cache."""
        if not self.is_open:
            return True
        now = monotonic()
        if now < self._try_at:
            return False
        self._try_at = now + _TRY_EVERY
        return self._has_room()

    def open(self, error: OSError) -> None:
        """There was no room, as *error* says."""
        self._try_at = monotonic() + _TRY_EVERY
        self.is_open = True
        if self._scoreboard.change_reads_through(True):
            log.warning(
                "no room for the cache image or its sums (%s): what is read from the origin is passed on and not kept",
                error.strerror,
            )

    def on_kept(self) -> None:
        """Something that was fetched is in the cache."""
        self.is_open = False
        if self._scoreboard.reads_through and self._has_room() and self._scoreboard.change_reads_through(False):
            log.info("there is room for the cache image again: what is read from the origin is kept")

    def _has_room(self) -> bool:
        return all(map(_has_room, self._fds))


def _has_room(fd: int) -> bool:
    status = os.fstatvfs(fd)
    free = status.f_bavail if os.geteuid() else status.f_bfree
    return not status.f_blocks or free * status.f_frsize >= _LEAST


class PassedParcel(Parcel):
    """A parcel whose bytes *passage* counts as long as it is there."""

    def __init__(self, passage: Passage, first: int, end: int, data: bytes) -> None:
        super().__init__(first, end, data)
        self._passage = passage
        passage.held += len(data)

    def __del__(self) -> None:
        self._passage.held -= len(self)
