"""An image in Ceph as an origin: reads go to librbd, many at once; what waits is done by threads (`disk.Disk`).

- librbd asks again by itself, whatever happens to OSDs and the network. What does fail ends the origin, but for
  bytes that cannot be read (EIO): who owns it opens it again later.
- What was read goes to the sink after a check that began later (`lineage`). One check is under way at a time, and
  counts for all that had come before it. It begins when half of what was asked for has come, or soon in any case.
"""

from __future__ import annotations

import errno
import select
from collections import deque
from functools import partial
from time import monotonic
from typing import Any, Callable, Deque, Dict, List, NamedTuple, NoReturn, Optional, Tuple, Union

from ...text import counted
from ..base import Origin, OriginLost, Sink, Terms
from ..pool import Inbox, Pool
from .address import RbdAddress
from .disk import Disk, Extents, Found, Limits, reason

_MAXIMUM_READ = 1 << 20
_MOST_READS = 128
_SILENCE = 30.0
"""Seconds without an answer to anything after which the origin is lost, if the terms name no other time."""

_PATIENCE = 0.002
"""Seconds that an answer waits for others, so that one check is for all of them."""

_START, _CHECK = -1, -2

_THREADS = 2
"""One that asks for holes, and one that checks meanwhile."""


class _Request(NamedTuple):
    """A read or a query that is not done."""

    token: Any
    offset: int
    length: int


_Told = Union[bytes, Extents]
_Outcome = Union[Found, Extents, OriginLost, None]


