"""Which requests took long, and where the time went: ``--slow-log``.

It is the session's `Timing`, and looks at the clocks once for each batch. What a batch has taken is divided only if
that was long:

- *origin* and *lock*: what its request was parked for, by what the tickets say that they waited for;
- *client*: the session slept until the client took or sent more (`Connection.waited`);
- *disk*: of the time in which this process did not run, all if the requests change something or pages had to be read;
- *rest*: anything else.

Requests of a batch are answered together, so each of them has taken as long as all, and one of them is named.
"""

from __future__ import annotations

import mmap
from logging import WARNING
from resource import RUSAGE_SELF, getrusage, struct_rusage
from time import monotonic
from typing import Container, Dict, List, NamedTuple, Optional

from ...log_turns import SLOW, Line, RationedLines
from ...protocol import constants as c
from ...protocol.transmission import REQUEST, split_word
from ...scoreboard.tally import Tally
from ...storage.image import Ticket
from .commands import request_fields, request_text
from .connection import Connection
from .parking import ParkedRequest, Parking, Where
from .receive_buffer import ReceiveBuffer
from .timing import Timing

_UNKNOWN = (-1, 0)


class _Moment(NamedTuple):
    """Readings of the clocks; *waited* is that of the connection, *usage* that of this process."""

    time: float
    waited: float
    usage: struct_rusage

    @property
    def used(self) -> float:
        """Seconds of the processor."""
        return self.usage.ru_utime + self.usage.ru_stime

    @property
    def pages(self) -> int:
        """As `page_prefetch.pages_read`."""
        return self.usage.ru_majflt + self.usage.ru_inblock


class _Wait(NamedTuple):
    """What a parked request has waited for, until *until*."""

    until: float
    origin: float = 0.0
    lock: float = 0.0

    def longer(self, ticket: Ticket, now: float) -> _Wait:
        """It has waited for *ticket*, too."""
        waited = max(0.0, now - self.until)
        lock = min(ticket.locked, waited)
        return _Wait(now, self.origin + waited - lock, self.lock + lock)


class _Answered(NamedTuple):
    """So many requests that are answered, of which one is that for *where*; work on them *began* at that moment."""

    command: int
    where: Where
    number: int
    arrived: float
    began: _Moment
    wait: _Wait


class _Uncounted(Tally):
    """Where there are no metrics."""

    def __init__(self) -> None:
        pass

    def answered(self, reads: int, writes: int, seconds: float) -> None:
        pass

    def answered_some(self, command: int, count: int, seconds: float, *, waited: bool) -> None:
        pass


