"""A disk that lives elsewhere: read from its origin once, kept here, written here only.

What is local lies in the cache image, which is a disk image like any other
(`storage.target`); the bitmap tells which blocks those are. A request that needs
others raises `NotLocal` with a ticket of the `Fetcher`, and is done again when they
are here. What is written, trimmed or zeroed counts as local.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Callable, Iterator, List, Optional, Tuple

from ..scoreboard.counters import MISSES, new_counts
from ..storage.blocks import BLOCK_SHIFT, block_count, block_start, block_stop, covered, touched
from ..storage.image import (
    FETCH_STEP,
    Buffer,
    Extent,
    Image,
    NotLocal,
    Parcel,
    Part,
    Ticket,
)
from ..storage.target import TargetImage
from .fetcher import Fetcher
from .in_hand import InHand
from .origin_link import Patience, Whereabouts
from .readahead import Readahead
from .state.checkpoint import ProcessState
from .state.sums import sums_of
from .verification import Verification, Verify

DEFAULT_READAHEAD = 8 << 20

_STEP = 1 << 14
"""Blocks that are zeroed under one lock."""

_SHORT = 32 << 10


class ProxyImage(Image):
    """The disk for one process, which owns *cache* and *state* from now on."""

    def __init__(
        self,
        cache: TargetImage,
        state: ProcessState,
        whereabouts: Whereabouts,
        patience: Patience,
        *,
        readonly: bool,
        readahead: int = DEFAULT_READAHEAD,
        fetch_size: Optional[int] = None,
        verify: Verify = Verify.FIRST,
        name: str = "",
    ) -> None:
        self.size = cache.size
        self.readonly = readonly
        self._scoreboard = whereabouts.scoreboard
        self._counts = new_counts()
        self.fetcher = Fetcher(cache, state, whereabouts, patience, fetch_size)
        self.background = self.fetcher
        self._locking = self.fetcher.locking
        self._cache = cache
        self._state = state
        self.bitmap = state.bitmap
        self._written = state.written
        self._sums = state.integrity.sums
        on_damage = self._scoreboard.note_incomplete
        self.verification = Verification(cache, state, self._locking, verify, name, on_damage)
        self._trusted = self.verification.trusted
        self._octets = self._trusted.octets
        self._written_octets = state.written.octets
        self._readahead = Readahead(block_count(self.size), readahead >> BLOCK_SHIFT)
        self._marks = self._readahead.marks
        self._in_hand: Optional[InHand] = None
        self._whole = False
        self.readable: Callable[[], int] = self._readable
        self._readable()

    def _readable(self) -> int:
        length = self._cache.readable()
        assert self._cache.flat is not None
        self._view = self._cache.flat
        # Where nothing is missing, and all is known to be right, there is no need to look at bitmaps.
        self.flat = self._view if self._scoreboard.mode and (self._whole or self._trusts_all()) else None
        return length

    def _trusts_all(self) -> bool:
        self._whole = self.verification.trusts_all()
        return self._whole

    def count_in(self, counts: List[int]) -> None:
        self._counts = self.fetcher.arrivals.counts = self.verification.counts = counts

    # A byte of the map of trusted blocks speaks for 32 KiB (1 << 15). Most requests lie within one.

    def read(self, offset: int, length: int) -> List[memoryview]:
        stop = offset + length
        byte = offset >> 15
        if byte in self._marks:
            self._bring_ahead(self._readahead.on_marked(byte, stop >> BLOCK_SHIFT))
        if self._octets[byte] == 0xFF and (stop - 1) >> 15 == byte:
            return [self._view[offset:stop]]
        if length:
            self._demand(*touched(offset, length))
            if self._in_hand is not None:
                return self._in_hand.pieces(offset, length, self._view)
        return [self._view[offset:stop]]

    def pread(self, offset: int, length: int) -> bytes:
        if length:
            self._demand(*touched(offset, length))
            if self._in_hand is not None:
                return self._in_hand.copy(offset, length, self._cache)
        return self._cache.pread(offset, length)

    def read_fresh(self, offset: int, length: int) -> List[memoryview]:
        """A copy, if it is short: cheaper than a page fault."""
        if length > _SHORT:
            return self.read(offset, length)
        first, end = touched(offset, length)
        if not (self._octets[first >> 3] >> (first & 7) & 1 if end - first == 1 else self._trusted.all_set(first, end)):
            return self.read(offset, length)
        data = os.pread(self._cache.fd, length, offset)
        return [memoryview(data)] if len(data) == length else self.read(offset, length)

    def _bring_ahead(self, blocks: Optional[Tuple[int, int]]) -> None:
        if blocks is not None:
            self.fetcher.bring_ahead(*blocks)

    def _demand(self, first: int, end: int) -> None:
        """Raises `NotLocal` unless these blocks are all here, and right; then they are on their way."""
        ticket: Optional[Ticket]
        if end - first == 1:
            if self._octets[first >> 3] >> (first & 7) & 1 or self._has(first, end):
                return
            ticket = self.fetcher.need_block(first)
        elif self._trusted.all_set(first, end) or self._has(first, end):
            return
        else:
            ticket = self.fetcher.need(first, end, self._in_hand)
        self._bring_ahead(self._readahead.on_read(first, end))
        if ticket is not None:
            self._counts[MISSES] += 1
            raise NotLocal(ticket)

    def _has(self, first: int, end: int) -> bool:
        """Whether these blocks are here, or in hand, once those that nobody has checked are."""
        self.verification.check(first, end)
        return self.bitmap.all_set(first, end) or (self._in_hand is not None and self._in_hand.has_missing(first, end))

    def write(self, offset: int, data: Buffer) -> None:
        length = len(data)
        byte = offset >> 15
        if not length:
            return
        if self._written_octets[byte] == 0xFF and self._octets[byte] == 0xFF and (offset + length - 1) >> 15 == byte:
            self._cache.write(offset, data)
            return
        first, end = touched(offset, length)
        if self._is_ours(first, end):
            self._cache.write(offset, data)
            return
        partly = self._demand_edges(offset, length)
        if not self._locking.write(first, end, partial(self._cache.write, offset, data), partly):
            raise NotLocal(self._locking.next_turn(first, end))

    def _is_ours(self, first: int, end: int) -> bool:
        """Whether clients have written all of these blocks before, so that they need no more than to be written."""
        if end - first == 1:
            mask = 1 << (first & 7)
            return bool(self._written_octets[first >> 3] & self._octets[first >> 3] & mask)
        return self._written.all_set(first, end) and self._trusted.all_set(first, end)

    def _demand_edges(self, offset: int, length: int) -> List[int]:
        """The blocks that the range covers in part only. Raises `NotLocal` unless they are local, and right."""
        first, end = touched(offset, length)
        inner, inner_end = covered(offset, length, self.size)
        partly = [first] if inner > first else []
        if inner_end < end and end - 1 >= inner:
            partly.append(end - 1)
        for block in partly:
            self._demand_block(block)
        return partly

    def _demand_block(self, block: int) -> None:
        if block not in self._trusted:
            self.verification.check(block, block + 1)
        if self._in_hand is not None and self._in_hand.has_missing(block, block + 1):
            self._keep(block, self._in_hand)
        if block not in self.bitmap:
            ticket = self.fetcher.need(block, block + 1)
            if ticket is not None:
                raise NotLocal(ticket)

    def _borrow(self, first: int, end: int) -> None:
        if not self._locking.borrow(first, end):
            raise NotLocal(self._locking.next_turn(first, end))

    # What has come and could not be kept

    def take(self, parcels: Optional[List[Parcel]]) -> None:
        self._in_hand = InHand(parcels, self.bitmap) if parcels else None

    def _keep(self, block: int, in_hand: InHand) -> None:
        """Bring a *block* that is in hand into the cache, because part of it is to be written; it may find no room."""
        self._borrow(block, block + 1)
        try:
            if block not in self.bitmap:
                at = block_start(block)
                data = b"".join(in_hand.unpack(at, block_stop(block, self.size) - at))
                self._cache.write(at, data)
                self._sums.note(block, sums_of(data))
                self._locking.mark_local(block, block + 1)
        finally:
            self._locking.give_back(block, block + 1)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        if fast and covered(offset, length, self.size) != touched(offset, length):
            raise OSError(errno.EOPNOTSUPP, "parts of blocks have to be written")
        self._zero(offset, length, may_trim, fast)

    def trim(self, offset: int, length: int) -> None:
        try:
            self._zero(offset, length, may_trim=True, fast=True)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def _zero(self, offset: int, length: int, may_trim: bool, fast: bool) -> None:
        """Parts of blocks at either end are written, whole blocks zeroed; what was done is done again after a wait."""
        first, end = covered(offset, length, self.size)
        stop = offset + length
        if first >= end:
            self.write(offset, bytes(length))
            return
        head, tail = block_start(first), block_stop(end - 1, self.size)
        self.write(offset, bytes(head - offset))
        self.write(tail, bytes(stop - tail))
        for run_first, run_end, written in list(self._written.runs(first, end)):
            zero = partial(self._zero_blocks, may_trim=may_trim, fast=fast)
            if written and self._trusted.all_set(run_first, run_end):
                zero(run_first, run_end)
                continue
            for step in range(run_first, run_end, _STEP):
                step_end = min(step + _STEP, run_end)
                if not self._locking.write(step, step_end, partial(zero, step, step_end)):
                    raise NotLocal(self._locking.next_turn(step, step_end))

    def _zero_blocks(self, first: int, end: int, *, may_trim: bool, fast: bool) -> None:
        at = block_start(first)
        self._cache.write_zeroes(at, block_stop(end - 1, self.size) - at, may_trim=may_trim, fast=fast)

    def flush(self) -> None:
        self._state.checkpoint(self._cache.fd, self.on_wait)

    def prefetch(self, offset: int, length: int) -> None:
        self._cache.prefetch(offset, length)

    def fetch(self, offset: int, length: int) -> None:
        first, end = touched(offset, length)
        step = FETCH_STEP >> BLOCK_SHIFT
        while first < end:
            stop = min(first + step, end)
            self._demand(first, stop)
            if self._in_hand is not None and not self.bitmap.all_set(first, stop):
                raise OSError(errno.ENOSPC, "there is no room to keep what was fetched")
            first = stop

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is not here counts as data: only the origin knows better. So does what may be damaged."""
        for at, count, local in self.bitmap.parts(offset, length):
            if not local:
                yield Extent(count, hole=False)
                continue
            for extent in self._cache.extents(at, count):
                yield from self._holes(at, extent.length) if extent.hole else (extent,)
                at += extent.length

    def _holes(self, offset: int, length: int) -> Iterator[Extent]:
        """A hole of the cache is one of the disk if it is known to be right, or came as zeros: it may be damage."""
        for at, count, trusted in self._trusted.parts(offset, length):
            first, end = touched(at, count)
            right = trusted or self._written.all_set(first, end) or self._sums.are_zeros(first, end)
            yield Extent(count, hole=right)

    def cached(self, offset: int, length: int) -> Iterator[Part]:
        for _, count, local in self.bitmap.parts(offset, length):
            yield Part(count, local)

    def written(self, offset: int, length: int) -> Iterator[Part]:
        """Of a block that is not here yet, a mark says nothing."""
        for at, count, written in self._written.parts(offset, length):
            if written:
                yield from self.cached(at, count)
            else:
                yield Part(count, so=False)

    def data_until(self, offset: int) -> int:
        first = offset >> BLOCK_SHIFT
        _, end, local = next(self.bitmap.runs(first, block_count(self.size)))
        stop = min(block_start(end), self.size)
        return min(self._cache.data_until(offset), stop) if local else stop

    def close(self) -> None:
        self.fetcher.close()
        self.verification.close()
        self._cache.close()
        self._state.close()
