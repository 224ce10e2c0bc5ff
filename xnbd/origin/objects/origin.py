"""An object as an origin: its size and version are asked for at the start, then it is read in ranges.

- Every read carries ``If-Match`` with the object's ETag, or ``If-Unmodified-Since`` where that has none
  or a weak one. Not every server heeds that. So every reply is held against what the start has brought:
  its range (obstore does that), its length, its object's size, and its own ETag and date.
- A server that tells neither ETag nor date is refused: nobody would notice another object in its place.
  So is one that sends the whole object where a range is wanted.
- How many reads are under way at once follows from how long they take: what shares a slow line comes at
  the end only, all at once, and would pass for silence. obstore tells of no part of a reply.
- Threads make the calls, because they are cheaper than obstore's coroutines (``contrib/doc/performance.rst``).
- What may pass by itself is asked for again, after a pause that grows. The origin is lost if that has
  happened `_ATTEMPTS` times to a read, and nothing else was answered meanwhile.
"""

from __future__ import annotations

import select
from collections import deque
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Any, Deque, Dict, List, NamedTuple, NoReturn, Optional, Tuple, Union

from ...text import counted
from ..base import BLOCK, Data, Origin, OriginLost, Sink, Terms
from ..pool import Pool
from .address import ObjectAddress
from .failures import OUT_OF_RANGE, Failure, Kind, failure_of
from .store import open_store

_MAXIMUM_READ = 1 << 20
_MOST_CALLS = 32
_FIRST_CALLS = 2
_QUICK, _SLOW = 0.5, 2.0
"""Seconds for a read below which one more is made at once, and above which fewer are."""


_ATTEMPTS = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_SILENCE = 30.0
"""Seconds without an answer to anything after which the origin is lost, if the terms name no other time."""

_START = 0
_LONGEST_TAG = 200


class _Found(NamedTuple):
    """What the start has brought: the *store*, the object's *size* and *version*, and the conditions of each read."""

    store: Any
    size: int
    version: str
    conditions: Dict[str, Any]


class _Piece(NamedTuple):
    """What a reply has brought, of an object of that *size* and *version*."""

    data: Data
    size: int
    version: str


_Outcome = Union[_Found, _Piece, Failure]


class _Read:
    """A read that is not done: how often it has *failed*, and since when it is wanted, and was *called* for last."""

    __slots__ = ("called", "failed", "length", "offset", "since", "token")

    def __init__(self, token: Any, offset: int, length: int) -> None:
        self.token = token
        self.offset = offset
        self.length = length
        self.failed = 0
        self.since = self.called = monotonic()


