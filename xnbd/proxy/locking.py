"""Who may write which blocks of the cache: the locks that this process has, and who waits for one that it has not.

Requests borrow the blocks that they write; the blocks of a fetch are held while it is under way.
A lock that another process holds is tried again later (`proxy.lock_retry`), never waited for.
"""

from __future__ import annotations

import errno
import os
from math import inf
from time import monotonic, thread_time
from typing import Callable, List, Optional, Sequence, Union

from ..logs import about, log
from ..storage.image import Ticket
from ..storage.target import TargetImage
from ..text import counted
from .block_locks import BlockLocks, lock_of
from .fetch_queue import Fetch, FetchQueue
from .lock_retry import LockRetry
from .state.checkpoint import ProcessState

HELD, LATER = -1, -2
"""What `Locking.hold` tells besides an errno: no errno is negative."""


class CacheShrunk(OSError):
    """The cache image is shorter than it was: what came would hide that the rest is lost."""


def refuse_if_shrunk(cache: TargetImage) -> None:
    """What was behind the cache's new end is lost: who made it longer again would have zeros read there.

    Raises `CacheShrunk`.
    """
    if os.lseek(cache.fd, 0, os.SEEK_END) < cache.size:
        raise CacheShrunk(errno.EIO, "the cache image has shrunk")


class Locking:
    """The blocks of *cache*, whose bitmap is in *state*, in the hands of this process."""

    def __init__(self, cache: TargetImage, state: ProcessState, queue: FetchQueue) -> None:
        self._cache = cache
        self._bitmap = state.bitmap
        self._written = state.written
        self._checked = state.integrity.checked
        self._pages = state.pages
        self._locks = BlockLocks(state.fd)
        self._queue = queue
        self._retry: LockRetry[Union[Fetch, Ticket]] = LockRetry()

    # For requests that write

    def borrow(self, first: int, end: int) -> bool:
        """Lock these blocks to write them; False if another process has some. Else always followed by `give_back`.

        Raises `OSError` if the cache is too short, or its bitmap damaged; `LockHeld` if that process is no server's.
        """
        refuse_if_shrunk(self._cache)
        self._pages.look(first, end)
        if self._locks.borrow(first, end):
            return True
        stranger = self._locks.held_by_stranger(first, end)
        if stranger is not None:
            raise stranger
        return False

    def write(self, first: int, end: int, write: Callable[[], None], partly: Sequence[int] = ()) -> bool:
        """Have a client *write* these blocks, whole ones but for those that are written *partly*.

        False if another process has some, or if of those some are not local (any more).
        Raises like `borrow`, and what *write* raises.
        """
        if not self.borrow(first, end):
            return False
        try:
            if any(block not in self._bitmap for block in partly):
                return False
            some_here = self._bitmap.any_set(first, end)
            if some_here:  # and may not be taken for the origin's any more
                self._written.set(first, end)
            write()
            if not some_here:
                self._written.set(first, end)
            self.mark_local(first, end)
        finally:
            self.give_back(first, end)
        return True

    def mark_local(self, first: int, end: int) -> None:
        """These blocks, which are borrowed, have come in another way: what is still fetched of them is not kept."""
        self._bitmap.set(first, end)
        self._checked.set(first, end)
        self._queue.note_written(first, end)

    def mark_missing(self, block: int) -> None:
        """This block, which is borrowed, is damaged: it has to be fetched again."""
        self._checked.clear(block, block + 1)
        self._bitmap.clear(block, block + 1)

    def give_back(self, first: int, end: int) -> None:
        """Let go of blocks that were borrowed."""
        self._locks.give_back(first, end)

    def next_turn(self, first: int, end: int) -> Ticket:
        """A ticket that is done when it is time to try again, for who could not borrow these blocks."""
        ticket = Ticket()
        ticket.pending, ticket.locked = 1, inf
        self._retry.lock_out(ticket, lock_of(first, end))
        return ticket

    # For fetches

    def hold(self, fetch: Fetch) -> int:
        """Lock the blocks of *fetch*, and look which of them are local by now.

        Returns `HELD`; `LATER` if the fetch has another turn; or the errno with which it
        ends, 0 if all of its blocks are local.
        """
        first, end = fetch.first, fetch.end
        try:
            self._pages.look(first, end)
            held = self._locks.hold(first, end)
        except OSError as error:
            log.warning("cannot lock blocks in the bitmap: %s", error.strerror, extra=about(error=error))
            return error.errno or errno.EIO
        if not held:
            return self._locked_out(fetch)
        fetch.note_lock()
        if self._bitmap.any_set(first, end):
            fetch.mixed = True
            if self._bitmap.all_set(first, end):
                return self.release(fetch)
        return HELD

    def _locked_out(self, fetch: Fetch) -> int:
        first, end = fetch.first, fetch.end
        if self._bitmap.all_set(first, end):
            return 0
        stranger = self._locks.held_by_stranger(first, end)
        if stranger is not None:
            log.error("%s", stranger.strerror, extra=about(error=stranger))
            return errno.EIO
        fetch.locked_at = fetch.locked_at or monotonic()
        self._retry.lock_out(fetch, lock_of(first, end))
        return LATER

    def release(self, fetch: Fetch) -> int:
        """Unlock the blocks of *fetch*; returns an errno if that cannot be done."""
        try:
            self._locks.release(fetch.first, fetch.end)
        except OSError as error:
            log.error("cannot unlock blocks in the bitmap: %s", error.strerror, extra=about(error=error))
            return error.errno or errno.EIO
        return 0

    # Turns

    @property
    def busy(self) -> bool:
        """Whether `take_turn` wants to be called before anybody sleeps."""
        return self._retry.busy

    @property
    def deadline(self) -> Optional[float]:
        """When to call `take_turn`, in monotonic seconds."""
        return self._retry.deadline

    @property
    def oldest(self) -> Optional[float]:
        """Since when the first of those who are locked out waits; None if nobody does, or that is not known yet."""
        return self._retry.oldest

    def take_turn(self) -> List[Ticket]:
        """Have those try again who were locked out: fetches go before all others; the tickets of requests are done."""
        turn = self._retry.take(monotonic(), thread_time())
        for who in reversed(turn):
            if isinstance(who, Fetch):
                self._queue.put_back(who)
        return [_end(who, 0) for who in turn if isinstance(who, Ticket)]

    def abandon(self) -> List[Fetch]:
        """Nobody waits any more: forget who is locked out, and return the fetches among them."""
        return [who for who in self._retry.clear() if isinstance(who, Fetch)]

    def give_up(self, time: float) -> List[Ticket]:
        """End with an error what is locked out since *time* or longer; returns the tickets that are done by that."""
        done: List[Ticket] = []
        for who in self._retry.take_older(time):
            done += self._queue.finish(who, errno.EIO) if isinstance(who, Fetch) else [_end(who, errno.EIO)]
        if done:
            what = "%s no more for blocks that another process has in hand: see whether it is stopped"
            log.warning(what, counted(len(done), "request waits", "requests wait"))
        return done


def _end(ticket: Ticket, error: int) -> Ticket:
    """A request that was locked out has its turn, or waits no more."""
    ticket.pending = 0
    ticket.error = error
    return ticket
