"""What comes from the origin: into the cache, or past it to those who wait.

- Data goes only to blocks whose bits are not set: a whole block may be written while
  its fetch is under way, and that counts.
- Bits are set when the reply is complete and good, after the data and its checksums.
- In a cache that has a limit blocks are counted before they come (`proxy.limited`).
- What finds no room in the cache is passed on to those who wait, with their tickets
  (`storage.passage`); no bit is set.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, List, Optional, Tuple

from ..logs import about, log
from ..origin.base import Data
from ..scoreboard.counters import BYTES_FETCHED, new_counts
from ..scoreboard.scoreboard import Scoreboard
from ..storage.blocks import BLOCK, BLOCK_SHIFT, block_start, block_stop
from ..storage.space import NO_SPACE
from ..storage.target import TargetImage
from .fetch_queue import Fetch, FetchQueue
from .locking import refuse_if_shrunk
from .passage import Passage, PassedParcel
from .state.checkpoint import ProcessState
from .state.sums import NO_SUM, SUM_SIZE, ZERO_SUM, sums_of

if TYPE_CHECKING:
    from .limited import Intake

_WITHIN = BLOCK - 1


class Arrivals:
    """Replies to the fetches of this process, whose blocks it holds; they fill *cache*.

    ``counts`` are those of `Image.count_in`. Nothing is kept any more once ``closed``.
    """

    def __init__(self, cache: TargetImage, state: ProcessState, queue: FetchQueue, scoreboard: Scoreboard) -> None:
        self.counts: List[int] = new_counts()
        self.passes_on = True
        """Whether what cannot be kept is of use to those who wait; else it is an error."""
        self.closed = False
        self.intake: Optional[Intake] = None
        """Who counts what comes, if the cache has a limit."""
        self.passage = Passage((cache.fd, state.integrity.sums.fd), scoreboard)
        self._cache = cache
        self._bitmap = state.bitmap
        self._sums = state.integrity.sums
        self._checked = state.integrity.checked
        self._queue = queue
        self._error = 0  # of the cache, the one that was told last, until something is written again
        self._has_looked = self._has_kept = False

    def settle(self) -> None:
        """After some replies: what has to be looked at once for all of them, and not for each block, is so again."""
        self._has_looked = False
        if self._has_kept:
            self._has_kept = False
            self.passage.on_kept()

    # Of `origin.base.Sink`

    def on_data(self, token: Fetch, offset: int, data: Data) -> None:
        self.counts[BYTES_FETCHED] += len(data)
        if token.error or self.closed:
            return
        if self._may_keep(token):
            if not offset & _WITHIN and (not len(data) & _WITHIN or offset + len(data) == self._cache.size):
                token.sums.append((offset >> BLOCK_SHIFT, sums_of(data)))
            else:
                token.sums.append(_unknown_sums(offset, len(data)))
            try:
                self._store(token, offset, data)
            except OSError as error:
                self._on_failure(token, error)
        if token.passing is not None:
            token.passing.append((offset, bytes(data)))

    def on_hole(self, token: Fetch, offset: int, length: int) -> None:
        if token.error or self.closed:
            return
        if self._may_keep(token):
            try:
                self._refuse_if_shrunk()
                self._zero(offset, length)
            except OSError as error:
                self._on_failure(token, error)
        if token.passing is not None:
            token.passing.append((offset, bytes(length)))
        elif not offset & _WITHIN and (not length & _WITHIN or offset + length == self._cache.size):
            token.sums.append((offset >> BLOCK_SHIFT, _zero_sums(length)))
        else:
            token.sums.append(_unknown_sums(offset, length))

    def _store(self, fetch: Fetch, offset: int, data: Data) -> None:
        self._refuse_if_shrunk()
        if not fetch.mixed:
            self._cache.write(offset, data)
            return
        for at, count in self._missing(offset, len(data)):
            self._cache.write(at, data[at - offset : at - offset + count])

    def _refuse_if_shrunk(self) -> None:
        if not self._has_looked:
            refuse_if_shrunk(self._cache)
            self._has_looked = True

    def make_zero(self, first: int, end: int) -> None:
        """Have missing blocks be zeros; their bits are yet to be set. Raises `OSError`."""
        offset = block_start(first)
        self._zero(offset, block_stop(end - 1, self._cache.size) - offset)
        self._sums.note_zeros(first, end)

    def admits_zeros(self, first: int, end: int) -> bool:
        """Whether there is room for these blocks, for `make_zero`."""
        return self.intake is None or self.intake.admit_zeros(first, end)

    def _zero(self, offset: int, length: int) -> None:
        """Zeros where blocks are missing; what is a hole of the cache already is left alone. Raises `OSError`."""
        for at, count in self._missing(offset, length):
            for extent in self._cache.extents(at, count):
                if not extent.hole:
                    self._cache.write_zeroes(at, extent.length, may_trim=True, fast=False)
                at += extent.length

    def _missing(self, offset: int, length: int) -> List[Tuple[int, int]]:
        """The parts of *length* bytes at *offset* whose blocks are not local: offset and length."""
        return [(at, count) for at, count, local in self._bitmap.parts(offset, length) if not local]

    def complete(self, fetch: Fetch) -> None:
        """All of *fetch* has come, and is good."""
        if fetch.error or self.closed:
            return
        if fetch.passing is None:
            try:
                self._keep(fetch)
            except OSError as error:
                self._on_failure(fetch, error)
        if fetch.passing is not None and fetch.tickets:
            self._pass_on(fetch, fetch.passing)

    def _keep(self, fetch: Fetch) -> None:
        """Have its blocks be local, but for those that are so already. Raises `OSError`."""
        first, end = fetch.first, fetch.end
        sums = self._sums_of(fetch)
        if not fetch.mixed:
            self._make_local(first, end, sums)
            kept = end - first
        else:
            kept = 0
            for run_first, run_end, local in list(self._bitmap.runs(first, end)):
                if not local:
                    start, stop = SUM_SIZE * (run_first - first), SUM_SIZE * (run_end - first)
                    self._make_local(run_first, run_end, sums[start:stop])
                    kept += run_end - run_first
        if self.intake is not None:
            self.intake.settle(fetch, kept)
        self._error = 0
        self._has_kept = True

    def _make_local(self, first: int, end: int, sums: bytes) -> None:
        if len(sums) != SUM_SIZE * (end - first):  # whatever an origin did: others have the locks of the blocks behind
            sums = b"".join(map(self._sum_of_cached, range(first, end)))
        self._sums.note(first, sums)
        self._bitmap.set(first, end)
        self._checked.set(first, end)

    def _sums_of(self, fetch: Fetch) -> bytes:
        """Of all blocks of *fetch*; of what came twice the later one counts, as in the cache. Raises `OSError`.

        What came in pieces that are no blocks is read from the cache.
        """
        size = SUM_SIZE * (fetch.end - fetch.first)
        if len(fetch.sums) == 1 and len(fetch.sums[0][1]) == size:
            return fetch.sums[0][1]
        known = bytearray(size)
        for first, sums in fetch.sums:
            at = SUM_SIZE * (first - fetch.first)
            known[at : at + len(sums)] = sums
        for at in range(0, size, SUM_SIZE):
            if known[at : at + SUM_SIZE] == NO_SUM:
                known[at : at + SUM_SIZE] = self._sum_of_cached(fetch.first + at // SUM_SIZE)
        return bytes(known)

    def _sum_of_cached(self, block: int) -> bytes:
        """Of a block that has just been written, but not as a block."""
        start = block_start(block)
        return sums_of(self._cache.pread(start, block_stop(block, self._cache.size) - start))

    # What finds no room

    def _may_keep(self, fetch: Fetch) -> bool:
        """Whether to write what comes for *fetch* to the cache; else it is passed on from now on."""
        if fetch.passing is None and not self._has_room(fetch):
            fetch.passing = []
            fetch.error = 0 if self.passes_on else errno.ENOSPC
        return fetch.passing is None

    def _has_room(self, fetch: Fetch) -> bool:
        if self.passage.is_open and not self.passage.may_keep():
            return False
        return self.intake is None or self.intake.admit(fetch)

    @property
    def is_full(self) -> bool:
        """Whether nothing is to be fetched for which nobody waits."""
        return self.passage.is_open or (self.intake is not None and self.intake.is_full)

    def give_up(self, fetch: Fetch) -> None:
        """Nothing more of *fetch* is kept."""
        if fetch.counted and self.intake is not None:
            self.intake.settle(fetch, 0)

    def _on_failure(self, fetch: Fetch, error: OSError) -> None:
        if error.errno in NO_SPACE and self.passes_on:
            fetch.passing = []
            self._queue.forget_ahead()
            self.passage.open(error)
            return
        fetch.error = error.errno or errno.EIO
        if fetch.error != self._error:
            log.error("cannot write to the cache image: %s", error.strerror, extra=about(error=error))
        self._error = fetch.error

    def _pass_on(self, fetch: Fetch, pieces: List[Tuple[int, bytes]]) -> None:
        """Give all that has come for *fetch* to those who wait; what was still written is read from the cache."""
        offset = block_start(fetch.first)
        try:
            data = self._cache.pread(offset, block_stop(fetch.end - 1, self._cache.size) - offset)
        except OSError as error:
            self._on_failure(fetch, error)
            return
        parcel = PassedParcel(self.passage, fetch.first, fetch.end, data)
        for at, piece in pieces:
            parcel[at - offset : at - offset + len(piece)] = piece
        for ticket in fetch.tickets:
            ticket.parcels = [*(ticket.parcels or ()), parcel]


def _zero_sums(length: int) -> bytes:
    """Of so many zeros, the last block of which may be shorter."""
    rest = length & _WITHIN
    return ZERO_SUM * (length >> BLOCK_SHIFT) + (sums_of(bytes(rest)) if rest else b"")


def _unknown_sums(offset: int, length: int) -> Tuple[int, bytes]:
    """Of the blocks that these bytes lie in: whatever was known of them holds no more."""
    first = offset >> BLOCK_SHIFT
    return first, NO_SUM * (-(-(offset + length) // BLOCK) - first)
