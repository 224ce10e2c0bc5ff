"""What a process has asked its origin for: how much of it at once, and what becomes of the replies.

- A fetch is sent when its blocks are locked, and lets go of them when its reply is there.
- A piece of the disk that the origin cannot read is asked for again block by block:
  only who needs the block that is bad hears of it.
- Whatever fails between the taking of a fetch and its end ends it, with that error.
"""

from __future__ import annotations

import errno
from time import monotonic
from typing import Any, Callable, List, Tuple

from ..logs import log
from ..origin.base import Origin
from ..origin.flow_window import FlowWindow
from ..storage.blocks import BLOCK, BLOCK_SHIFT, block_start, block_stop
from ..storage.image import Ticket
from ..system.file_locks import do_nothing
from .arrivals import Arrivals
from .fetch_queue import Fetch, FetchQueue
from .locking import HELD, LATER, Locking
from .zero_query import ZeroQuery

_IN_FLIGHT = 8 << 20
"""Bytes asked for at once for those who wait; ahead of them, a `FlowWindow` that is never larger."""

_HELD = 4 * _IN_FLIGHT
"""Bytes held for those who wait, because they cannot be kept, from which on no more is asked for than has to be."""

_LEAST_AHEAD = 512 << 10

Finished = Callable[[List[Ticket]], object]


class Asking:
    """Requests to the origin, and its sink, for a disk of *size* bytes. Tickets that are done go to *finished*."""

    def __init__(self, size: int, queue: FetchQueue, locking: Locking, arrivals: Arrivals, finished: Finished) -> None:
        self.on_data = arrivals.on_data
        self.on_hole = arrivals.on_hole
        self.on_answer: Callable[[], object] = do_nothing
        """Called when the origin has answered, and well."""
        self.zero_queries = 0
        """Those that are not done."""
        self._size = size
        self._queue = queue
        self._locking = locking
        self._arrivals = arrivals
        self._finished = finished
        self._in_flight = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)

    def ask(self, origin: Origin, *, crowded: bool) -> None:
        """Ask *origin* for what is queued, as far as it is time for that.

        *crowded* tells that tickets are done and have not been taken off yet.
        """
        wanted, ahead = self._queue.wanted, self._queue.ahead
        most = self._most_in_flight(crowded=crowded)
        while wanted and self._in_flight < most:
            self._ask_for(origin, wanted.popleft())
        window = origin.window or self._flow_window.size
        while ahead and self._in_flight < window:
            self._ask_for(origin, ahead.popleft())

    def _most_in_flight(self, *, crowded: bool) -> int:
        """Bytes; where much is held, what is done has to leave first, and the rest comes one by one."""
        if self._arrivals.passage.held < _HELD:
            return _IN_FLIGHT
        return 0 if crowded else 1

    def _ask_for(self, origin: Origin, fetch: Fetch) -> None:
        most = origin.maximum_read >> BLOCK_SHIFT
        if fetch.end - fetch.first > most:
            self._queue.split(fetch, fetch.first + max(1, most))
        outcome = self._locking.hold(fetch)
        if outcome == HELD:
            offset = block_start(fetch.first)
            length = block_stop(fetch.end - 1, self._size) - offset
            self._in_flight += length
            fetch.asked_at = monotonic()
            origin.read(fetch, offset, length)
        elif outcome != LATER:
            self.finish(fetch, outcome)

    def query_zeros(self, origin: Origin, first: int, end: int) -> ZeroQuery:
        """Ask *origin*, which can tell, about these blocks, of less than 4 GiB."""
        zero_query = ZeroQuery(first, end, self._size)
        origin.query_extents(zero_query, block_start(first), block_stop(end - 1, self._size) - block_start(first))
        self.zero_queries += 1
        return zero_query

    def take_back(self, unfinished: List[Any]) -> None:
        """The origin is not there any more: what it was asked for is asked for again, if anybody waits for it."""
        self._in_flight = self.zero_queries = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)
        for fetch in reversed(unfinished):
            if isinstance(fetch, ZeroQuery):
                fetch.lost = True
                fetch.finish(errno.EIO)
                self._finished([fetch.ticket])
                continue
            self._arrivals.give_up(fetch)
            self._locking.release(fetch)
            fetch.error = 0
            fetch.passing = None
            fetch.sums.clear()
            if fetch.tickets:
                self._queue.put_back(fetch)
            else:
                self._queue.forget(fetch)
        self._queue.forget_ahead()

    # Replies (`origin.base.Sink`), besides data

    def on_extents(self, token: ZeroQuery, extents: List[Tuple[int, bool]]) -> None:
        token.add(extents)

    def on_done(self, token: Any, error: int) -> None:
        if isinstance(token, ZeroQuery):
            self.zero_queries -= 1
            token.finish(error)
            self._finished([token.ticket])
            return
        first, end = token.first, token.end
        length = block_stop(end - 1, self._size) - block_start(first)
        self._flow_window.on_reply(token.asked_at, monotonic(), length, self._in_flight)
        self._in_flight -= length
        if not error:
            self.on_answer()
            self._arrivals.complete(token)
        self._arrivals.give_up(token)
        token.error = self._locking.release(token) or token.error
        if error and not token.error:
            if self._queue.note_damage(first, end):
                count, offset = (end - first) * BLOCK, block_start(first)
                log.warning("the origin cannot read %d bytes at %d: error %d", count, offset, error)
            if end - first > 1:
                error = 0  # who needs them asks again, for one after the other
        self.finish(token, token.error or error)

    def finish(self, fetch: Fetch, error: int) -> None:
        """The end of *fetch*, well or with that errno."""
        self._finished(self._queue.finish(fetch, error))
