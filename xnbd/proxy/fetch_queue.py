"""Which blocks are to be fetched, with what, and in which order: pure bookkeeping.

A `Fetch` is a run of blocks that are asked for with one READ. Whoever needs its
blocks holds a `Ticket`. No block is in two fetches.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Callable, Deque, Dict, List, Optional, Set, Tuple

from ..storage.image import Ticket

PIECE = 64
"""Blocks that one READ asks for at most, and a multiple of which none goes across."""

_MOST_DAMAGED = 1 << 12


class Fetch:
    """The blocks from *first* up to *end*. ``mixed`` tells that some of them may be there already.

    ``counted`` is how many blocks of it are counted as come, in a cache that has a limit (`proxy.limited`).
    ``sums`` are those of blocks that have come, of so many from a block on; later ones replace earlier ones.
    ``passing`` is what has come and finds no room in the cache, if anything does not: offsets and data.
    ``locked_at`` is when another process was found to have some of the blocks, if one has.
    """

    __slots__ = (
        "ahead",
        "asked_at",
        "counted",
        "end",
        "error",
        "first",
        "locked_at",
        "mixed",
        "passing",
        "since",
        "sums",
        "tickets",
    )

    def __init__(self, first: int, end: int, *, ahead: bool) -> None:
        self.first = first
        self.end = end
        self.ahead = ahead
        self.tickets: List[Ticket] = []
        self.mixed = False
        self.sums: List[Tuple[int, bytes]] = []
        self.passing: Optional[List[Tuple[int, bytes]]] = None
        self.error = self.counted = 0
        self.since = self.asked_at = self.locked_at = 0.0

    def note_lock(self) -> None:
        """What another process had locked, if anything was, is locked no more: its tickets are told how long it was."""
        if self.locked_at:
            seconds = monotonic() - self.locked_at
            for ticket in self.tickets:
                ticket.locked = max(ticket.locked, seconds)
            self.locked_at = 0.0


class FetchQueue:
    """All fetches of a process. ``wanted`` are those to be asked for, ``ahead`` those nobody waits for, after them.

    Those taken out of there go on to exist until `finish` or `forget`. ``since`` is noted if they are *timed*.
    With a ``least`` of blocks, a power of 2 and at most `PIECE`, a fetch has so many: those around it of which
    *is_local* says that they are missing, and which no other fetch has, up to the next multiples of it.
    """

    def __init__(self, *, timed: bool, is_local: Callable[[int], bool] = lambda block: False, blocks: int = 0) -> None:
        self.least = 1
        self._is_local = is_local
        self._blocks = blocks
        self.wanted: Deque[Fetch] = deque()
        self.ahead: Deque[Fetch] = deque()
        self._timed = timed
        self._by_block: Dict[int, Fetch] = {}
        self._damaged: Dict[int, Set[int]] = {}  # pieces, and what was told of their blocks

    def __bool__(self) -> bool:
        """Whether there is any fetch."""
        return bool(self._by_block)

    # For those who need blocks

    def need_block(self, block: int) -> Ticket:
        """A ticket for *block*."""
        ticket = Ticket()
        ticket.pending = 1
        fetch = self._by_block.get(block)
        if fetch is None:
            first, end = self._widened(block, block + 1) if self.least > 1 else (block, block + 1)
            fetch = self._add(self.wanted, first, end, ahead=False)
        elif fetch.ahead:
            self._prefer(fetch)
        fetch.tickets.append(ticket)
        return ticket

    def need(self, ticket: Ticket, first: int, end: int) -> None:
        """Have *ticket* be for the blocks from *first* up to *end* too, after others that lie before them."""
        by_block = self._by_block
        while first < end:
            fetch = by_block.get(first)
            if fetch is None:
                fetch = self._add(self.wanted, *self._widened(first, self._free_until(first, end)), ahead=False)
            elif fetch.ahead:
                self._prefer(fetch)
            if not fetch.tickets or fetch.tickets[-1] is not ticket:
                fetch.tickets.append(ticket)
                ticket.pending += 1
            first = fetch.end

    def bring_ahead(self, first: int, end: int) -> None:
        """Fetch these blocks after everything that is needed."""
        by_block = self._by_block
        while first < end:
            stop = first + 1
            if first not in by_block:
                begin, stop = self._widened(first, self._free_until(first, end))
                self._add(self.ahead, begin, stop, ahead=True)
            first = stop

    def _prefer(self, fetch: Fetch) -> None:
        """Somebody waits for what was to be fetched ahead."""
        fetch.ahead = False
        if fetch in self.ahead:
            self.ahead.remove(fetch)
            self.wanted.append(fetch)

    def _free_until(self, first: int, end: int) -> int:
        """Where a fetch from *first* on has to end: at *end*, at a piece's end, or where another one begins."""
        by_block = self._by_block
        piece = first // PIECE
        stop = min(end, (piece + 1) * PIECE) if piece not in self._damaged else first + 1
        if stop - first == 1 or by_block.keys().isdisjoint(range(first + 1, stop)):
            return stop
        return next(block for block in range(first + 1, stop) if block in by_block)

    def _widened(self, first: int, end: int) -> Tuple[int, int]:
        """The blocks to fetch instead of these, which are missing, in no fetch, and of one piece."""
        least = self.least
        if end - first >= least or first // PIECE in self._damaged:
            return first, end
        by_block, is_local = self._by_block, self._is_local
        lowest, highest = first // least * least, min(-(-end // least) * least, self._blocks)
        while first > lowest and first - 1 not in by_block and not is_local(first - 1):
            first -= 1
        while end < highest and end not in by_block and not is_local(end):
            end += 1
        return first, end

    def _add(self, queue: Deque[Fetch], first: int, end: int, *, ahead: bool) -> Fetch:
        last = queue[-1] if queue else None
        if last is not None and last.end == first and first % PIECE and first // PIECE not in self._damaged:
            last.end = end
            fetch = last
        else:
            fetch = Fetch(first, end, ahead=ahead)
            if self._timed:
                fetch.since = monotonic()
            queue.append(fetch)
        if end - first == 1:
            self._by_block[first] = fetch
        else:
            self._by_block.update(dict.fromkeys(range(first, end), fetch))
        return fetch

    def note_written(self, first: int, end: int) -> None:
        """These blocks are there by now: what is fetched of them is not to be written."""
        by_block = self._by_block
        if len(by_block) < end - first:
            for block, fetch in by_block.items():
                if first <= block < end:
                    fetch.mixed = True
        elif by_block:
            for block in range(first, end):
                if block in by_block:
                    by_block[block].mixed = True

    # For who fetches

    def put_back(self, fetch: Fetch) -> None:
        """Ask for *fetch* again, before all others."""
        (self.ahead if fetch.ahead else self.wanted).appendleft(fetch)

    def split(self, fetch: Fetch, end: int) -> None:
        """Ask for the blocks from *end* on separately, next."""
        rest = Fetch(end, fetch.end, ahead=fetch.ahead)
        rest.since, rest.mixed, rest.tickets = fetch.since, fetch.mixed, list(fetch.tickets)
        for ticket in rest.tickets:
            ticket.pending += 1
        self._by_block.update(dict.fromkeys(range(end, fetch.end), rest))
        fetch.end = end
        self.put_back(rest)

    def waits_since(self) -> Optional[float]:
        """When the first of those in `wanted` came to be, if they are timed and there are any."""
        return min(fetch.since for fetch in self.wanted) if self._timed and self.wanted else None

    def take_older(self, time: float) -> List[Fetch]:
        """Those of `wanted` that came to be at *time* at the latest, taken out."""
        older = [fetch for fetch in self.wanted if fetch.since <= time]
        for fetch in older:
            self.wanted.remove(fetch)
        return older

    def finish(self, fetch: Fetch, error: int) -> List[Ticket]:
        """The end of *fetch*, well or with the errno *error*: the tickets that are done by that."""
        self.forget(fetch)
        fetch.note_lock()
        done = []
        for ticket in fetch.tickets:
            ticket.error = ticket.error or error
            ticket.pending -= 1
            if not ticket.pending:
                done.append(ticket)
        return done

    def forget(self, fetch: Fetch) -> None:
        by_block, first = self._by_block, fetch.first
        del by_block[first]
        if fetch.end - first > 1:
            for block in range(first + 1, fetch.end):
                del by_block[block]

    def forget_ahead(self) -> None:
        """Forget those of `ahead`."""
        for fetch in self.ahead:
            self.forget(fetch)
        self.ahead.clear()

    def abandon(self, waiting: List[Fetch]) -> None:
        """Nobody waits any more: forget those to be asked for, and those *waiting* for a lock."""
        for fetch in (*self.wanted, *self.ahead, *waiting):
            self.forget(fetch)
        self.wanted.clear()
        self.ahead.clear()
        for fetch in self._by_block.values():
            fetch.tickets.clear()

    # What the origin cannot read

    def note_damage(self, first: int, end: int) -> bool:
        """Not all of these blocks can be read: those of their piece are asked for one by one from now on.

        Returns whether that is news.
        """
        if len(self._damaged) >= _MOST_DAMAGED:
            self._damaged.clear()
        told = self._damaged.setdefault(first // PIECE, set())
        if end - first > 1:
            return True
        news = first not in told
        told.add(first)
        return news

    def forget_damage(self) -> None:
        self._damaged.clear()
