"""An image in Ceph as an origin: reads go to librbd, many at once; what waits is done by a thread (`disk.Disk`).

- librbd asks again by itself, whatever happens to OSDs and the network. What does fail ends the origin, but for
  bytes that cannot be read (EIO): who owns it opens it again later.
- Zeros go to the sink when they are confirmed. All that have come meanwhile are confirmed together.
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
from .disk import Claim, Disk, Extents, Found, Limits, reason

_MAXIMUM_READ = 1 << 20
_MOST_READS = 128
_SILENCE = 30.0
"""Seconds without an answer to anything after which the origin is lost, if the terms name no other time."""

_START, _CONFIRMATION = -1, -2


class _Request(NamedTuple):
    """A read or a query that is not done."""

    token: Any
    offset: int
    length: int


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
        self._thread: Pool[_Outcome] = Pool(1, at_end=self._disk.close)
        self._inbox: Inbox[Union[bytes, int]] = Inbox()
        self._found: Optional[Found] = None
        self._start_by: Optional[float] = None
        self._numbers = 0
        self._requests: Dict[int, _Request] = {}
        self._queue: Deque[int] = deque()  # reads that librbd is to be asked for as soon as fewer are under way
        self._reads = 0
        self._doubtful: Dict[int, Claim] = {}  # answers that have to be confirmed
        self._confirming: Dict[int, Claim] = {}  # those about which the thread is asking

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
        return [(self._thread.fileno(), select.POLLIN), (self._inbox.fileno(), select.POLLIN)]

    @property
    def deadline(self) -> Optional[float]:
        if self._start_by is not None:
            return self._start_by
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
        for number, outcome in self._thread.take():
            self._on_outcome(number, outcome)
        for number, data in self._inbox.take():
            self._reads -= 1
            self._on_read(number, data)
        if self._doubtful and not self._confirming:
            self._confirm()
        self.push()
        self._check_time(monotonic())

    def close(self) -> None:
        self._thread.close()
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
        self._thread.call(number, partial(_outcome_of, job))

    # Answers

    def _on_outcome(self, number: int, outcome: _Outcome) -> None:
        self.heard_at = monotonic()
        if isinstance(outcome, OriginLost):
            self._lose(str(outcome), refused=outcome.refused, changed=outcome.changed)
        elif isinstance(outcome, Found):
            self._on_found(outcome)
        elif outcome is None:
            self._on_confirmed()
        else:
            self._answer(number, outcome, doubtful=any(zero for _, zero in outcome))

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
            assert self._found
            self._answer(number, data, doubtful=has_zero_unit(data, request.offset, self._found.unit))

    def _answer(self, number: int, told: Union[bytes, Extents], *, doubtful: bool) -> None:
        request = self._requests[number]
        claim = Claim(request.offset, request.length, told)
        if doubtful:
            self._doubtful[number] = claim
        else:
            self._hand_over(number, claim)

    def _confirm(self) -> None:
        self._confirming, self._doubtful = self._doubtful, {}
        self._call(_CONFIRMATION, partial(self._disk.confirm, list(self._confirming.values())))

    def _on_confirmed(self) -> None:
        confirmed, self._confirming = self._confirming, {}
        for number, claim in confirmed.items():
            self._hand_over(number, claim)

    def _hand_over(self, number: int, claim: Claim) -> None:
        token = self._requests.pop(number).token
        if not isinstance(claim.told, bytes):
            self._sink.on_extents(token, claim.told)
        elif is_zero(claim.told):
            self._sink.on_hole(token, claim.offset, claim.length)
        else:
            self._sink.on_data(token, claim.offset, claim.told)
        self._sink.on_done(token, 0)

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


def has_zero_unit(data: bytes, offset: int, unit: int) -> bool:
    """Whether all of *data*, from *offset* on, that lies between two multiples of *unit* is zeros somewhere."""
    first = unit - offset % unit
    if len(data) <= first:
        return is_zero(data)
    cuts = [0, *range(first, len(data), unit), len(data)]
    return any(is_zero(data[start:stop]) for start, stop in zip(cuts, cuts[1:]))


# In other threads


def _outcome_of(job: Callable[[], _Outcome]) -> _Outcome:
    try:
        return job()
    except OriginLost as lost:
        return lost


def _on_read(inbox: Inbox[Union[bytes, int]], number: int, completion: Any, data: Optional[bytes]) -> None:
    inbox.put(number, -completion.get_return_value() if data is None else data)
