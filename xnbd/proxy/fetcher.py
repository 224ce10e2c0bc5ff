"""Bringing blocks from the origin into the cache, while others go on.

What is to be fetched is the business of `proxy.fetch_queue`, when to try locked blocks
again that of `proxy.lock_retry`. The rules that keep the cache right:

- A block is written by the process that holds the lock of its byte of the bitmap.
  A lock that another process holds is tried again later, never waited for.
- With the lock in hand the bits are looked at once more, and data goes only to
  blocks whose bits are not set: a whole block may be written while its fetch is
  under way, and that counts.
- Bits are set when the reply is complete and good, after the data.
- When the origin is lost its fetches let go of their locks and are asked again.
- A piece of the disk that the origin cannot read is asked for again block by block:
  only who needs the block that is bad hears of it.
- What finds no room in the cache is passed on to those who wait, with their tickets
  (`proxy.passage`); no bit is set.
- Whatever fails between the taking of a fetch and its end ends it, with that error.
"""

from __future__ import annotations

import errno
import os
import select
from time import monotonic, thread_time
from typing import Any, List, NamedTuple, Optional, Tuple, Union

from ..logs import log
from ..origin.address import OriginAddress, parse_origin
from ..origin.nbd.connection import OriginConnection, OriginLost
from ..scoreboard.counters import BYTES_FETCHED, new_counts
from ..scoreboard.layout import NOT_NEEDED, REACHED, TARGET, UNREACHABLE
from ..scoreboard.scoreboard import Scoreboard
from ..storage.blocks import BLOCK, BLOCK_SHIFT, block_start, block_stop
from ..storage.image import Background, Ticket
from ..storage.target import TargetImage
from .block_locks import BlockLocks, lock_of
from .fetch_queue import Fetch, FetchQueue
from .flow_window import FlowWindow
from .lock_retry import LockRetry
from .passage import NO_SPACE, Passage, PassedParcel
from .state.checkpoint import ProcessState
from .zero_query import ZeroQuery

_IN_FLIGHT = 8 << 20
"""Bytes asked for at once for those who wait; ahead of them, a `FlowWindow` that is never larger."""

_HELD = 4 * _IN_FLIGHT
"""Bytes held for those who wait, because they cannot be kept, from which on no more is asked for than has to be."""

_LEAST_AHEAD = 512 << 10
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_PARTING = 1.0
_QUIET = 0.005


class Whereabouts(NamedTuple):
    """Where the origin is: at *first* unless the *scoreboard* has another address."""

    scoreboard: Scoreboard
    first: OriginAddress

    @property
    def generation(self) -> int:
        """Changes whenever the address does."""
        return self.scoreboard.origin.generation

    @property
    def address(self) -> OriginAddress:
        moved = self.scoreboard.origin.address
        return parse_origin(moved) if moved else self.first


class Patience(NamedTuple):
    """Seconds until a connection has to stand, and until blocks that do not come are given up (None: never)."""

    connect: float = 10.0
    origin: Optional[float] = None


