"""Bringing blocks from the origin into the cache, while others go on.

What is to be fetched is the business of `proxy.fetch_queue`, who may write which
blocks that of `proxy.locking`, requests and replies that of `proxy.asking`, what becomes
of data that has come that of `proxy.arrivals`, and the way to the origin that of
`proxy.origin_link`. The rules that keep the cache right:

- A block is written by the process that holds the lock of its byte of the bitmap.
- With the lock in hand the bits are looked at once more.
- When the origin is lost its fetches let go of their locks and are asked again.
"""

from __future__ import annotations

import errno
from math import inf
from time import monotonic
from typing import List, Optional, Sequence, Tuple

from ..origin.base import Origin, OriginLost, Standing
from ..scoreboard.layout import TARGET
from ..storage.blocks import BLOCK_SHIFT, block_count
from ..storage.image import Background, Ticket
from ..storage.target import TargetImage
from .arrivals import Arrivals
from .asking import Asking
from .fetch_queue import PIECE, FetchQueue
from .in_hand import InHand
from .locking import Locking
from .origin_link import OriginLink, Patience, Whereabouts
from .state.checkpoint import ProcessState
from .zero_query import ZeroQuery

_PARTING = 1.0


class Fetcher(Background):
    """Fills *cache* for this process; everything between two sleeps happens in one thread."""

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
        self._bitmap = state.bitmap
        self._scoreboard = whereabouts.scoreboard
        self._patience = patience.origin
        is_local = state.bitmap.__contains__
        self._queue = FetchQueue(timed=patience.origin is not None, is_local=is_local, blocks=block_count(cache.size))
        self.need_block = self._queue.need_block
        """What `need` does, for one block that is not local."""
        self.locking = Locking(cache, state, self._queue)
        self.arrivals = Arrivals(cache, state, self._queue, whereabouts.scoreboard)
        self._asking = Asking(cache.size, self._queue, self.locking, self.arrivals, self._note_finished)
        self.link = OriginLink(whereabouts, patience, cache.size, state.versions, self._asking)
        self._asking.on_answer = self.link.on_answer
        self._approach = False
        self._fetch_size = fetch_size
        self._set_least()

    def _set_least(self) -> None:
        size = self.link.fetch_size if self._fetch_size is None else self._fetch_size
        self._queue.least = min(PIECE, size >> BLOCK_SHIFT)

    # For those who need blocks

    def need(self, first: int, end: int, in_hand: Optional[InHand] = None) -> Optional[Ticket]:
        """A ticket for the blocks from *first* up to *end* that are not local; None if they all are by now.

        Those that are *in_hand* stay so, with the ticket: of a cache that is smaller than
        a request some blocks would be gone whenever the others have come.
        """
        ticket = Ticket()
        if in_hand is not None:
            ticket.parcels = list(in_hand.parcels)
            for run_first, run_end in list(in_hand.lacks(first, end)):
                self._queue.need(ticket, run_first, run_end)
            return ticket if ticket.pending else None
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
        origin = self.link.origin
        if origin is None or not self.link.ready or not origin.can_tell_zeros:
            return None
        return self._asking.query_zeros(origin, first, end)

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

    def _note_finished(self, tickets: List[Ticket]) -> None:
        self.finished += tickets

    # Background

    @property
    def trouble(self) -> str:
        return self.link.trouble

    @property
    def busy(self) -> bool:
        waits = self._queue or self.locking.busy or self.finished or self._asking.zero_queries or self._approach
        return bool(waits or self.link.restless)

    @property
    def quiet(self) -> bool:
        return self.link.quiet

    @property
    def health(self) -> int:
        return self.link.health

    def news(self) -> Optional[Sequence[Standing]]:
        return self.link.news()

    @property
    def returns(self) -> int:
        return self.link.returns

    def interests(self) -> List[Tuple[int, int]]:
        return self.link.interests()

    def deadline(self) -> Optional[float]:
        times = [self.locking.deadline, self.link.deadline(needed=self._has_work)]
        if self.link.refuses and self._queue.wanted:
            return 0.0
        if self._patience is not None:
            waiting = (self.locking.oldest, None if self.link.ready else self._queue.waits_since())
            times += [since + self._patience for since in waiting if since is not None]
        return min((time for time in times if time is not None), default=None)

    @property
    def _has_work(self) -> bool:
        """Whether there is anything to ask the origin."""
        return bool(self._queue.wanted or self._queue.ahead or self._approach)

    def progress(self) -> None:
        link = self.link
        if self.locking.busy:
            self.finished += self.locking.take_turn()
        if link.is_outdated:
            self._queue.forget_damage()
            self._asking.take_back(link.move())
            self._set_least()
        if self._patience is not None:
            self._give_up(monotonic() - self._patience)
        try:
            if link.origin is None and self._has_work:
                link.open()
            if link.origin is not None:
                self._work_with(link.origin)
        except (OriginLost, OSError) as error:
            self._asking.take_back(link.lose(error, len(self._queue.wanted)))
        finally:
            self.arrivals.settle()
            if self.link.refuses:
                self._refuse()

    def approach(self) -> bool:
        self._approach = not self.link.ready
        return self.link.ready

    def abandon(self) -> None:
        """What the origin was asked for still comes, and its locks are held until then."""
        self._queue.abandon(self.locking.abandon())
        self.finished = []

    def _work_with(self, origin: Origin) -> None:
        if self.link.ready:
            self._asking.ask(origin, crowded=bool(self.finished))
        self.link.progress(origin)
        if self.link.ready:
            if self._queue.wanted or self._queue.ahead:
                self._asking.ask(origin, crowded=bool(self.finished))
                origin.push()
            if self._approach:
                self._approach = False
                self.finished.append(Ticket())

    def _give_up(self, time: float) -> None:
        """End what has waited since *time* or longer, for an origin that is not there or for another process."""
        if not self.link.ready:
            for fetch in self._queue.take_older(time):
                self._asking.finish(fetch, errno.EIO)
        self.finished += self.locking.give_up(time)

    def _refuse(self) -> None:
        """Another disk is where this one was: what is missing does not come."""
        self._queue.forget_ahead()
        for fetch in self._queue.take_older(inf):
            self._asking.finish(fetch, errno.EIO)

    def take_leave(self) -> None:
        self.link.leave(0.0)

    def close(self) -> None:
        """Take leave of the origin, as soon as what it was asked for has come; none of that is kept.

        Not kept, because the disk may be a plain target by now. In that case nobody
        waits here either.
        """
        self.arrivals.closed = True
        self._queue.wanted.clear()
        self._queue.ahead.clear()
        self.link.leave(0.0 if self._scoreboard.mode == TARGET else _PARTING)
