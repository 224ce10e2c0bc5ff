"""Keeping a cache below its limit: what was used the longest time ago is let go (`proxy.letting_go`).

For one process of all servers, which serves nobody. It looks at the figures (`scoreboard.room`)
and at the eras (`proxy.state.use_map`) again and again:

- Above the high mark it lets go of pieces, the oldest era first, until it is at the low mark.
- It begins a new era when so many pieces were used in the present one that it says little.
- It counts what there is, at its start, and now and then if something has come, or clients have written where clean
  blocks were: see `Evictor.count`.
- It gives back the space of what nobody knows of any more (`proxy.leftovers`).

Of a piece with written blocks only the clean ones go. Whatever goes wrong, pieces stay as they are.
"""

from __future__ import annotations

import os
from itertools import islice
from time import monotonic
from typing import Dict, Iterator, List, Optional, Set

from ..scoreboard.scoreboard import Scoreboard
from ..storage.bitmap import bitmap_size, count_bits
from ..storage.blocks import BLOCKS_PER_BYTE
from .fetch_queue import PIECE
from .leftovers import pieces_with_leftovers, takes
from .letting_go import LettingGo, Run
from .state.checkpoint import ProcessState
from .state.format import PAGE
from .state.use_map import ERAS, UseMap, era_after
from .state.written import WrittenMap

_MOST_PIECES = 256
"""Pieces that are let go at once: for so long nobody gets at them."""

_GATE_TIMEOUT, _TIMEOUT = 0.2, 2.0
"""Seconds until everybody is out of the gate, for which all others have to wait; and until nobody holds blocks."""

_SOON, _LATER, _LONG = 0.01, 0.05, 0.25
_COUNT_EVERY = 2.0
_MOST_LEFT = 256
"""Blocks of leftovers that are not looked for."""

_LONGER = 20
"""Times as long as a look at all pieces took, or a count, there is none."""

_GENERATIONS = 32
"""The parts of what is local that are told apart by their eras, about."""

_PIECE_BYTES = PIECE // BLOCKS_PER_BYTE
_ZEROS = bytes(_PIECE_BYTES)