class Fetcher(Background):
    """Fills *cache* for this process; everything between two sleeps happens in one thread."""

    def __init__(self, cache: TargetImage, state: ProcessState, whereabouts: Whereabouts, patience: Patience) -> None:
        self.finished: List[Ticket] = []
        self.counts = new_counts()
        self.passes_on = True
        """Whether what cannot be kept is of use to those who wait; else it is an error."""
        self._cache = cache
        self._size = cache.size
        self._bitmap = state.bitmap
        self._locks = BlockLocks(state.fd)
        self._whereabouts = whereabouts
        self._generation = whereabouts.generation
        self._patience = patience
        self._connection: Optional[OriginConnection] = None
        self._delay = 0.0
        self._connect_at = 0.0
        self._in_flight = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)
        self._queue = FetchQueue(timed=patience.origin is not None)
        self.need_block = self._queue.need_block
        """What `need` does, for one block that is not local."""
        self._lock_retry: LockRetry[Union[Fetch, Ticket]] = LockRetry()
        self._passage = Passage(cache.fd, whereabouts.scoreboard)
        self._zero_queries = 0
        self._cache_error = 0  # the one that was told last, until something is written again
        self._approach = False
        self._closing = False

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
        if self._passage.is_open:
            return
        for run_first, run_end, local in self._bitmap.runs(first, end):
            if not local:
                self._queue.bring_ahead(run_first, run_end)

    def query_zeros(self, first: int, end: int) -> Optional[ZeroQuery]:
        """Ask about these blocks, of less than 4 GiB; None if the origin cannot tell, or is not there."""
        connection = self._connection
        if connection is None or not self._reached or not connection.can_block_status:
            return None
        zero_query = ZeroQuery(first, end, self._size)
        connection.block_status(zero_query, block_start(first), block_stop(end - 1, self._size) - block_start(first))
        self._zero_queries += 1
        return zero_query

    def approach(self) -> bool:
        """Connect, if that is not done; whether the origin is there. There is a result when it is."""
        self._approach = not self._reached
        return self._reached

    def make_zero(self, first: int, end: int) -> bool:
        """Note that these blocks are zeros at the origin; False if another process has some of them in hand."""
        if not self.borrow(first, end):
            return False
        try:
            self._zero(block_start(first), block_stop(end - 1, self._size) - block_start(first))
            self.mark_local(first, end)
        finally:
            self.give_back(first, end)
        return True

    def _zero(self, offset: int, length: int) -> None:
        """Zeros where blocks are missing; what is a hole of the cache already is left alone."""
        for at, count in self._missing(offset, length):
            for extent in self._cache.extents(at, count):
                if not extent.hole:
                    self._cache.write_zeroes(at, extent.length, may_trim=True, fast=False)
                at += extent.length

    def borrow(self, first: int, end: int) -> bool:
        """Lock these blocks to write them; False if another process has some. Else always followed by `give_back`.

        Raises `OSError` if the cache is too short, `LockHeld` among them if that process is no server's.
        """
        self._refuse_if_shrunk()
        if self._locks.borrow(first, end):
            return True
        stranger = self._locks.held_by_stranger(first, end)
        if stranger is not None:
            raise stranger
        return False

    def _refuse_if_shrunk(self) -> None:
        """What was behind the cache's new end is lost: who made it longer again would have zeros read there."""
        if os.lseek(self._cache.fd, 0, os.SEEK_END) < self._size:
            raise OSError(errno.EIO, "the cache image has shrunk")

    def mark_local(self, first: int, end: int) -> None:
        """These blocks, which are borrowed, were written: what is still fetched of them is not."""
        self._bitmap.set(first, end)
        self._queue.note_written(first, end)

    def give_back(self, first: int, end: int) -> None:
        """Let go of blocks that were borrowed."""
        self._locks.give_back(first, end)

    def next_turn(self, first: int, end: int) -> Ticket:
        """A ticket that is done when it is time to try again, for who could not borrow these blocks."""
        ticket = Ticket()
        ticket.pending = 1
        self._lock_retry.lock_out(ticket, lock_of(first, end))
        return ticket

    # Background

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._lock_retry.busy or self.finished or self._zero_queries or self._approach)

    @property
    def quiet(self) -> bool:
        connection = self._connection
        return connection is None or monotonic() > connection.heard_at + _QUIET

    @property
    def health(self) -> int:
        if self._reached:
            return REACHED
        return UNREACHABLE if self.trouble else NOT_NEEDED

    def interests(self) -> List[Tuple[int, int]]:
        connection = self._connection
        return [(connection.fileno(), connection.events())] if connection is not None else []

    def deadline(self) -> Optional[float]:
        times = [] if self._lock_retry.deadline is None else [self._lock_retry.deadline]
        if self._connection is None:
            if self._has_work:
                times.append(self._connect_at)
        elif self._connection.deadline is not None:
            times.append(self._connection.deadline)
        if self._patience.origin is not None:
            waiting = (self._lock_retry.oldest, None if self._reached else self._queue.waits_since())
            times += [since + self._patience.origin for since in waiting if since is not None]
        return min(times) if times else None

    @property
    def _reached(self) -> bool:
        return self._connection is not None and self._connection.ready

    @property
    def _has_work(self) -> bool:
        """Whether there is anything to ask the origin."""
        return bool(self._queue.wanted or self._queue.ahead or self._approach)

    def progress(self) -> None:
        if self._lock_retry.busy:
            self._take_turns()
        if self._generation != self._whereabouts.generation:
            self._move()
        if self._patience.origin is not None:
            self._give_up(monotonic() - self._patience.origin)
        try:
            if self._connection is None and self._has_work:
                self._connect()
            if self._connection is not None:
                self._work_with(self._connection)
        except OriginLost as lost:
            self._on_lost(str(lost))
        except OSError as error:
            if self._connection is not None:
                self._connection.close()
            self._on_lost(f"origin {self._whereabouts.address}: {error.strerror}")

    def _work_with(self, connection: OriginConnection) -> None:
        if connection.ready:
            self._ask(connection)
            connection.on_events(select.POLLIN)
        else:
            connection.wait(0.0)
        if connection.ready and (self._queue.wanted or self._queue.ahead):
            self._ask(connection)
            connection.on_events(0)
        if connection.ready and self._approach:
            self._approach = False
            self.finished.append(Ticket())
        connection.on_time()

    def _take_turns(self) -> None:
        """Have those who were locked out try again: fetches before all others, requests when they hear of it."""
        turn = self._lock_retry.take(monotonic(), thread_time())
        for who in reversed(turn):
            if isinstance(who, Fetch):
                self._queue.put_back(who)
        for who in turn:
            if isinstance(who, Ticket):
                self._let_in(who, 0)

    def _let_in(self, ticket: Ticket, error: int) -> None:
        """A request that was locked out has its turn, or waits no more."""
        ticket.pending = 0
        ticket.error = error
        self.finished.append(ticket)

    # The connection

    def _connect(self) -> None:
        if monotonic() < self._connect_at:
            return
        self._connection = OriginConnection(
            self._whereabouts.address,
            self,
            expected_size=self._size,
            connect_timeout=self._patience.connect,
            reply_timeout=self._patience.origin,
        )
        self._connection.start()

    def _on_lost(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        unfinished = connection.unfinished() if connection is not None else []
        if reason != self.trouble:
            waiting = len(self._queue.wanted) + len(unfinished)
            log.warning("%s; %d requests wait for it, trying again", reason, waiting)
        self.trouble = reason
        self._connect_at = monotonic() + self._delay
        self._delay = min(_LONGEST_DELAY, max(_FIRST_DELAY, 2 * self._delay))
        self._ask_again(unfinished)

    def _ask_again(self, unfinished: List[Any]) -> None:
        self._in_flight = self._zero_queries = 0
        self._flow_window = FlowWindow(_LEAST_AHEAD)
        for fetch in reversed(unfinished):
            if isinstance(fetch, ZeroQuery):
                fetch.lost = True
                fetch.finish(errno.EIO)
                self.finished.append(fetch.ticket)
                continue
            self._let_go(fetch)
            fetch.error = 0
            fetch.passing = None
            if fetch.tickets:
                self._queue.put_back(fetch)
            else:
                self._queue.forget(fetch)
        self._queue.forget_ahead()

    def _give_up(self, time: float) -> None:
        """End what has waited since *time* or longer, for an origin that is not there or for another process."""
        if not self._reached:
            for fetch in self._queue.take_older(time):
                self._finish(fetch, errno.EIO)
        done = len(self.finished)
        for who in self._lock_retry.take_older(time):
            if isinstance(who, Fetch):
                self._finish(who, errno.EIO)
            else:
                self._let_in(who, errno.EIO)
        done = len(self.finished) - done
        if done:
            what = "%d requests wait no more for blocks that another process has in hand: see whether it is stopped"
            log.warning(what, done)

    def _move(self) -> None:
        """The origin is elsewhere now: ask there for all that has not come."""
        self._generation = self._whereabouts.generation
        self._queue.forget_damage()
        self._delay = self._connect_at = 0.0
        connection, self._connection = self._connection, None
        if connection is not None:
            self._ask_again(connection.unfinished())
            connection.close()

    def close(self) -> None:
        """Take leave of the origin, as soon as what it was asked for has come; none of that is kept.

        Not kept, because the disk may be a plain target by now. In that case nobody
        waits here either.
        """
        until = monotonic() + (0.0 if self._whereabouts.scoreboard.mode == TARGET else _PARTING)
        self._closing = True
        self._queue.wanted.clear()
        self._queue.ahead.clear()
        connection = self._connection
        try:
            while connection is not None and connection.ready and connection.outstanding and monotonic() < until:
                connection.wait(0.1)
        except OriginLost:
            pass  # it was quicker to leave
        if connection is not None:
            connection.close()
        self._connection = None

    # Asking

    def _ask(self, connection: OriginConnection) -> None:
        wanted, ahead = self._queue.wanted, self._queue.ahead
        most = self._most_in_flight()
        while wanted and self._in_flight < most:
            self._ask_for(connection, wanted.popleft())
        while ahead and self._in_flight < self._flow_window.size:
            self._ask_for(connection, ahead.popleft())

    def _most_in_flight(self) -> int:
        """Bytes; where much is held, what is done has to leave first, and the rest comes one by one."""
        if self._passage.held < _HELD:
            return _IN_FLIGHT
        return 0 if self.finished else 1

    def _ask_for(self, connection: OriginConnection, fetch: Fetch) -> None:
        first, end = fetch.first, fetch.end
        most = connection.maximum_read >> BLOCK_SHIFT
        if end - first > most:
            self._queue.split(fetch, first + max(1, most))
            end = fetch.end
        try:
            held = self._locks.hold(first, end)
        except OSError as error:
            log.warning("cannot lock blocks in the bitmap: %s", error.strerror)
            self._finish(fetch, error.errno or errno.EIO)
            return
        if not held:
            if self._bitmap.all_set(first, end):
                self._finish(fetch, 0)
                return
            stranger = self._locks.held_by_stranger(first, end)
            if stranger is not None:
                log.error("%s", stranger.strerror)
                self._finish(fetch, errno.EIO)
                return
            self._lock_retry.lock_out(fetch, lock_of(first, end))
            return
        if self._bitmap.any_set(first, end):
            fetch.mixed = True
            if self._bitmap.all_set(first, end):
                self._finish(fetch, self._let_go(fetch))
                return
        offset = block_start(first)
        length = block_stop(end - 1, self._size) - offset
        self._in_flight += length
        fetch.asked_at = monotonic()
        connection.read(fetch, offset, length)

    # Replies (`origin.nbd.replies.Sink`)

    def on_data(self, token: Any, offset: int, data: memoryview) -> None:
        self.counts[BYTES_FETCHED] += len(data)
        if token.error or self._closing:
            return
        if self._may_keep(token):
            try:
                self._store(token, offset, data)
            except OSError as error:
                self._on_cache_failure(token, error)
        if token.passing is not None:
            token.passing.append((offset, bytes(data)))

    def _store(self, fetch: Fetch, offset: int, data: memoryview) -> None:
        self._refuse_if_shrunk()
        if not fetch.mixed:
            self._cache.write(offset, data)
            return
        for at, count in self._missing(offset, len(data)):
            self._cache.write(at, data[at - offset : at - offset + count])

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        if token.error or self._closing:
            return
        if self._may_keep(token):
            try:
                self._refuse_if_shrunk()
                self._zero(offset, length)
            except OSError as error:
                self._on_cache_failure(token, error)
        if token.passing is not None:
            token.passing.append((offset, bytes(length)))

    def _may_keep(self, fetch: Fetch) -> bool:
        """Whether to write what comes for *fetch* to the cache; else it is passed on from now on."""
        if fetch.passing is None and not self._passage.may_keep():
            fetch.passing = []
        return fetch.passing is None

    def _missing(self, offset: int, length: int) -> List[Tuple[int, int]]:
        """The parts of *length* bytes at *offset* whose blocks are not local: offset and length."""
        return [(at, count) for at, count, local in self._bitmap.parts(offset, length) if not local]

    def _on_cache_failure(self, fetch: Fetch, error: OSError) -> None:
        if error.errno in NO_SPACE and self.passes_on:
            fetch.passing = []
            self._queue.forget_ahead()
            self._passage.open(error)
            return
        fetch.error = error.errno or errno.EIO
        if fetch.error != self._cache_error:
            log.error("cannot write to the cache image: %s", error.strerror)
        self._cache_error = fetch.error

    def on_extents(self, token: Any, extents: List[Tuple[int, int]]) -> None:
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
        if not error and (self._delay or self.trouble):
            self._delay, self.trouble = 0.0, ""
            log.info("origin %s: answers again", self._whereabouts.address)
        if not error and not token.error and not self._closing:
            if token.passing is None:
                self._bitmap.set(first, end)
                self._cache_error = 0
                self._passage.on_kept()
            else:
                self._pass_on(token, block_start(first), length)
        token.error = self._let_go(token) or token.error
        if error and not token.error:
            if self._queue.note_damage(first, end):
                count, offset = (end - first) * BLOCK, block_start(first)
                log.warning("the origin cannot read %d bytes at %d: error %d", count, offset, error)
            if end - first > 1:
                error = 0  # who needs them asks again, for one after the other
        self._finish(token, token.error or error)

    def _pass_on(self, fetch: Fetch, offset: int, length: int) -> None:
        """Give all that has come for *fetch* to those who wait; what was still written is read from the cache."""
        assert fetch.passing is not None
        if not fetch.tickets:
            return
        try:
            data = self._cache.pread(offset, length)
        except OSError as error:
            self._on_cache_failure(fetch, error)
            return
        parcel = PassedParcel(self._passage, fetch.first, fetch.end, data)
        for at, piece in fetch.passing:
            parcel[at - offset : at - offset + len(piece)] = piece
        for ticket in fetch.tickets:
            ticket.parcels = [*(ticket.parcels or ()), parcel]

    def _let_go(self, fetch: Fetch) -> int:
        """Unlock the blocks of *fetch*; returns an errno if that cannot be done."""
        try:
            self._locks.release(fetch.first, fetch.end)
        except OSError as error:
            log.error("cannot unlock blocks in the bitmap: %s", error.strerror)
            return error.errno or errno.EIO
        return 0

    def _finish(self, fetch: Fetch, error: int) -> None:
        self.finished += self._queue.finish(fetch, error)
