"""When each piece of the cache was last used by clients: the file ``CACHE_BITMAP_IMAGE.used``, a byte for 256 KiB.

It is memory of the servers that run, and there only if the cache has a limit. A byte is the
**era** in which the piece was used, from 1 to 255 and then from 1 again; 0 says nothing. Who
lets blocks go begins a new era when a good part of the pieces was used in the present one.
So the order of eras is about the order of uses, and a use costs no more than a store.

What comes for nobody yet (read ahead, copied) is put into an era of long ago: it goes before
what clients use. Behind the pieces lie two bytes: the present era, and that one.
"""

from __future__ import annotations

import mmap
from typing import Iterator, Tuple

from ...storage.blocks import BLOCK_SHIFT, block_count
from ..fetch_queue import PIECE

PIECE_SHIFT = PIECE.bit_length() - 1
USE_SHIFT = BLOCK_SHIFT + PIECE_SHIFT
"""The bytes of a piece are 1 << USE_SHIFT."""

ERAS = 255
_COUNTED_AT_ONCE = 1 << 20


def piece_count(disk_size: int) -> int:
    return -(-block_count(disk_size) // PIECE)


def use_map_size(disk_size: int) -> int:
    """Bytes of the file."""
    return piece_count(disk_size) + 2


def era_after(era: int) -> int:
    return era % ERAS + 1


class UseMap:
    """The map of the disk of *disk_size* bytes in the file behind *fd*, which stays the caller's.

    ``octets`` is the mapping itself, and ``era_at`` where the present era lies.
    """

    def __init__(self, fd: int, disk_size: int) -> None:
        self.pieces = piece_count(disk_size)
        self.octets = mmap.mmap(fd, use_map_size(disk_size))
        self.era_at = self.pieces
        self._former_at = self.pieces + 1

    def note_use(self, first_piece: int, end: int) -> None:
        """A client uses these pieces."""
        octets = self.octets
        era = octets[self.era_at]
        for piece in range(first_piece, end):
            octets[piece] = era

    def note_arrival(self, piece: int) -> None:
        """Something of *piece* has come that no client waits for."""
        if not self.octets[piece]:
            self.octets[piece] = self.octets[self._former_at]

    # For the one process that lets blocks go

    def begin(self, era: int, former: int) -> None:
        """The present era, and that of what comes for nobody."""
        self.octets[self._former_at] = former
        self.octets[self.era_at] = era

    def of_era(self, era: int) -> Iterator[int]:
        """The pieces that were last used then."""
        wanted = bytes((era,))
        piece = self.octets.find(wanted, 0, self.pieces)
        while piece >= 0:
            yield piece
            piece = self.octets.find(wanted, piece + 1, self.pieces)

    def count(self, era: int) -> int:
        """How many pieces were last used then."""
        return sum(self.octets[at:stop].count(era) for at, stop in self._steps())

    def _steps(self) -> Iterator[Tuple[int, int]]:
        for at in range(0, self.pieces, _COUNTED_AT_ONCE):
            yield at, min(at + _COUNTED_AT_ONCE, self.pieces)

    def close(self) -> None:
        self.octets.close()
