"""One client's requests, from the first to the last.

As many requests as one receive brings are worked through, and all their replies
leave with one gathering send; plain reads and writes take a path of their own
through `Session._work`, everything else goes through `Session._execute`. Whatever
may take long sends the replies before it first.

A request whose blocks are not local is put aside, those behind it go on, and it is
done once more when its blocks have come (`server.waiting`). But for that, replies
leave in the order of the requests.

Mapped data is passed on, never looked at (see `storage.image`).
"""

from __future__ import annotations

import errno
import mmap
import select
from functools import partial
from time import monotonic
from typing import Callable, Iterator, List, Optional, Tuple

from ..errors import Disconnected, ProtocolError, RequestError
from ..logs import log
from ..protocol import constants as c
from ..protocol import transmission as wire
from ..protocol.negotiation import ALLOCATION_CONTEXT, Agreement
from ..storage.board import BYTES_READ, BYTES_WRITTEN, REQUESTS
from ..storage.image import FETCH_STEP, Background, NotLocal, Ticket
from .connection import Connection
from .disk import Disk
from .holes import HOLE_MINIMUM, Holes
from .readahead import ReadAhead
from .replies import Piece, Replies
from .waiting import QueueLimits, Waiting, WaitingRoom

BUFFER_SIZE = 1 << 20
"""Bytes received at once: many small requests, or several large writes."""

MAXIMUM_REQUEST = 256 << 20
"""Reads and writes above this are refused: no client sends them but by mistake."""

_STREAM_FROM = BUFFER_SIZE // 2 - wire.REQUEST.size
"""Payloads from this size on go to the image as they arrive instead of being collected first."""

_BATCH = 4096
"""Requests answered in one go: many enough to cost little each, few enough to keep their replies in memory."""

_MAXIMUM_PIECES = 4096
"""Pieces of replies that may pile up before they are sent."""

_PATIENCE = 30.0
"""Seconds that a client which has closed its end may wait for the replies that are still to come."""

_BUFFERED = 8 << 20
"""Bytes of one write that may wait for blocks around them before the rest of it is received."""

_NO_LIMITS = QueueLimits()

_LONG = 1 << 20
"""Bytes from which on a request that waits for all of its blocks takes memory worth counting."""

_BLOCK = 4096
_MAXIMUM_EXTENTS = 1 << 14

_READ = wire.request_word(c.CMD_READ)
_WRITE = wire.request_word(c.CMD_WRITE)

_KNOWN_FLAGS = {
    c.CMD_READ: c.CMD_FLAG_DF,
    c.CMD_WRITE: 0,
    c.CMD_DISC: 0,
    c.CMD_FLUSH: 0,
    c.CMD_TRIM: 0,
    c.CMD_CACHE: 0,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_REQ_ONE,
}
"""Flags by command; FUA is one of all of them, though it says something to writers only."""

_AT_ONCE = {c.CMD_READ: MAXIMUM_REQUEST, c.CMD_CACHE: FETCH_STEP}
"""Bytes of one request whose blocks are fetched at once."""

_MODIFYING = (c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES)
_ENOSPC_BEYOND_END = (c.CMD_WRITE, c.CMD_WRITE_ZEROES)


