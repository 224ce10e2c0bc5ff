"""Copying all that is missing, in a process of its own, with a deep queue.

Holes of the origin, where it can tell them, become local without being transferred.
Who waits for blocks goes first: while any client does, only a little is asked for
ahead of it. What was copied is known from the bitmap alone, so that a copy may end
at any time and be begun again.
"""

from __future__ import annotations

import os
from time import monotonic
from typing import Dict, Iterator, NamedTuple, Optional, Tuple

from ...errors import TaskFailed
from ...origin.flow_window import FlowWindow
from ...proxy.fetch_queue import PIECE
from ...proxy.image import ProxyImage
from ...proxy.zero_query import ZeroQuery
from ...storage.blocks import BLOCK, block_count
from ...storage.image import Ticket
from ...storage.space import NO_SPACE
from ...text import counted
from ..disk import Disk
from ..process_loop import ProcessLoop

_LEAST, _SHALLOW = 1 << 20, 512 << 10
"""Bytes asked for at once, at least if nobody else wants anything, and at most if somebody does."""

_QUERY_STEP = 1 << 19
_QUERY_ATTEMPTS = 3
_MOST_FAILURES = 100
_ZERO_STEP = 1 << 14
_LOOK_AROUND = 0.1
_COUNT_PATIENCE = 10.0


class CopyOptions(NamedTuple):
    """How to copy: *piece* blocks with one request, *rate* bytes per second at most (0: as fast as it goes)."""

    piece: int = PIECE
    rate: int = 0


