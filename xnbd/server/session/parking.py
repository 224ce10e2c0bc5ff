"""Requests put aside until blocks are local, and the order in which replies may leave.

A session with an old client answers in the order of the requests: there, replies
that are ready stand in line behind those that are not.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...protocol.constants import CMD_READ
from ...storage.image import Ticket
from ..handover.frozen import FrozenRequest
from .replies import Piece

Work = Callable[[List[Piece]], None]
"""Does a request and appends its answer to the list; raises `NotLocal`, or the error to answer with instead."""


REQUEST_SIZE = 3 << 10
"""Bytes of a waiting request, with what the proxy notes of its blocks if they are few; measured: 0.6 to 2.6 KiB."""

LEAST = 1 << 20
"""Bytes that any client's requests may hold: a process for a client takes more than that already."""

_STEP = 1 << 20
_STEPS_OF_SHARE = 128
_VALID = 1.0
Where = Tuple[int, int]
"""The bytes that a request is about: offset and length."""


class QueueLimits(NamedTuple):
    """How many requests of one client may be parked, and how many bytes of their payloads; 0 is no limit.

    At a limit nothing more is received from the client.
    """

    requests: int = 0
    buffered: int = 0


class ParkedRequest:
    """A request from the moment it is put aside until its reply has left the line.

    *again* does it once more, and may find that it has to wait for more; *buffered*
    is what it holds in memory, in bytes; *left* is what a WRITE has still to write.
    """

    __slots__ = (
        "again",
        "answer",
        "arrived",
        "buffered",
        "command",
        "cookie",
        "flags",
        "in_line",
        "left",
        "ready",
        "where",
    )

    def __init__(
        self,
        command: int,
        cookie: bytes,
        again: Work,
        where: Where,
        buffered: int = 0,
        flags: int = 0,
        left: Sequence[Tuple[int, bytes]] = (),
    ) -> None:
        self.command = command
        self.flags = flags
        self.left = left
        self.cookie = cookie
        self.again = again
        self.where = where
        self.buffered = buffered
        self.ready = self.in_line = False
        self.arrived = monotonic()
        self.answer: List[Piece] = []

    def freeze(self) -> FrozenRequest:
        """As data. A READ whose data is known is done once more, because that lies in the disk's memory."""
        answer = None
        if self.ready and not (self.command == CMD_READ and any(isinstance(p, memoryview) for p in self.answer)):
            answer = b"".join(self.answer)
        return FrozenRequest(self.command, self.flags, self.cookie, *self.where, self.left, answer, self.arrived)


class Allowance:
    """The memory that the parked requests of one client may hold; measured again when they hold more, and with time."""

    def __init__(self) -> None:
        self._until = 0
        self._valid = 0.0

    def covers(self, held: int) -> bool:
        """Whether a client whose requests hold so many bytes may send more."""
        if held < LEAST or (held < self._until and monotonic() < self._valid):
            return True
        from .memory import share

        limit = share()
        self._until = min(limit, held + max(_STEP, limit // _STEPS_OF_SHARE))
        self._valid = monotonic() + _VALID
        return held < limit


class Parking:
    """The requests of one session that are put aside, and the line of replies if they keep the order of requests.

    ``blocked`` tells whether later replies have to stand in line. ``buffered`` is the
    number of bytes that parked requests hold. ``short`` tells that memory is short, so
    that no more requests should come.
    """

    def __init__(self, replies: List[Piece], limits: QueueLimits, *, ordered: bool) -> None:
        self.on_answer: Callable[[ParkedRequest], None] = lambda request: None
        """Hears of each request whose answer leaves."""
        self.blocked = False
        self.buffered = 0
        self._replies = replies
        self._limits = limits
        self._ordered = ordered
        self._allowance = Allowance()
        self.short = False
        self._by_ticket: Dict[Ticket, ParkedRequest] = {}
        self._line: Deque[ParkedRequest] = deque()

    def __len__(self) -> int:
        """Requests that wait for a ticket."""
        return len(self._by_ticket)

    @property
    def full(self) -> bool:
        """Whether no more requests should come, which does not change before one has left."""
        requests, buffered = self._limits
        count = max(len(self._by_ticket), len(self._line))
        if self.short or 0 < requests <= count or 0 < buffered <= self.buffered:
            return True
        self.short = count > 0 and not self._allowance.covers(count * REQUEST_SIZE + self.buffered)
        return self.short

    def enter(self, ticket: Ticket, request: ParkedRequest) -> None:
        """*request* waits for *ticket*."""
        self._by_ticket[ticket] = request
        self.buffered += request.buffered
        if self._ordered and not request.in_line:
            self.stand_in_line(request)

    def leave(self, ticket: Ticket) -> Optional[ParkedRequest]:
        """The request that waits for *ticket*, if one does: it has to be done again now."""
        request = self._by_ticket.pop(ticket, None)
        if request is not None:
            self.buffered -= request.buffered
            self.short = False
        return request

    def requests(self) -> List[ParkedRequest]:
        """All that are put aside, those of an ordered session in their order."""
        return list(self._line or self._by_ticket.values())

    def tickets(self) -> List[Ticket]:
        return list(self._by_ticket)

    def answers(self) -> List[List[Piece]]:
        """Those that are complete and stand in line."""
        return [request.answer for request in self._line if request.ready]

    def stand_in_line(self, request: ParkedRequest) -> None:
        """A request of an ordered session takes its place, whether it has to wait itself or for others only."""
        request.in_line = self.blocked = True
        self._line.append(request)

    def answered(self, request: ParkedRequest) -> None:
        """The answer of *request* is complete: it leaves, unless it has to keep its place."""
        request.ready = True
        self.short = False
        if not self._ordered:
            self._leave(request)
            return
        while self._line and self._line[0].ready:
            self._leave(self._line.popleft())
        self.blocked = bool(self._line)

    def _leave(self, request: ParkedRequest) -> None:
        self._replies += request.answer
        self.on_answer(request)