class Session:
    """The transmission phase of *connection*, over *disk*, as agreed in the handshake."""

    def __init__(
        self, connection: Connection, disk: Disk, agreement: Agreement, limits: QueueLimits = _NO_LIMITS
    ) -> None:
        self._connection = connection
        self._disk = disk
        self._place = disk.place
        self._counts = disk.place.counts
        self._image = disk.image
        self._structured = agreement.structured
        self._allocation = agreement.allocation
        self._replies = Replies(connection)
        self._out: List[Piece] = self._replies.pieces  # where the answer to the request in hand goes
        self._room = WaitingRoom(self._replies.pieces, limits, ordered=agreement.ordered)
        self._read_ahead = ReadAhead(disk.image)
        self._buffer = mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # the received bytes that are still to be worked on
        self._left = False
        self._leaves_at: Optional[float] = None
        self._hung_up_at: Optional[float] = None
        self._holes = Holes(disk.image)
        disk.image.wait_with(self._on_wait)
        self._commands = {
            c.CMD_READ: self._read,
            c.CMD_FLUSH: self._flush,
            c.CMD_TRIM: self._trim,
            c.CMD_CACHE: self._cache,
            c.CMD_WRITE_ZEROES: self._write_zeroes,
            c.CMD_BLOCK_STATUS: self._block_status,
        }

    def run(self) -> None:
        """Serve until the client leaves.

        Raises `ProtocolError` if it has to be thrown out, `Stop` once the requests
        in hand are answered and the worker is to leave, `OSError` if the connection
        breaks.
        """
        connection, replies, disk, place = self._connection, self._replies, self._disk, self._place
        check, receive, view = connection.watch.check, connection.receive, self._view
        while not self._left:
            check(mid_message=True)  # what has come already is answered; the next sleep ends it
            if self._start > BUFFER_SIZE // 2:
                self._move_to_front()
            background = self._image.background
            received: Optional[int]
            if background is not None and background.busy:
                received = self._receive_beside(background)
            elif not self._end:
                received = receive(view)
                if received == 0:
                    return
            else:
                received = connection.receive_rest(view[self._end :])
            self._end += received or 0
            more = True
            while more:
                place.enter()
                if disk.outdated:
                    self._renew()
                more = self._work_or_leave()
                place.leave()
                began, waits, pieces = monotonic(), connection.waits, len(replies.pieces)
                length = replies.send()
                if connection.waits == waits:  # else it was the client that took its time
                    self._read_ahead.sent(pieces, length, monotonic() - began)
                place.tell()

    # Requests that wait

    def _receive_beside(self, background: Background) -> int:
        """Receive while the background works: the number of bytes.

        Returns 0 also when requests that had to wait were gone on with, when there is
        nothing left to wait for, and when the client has left.
        """
        disk = self._disk
        disk.place.enter()
        if disk.outdated:
            return 0
        background.progress()
        self._tell_queue()
        while not background.finished:
            wanted = self._leaves_at is None and not self._room.full
            received = self._connection.receive_now(self._view[self._end :]) if wanted else None
            if received:
                return received
            if received == 0:
                self._leaves_at = monotonic() + _PATIENCE
            elif self._leaves_at is not None and (not len(self._room) or monotonic() > self._leaves_at):
                self._left = True
                return 0
            elif not background.busy:
                return 0
            else:
                self._wait_beside(background, wanted)
                if disk.outdated:
                    return 0
        self._go_on(background)
        return 0

    def _wait_beside(self, background: Background, wanted: bool) -> None:
        """Sleep; a client that has to wait before it may send more is watched for its leaving.

        Over TCP one that has gone looks like one that only has no more to say, so its
        last requests get `_PATIENCE` to come to their turn.
        """
        if wanted:
            if not (background.quiet and self._connection.soon()):
                self._connection.wait_beside(select.POLLIN, None)
        elif self._leaves_at is not None or self._hung_up_at is not None:
            self._connection.wait_beside(0, 1.0)
            if self._hung_up_at is not None and monotonic() > self._hung_up_at + _PATIENCE:
                raise Disconnected("client left with requests waiting")
        elif self._connection.wait_beside(select.POLLRDHUP, None):
            self._hung_up_at = monotonic()

    def _tell_queue(self) -> None:
        self._place.tell_queue(len(self._room), self._room.buffered)
        self._disk.tell_health()

    def _renew(self) -> None:
        """Go on with the disk that has changed; what had waited for blocks is done there."""
        self._disk.renew()
        self._image = self._disk.image
        self._read_ahead = ReadAhead(self._image)
        self._holes = Holes(self._image)
        for ticket in self._room.tickets():
            request = self._room.leave(ticket)
            if request is not None:
                self._answer(request, request.again)

    def _go_on(self, background: Background) -> None:
        """Do the requests again whose tickets are done."""
        finished, background.finished = background.finished, []
        for ticket in finished:
            request = self._room.leave(ticket)
            if request is not None:
                self._answer(request, partial(_fail, ticket.error) if ticket.error else request.again)
        self._tell_queue()

    def _answer(self, request: Waiting, work: Callable[[], None]) -> None:
        """Do *work* for *request*, which then is answered, or waits for another ticket."""
        before, self._out = self._out, request.answer
        try:
            work()
        except NotLocal as missing:
            request.answer.clear()
            self._room.enter(missing.ticket, request)
            return
        except (OSError, RequestError) as error:
            request.answer.clear()
            self._refuse(request.command, request.cookie, error)
        finally:
            self._out = before
        self._room.answered(request)

    def _do(self, command: int, cookie: bytes, work: Callable[[], None], buffered: int = 0) -> None:
        """Do the *work* that answers a request: now if it can be, and if nobody stands in line before it."""
        if self._room.blocked:
            request = Waiting(command, cookie, work, buffered)
            self._room.stand_in_line(request)
            self._answer(request, work)
            return
        try:
            work()
        except NotLocal as missing:
            self._room.enter(missing.ticket, Waiting(command, cookie, work, buffered))
        except (OSError, RequestError) as error:
            self._refuse(command, cookie, error)

    def _finish_waiting(self) -> None:
        """The client takes its leave: what it has asked for before is done for `_PATIENCE`, even if it has gone."""
        until = monotonic() + _PATIENCE
        while len(self._room) and monotonic() < until:
            self._connection.watch.wait((), 0, 1.0, mid_message=True, results=True)
            if self._disk.outdated:
                self._renew()
            elif self._image.background is not None:
                self._go_on(self._image.background)
            try:
                self._replies.send(wait=False)
            except Disconnected:
                self._replies.pieces.clear()

    def _wait_for(self, ticket: Ticket) -> None:
        """Wait in the middle of a message, with the background at work."""
        background = self._image.background
        assert background is not None
        while ticket.pending:
            self._connection.watch.wait((), 0, mid_message=True, results=True)
            if self._disk.outdated:
                self._renew()
                return
            ours = [done for done in background.finished if done is ticket]
            background.finished = [done for done in background.finished if done is not ticket]
            if background.finished:
                self._go_on(background)
                self._replies.send()
            if ours:
                return

    def _on_wait(self) -> None:
        """The image waits for another process: nobody else has to. The gate must not be left meanwhile."""
        self._replies.send(wait=False)
        self._connection.watch.check(mid_message=True)

    def _send_first(self) -> None:
        """For what may take long: replies before it leave. Meanwhile the disk may have changed."""
        self._replies.send()
        if self._disk.outdated:
            self._renew()

    def _move_to_front(self) -> None:
        rest = self._end - self._start
        if rest:
            self._view[:rest] = self._view[self._start : self._end]
        self._start, self._end = 0, rest

    def _work_or_leave(self) -> bool:
        """What `_work` does; what was answered before a fatal request is sent before the client is thrown out."""
        try:
            return self._work()
        except Disconnected:
            raise
        except ProtocolError:
            self._replies.send()
            raise

    def _work(self) -> bool:
        """Work through the complete requests that were received; True if there may be more than fit in one go."""
        buffer, view, image = self._buffer, self._view, self._image
        unpack_request, pack_data_chunk, ok_prefix = wire.REQUEST.unpack_from, wire.pack_data_chunk, wire.OK_PREFIX
        pieces = self._replies.pieces
        append, extend = pieces.append, pieces.extend
        structured, room = self._structured, self._room
        readable = min(image.readable(), image.size)
        flat, read, write = image.flat, image.read, image.write
        writable = -1 if image.readonly else readable
        announce = self._read_ahead.announce if self._read_ahead.active else None
        longest_read = HOLE_MINIMUM - 1 if structured else MAXIMUM_REQUEST
        position, end = self._start, self._end
        counts, done = self._counts, 0
        for done in range(1, _BATCH + 1):
            if end - position < 28:
                done -= 1
                break
            word, cookie, offset, length = unpack_request(buffer, position)
            stop = offset + length
            if word == _READ and stop <= readable and 0 < length <= longest_read and not room.blocked:
                if announce:
                    announce(offset, length)
                position += 28
                if flat is not None:
                    append(pack_data_chunk(cookie, offset, length) if structured else ok_prefix + cookie)
                    append(flat[offset:stop])
                    counts[BYTES_READ] += length
                    continue
                try:
                    data = read(offset, length)
                except NotLocal as missing:
                    again = partial(self._read_again, cookie, offset, length)
                    room.enter(missing.ticket, Waiting(c.CMD_READ, cookie, again, _notes(length)))
                    if room.full:
                        break
                    continue
                append(pack_data_chunk(cookie, offset, length) if structured else ok_prefix + cookie)
                extend(data)
                counts[BYTES_READ] += length
                if len(data) > 1 and len(pieces) > _MAXIMUM_PIECES:
                    break
            elif word == _WRITE and stop <= writable and position + 28 + length <= end and not room.blocked:
                payload = position + 28
                position = payload + length
                try:
                    write(offset, view[payload:position])
                except NotLocal as missing:
                    left = [(offset, bytes(view[payload:position]))]
                    again = partial(self._finish_write, 0, cookie, None, left)
                    room.enter(missing.ticket, Waiting(c.CMD_WRITE, cookie, again, length))
                    if room.full:
                        break
                except OSError as error:
                    self._refuse(c.CMD_WRITE, cookie, error)
                else:
                    append(ok_prefix + cookie)
                    counts[BYTES_WRITTEN] += length
            else:
                self._start = position
                if not self._execute(word, cookie, offset, length):
                    counts[REQUESTS] += done - 1
                    return False
                position, end = self._start, self._end
                if room.full or image is not self._image or self._disk.outdated:
                    break
        counts[REQUESTS] += done
        self._start = position
        if position == end:
            self._start = self._end = 0
        return end - position >= 28 and not room.full

    def _execute(self, word: int, cookie: bytes, offset: int, length: int) -> bool:
        """Any request, at `_start`; False if it has to wait for more bytes, or is the last."""
        self._connection.watch.check(mid_message=True)
        magic, flags, command = wire.split_word(word)
        if magic != c.REQUEST_MAGIC:
            raise ProtocolError(f"wrong request magic {magic:#x}")
        if command == c.CMD_WRITE:
            return self._write(flags, cookie, offset, length)
        self._start += wire.REQUEST.size
        if command == c.CMD_DISC:
            self._finish_waiting()
            self._left = True
            return False
        work = partial(self._command, command, flags, cookie, offset, length)
        self._do(command, cookie, work, _notes(min(length, _AT_ONCE[command])) if command in _AT_ONCE else 0)
        return True

    def _command(self, command: int, flags: int, cookie: bytes, offset: int, length: int) -> None:
        self._check(command, flags, offset, length)
        self._commands[command](flags, cookie, offset, length)

    def _check(self, command: int, flags: int, offset: int, length: int) -> None:
        """Raises `RequestError` for a request that nothing can be done about."""
        image = self._image
        if command not in _KNOWN_FLAGS:
            raise RequestError(errno.EINVAL, f"unknown command {command}")
        if image.readonly and command in _MODIFYING:
            raise ProtocolError("client writes to a read-only disk")
        if flags & ~(_KNOWN_FLAGS[command] | c.CMD_FLAG_FUA):
            raise RequestError(errno.EINVAL, "unknown flags for this command")
        if command == c.CMD_FLUSH:
            return
        if offset + length > image.size:
            beyond = errno.ENOSPC if command in _ENOSPC_BEYOND_END else errno.EINVAL
            raise RequestError(beyond, "beyond the end of the disk")
        if command in (c.CMD_READ, c.CMD_WRITE) and length > MAXIMUM_REQUEST:
            raise RequestError(errno.EINVAL, f"more than {MAXIMUM_REQUEST} bytes at once")
        if offset + length > image.readable():
            raise RequestError(errno.EIO, "the disk image has shrunk")

    def _refuse(self, command: int, cookie: bytes, error: Exception) -> None:
        log.debug("%s: command %d refused: %s", self._connection.peer, command, error)
        number = wire.nbd_error(getattr(error, "errno", None) or errno.EIO)
        if self._structured and command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
            self._out.append(wire.pack_error_chunk(cookie, number, str(error)))
        else:
            self._out.append(wire.pack_simple_reply(cookie, number))

    def _acknowledge(self, cookie: bytes, flags: int = 0) -> None:
        """Success of a command that returns nothing, durable if *flags* ask for it."""
        if flags & c.CMD_FLAG_FUA:
            self._flush_image()
        self._out.append(wire.OK_PREFIX + cookie)

    def _flush_image(self) -> None:
        """Outside the gate: it changes nothing, and may take long."""
        self._place.leave()
        try:
            self._image.flush()
        finally:
            self._disk.place.enter()
        if self._disk.outdated:
            self._renew()

    # READ

    def _read(self, flags: int, cookie: bytes, offset: int, length: int) -> None:
        pieces = self._out
        if length and self._read_ahead.active:
            self._read_ahead.announce(offset, length)
        if not self._structured:
            if flags & c.CMD_FLAG_DF:
                raise RequestError(errno.EINVAL, "DF needs structured replies")
            data = self._image.read(offset, length)
            pieces.append(wire.OK_PREFIX + cookie)
            pieces.extend(data)
        elif not length:
            pieces.append(wire.pack_done(cookie))
        elif flags & c.CMD_FLAG_DF or length < HOLE_MINIMUM:
            self._append_data(cookie, offset, length, c.REPLY_FLAG_DONE)
        else:
            self._read_around_holes(cookie, offset, length)
        self._counts[BYTES_READ] += length
        if len(self._replies.pieces) > _MAXIMUM_PIECES:
            self._send_first()

    def _read_again(self, cookie: bytes, offset: int, length: int) -> None:
        """A READ of the fast path whose blocks have come."""
        data = self._image.read_fresh(offset, length)
        self._out.append(wire.pack_data_chunk(cookie, offset, length) if self._structured else wire.OK_PREFIX + cookie)
        self._out.extend(data)
        self._counts[BYTES_READ] += length

    def _read_around_holes(self, cookie: bytes, offset: int, length: int) -> None:
        """A structured answer in which long holes are chunks without data."""
        if self._image.background is not None:
            self._image.read(offset, length)  # all of it is here, or nothing has been said yet
        parts = list(self._holes.parts(offset, length))
        for part, (hole, at, count) in enumerate(parts, 1):
            flags = c.REPLY_FLAG_DONE if part == len(parts) else 0
            if hole:
                self._out.append(wire.pack_hole_chunk(cookie, at, count, flags))
            else:
                self._append_data(cookie, at, count, flags)

    def _append_data(self, cookie: bytes, offset: int, length: int, flags: int) -> None:
        data = self._image.read(offset, length)
        self._out.append(wire.pack_data_chunk(cookie, offset, length, flags))
        self._out.extend(data)

    # WRITE

    def _write(self, flags: int, cookie: bytes, offset: int, length: int) -> bool:
        """A WRITE off the fast path; False if its payload is small and not all there yet."""
        refusal: Optional[Exception] = None
        try:
            self._check(c.CMD_WRITE, flags, offset, length)
        except RequestError as error:
            refusal = error
        payload = self._start + wire.REQUEST.size
        if payload + length > self._end:
            if length < _STREAM_FROM:
                return False
            self._send_first()
        self._start = payload
        left: List[Tuple[int, bytes]] = []
        failure = self._write_pieces(offset, length, refusal, left)
        work = partial(self._finish_write, flags, cookie, failure, left)
        self._do(c.CMD_WRITE, cookie, work, sum(len(data) for _, data in left))
        return True

    def _write_pieces(
        self, offset: int, length: int, failure: Optional[Exception], left: List[Tuple[int, bytes]]
    ) -> Optional[Exception]:
        """Write the payload piece by piece; after a *failure* only take it off the wire.

        Pieces that have to wait for blocks around them are *left*.
        """
        held = 0
        for at, piece in self._payload(offset, length):
            while failure is None:
                if self._disk.outdated:
                    self._renew()
                try:
                    self._image.write(at, piece)
                    self._counts[BYTES_WRITTEN] += len(piece)
                except NotLocal as missing:
                    if held >= _BUFFERED:
                        self._wait_for(missing.ticket)
                        if missing.ticket.error:
                            failure = RequestError(missing.ticket.error, "a block could not be fetched")
                        continue
                    left.append((at, bytes(piece)))
                    held += len(piece)
                except OSError as error:
                    failure = error
                break
        return failure

    def _finish_write(
        self, flags: int, cookie: bytes, failure: Optional[Exception], left: List[Tuple[int, bytes]]
    ) -> None:
        """Write what was *left* of the payload, and acknowledge the whole."""
        if failure is not None:
            raise failure
        while left:
            self._image.write(*left[-1])
            self._counts[BYTES_WRITTEN] += len(left.pop()[1])
        self._acknowledge(cookie, flags)

    def _payload(self, offset: int, length: int) -> Iterator[Tuple[int, memoryview]]:
        """The payload of *length* bytes from `_start` on, with the offsets where its pieces belong.

        A piece ends at a block's end, so that no block has to be written twice.
        """
        view = self._view
        while self._end - self._start < length:
            usable = self._end - self._start
            usable -= (offset + usable) % _BLOCK
            if usable > 0:
                yield offset, view[self._start : self._start + usable]
                self._start += usable
                offset += usable
                length -= usable
            self._move_to_front()
            wanted = min(length, len(view))
            while self._end < wanted:
                self._end += self._connection.receive_rest(view[self._end : wanted])
        yield offset, view[self._start : self._start + length]
        self._start += length

    # The other commands

    def _flush(self, _flags: int, cookie: bytes, _offset: int, _length: int) -> None:
        self._send_first()
        self._acknowledge(cookie, c.CMD_FLAG_FUA)

    def _trim(self, flags: int, cookie: bytes, offset: int, length: int) -> None:
        self._send_first()
        if length:
            self._image.trim(offset, length)
            self._holes.forget()
        self._acknowledge(cookie, flags)

    def _cache(self, _flags: int, cookie: bytes, offset: int, length: int) -> None:
        if length:
            self._image.fetch(offset, length)
        self._acknowledge(cookie)

    def _write_zeroes(self, flags: int, cookie: bytes, offset: int, length: int) -> None:
        self._send_first()
        if length:
            may_trim, fast = not flags & c.CMD_FLAG_NO_HOLE, bool(flags & c.CMD_FLAG_FAST_ZERO)
            self._image.write_zeroes(offset, length, may_trim=may_trim, fast=fast)
            self._holes.forget()
        self._acknowledge(cookie, flags)

    def _block_status(self, flags: int, cookie: bytes, offset: int, length: int) -> None:
        if not self._allocation:
            raise RequestError(errno.EINVAL, "no meta context was negotiated")
        if not length:
            raise RequestError(errno.EINVAL, "block status of nothing")
        self._send_first()
        limit = 1 if flags & c.CMD_FLAG_REQ_ONE else _MAXIMUM_EXTENTS
        extents = self._holes.status(offset, length, limit)
        self._out.append(wire.pack_block_status(cookie, ALLOCATION_CONTEXT, extents))


def _notes(length: int) -> int:
    """Bytes that are held for a request that waits for *length* bytes: the proxy notes each of their blocks."""
    return length >> 5 if length >= _LONG else 0


def _fail(number: int) -> None:
    """What becomes of a request whose blocks could not be fetched."""
    raise RequestError(number, "a block could not be fetched")