class RbdOrigin(Origin):
    """The image at *address*; replies go to *sink*."""

    can_tell_zeros = True

    def __init__(self, address: RbdAddress, sink: Sink, terms: Terms) -> None:
        self.heard_at = monotonic()
        self._address = address
        self._sink = sink
        self._terms = terms
        self._silence = _SILENCE if terms.reply_timeout is None else terms.reply_timeout
        self._disk = Disk(address, Limits(terms.connect_timeout, self._silence))
        self._threads: Pool[_Outcome] = Pool(_THREADS, at_end=self._disk.close)
        self._inbox: Inbox[Union[bytes, int]] = Inbox()
        self._found: Optional[Found] = None
        self._start_by: Optional[float] = None
        self._numbers = 0
        self._requests: Dict[int, _Request] = {}
        self._queue: Deque[int] = deque()  # reads that librbd is to be asked for as soon as fewer are under way
        self._reads = 0
        self._unchecked: Dict[int, _Told] = {}  # answers that came after the check had begun
        self._check_by = 0.0  # when they have waited long enough, in monotonic seconds
        self._checking: Dict[int, _Told] = {}  # those that are good if the check succeeds

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
        return len(self._requests)

    def unfinished(self) -> List[Any]:
        return [request.token for request in self._requests.values()]

    def interests(self) -> List[Tuple[int, int]]:
        return [(self._threads.fileno(), select.POLLIN), (self._inbox.fileno(), select.POLLIN)]

    @property
    def deadline(self) -> Optional[float]:
        if self._start_by is not None:
            return self._start_by
        if self._unchecked and not self._checking:
            return self._check_by
        return self.heard_at + self._silence if self._requests else None

    # What the owner does

    def start(self) -> None:
        self._start_by = monotonic() + self._terms.connect_timeout
        self._call(_START, self._disk.open)

    def read(self, token: Any, offset: int, length: int) -> None:
        self._queue.append(self._note(token, offset, length))

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        self._call(self._note(token, offset, length), partial(self._disk.find_extents, offset, length))

    def push(self) -> None:
        while self._queue and self._reads < _MOST_READS:
            number = self._queue.popleft()
            request = self._requests[number]
            self._reads += 1
            self._disk.read(request.offset, request.length, partial(_on_read, self._inbox, number))

    def progress(self) -> None:
        for number, outcome in self._threads.take():
            self._on_outcome(number, outcome)
        for number, data in self._inbox.take():
            self._reads -= 1
            self._on_read(number, data)
        now = monotonic()
        if self._may_check(now):
            self._check()
        self.push()
        self._check_time(now)

    def close(self) -> None:
        self._threads.close()
        self._inbox.close()
        self._found = self._start_by = None
        self._queue.clear()

    def _note(self, token: Any, offset: int, length: int) -> int:
        if not self._requests:
            self.heard_at = monotonic()
        self._numbers += 1
        self._requests[self._numbers] = _Request(token, offset, length)
        return self._numbers

    def _call(self, number: int, job: Callable[[], _Outcome]) -> None:
        self._threads.call(number, partial(_outcome_of, job))

    # Answers

    def _on_outcome(self, number: int, outcome: _Outcome) -> None:
        self.heard_at = monotonic()
        if isinstance(outcome, OriginLost):
            self._lose(str(outcome), refused=outcome.refused, changed=outcome.changed)
        elif isinstance(outcome, Found):
            self._on_found(outcome)
        elif outcome is None:
            self._on_checked()
        else:
            self._put_aside(number, outcome)

    def _on_found(self, found: Found) -> None:
        expected = self._terms.expected_size
        if expected not in (None, found.size):
            self._lose(f"it has {found.size} bytes, not {expected} as before", changed=True)
        self._found = found
        self._start_by = None

    def _on_read(self, number: int, data: Union[bytes, int]) -> None:
        self.heard_at = monotonic()
        request = self._requests[number]
        if isinstance(data, int):
            if data != errno.EIO:
                self._lose(reason(data))
            del self._requests[number]
            self._sink.on_done(request.token, data)
        elif len(data) != request.length:
            self._lose(f"it sent {len(data)} bytes for {request.length}")
        else:
            self._put_aside(number, data)

    def _put_aside(self, number: int, told: _Told) -> None:
        if not self._unchecked:
            self._check_by = monotonic() + _PATIENCE
        self._unchecked[number] = told

    def _may_check(self, now: float) -> bool:
        """Nothing is gained by waiting if most of what is under way has come."""
        if not self._unchecked or self._checking:
            return False
        return len(self._unchecked) >= self._reads or now >= self._check_by

    def _check(self) -> None:
        self._checking, self._unchecked = self._unchecked, {}
        self._call(_CHECK, self._disk.check)

    def _on_checked(self) -> None:
        checked, self._checking = self._checking, {}
        for number, told in checked.items():
            self._hand_over(self._requests.pop(number), told)

    def _hand_over(self, request: _Request, told: _Told) -> None:
        if not isinstance(told, bytes):
            self._sink.on_extents(request.token, told)
        elif is_zero(told):
            self._sink.on_hole(request.token, request.offset, request.length)
        else:
            self._sink.on_data(request.token, request.offset, told)
        self._sink.on_done(request.token, 0)

    def _check_time(self, now: float) -> None:
        if self._start_by is not None and now >= self._start_by:
            self._lose(f"no answer within {self._terms.connect_timeout:g} s")
        if self._requests and now >= self.heard_at + self._silence:
            self._lose(f"silent for {self._silence:g} s with {counted(len(self._requests), 'request')} waiting")

    def _lose(self, text: str, *, refused: bool = False, changed: bool = False) -> NoReturn:
        self.close()
        raise OriginLost(f"origin {self._address}: {text}", refused=refused, changed=changed)


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zeros, of which there is one at least."""
    return not (data[0] or data[-1]) and data == bytes(len(data))


# In other threads


def _outcome_of(job: Callable[[], _Outcome]) -> _Outcome:
    try:
        return job()
    except OriginLost as lost:
        return lost


def _on_read(inbox: Inbox[Union[bytes, int]], number: int, completion: Any, data: Optional[bytes]) -> None:
    inbox.put(number, -completion.get_return_value() if data is None else data)