class Evictor:
    """Keeps the cache behind *cache_fd*, of a disk of *size* bytes, below its limit. Owns all but *scoreboard*."""

    def __init__(self, cache_fd: int, size: int, state: ProcessState, scoreboard: Scoreboard, use_map: UseMap) -> None:
        self._cache_fd = cache_fd
        self._size = size
        self._state = state
        self._bitmap, self._written = state.bitmap.octets, state.written.octets
        self._bytes = bitmap_size(state.bitmap.blocks)
        self._blocks = state.bitmap.blocks
        self._gate = scoreboard.gate
        self._room = scoreboard.room
        self._use_map = use_map
        self._letting_go = LettingGo(cache_fd, size, state, scoreboard)
        self._oldest = era_after(self._era) if self._era else 1
        self._is_above = False
        self._pieces = self._local = 0
        self._leftovers: Optional[Iterator[int]] = None
        self._clean_pages: Set[int] = set()
        self._overwriting = _Overwriting(state.written)
        self._count_at = self._look_at = 0.0
        self._seen = self._counted = -1
        self._has_swept = False
        self._begin_era(self._era or 2)

    @property
    def _era(self) -> int:
        return self._use_map.octets[self._use_map.era_at]

    def step(self) -> float:
        """Do what there is to do; returns after how many seconds to come again.

        Raises `OSError`, `TimeoutError` among them if some process is in the way.
        """
        now, came = monotonic(), self._room.came
        if now >= self._count_at and (came != self._counted or self._overwriting.reached(self._clean_pages)):
            self.count()
        if now >= self._look_at:
            self._turn_era(now)
        used = self._room.used
        self._is_above = used > (self._room.low if self._is_above else self._room.high)
        if self._is_above and self._let_go(used - self._room.low):
            return 0.0
        if self._leftovers is not None and self._sweep(self._leftovers):
            return _SOON
        idle, self._seen = came == self._seen, came
        if self._is_above:
            return _SOON
        return _LONG if idle else _LATER

    # What there is

    def count(self) -> None:
        """Count the clean blocks, and put pieces without an era into the oldest one.

        Those that come meanwhile count twice, perhaps, but none is missed.
        """
        began = monotonic()
        with self._gate.closed(_GATE_TIMEOUT):
            expected = self._room.expected()
        self._counted, _ = expected
        self._clean_pages.clear()
        found = self._pieces = self._local = 0
        for at in range(0, self._bytes, PAGE):
            local = self._bitmap[at : min(at + PAGE, self._bytes)]
            if local.count(0) < len(local):
                found += self._count_page(at, local)
        self._room.correct(expected, found)
        if self._letting_go.gives_space_back and self._has_leftovers():
            self._leftovers = pieces_with_leftovers(self._cache_fd, self._size, self._state.bitmap)
            self._has_swept = True
        self._count_at = monotonic() + max(_COUNT_EVERY, _LONGER * (monotonic() - began))

    def _has_leftovers(self) -> bool:
        return not self._has_swept or takes(self._cache_fd) > self._local + _MOST_LEFT

    def _count_page(self, at: int, local: bytes) -> int:
        written = self._written[at : at + len(local)]
        self._local += count_bits(local)
        clean = local if written.count(0) == len(written) else _without(local, written)
        clean_blocks = count_bits(clean)
        if clean_blocks:
            self._clean_pages.add(at // PAGE)
        uses, first = self._use_map.octets, at // _PIECE_BYTES
        age = (self._era - self._oldest) % ERAS
        for piece, start in enumerate(range(0, len(clean), _PIECE_BYTES), first):
            if clean[start : start + _PIECE_BYTES] != _ZEROS[: len(clean) - start]:
                self._pieces += 1
                if not uses[piece] or (uses[piece] - self._oldest) % ERAS > age:
                    uses[piece] = self._oldest
        return clean_blocks

    def _turn_era(self, now: float) -> None:
        """Begin a new era if a good part of the pieces was used in this one."""
        era, uses = self._era, self._use_map
        pieces = max(self._pieces, self._room.used // PIECE, _GENERATIONS)
        if uses.count(era) * _GENERATIONS >= pieces:
            era = era_after(era)
            if era == self._oldest:
                self._oldest = era_after(era)
                for piece in uses.of_era(era):
                    uses.octets[piece] = self._oldest
            self._begin_era(era)
        self._look_at = monotonic() + _LONGER * (monotonic() - now)

    def _begin_era(self, era: int) -> None:
        """What comes for nobody goes soon, but not before it can be used."""
        age = (era - self._oldest) % ERAS
        self._use_map.begin(era, (self._oldest - 1 + age // 8) % ERAS + 1)

    # What goes

    def _let_go(self, wanted: int) -> int:
        """Let go of about so many blocks, if that is possible; returns how many."""
        gone = self._letting_go.let_go(self._victims(wanted), _TIMEOUT, _GATE_TIMEOUT)
        self._room.let_go(gone)
        return gone

    def _victims(self, wanted: int) -> List[Run]:
        """The pieces that were used the longest time ago, with so many clean blocks."""
        victims: Set[int] = set()
        for piece in self._by_age():
            clean = self._clean_blocks(piece)
            if not clean:
                self._forget(piece)
            elif piece not in victims:  # it may be used meanwhile, and found again
                victims.add(piece)
                wanted -= clean
            if wanted <= 0 or len(victims) == _MOST_PIECES:
                break
        return [self._blocks_of(piece) for piece in sorted(victims)]

    def _by_age(self) -> Iterator[int]:
        """All pieces, those of the oldest era first. An era of which all are gone is not the oldest any more."""
        era, present = self._oldest, self._era
        while True:
            was_there = False
            for piece in self._use_map.of_era(era):
                was_there = True
                yield piece
            if era == present:
                return
            if not was_there and era == self._oldest:
                self._oldest = era_after(era)
                self._begin_era(present)
            era = era_after(era)

    def _clean_blocks(self, piece: int) -> int:
        at = piece * _PIECE_BYTES
        local, written = (octets[at : min(at + _PIECE_BYTES, self._bytes)] for octets in (self._bitmap, self._written))
        return count_bits(_without(local, written))

    def _forget(self, piece: int) -> None:
        """Nothing of *piece* is clean and local. A client may be about to use it, which is looked at after that."""
        uses = self._use_map.octets
        era, uses[piece] = uses[piece], 0
        if self._clean_blocks(piece):
            uses[piece] = era

    def _sweep(self, leftovers: Iterator[int]) -> bool:
        """Give the space of some leftovers back; whether there may be more."""
        pieces = list(islice(leftovers, _MOST_PIECES))
        if not pieces:
            self._leftovers = None
            return False
        self._letting_go.free([self._blocks_of(piece) for piece in pieces], _TIMEOUT, _GATE_TIMEOUT)
        return True

    def _blocks_of(self, piece: int) -> Run:
        return piece * PIECE, min((piece + 1) * PIECE, self._blocks)

    def close(self) -> None:
        self._use_map.close()
        self._state.close()
        os.close(self._cache_fd)


class _Overwriting:
    """Notices where clients write, by the pages of the *written* map, and by what checkpoints note of them anyway."""

    def __init__(self, written: WrittenMap) -> None:
        self._written = written
        self._sums: Dict[int, bytes] = {}
        self._look_at = 0.0

    def reached(self, pages: Set[int]) -> bool:
        """Whether something was marked on one of *pages* since it was said the last time; it may be told later."""
        began = monotonic()
        if began < self._look_at:
            return False
        sums = self._written.exposed()
        marked = [page for page, checksum in sums.items() if self._sums.get(page) != checksum]
        self._sums.update(sums)
        self._look_at = monotonic() + max(_COUNT_EVERY, _LONGER * (monotonic() - began))
        return not pages.isdisjoint(marked)


def _without(local: bytes, written: bytes) -> bytes:
    """The bits of *local* that are not in *written*."""
    clean = int.from_bytes(local, "little") & ~int.from_bytes(written, "little")
    return clean.to_bytes(len(local), "little")
