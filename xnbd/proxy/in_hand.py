"""Blocks that have come for a request, and could not be kept (`storage.passage`)."""

from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

from ..storage.bitmap import Bitmap
from ..storage.blocks import BLOCK_SHIFT, block_start
from ..storage.image import Image, Parcel


class InHand:
    """*parcels* stand in for blocks that are not local, which *bitmap* tells. Offsets and lengths are bytes."""

    def __init__(self, parcels: List[Parcel], bitmap: Bitmap) -> None:
        self.parcels = parcels
        self._bitmap = bitmap

    def has_missing(self, first: int, end: int) -> bool:
        """Whether all of these blocks that are not local are here."""
        return not any(True for _ in self.lacks(first, end))

    def lacks(self, first: int, end: int) -> Iterator[Tuple[int, int]]:
        """The runs of these blocks that are neither local nor here."""
        for run_first, run_end, local in self._bitmap.runs(first, end):
            while not local and run_first < run_end:
                parcel = self._with(run_first)
                if parcel is not None:
                    run_first = parcel.end
                    continue
                later = (parcel.first for parcel in self.parcels if run_first < parcel.first < run_end)
                stop = min(later, default=run_end)
                yield run_first, stop
                run_first = stop

    def _with(self, block: int) -> Optional[Parcel]:
        return next((parcel for parcel in self.parcels if parcel.first <= block < parcel.end), None)

    def pieces(self, offset: int, length: int, view: memoryview) -> List[memoryview]:
        """What `Image.read` returns; local blocks are in *view*."""
        pieces: List[memoryview] = []
        for at, count, local in self._bitmap.parts(offset, length):
            pieces += [view[at : at + count]] if local else self.unpack(at, count)
        return pieces

    def copy(self, offset: int, length: int, cache: Image) -> bytes:
        """What `Image.pread` returns; local blocks are in *cache*. Raises `OSError`."""
        parts = self._bitmap.parts(offset, length)
        return b"".join(cache.pread(at, n) if local else b"".join(self.unpack(at, n)) for at, n, local in parts)

    def unpack(self, offset: int, length: int) -> Iterator[memoryview]:
        """The bytes of blocks that are all here, in pieces."""
        stop = offset + length
        while offset < stop:
            block = offset >> BLOCK_SHIFT
            parcel = self._with(block)
            assert parcel is not None
            start = block_start(parcel.first)
            piece = memoryview(parcel)[offset - start : stop - start]
            yield piece
            offset += len(piece)
