"""Bringing blocks from the origin into the cache, while others go on.

What is to be fetched is the business of `proxy.fetch_queue`, who may write which
blocks that of `proxy.locking`, what becomes of data that has come that of
`proxy.arrivals`, and the way to the origin that of `proxy.origin_link`. The rules
that keep the cache right:

- A block is written by the process that holds the lock of its byte of the bitmap.
- With the lock in hand the bits are looked at once more.
- When the origin is lost its fetches let go of their locks and are asked again.
- A piece of the disk that the origin cannot read is asked for again block by block:
  only who needs the block that is bad hears of it.
- Whatever fails between the taking of a fetch and its end ends it, with that error.
"""

from __future__ import annotations

import errno
from math import inf
from time import monotonic
from typing import Any, List, Optional, Tuple

from ..logs import log
from ..origin.base import Origin, OriginLost
from ..scoreboard.layout import TARGET
from ..storage.blocks import BLOCK, BLOCK_SHIFT, block_count, block_start, block_stop
from ..storage.image import Background, Ticket
from ..storage.target import TargetImage
from .arrivals import Arrivals
from .fetch_queue import PIECE, Fetch, FetchQueue
from .flow_window import FlowWindow
from .locking import HELD, LATER, Locking
from .origin_link import OriginLink, Patience, Whereabouts
from .state.checkpoint import ProcessState
from .zero_query import ZeroQuery

_IN_FLIGHT = 8 << 20
"""Bytes asked for at once for those who wait; ahead of them, a `FlowWindow` that is never larger."""

_HELD = 4 * _IN_FLIGHT
"""Bytes held for those who wait, because they cannot be kept, from which on no more is asked for than has to be."""

_LEAST_AHEAD = 512 << 10
_PARTING = 1.0


