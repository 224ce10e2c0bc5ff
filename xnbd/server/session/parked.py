"""Requests that cannot be answered yet: put aside, and done once more when their blocks have come.

To do one raises `NotLocal`, with the ticket that it has to wait for; the session's
loop goes on with those behind it. As long as the image's background has anything to
do, the loop receives by `Parked.receive`, which does again what can be done.

When the disk has become another one (see `server.disk`), all that is parked is done on
that one at once.
"""

from __future__ import annotations

import select
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple, Union

from ...errors import Disconnected, RequestError
from ...logs import log
from ...protocol import constants as c
from ...scoreboard.counters import BYTES_READ
from ...storage.image import FETCH_STEP, Background, NotLocal, Parcel, Ticket
from ..disk import Disk
from .commands import MAXIMUM_REQUEST, MAY_TAKE_LONG, Commands
from .connection import Connection
from .pace import Pace
from .parking import ParkedRequest, Parking, Where, Work
from .replies import MAXIMUM_PIECES, MOST_GATHERED, Piece, Replies
from .timing import Timing

if TYPE_CHECKING:
    from .slow_log import SlowLog

_PATIENCE = 30.0
"""Seconds that a client which has closed its end may wait for the replies that are still to come."""

_LONG = 64 << 10
"""Bytes from which on a request that waits for all of its blocks takes more memory than any other."""

_AT_ONCE = {c.CMD_READ: MAXIMUM_REQUEST, c.CMD_CACHE: FETCH_STEP}
"""Bytes of one request whose blocks are fetched at once."""