class ObjectOrigin(Origin):
    """The object at *address*; replies go to *sink*."""

    can_tell_zeros = False

    def __init__(self, address: ObjectAddress, sink: Sink, terms: Terms) -> None:
        self.heard_at = monotonic()
        self._address = address
        self._sink = sink
        self._terms = terms
        self._silence = _SILENCE if terms.reply_timeout is None else terms.reply_timeout
        self._pool: Pool[_Outcome] = Pool(_MOST_CALLS)
        self._found: Optional[_Found] = None
        self._start_by: Optional[float] = None
        self._numbers = _START
        self._reads: Dict[int, _Read] = {}
        self._queue: Deque[int] = deque()  # reads that are to be called for as soon as fewer are under way
        self._again: Dict[int, float] = {}  # reads that are to be asked for again, and when
        self._calls, self._most_calls = 0, _FIRST_CALLS
        self._fewer_since = 0.0

    # What the owner asks

    @property
    def ready(self) -> bool:
        return self._found is not None

    @property
    def size(self) -> int:
        return self._found.size if self._found else 0

    @property
    def version(self) -> str:
        return self._found.version if self._found else ""

    @property
    def maximum_read(self) -> int:
        return _MAXIMUM_READ

    @property
    def outstanding(self) -> int:
        return len(self._reads)

    def unfinished(self) -> List[Any]:
        return [read.token for read in self._reads.values()]

    def interests(self) -> List[Tuple[int, int]]:
        return [(self._pool.fileno(), select.POLLIN)]

    @property
    def deadline(self) -> Optional[float]:
        times = list(self._again.values())
        if self._start_by is not None:
            times.append(self._start_by)
        if self._reads:
            times.append(self.heard_at + self._silence)
        return min(times, default=None)

    # What the owner does

    def start(self) -> None:
        self._start_by = monotonic() + self._terms.connect_timeout
        self._pool.call(_START, partial(_begin, self._address, self._terms.connect_timeout))

    def read(self, token: Any, offset: int, length: int) -> None:
        if not self._reads:
            self.heard_at = monotonic()
        self._numbers += 1
        self._reads[self._numbers] = _Read(token, offset, length)
        self._queue.append(self._numbers)
        self._call()

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        raise AssertionError("an object has no holes")

    def push(self) -> None:
        pass  # nothing is queued here: the threads have it

    def progress(self) -> None:
        for number, outcome in self._pool.take():
            self._calls -= number != _START
            if isinstance(outcome, _Found):
                self._on_found(outcome)
            elif isinstance(outcome, Failure):
                self._on_failure(number, outcome)
            else:
                self._on_piece(number, outcome)
        now = monotonic()
        for number in [number for number, at in self._again.items() if at <= now]:
            del self._again[number]
            self._queue.appendleft(number)
        self._call()
        self._check_time(now)

    def close(self) -> None:
        self._pool.close()
        self._found = self._start_by = None
        self._queue.clear()
        self._again.clear()

    # Replies

    def _on_found(self, found: _Found) -> None:
        expected = self._terms.expected_size
        if expected not in (None, found.size):
            self._lose(f"it has {found.size} bytes, not {expected} as before", changed=True)
        self._found = found
        self._start_by = None
        self.heard_at = monotonic()

    def _on_piece(self, number: int, piece: _Piece) -> None:
        found, read = self._found, self._reads[number]
        assert found
        if (piece.size, piece.version) != (found.size, found.version):
            was, now = f"{found.version} of {found.size} bytes", f"{piece.version} of {piece.size} bytes"
            self._lose(f"it is another object now: {now}, no more {was}", changed=True)
        if len(piece.data) != read.length:
            sent = "more bytes than" if len(piece.data) > read.length else f"{len(piece.data)} bytes for"
            self._on_failure(number, Failure(Kind.PASSING, f"it sent {sent} the {read.length} that were asked for"))
            return
        self.heard_at = monotonic()
        self._adapt(self.heard_at - read.called)
        del self._reads[number]
        self._sink.on_data(read.token, read.offset, piece.data)
        self._sink.on_done(read.token, 0)

    def _on_failure(self, number: int, failure: Failure) -> None:
        if number == _START or failure.kind is not Kind.PASSING:
            self._lose(failure.text, refused=failure.kind is not Kind.PASSING, changed=failure.kind is Kind.CHANGED)
        read = self._reads[number]
        read.failed += 1
        now, patience = monotonic(), self._terms.reply_timeout
        alone = read.failed >= _ATTEMPTS and self.heard_at <= read.since
        if alone or (patience is not None and now - read.since >= patience):
            self._lose(failure.text)
        self._again[number] = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (read.failed - 1))

    def _check_time(self, now: float) -> None:
        if self._start_by is not None and now >= self._start_by:
            self._lose(f"no answer within {self._terms.connect_timeout:g} s")
        if self._reads and now >= self.heard_at + self._silence:
            self._lose(f"silent for {self._silence:g} s with {counted(len(self._reads), 'request')} waiting")

    def _lose(self, reason: str, *, refused: bool = False, changed: bool = False) -> NoReturn:
        self.close()
        raise OriginLost(f"origin {self._address}: {reason}", refused=refused, changed=changed)

    def _adapt(self, took: float) -> None:
        """A read took so many seconds, of which those that it shared the line with have a part."""
        if took < _QUICK:
            self._most_calls = min(_MOST_CALLS, self._most_calls + 1)
        elif took > _SLOW and self.heard_at - took >= self._fewer_since:
            self._fewer_since = self.heard_at  # those under way were made before there were fewer
            self._most_calls = max(1, self._most_calls * 2 // 3)

    def _call(self) -> None:
        while self._queue and self._calls < self._most_calls:
            assert self._found
            number = self._queue.popleft()
            read = self._reads[number]
            read.called = monotonic()
            self._calls += 1
            self._pool.call(number, partial(_get, self._found, self._address.key, read.offset, read.length))


# In the threads


def _begin(address: ObjectAddress, connect_timeout: float) -> _Outcome:
    try:
        store = open_store(address, connect_timeout)
        import obstore

        result = obstore.get(store, address.key, options={"range": (0, BLOCK)})
        meta = result.meta
        version = _version_of(meta)
    except OriginLost as lost:
        return Failure(Kind.REFUSED, str(lost))
    except BaseException as error:  # a panic of obstore is no Exception
        failure = failure_of(error)
        return Failure(Kind.CHANGED, "its disk is empty (0 bytes)") if failure is OUT_OF_RANGE else failure
    if not version:
        return Failure(Kind.REFUSED, "it tells neither ETag nor Last-Modified: nobody would notice another object")
    return _Found(store, meta["size"], version, _conditions(meta))


def _get(found: _Found, key: str, offset: int, length: int) -> _Outcome:
    import obstore

    try:
        options: Any = {**found.conditions, "range": (offset, offset + length)}
        result = obstore.get(found.store, key, options=options)
        meta = result.meta
        body = result.stream(min_chunk_size=length + 1)  # in one piece if it is as long as it should be, or shorter
        return _Piece(memoryview(next(iter(body), b"")), meta["size"], _version_of(meta))
    except BaseException as error:  # a panic of obstore is no Exception
        return failure_of(error)


def _version_of(meta: Any) -> str:
    """What tells this object from another one in its place: its ETag, else its date; empty if there is neither."""
    tag, modified = meta["e_tag"], _modified(meta)
    if tag and len(tag) <= _LONGEST_TAG and tag.isprintable():
        return f"ETag {tag}"
    return f"Last-Modified {modified:%Y-%m-%dT%H:%M:%SZ}" if modified else ""


def _modified(meta: Any) -> Optional[datetime]:
    """obstore has the year 1970 where a server tells no date."""
    modified: datetime = meta["last_modified"]
    return modified if modified.timestamp() > 0 else None


def _conditions(meta: Any) -> Dict[str, Any]:
    """A weak ETag is never a match (RFC 9110, 13.1.1)."""
    tag, modified = meta["e_tag"], _modified(meta)
    if tag and not tag.startswith("W/"):
        return {"if_match": tag}
    return {"if_unmodified_since": modified} if modified else {}
