"""How much of a disk is local, and how fast that changes."""

from __future__ import annotations

from time import monotonic
from typing import List, Optional, Tuple

from ..storage.bitmap import Bitmap
from ..storage.blocks import BLOCK

_WINDOW = 5.0
_SHORTEST = 0.1
_LONGER = 20


class Progress:
    """Of the disk of *size* bytes with *bitmap*. Counting takes long on a large disk, so a count serves for a while."""

    def __init__(self, bitmap: Bitmap, size: int) -> None:
        self.blocks = bitmap.blocks
        self.size = size
        self._bitmap = bitmap
        self._counted = 0
        self._count_again = 0.0

    @property
    def complete(self) -> bool:
        """Whether every block is local, as of now."""
        return self._bitmap.all_set(0, self.blocks)

    def missing(self, *, exact: bool = False) -> int:
        """Blocks that are not local; 0 only if none is. Without *exact* a figure of a moment ago will do."""
        if self.complete:
            return 0
        now = monotonic()
        if exact or now >= self._count_again:
            self._counted = self._bitmap.count()
            self._count_again = now + max(_SHORTEST, _LONGER * (monotonic() - now))
        return max(1, self.blocks - self._counted)

    def cached_bytes(self) -> int:
        return max(0, self.size - self.missing() * BLOCK)

    def shares(self, cells: int) -> List[float]:
        """Which share of each of at most *cells* parts of the disk is local."""
        return self._bitmap.shares(min(cells, self.blocks))


class Rate:
    """Bytes per second over the last moments."""

    def __init__(self) -> None:
        self._samples: List[Tuple[float, int]] = []

    def of(self, amount: int) -> Optional[float]:
        """The rate, now that *amount* has been reached; None at the first time.

        Who asks seldom gets the rate since the time before.
        """
        now = monotonic()
        recent = [sample for sample in self._samples if now - sample[0] < _WINDOW] or self._samples[-1:]
        self._samples = [*recent, (now, amount)]
        first_time, first_amount = self._samples[0]
        return max(0.0, (amount - first_amount) / (now - first_time)) if now > first_time else None
