"""A cache that has a limit: what comes is counted first, and what clients use is noted.

Who lets blocks go is another process (`proxy.evictor`). Here nobody waits for it: what finds
no room below the limit is passed on to those who wait, and not kept.
"""

from __future__ import annotations

from typing import Any, Callable, List

from ..scoreboard.room import Room
from .fetch_queue import Fetch
from .image import ProxyImage
from .state.use_map import PIECE_SHIFT, USE_SHIFT, UseMap


class Intake:
    """What comes to the cache through this process, which has *room* for it or not."""

    def __init__(self, room: Room, use_map: UseMap) -> None:
        self._room = room
        self._use_map = use_map
        self._coming = 0
        self.tell_coming: Callable[[int], None] = lambda blocks: None
        """Hears how many blocks are counted and on their way."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for what nobody waits for."""
        return self._room.used >= self._room.high

    def admit(self, fetch: Fetch) -> bool:
        """Whether there is room for the blocks of *fetch*, which count from now on until it is settled."""
        if not fetch.counted:
            count = fetch.end - fetch.first
            self._come(count)  # first: a count in between finds too many, and never too few
            if not self._room.take(count):
                self._come(-count)
                return False
            fetch.counted = count
        return True

    def settle(self, fetch: Fetch, kept: int) -> None:
        """Of the blocks of *fetch* so many have become local."""
        counted, fetch.counted = fetch.counted, 0
        if not counted:
            return
        if kept:
            if fetch.tickets:
                self._use_map.note_use(fetch.first >> PIECE_SHIFT, (fetch.first >> PIECE_SHIFT) + 1)
            else:
                self._use_map.note_arrival(fetch.first >> PIECE_SHIFT)
        if kept < counted:
            self._room.give_back(counted - kept)
        self._come(-counted)  # last, for the same reason

    def admit_zeros(self, first: int, end: int) -> bool:
        """Whether there is room for these blocks, which are zeros and there at once."""
        if not self._room.take(end - first):
            return False
        for piece in range(first >> PIECE_SHIFT, ((end - 1) >> PIECE_SHIFT) + 1):
            self._use_map.note_arrival(piece)
        return True

    def _come(self, count: int) -> None:
        self._coming += count
        self.tell_coming(self._coming)


class LimitedImage(ProxyImage):
    """A disk whose cache has a limit."""

    def __init__(self, room: Room, use_map: UseMap, *of_proxy: Any, **options: Any) -> None:
        """*of_proxy* and *options* are those of `ProxyImage`; *use_map* is owned, too."""
        super().__init__(*of_proxy, **options)
        self._use_map = use_map
        self._uses = use_map.octets
        self._era_at = use_map.era_at
        self.intake = self.fetcher.arrivals.intake = Intake(room, use_map)

    def tell_coming_by(self, tell: Callable[[int], None]) -> None:
        self.intake.tell_coming = tell

    def read(self, offset: int, length: int) -> List[memoryview]:
        self._note_use(offset, length)
        return ProxyImage.read(self, offset, length)

    def pread(self, offset: int, length: int) -> bytes:
        self._note_use(offset, length)
        return super().pread(offset, length)

    def _note_use(self, offset: int, length: int) -> None:
        if not length:
            return
        piece, last = offset >> USE_SHIFT, (offset + length - 1) >> USE_SHIFT
        uses = self._uses
        uses[piece] = uses[self._era_at]
        if piece < last:
            self._use_map.note_use(piece + 1, last + 1)

    def close(self) -> None:
        super().close()
        self._use_map.close()