class Fetcher(Background):
    """Fills *cache* for this process, and is the origin's sink; everything between two sleeps happens in one thread."""

    def __init__(
        self,
        cache: TargetImage,
        state: ProcessState,
        whereabouts: Whereabouts,
        patience: Patience,
        fetch_size: Optional[int] = None,
    ) -> None:
        """*fetch_size* is the bytes to ask for at once, at least; None: what suits the kind of origin."""
        self.finished: List[Ticket] = []
        self._size = cache.size
        self._bitmap = state.bitmap
        self._scoreboard = whereabouts.scoreboard
        self._patience = patience.origin
        is_local = state.bitmap.__contains__
        self._queue = FetchQueue(timed=patience.origin is not None, is_local=is_local, blocks=block_count(cache.size))
        self.need_block = self._queue.need_block
        """What `need` does, for one block that is not local."""
        self.locking = Locking(cache, state, self._queue)
        self.arrivals = Arrivals(cache, state, self._queue, whereabouts.scoreboard)
        self.on_data = self.arrivals.on_data
        self.on_hole = self.arrivals.on_hole
        self._link = OriginLink(whereabouts, patience, cache.size, state.versions, self)
        self._in_flight = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)
        self._zero_queries = 0
        self._approach = False
        self._fetch_size = fetch_size
        self._set_least()

    def _set_least(self) -> None:
        size = self._link.fetch_size if self._fetch_size is None else self._fetch_size
        self._queue.least = min(PIECE, size >> BLOCK_SHIFT)

    # For those who need blocks

    def need(self, first: int, end: int) -> Optional[Ticket]:
        """A ticket for the blocks from *first* up to *end* that are not local; None if they all are by now."""
        ticket = Ticket()
        for run_first, run_end, local in self._bitmap.runs(first, end):
            if not local:
                self._queue.need(ticket, run_first, run_end)
        return ticket if ticket.pending else None

    def bring_ahead(self, first: int, end: int) -> None:
        """Fetch what is missing of these blocks, after everything that is needed, unless it cannot be kept."""
        if self.arrivals.is_full:
            return
        for run_first, run_end, local in self._bitmap.runs(first, end):
            if not local:
                self._queue.bring_ahead(run_first, run_end)

    def query_zeros(self, first: int, end: int) -> Optional[ZeroQuery]:
        """Ask about these blocks, of less than 4 GiB; None if the origin cannot tell, or is not there."""
        origin = self._link.origin
        if origin is None or not self._link.ready or not origin.can_tell_zeros:
            return None
        zero_query = ZeroQuery(first, end, self._size)
        origin.query_extents(zero_query, block_start(first), block_stop(end - 1, self._size) - block_start(first))
        self._zero_queries += 1
        return zero_query

    def make_zero(self, first: int, end: int) -> bool:
        """Note that these blocks are zeros at the origin; False if another process has some, or there is no room."""
        if not self.locking.borrow(first, end):
            return False
        try:
            for run_first, run_end, local in list(self._bitmap.runs(first, end)):
                if not local:
                    if not self.arrivals.admits_zeros(run_first, run_end):
                        return False
                    self.arrivals.make_zero(run_first, run_end)
                    self.locking.mark_local(run_first, run_end)
        finally:
            self.locking.give_back(first, end)
        return True

    @property
    def has_changed(self) -> bool:
        """Whether the origin has another disk now: nothing more comes of this one."""
        return self._link.has_changed

    # Background

    @property
    def trouble(self) -> str:
        return self._link.trouble

    @property
    def busy(self) -> bool:
        return bool(self._queue or self.locking.busy or self.finished or self._zero_queries or self._approach)

    @property
    def quiet(self) -> bool:
        return self._link.quiet

    @property
    def health(self) -> int:
        return self._link.health

    @property
    def returns(self) -> int:
        return self._link.returns

    def interests(self) -> List[Tuple[int, int]]:
        return self._link.interests()

    def deadline(self) -> Optional[float]:
        times = [self.locking.deadline, self._link.deadline(needed=self._has_work)]
        if self._link.refuses and self._queue.wanted:
            return 0.0
        if self._patience is not None:
            waiting = (self.locking.oldest, None if self._link.ready else self._queue.waits_since())
            times += [since + self._patience for since in waiting if since is not None]
        return min((time for time in times if time is not None), default=None)

    @property
    def _has_work(self) -> bool:
        """Whether there is anything to ask the origin."""
        return bool(self._queue.wanted or self._queue.ahead or self._approach)

    def progress(self) -> None:
        link = self._link
        if self.locking.busy:
            self.finished += self.locking.take_turn()
        if link.is_outdated:
            self._queue.forget_damage()
            self._ask_again(link.move())
            self._set_least()
        if self._patience is not None:
            self._give_up(monotonic() - self._patience)
        try:
            if link.origin is None and self._has_work:
                link.open()
            if link.origin is not None:
                self._work_with(link.origin)
        except (OriginLost, OSError) as error:
            self._ask_again(link.lose(error, len(self._queue.wanted)))
        finally:
            self.arrivals.settle()
            if self._link.refuses:
                self._refuse()

    def approach(self) -> bool:
        self._approach = not self._link.ready
        return self._link.ready

    def abandon(self) -> None:
        """What the origin was asked for still comes, and its locks are held until then."""
        self._queue.abandon(self.locking.abandon())
        self.finished = []

    def _work_with(self, origin: Origin) -> None:
        if self._link.ready:
            self._ask(origin)
        self._link.progress(origin)
        if self._link.ready:
            if self._queue.wanted or self._queue.ahead:
                self._ask(origin)
                origin.push()
            if self._approach:
                self._approach = False
                self.finished.append(Ticket())

    def _ask_again(self, unfinished: List[Any]) -> None:
        """The origin is not there any more: what it was asked for is asked for again, if anybody waits for it."""
        self._in_flight = self._zero_queries = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)
        for fetch in reversed(unfinished):
            if isinstance(fetch, ZeroQuery):
                fetch.lost = True
                fetch.finish(errno.EIO)
                self.finished.append(fetch.ticket)
                continue
            self.arrivals.give_up(fetch)
            self.locking.release(fetch)
            fetch.error = 0
            fetch.passing = None
            fetch.sums.clear()
            if fetch.tickets:
                self._queue.put_back(fetch)
            else:
                self._queue.forget(fetch)
        self._queue.forget_ahead()

    def _give_up(self, time: float) -> None:
        """End what has waited since *time* or longer, for an origin that is not there or for another process."""
        if not self._link.ready:
            for fetch in self._queue.take_older(time):
                self._finish(fetch, errno.EIO)
        self.finished += self.locking.give_up(time)

    def _refuse(self) -> None:
        """Another disk is where this one was: what is missing does not come."""
        self._queue.forget_ahead()
        for fetch in self._queue.take_older(inf):
            self._finish(fetch, errno.EIO)

    def take_leave(self) -> None:
        self._link.leave(0.0)

    def close(self) -> None:
        """Take leave of the origin, as soon as what it was asked for has come; none of that is kept.

        Not kept, because the disk may be a plain target by now. In that case nobody
        waits here either.
        """
        self.arrivals.closed = True
        self._queue.wanted.clear()
        self._queue.ahead.clear()
        self._link.leave(0.0 if self._scoreboard.mode == TARGET else _PARTING)

    # Asking

    def _ask(self, origin: Origin) -> None:
        wanted, ahead = self._queue.wanted, self._queue.ahead
        most = self._most_in_flight()
        while wanted and self._in_flight < most:
            self._ask_for(origin, wanted.popleft())
        while ahead and self._in_flight < self._flow_window.size:
            self._ask_for(origin, ahead.popleft())

    def _most_in_flight(self) -> int:
        """Bytes; where much is held, what is done has to leave first, and the rest comes one by one."""
        if self.arrivals.passage.held < _HELD:
            return _IN_FLIGHT
        return 0 if self.finished else 1

    def _ask_for(self, origin: Origin, fetch: Fetch) -> None:
        most = origin.maximum_read >> BLOCK_SHIFT
        if fetch.end - fetch.first > most:
            self._queue.split(fetch, fetch.first + max(1, most))
        outcome = self.locking.hold(fetch)
        if outcome == HELD:
            offset = block_start(fetch.first)
            length = block_stop(fetch.end - 1, self._size) - offset
            self._in_flight += length
            fetch.asked_at = monotonic()
            origin.read(fetch, offset, length)
        elif outcome != LATER:
            self._finish(fetch, outcome)

    # Replies (`origin.base.Sink`), besides data

    def on_extents(self, token: ZeroQuery, extents: List[Tuple[int, bool]]) -> None:
        token.add(extents)

    def on_done(self, token: Any, error: int) -> None:
        if isinstance(token, ZeroQuery):
            self._zero_queries -= 1
            token.finish(error)
            self.finished.append(token.ticket)
            return
        first, end = token.first, token.end
        length = block_stop(end - 1, self._size) - block_start(first)
        self._flow_window.on_reply(token.asked_at, monotonic(), length, self._in_flight)
        self._in_flight -= length
        if not error:
            self._link.on_answer()
            self.arrivals.complete(token)
        self.arrivals.give_up(token)
        token.error = self.locking.release(token) or token.error
        if error and not token.error:
            if self._queue.note_damage(first, end):
                count, offset = (end - first) * BLOCK, block_start(first)
                log.warning("the origin cannot read %d bytes at %d: error %d", count, offset, error)
            if end - first > 1:
                error = 0  # who needs them asks again, for one after the other
        self._finish(token, token.error or error)

    def _finish(self, fetch: Fetch, error: int) -> None:
        self.finished += self._queue.finish(fetch, error)