class Parked:
    """Does one client's requests, parks those whose blocks are missing, and does them again when these have come."""

    def __init__(
        self,
        connection: Connection,
        disk: Disk,
        replies: Replies,
        commands: Commands,
        parking: Parking,
        timing: Optional[Timing] = None,
        slow_log: Optional[SlowLog] = None,
        pace: Optional[Pace] = None,
    ) -> None:
        """The *slow_log* is the *timing* too, if there is one."""
        self._timing = timing
        self._slow_log = slow_log
        self._pace = pace
        self._connection = connection
        self._disk = disk
        self._replies = replies
        self._commands = commands
        self._parking = parking
        self._leaves_at: Optional[float] = None
        self._hung_up_at: Optional[float] = None
        self._parting = False
        self._told_short = False
        self._counts = disk.place.counts
        self._full_at = 0
        """Bytes that have been read when replies are to be sent before more is done."""
        self.arrived: Optional[float] = None
        """When what is done now has arrived (monotonic seconds), if that was at another process."""

    # Doing requests

    def execute(self, command: int, flags: int, cookie: bytes, offset: int, length: int) -> None:
        """Do any request but WRITE and DISC, as `do` does."""
        work = partial(self._commands.execute, command, flags, cookie, offset, length)
        noted = notes(min(length, _AT_ONCE[command])) if command in _AT_ONCE else 0
        self.do(command, flags, cookie, work, (offset, length), noted)

    def do(
        self,
        command: int,
        flags: int,
        cookie: bytes,
        work: Work,
        where: Where,
        buffered: int = 0,
        left: Sequence[Tuple[int, bytes]] = (),
    ) -> None:
        """Do the *work* that answers a request for *where*: now if it can be, and if nobody stands in line before it.

        If it has to wait it holds so many bytes *buffered*, of which *left* are still to be written. The disk may
        have changed on return.
        """
        if self._parking.blocked:
            request = self._as_of_then(ParkedRequest(command, cookie, work, where, buffered, flags, left))
            self._parking.stand_in_line(request)
            self._do_again(request)
            return
        if command in MAY_TAKE_LONG:
            self.send_first()
        pieces = self._replies.pieces
        answer: List[Piece] = []  # which is not sent before it is whole: what has to wait is answered anew
        try:
            work(answer)
        except NotLocal as missing:
            request = self._as_of_then(ParkedRequest(command, cookie, work, where, buffered, flags, left))
            self._parking.enter(missing.ticket, request)
            return
        except (OSError, RequestError) as error:
            answer.clear()
            self._commands.refuse(command, cookie, error, answer, where)
        pieces.extend(answer)
        if self._timing is not None:
            self._timing.hold_one(command, where)

    def _as_of_then(self, request: ParkedRequest) -> ParkedRequest:
        if self.arrived is not None:
            request.arrived = self.arrived
        return request

    def _do_again(self, request: ParkedRequest, parcels: Optional[List[Parcel]] = None) -> None:
        """Do *request*, for which *parcels* have come; then it is answered, or waits for another ticket."""
        if request.command in MAY_TAKE_LONG:
            self.send_first()
        image = self._disk.image
        image.take(parcels)
        try:
            request.again(request.answer)
        except NotLocal as missing:
            request.answer.clear()
            self._parking.enter(missing.ticket, request)
            return
        except (OSError, RequestError) as error:
            self._refuse(request, error)
        else:
            self._parking.answered(request)
        finally:
            image.take(None)
        much = len(self._replies.pieces) > MAXIMUM_PIECES or self._counts[BYTES_READ] > self._full_at
        if much or self._disk.outdated:
            self.send_first()

    def _refuse(self, request: ParkedRequest, error: Exception) -> None:
        request.answer.clear()
        self._commands.refuse(request.command, request.cookie, error, request.answer, request.where)
        self._parking.answered(request)

    def _go_on(self, background: Background) -> None:
        """Do the requests again whose tickets are done."""
        finished, background.finished = background.finished, []
        self._full_at = self._counts[BYTES_READ] + MOST_GATHERED
        slow_log = self._slow_log
        if slow_log is not None:
            slow_log.wake()
        for ticket in finished:
            request = self._parking.leave(ticket)
            if request is None:
                continue
            if slow_log is not None:
                slow_log.came(request, ticket)
            if ticket.error:
                self._refuse(request, OSError(ticket.error, "a block could not be fetched"))
            else:
                self._do_again(request, ticket.parcels)
        self._tell()

    def _tell(self) -> None:
        if self._parking.short and not self._told_short:
            self._told_short = True
            log.warning(
                "%s: memory is short, nothing is received from it before some of its %d waiting requests are answered",
                self._connection.peer,
                len(self._parking),
            )
        self._disk.place.tell_queue(len(self._parking), self._parking.buffered)
        self._disk.tell_health()

    # A disk that becomes another one

    def start_again(self) -> None:
        """The disk has become another one: do all that had waited for blocks there."""
        for ticket in self._parking.tickets():
            request = self._parking.leave(ticket)
            if request is not None:
                self._do_again(request)

    def send_first(self) -> None:
        """For what may take long: replies before it leave. Meanwhile the disk may have changed."""
        if self._parting:
            self.send_now()
        else:
            self._replies.send()
            self._on_sent()
        self._full_at = self._counts[BYTES_READ] + MOST_GATHERED
        self._disk.catch_up()

    def _on_sent(self) -> None:
        if self._timing is not None and not self._replies.pieces:
            self._timing.depart_held(monotonic())

    def send_now(self) -> None:
        """Send what leaves without a wait; a client that takes its leave need not be there any more."""
        try:
            self._replies.send(wait=False)
        except Disconnected:
            if not self._parting:
                raise
            self._replies.pieces.clear()
        self._on_sent()

    # Waiting

    def receive(self, view: memoryview) -> Optional[int]:
        """Receive into *view* while the background works: the number of bytes, 0 when the client has left for good.

        Returns None when requests that had to wait were gone on with, when there is
        nothing left to wait for, when the disk has changed, and when somebody calls.
        """
        disk = self._disk
        background = disk.enter().background
        if background is None:
            return None
        background.progress()
        self._tell()
        while not background.finished:
            paused = 0.0 if self._pace is None else self._pace.remaining()
            wanted = self._leaves_at is None and not self._parking.full and paused <= 0
            received = self._way().receive_now(view) if wanted else None
            if received:
                return received
            if received == 0:
                self._leaves_at = monotonic() + _PATIENCE
            elif self._leaves_at is not None and (not len(self._parking) or monotonic() > self._leaves_at):
                return 0
            elif not background.busy:
                return None
            else:
                self._wait_beside(background, wanted, paused)
                if disk.catch_up() or self._connection.loop.called:
                    return None
        self._go_on(background)
        return None

    def _way(self) -> Union[Connection, Pace]:
        return self._connection if self._pace is None else self._pace.way()

    def _wait_beside(self, background: Background, wanted: bool, paused: float) -> None:
        """Sleep; a client that has to wait before it may send more is watched for its leaving.

        One that is *paused* by limits has to wait for so many seconds.
        Over TCP one that has gone looks like one that only has no more to say, so its
        last requests get `_PATIENCE` to come to their turn.
        """
        if wanted:
            if not (background.quiet and self._connection.soon()):
                self._connection.wait_beside(select.POLLIN, None)
        elif paused > 0 and self._pace is not None:
            with self._pace.waiting():
                self._connection.wait_beside(0, paused)
        elif self._leaves_at is not None or self._hung_up_at is not None:
            self._connection.wait_beside(0, 1.0)
            if self._hung_up_at is not None and monotonic() > self._hung_up_at + _PATIENCE:
                raise Disconnected("client left with requests waiting")
        elif self._connection.wait_beside(select.POLLRDHUP, None):
            self._hung_up_at = monotonic()

    def keep_in_line(self, command: int, cookie: bytes, answer: bytes) -> None:
        """A request has its *answer* already, and its place behind those before it."""
        request = self._as_of_then(ParkedRequest(command, cookie, _have_done, (0, 0)))
        request.answer.append(answer)
        self._parking.stand_in_line(request)
        self._parking.answered(request)

    def finish(self) -> None:
        """The client takes its leave: what it has asked for before is done for `_PATIENCE`, even if it has gone."""
        self._parting = True
        until = monotonic() + _PATIENCE
        while len(self._parking) and monotonic() < until:
            self._connection.loop.wait((), 0, 1.0, mid_message=True, results=True)
            if not self._disk.catch_up() and self._disk.image.background is not None:
                self._go_on(self._disk.image.background)
            self.send_now()

    def wait_for(self, ticket: Ticket) -> None:
        """Wait in the middle of a message until *ticket* is done or the disk has changed; the background goes on.

        The image has taken the ticket's parcels then.
        """
        since = monotonic()
        self._wait_for(ticket)
        if self._slow_log is not None:
            self._slow_log.waited_for(ticket, since)

    def _wait_for(self, ticket: Ticket) -> None:
        disk, image, generation = self._disk, self._disk.image, self._disk.generation
        background = image.background
        assert background is not None
        while ticket.pending and disk.generation == generation:  # going on with others may end in another one
            self._connection.loop.wait((), 0, mid_message=True, results=True)
            if disk.catch_up():
                return
            ours = [done for done in background.finished if done is ticket]
            background.finished = [done for done in background.finished if done is not ticket]
            if background.finished:
                self._go_on(background)
                self._replies.send()
            if ours:
                image.take(ticket.parcels)
                return


def notes(length: int) -> int:
    """Bytes that are held for a request that waits for *length* bytes: the proxy notes each of their blocks."""
    return length >> 5 if length >= _LONG else 0


def _have_done(_answer: List[Piece]) -> None:
    """Nothing: the request has its answer."""