class SlowLog(Timing):
    """The requests of one client that took longer than *limit* seconds; counts all of them in the *tally*, too."""

    def __init__(
        self,
        limit: float,
        connection: Connection,
        received: ReceiveBuffer,
        parking: Parking,
        disk: str,
        tally: Optional[Tally],
    ) -> None:
        self._limit = limit
        self._connection = connection
        self._received = received
        self._parking = parking
        self._disk = disk
        self._lines = RationedLines(WARNING, SLOW, disk, connection.loop.remind)
        self._answered: List[_Answered] = []
        self._waits: Dict[ParkedRequest, _Wait] = {}
        self._woken = self._now()
        super().__init__(tally or _Uncounted())
        self.answered = self._book

    def _now(self) -> _Moment:
        return _Moment(monotonic(), self._connection.waited, getrusage(RUSAGE_SELF))

    # The session tells

    @property
    def arrived(self) -> float:
        """When the batch has come; to set it begins the next one."""
        return self._time

    @arrived.setter
    def arrived(self, time: float) -> None:
        self._time = time
        self._waited, self._usage = self._connection.waited, getrusage(RUSAGE_SELF)
        self._first = self._received.start
        self._wait: Optional[_Wait] = None

    def _of_batch(self, command: int, where: Where, number: int) -> _Answered:
        began, wait = _Moment(self._time, self._waited, self._usage), self._wait or _Wait(self._time)
        return _Answered(command, where, number, self._time, began, wait)

    def _book(self, reads: int, writes: int, seconds: float) -> None:
        self._tally.answered(reads, writes, seconds)
        if seconds > self._limit and reads + writes:
            self._tell(self._group(reads, writes), self._time + seconds)

    def hold(self, reads: int, writes: int) -> None:
        super().hold(reads, writes)
        if reads + writes:
            self._answered.append(self._group(reads, writes))

    def hold_one(self, command: int, where: Where) -> None:
        super().hold_one(command, where)
        self._answered.append(self._of_batch(command, where, 1))
        self._first = self._received.start

    def hold_parked(self, request: ParkedRequest) -> None:
        super().hold_parked(request)
        wait = self._waits.pop(request, None)
        if wait is None:  # it has only waited for its turn
            wait = _Wait(request.arrived)
        answered = _Answered(request.command, request.where, 1, request.arrived, self._woken, wait)
        self._answered.append(answered)

    def depart_held(self, now: float) -> None:
        for answered in self._answered:
            if now - answered.arrived > self._limit:
                self._tell(answered, now)
        self._answered.clear()
        super().depart_held(now)

    def wake(self) -> None:
        """Something has come that requests waited for."""
        self._woken = self._now()

    def came(self, request: ParkedRequest, ticket: Ticket) -> None:
        """What *request* waited for, at the last `wake`."""
        wait = self._waits.get(request) or _Wait(request.arrived)
        self._waits[request] = wait.longer(ticket, self._woken.time)

    def waited_for(self, ticket: Ticket, since: float) -> None:
        """A WRITE of this batch has waited in the middle of its payload, from *since* on."""
        self._wait = (self._wait or _Wait(since))._replace(until=since).longer(ticket, monotonic())

    def end(self) -> None:
        """The client has left."""
        self._lines.rest()

    # What was slow

    def _group(self, reads: int, writes: int) -> _Answered:
        command = c.CMD_WRITE if writes else c.CMD_READ
        parked = {request.cookie for request in self._parking.requests()}
        where = _find(self._received.buffer, self._first, command, parked)
        return self._of_batch(command, where, reads + writes)

    def _tell(self, answered: _Answered, now: float) -> None:
        took, parts = now - answered.arrived, self._divide(answered, now)
        text = "%s: export %r: %s took %d ms: origin %d, lock %d, disk %d, client %d, rest %d"
        extra = request_fields(answered.command, answered.where)
        extra["about"].update(took=round(took * 1e3, 1), **parts)
        peer = self._connection.identity.at(self._connection.peer)
        what = request_text(answered.command, answered.where)
        arguments = (peer, self._disk, what, round(took * 1e3), *map(round, parts.values()))
        self._lines.say(Line(text, arguments, extra), took, answered.number)

    def _divide(self, answered: _Answered, now: float) -> Dict[str, float]:
        """Where the time went, in milliseconds; as no clock says all, what is found first counts first."""
        began, wait, end = answered.began, answered.wait, self._now()
        left = now - answered.arrived
        parts: Dict[str, float] = {}
        idle = now - max(began.time, answered.arrived) - (end.used - began.used)
        if began.time <= answered.arrived:
            idle -= wait.origin + wait.lock
        changes = answered.command != c.CMD_READ
        client = end.waited - began.waited
        disk = idle - client if changes or end.pages != began.pages else 0.0
        for name, seconds in (("origin", wait.origin), ("lock", wait.lock), ("client", client), ("disk", disk)):
            parts[name] = min(max(0.0, seconds), left)
            left -= parts[name]
        parts["rest"] = left
        order = ("origin", "lock", "disk", "client", "rest")
        return {name: round(parts[name] * 1e3, 1) for name in order}


def _find(buffer: mmap.mmap, start: int, command: int, others: Container[bytes]) -> Where:
    """Which bytes the first *command* in the *buffer* from *start* on is about, that is none of the *others*."""
    while start + REQUEST.size <= len(buffer):
        word, cookie, offset, length = REQUEST.unpack_from(buffer, start)
        magic, flags, found = split_word(word)
        if magic != c.REQUEST_MAGIC:
            break
        if found == command and not flags and cookie not in others:
            return offset, length
        start += REQUEST.size + (length if found == c.CMD_WRITE else 0)
    return _UNKNOWN
