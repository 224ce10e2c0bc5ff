"""One server's way into the files of a bitmap: what its making and its resuming share."""

from __future__ import annotations

import os
from typing import List, Optional, Set

from ...errors import ConfigurationError
from ...storage import image_use
from ...system.process import closed_on_error
from . import belonging, files
from .belonging import Tie
from .files import NEW
from .format import SUFFIX, Header, Layout
from .known import scoreboard_says_target

AFRESH = "(--clear-bitmap starts afresh, and forgets what clients have written)"
"""The end of a line with which a server does not start: the last choice."""


class Entry:
    """The way to the bitmap at *path* of the cache behind *cache_fd*; its header has to become ``header``.

    *origin* is the address that this server was started with. With *adopt* somebody vouches
    that the cache image has what the bitmap says. *thorough*: all of the bitmap is looked at now.
    *cache_limit* is bytes.
    """

    def __init__(
        self,
        path: str,
        cache_fd: int,
        layout: Layout,
        header: Header,
        *,
        origin: str,
        adopt: bool,
        thorough: bool,
        cache_limit: Optional[int] = None,
    ) -> None:
        self.path = path
        self.origin = origin
        self.state_path = path + SUFFIX
        self.cache_fd = cache_fd
        self.layout = layout
        self.header = header
        self.adopt = adopt
        self.thorough = thorough
        self.seen: Optional[List[int]] = None
        """The pages of the bitmap that have been looked at, if the others are still to be (`proxy.state.pages`)."""
        self.cache_limit = cache_limit
        self.owners = {os.fstat(cache_fd).st_uid}
        self.former_sessions: Set[bytes] = set()
        """Those that the files may bear which were there."""
        self.has_clean_blocks = False
        """Whether there may be blocks that were fetched, and that no client has written."""

    def bind(self, tie: Tie) -> None:
        self.header = self.header._replace(tie=tie)

    def mark(self, state_fd: int) -> None:
        """Put id and session on the cache image, durably. Raises `OSError`."""
        marked = belonging.write_mark(self.cache_fd, self.header.tie)
        if marked:
            files.write_back(state_fd).sync(self.cache_fd, metadata=True)
        self.bind(self.header.tie._replace(marked=marked))

    def use_cache(self, *, alone: bool) -> None:
        """Before anything is changed. Raises `image_use.ImageInUse`, but not for siblings that have been switched."""
        if image_use.try_use_as(self.cache_fd, image_use.CACHE):
            if not image_use.try_use_bitmap(self.cache_fd, self.header.tie.id):
                raise image_use.OtherBitmap
            return
        if alone or not self._siblings_are_targets():
            raise image_use.ImageInUse
        image_use.turn_into_disk(self.cache_fd)

    def _siblings_are_targets(self) -> bool:
        try:
            return scoreboard_says_target(self.path)
        except (OSError, ValueError):
            return False

    def make_bitmap(self) -> None:
        """Make an empty one, durably, that is yet to be published."""
        fd = files.make_new(self.path + NEW)
        try:
            files.allocate(fd, self.layout.bitmap_size)
            belonging.mark_bitmap(fd)
            os.fsync(fd)
        finally:
            os.close(fd)

    def open_bitmap(self) -> int:
        """A descriptor of the live bitmap, if it can be one of this disk. Raises `ConfigurationError`."""
        try:
            fd = files.open_regular(self.path)
        except FileNotFoundError:
            raise self.refusal(f"{self.path} is gone, but {self.state_path} is there; put it back") from None
        with closed_on_error(fd):
            self.check_size(fd, self.path, self.layout.bitmap_size)
        return fd

    def check_size(self, fd: int, path: str, size: int, advice: str = "put the right one back") -> None:
        found = os.fstat(fd).st_size
        if found != size:
            told = f"{path} has {found} bytes, not the {size} for a disk of {self.header.disk_size} bytes"
            raise self.refusal(f"{told}; {advice}")

    def refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(f"cannot go on with the cached blocks: {reason} {AFRESH}")

    def remove_unfinished(self) -> None:
        for path in (self.state_path, self.path):
            files.remove_unfinished(path)