class Copier:
    """Copies all missing blocks of one disk, in a process without a client."""

    def __init__(self, disk: Disk, image: ProxyImage, loop: ProcessLoop, options: CopyOptions) -> None:
        self._disk = disk
        self._fetcher = image.fetcher
        self._fetcher.arrivals.passes_on = False  # what cannot be kept is of no use here
        self._bitmap = image.bitmap
        self._blocks = block_count(image.size)
        self._loop = loop
        self._options = options
        self._outstanding: Dict[Ticket, Tuple[float, int]] = {}
        self._bytes = 0
        self._flow_window = FlowWindow(_LEAST)
        self._allowed_at = monotonic()
        self._looked_at = 0.0
        self._crowded = self._passed_over = False
        self._failures = self._error = 0

    def run(self) -> None:
        """Return when every block is local, or the cache is full, or the disk is no proxy any more.

        Raises `TaskFailed`, and `Stop`. What the origin cannot read is passed over, and told of in the end.
        """
        self._wait_for_count()
        while not self._is_over and not self._bitmap.all_set(0, self._blocks):
            for first, end in self._missing():
                self._fetch(first, end)
                if self._is_over:
                    break
            while self._outstanding and self._disk.stays_proxy():
                self._wait()
            if self._failures:
                self._fail()
            if self._passed_over:
                self._passed_over = False
                self._wait()

    def _wait_for_count(self) -> None:
        """Before the first count of a cache with a limit nobody knows whether there is room."""
        room, until = self._disk.scoreboard.room, monotonic() + _COUNT_PATIENCE
        while room.limit and not room.is_counted and monotonic() < until and self._disk.stays_proxy():
            self._wait()

    @property
    def is_full(self) -> bool:
        """Whether the limit of the cache is reached: more would push out what clients use."""
        return self._room_left <= 0

    @property
    def _room_left(self) -> int:
        """How many blocks more may be asked for; in a cache without a limit `_ZERO_STEP`, which always fits."""
        room = self._disk.scoreboard.room
        return room.high - room.used - self._bytes // BLOCK if room.limit else _ZERO_STEP

    @property
    def _is_over(self) -> bool:
        return not self._disk.stays_proxy() or self.is_full

    def _missing(self) -> Iterator[Tuple[int, int]]:
        """Runs of blocks to be fetched, after the origin's holes in them were noted."""
        position = 0
        while position < self._blocks and not self._is_over:
            first, end, local = next(self._bitmap.runs(position, min(position + _QUERY_STEP, self._blocks)))
            if not local:
                end = min(first + _QUERY_STEP, self._blocks)  # what is local within is passed over later
                zero_query = self._query_zeros(first, end)
                if zero_query is not None and zero_query.until > first:
                    end = zero_query.until
                    yield from self._between(zero_query, first, end)
                else:
                    yield first, end
            position = end

    def _query_zeros(self, first: int, end: int) -> Optional[ZeroQuery]:
        """What the origin says of its holes; an origin that is always lost over that is not asked for ever."""
        zero_query = None
        for _ in range(_QUERY_ATTEMPTS):
            while not self._fetcher.approach():
                self._wait()
                if not self._disk.stays_proxy():
                    return None
            zero_query = self._fetcher.query_zeros(first, end)
            while zero_query is not None and not zero_query.done and self._disk.stays_proxy():
                self._wait()
            if zero_query is None or not zero_query.lost:
                break
        return zero_query

    def _between(self, zero_query: ZeroQuery, first: int, end: int) -> Iterator[Tuple[int, int]]:
        """What lies between the holes."""
        for zero_first, zero_end in zero_query.zeros:
            if zero_first > first:
                yield first, zero_first
            first = zero_first
            while first < zero_end:
                fitting = min(_ZERO_STEP, self._room_left)  # zeros find room all together, or not at all
                if fitting <= 0:
                    return
                self._make_zero(first, min(first + fitting, zero_end))
                first = min(first + fitting, zero_end)
        if first < end:
            yield first, end

    def _make_zero(self, first: int, end: int) -> None:
        """What another process has in hand is left for the next round."""
        self._loop.check()
        self._disk.place.enter()
        try:
            if self._disk.stays_proxy() and not self._fetcher.make_zero(first, end):
                self._passed_over = True
        except OSError as error:
            raise TaskFailed(f"cannot write to the cache image: {error.strerror}") from error
        finally:
            self._disk.place.leave()

    def _fetch(self, first: int, end: int) -> None:
        piece = self._options.piece
        for run_first, run_end, local in self._bitmap.runs(first, end):
            while not local and run_first < run_end and not self._is_over:
                stop = min(run_end, (run_first // piece + 1) * piece)
                self._make_room()
                ticket = self._fetcher.need(run_first, stop)
                if ticket is not None:
                    length = (stop - run_first) * BLOCK
                    self._outstanding[ticket] = (monotonic(), length)
                    self._bytes += length
                    if self._options.rate:
                        self._allowed_at = max(self._allowed_at, monotonic() - 0.2) + length / self._options.rate
                run_first = stop

    def _make_room(self) -> None:
        while self._disk.stays_proxy():
            now = monotonic()
            if now - self._looked_at > _LOOK_AROUND:
                self._look_around(now)
            window = _SHALLOW if self._crowded else max(_LEAST, self._fetcher.link.window or self._flow_window.size)
            if self._bytes < window and now >= self._allowed_at:
                return
            self._wait(None if self._bytes >= window else self._allowed_at - now)

    def _look_around(self, now: float) -> None:
        self._looked_at = now
        scoreboard, own = self._disk.scoreboard, (self._disk.scoreboard.namespace, os.getpid())
        self._crowded = any(
            line.queued_requests for line in scoreboard.lines.living() if (line.namespace, line.pid) != own
        )
        self._disk.place.tell()

    def _wait(self, timeout: Optional[float] = None) -> None:
        self._loop.wait((), 0, _LOOK_AROUND if timeout is None else min(timeout, _LOOK_AROUND), results=True)
        if self._fetcher.link.has_changed:
            raise TaskFailed("the origin has another disk now: what is missing cannot be copied")
        finished, self._fetcher.finished = self._fetcher.finished, []
        now = monotonic()
        for ticket in finished:
            self._finish(ticket, now)

    def _finish(self, ticket: Ticket, now: float) -> None:
        asked_at, length = self._outstanding.pop(ticket, (now, 0))
        if not length:
            return  # a zero query's, or that the origin is there
        self._flow_window.on_reply(asked_at, now, length, self._bytes)
        self._bytes -= length
        if ticket.error:
            self._failures += 1
            self._error = ticket.error
            if self._failures == _MOST_FAILURES or ticket.error in NO_SPACE:
                self._fail()

    def _fail(self) -> None:
        missing = self._blocks - self._bitmap.count()
        raise TaskFailed(
            f"{counted(missing, 'block')} could not be copied: {os.strerror(self._error)} (the log tells which)"
        )
