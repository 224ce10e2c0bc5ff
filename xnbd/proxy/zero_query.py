"""What the origin says of its holes."""

from __future__ import annotations

from typing import List, Tuple

from ..storage.blocks import block_start, covered, touched
from ..storage.image import Ticket


class ZeroQuery:
    """A question about the blocks from *first* up to *end*: which of them the origin has as zeros.

    ``zeros`` are runs of blocks that lie wholly in such extents, ``until`` is where the
    answer ends: not at *first* unless the origin could not tell, or was ``lost`` meanwhile.
    """

    def __init__(self, first: int, end: int, size: int) -> None:
        self.first = first
        self.end = end
        self.done = self.lost = False
        self.ticket = Ticket()
        self.zeros: List[Tuple[int, int]] = []
        self.until = first
        self._size = size
        self._position = block_start(first)

    def add(self, extents: List[Tuple[int, bool]]) -> None:
        """The next extents (`Sink.on_extents`)."""
        for length, zero in extents:
            if zero:
                first, end = covered(self._position, length, self._size)
                if first < end:
                    self.zeros.append((first, end))
            self._position += length

    def finish(self, error: int) -> None:
        self.done = True
        if error:
            self.zeros.clear()
        else:
            self.until = min(self.end, touched(0, self._position)[1] if self._position else 0)
