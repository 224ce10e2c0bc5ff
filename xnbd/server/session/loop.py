"""One client's requests, from the first to the last.

As many requests as one receive brings are worked through, and all their replies
leave with one gathering send; plain reads and writes take a path of their own
through `Session._work`, everything else goes through `Session._execute`. Whatever
may take long sends the replies before it first.

A request whose blocks are not local is put aside, those behind it go on, and it is
done once more when its blocks have come (`server.session.parked`). But for that, replies
leave in the order of the requests.

Mapped data is passed on, never looked at (see `storage.image`).
"""

from __future__ import annotations

import errno
import os
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Optional, Union

from ...errors import Disconnected, ProtocolError
from ...protocol import constants as c
from ...protocol import transmission as wire
from ...protocol.reply_format import reply_format
from ...protocol.server_handshake import Agreement
from ...scoreboard.counters import BYTES_READ, BYTES_WRITTEN, REQUESTS
from ...storage.image import NotLocal
from ..disk import Disk
from ..handover.departure import Departure
from ..handover.frozen import FrozenSession
from .commands import MAXIMUM_REQUEST, Commands
from .connection import Connection
from .crossing import Crossing
from .first_touch import FirstTouch, Reader
from .held import Held
from .holes import HOLE_MINIMUM
from .pace import Pace
from .page_prefetch import QUICK
from .parked import Parked, notes
from .parking import ParkedRequest, Parking, QueueLimits
from .receive_buffer import ReceiveBuffer
from .replies import MAXIMUM_PIECES, MOST_GATHERED, Replies
from .timing import Timing
from .write_runs import WriteRuns
from .writes import STREAM_FROM, Writes

if TYPE_CHECKING:
    from .slow_log import SlowLog

_BATCH = 4096
"""Requests answered in one go: many enough to cost little each, few enough to keep their replies in memory."""

_SEVERAL = 3
"""Requests from which on it pays to unpack all of them at once."""

_ROUNDS = 16
"""Batches after which others are shown what was counted, and the worker looks whether it is to stop."""

_NO_LIMITS = QueueLimits()

_READ = wire.request_word(c.CMD_READ)
_WRITE = wire.request_word(c.CMD_WRITE)


class Session:
    """The transmission phase of one client: receives requests, does them on the disk, and sends the replies."""

    def __init__(
        self,
        connection: Connection,
        disk: Disk,
        agreement: Agreement,
        limits: QueueLimits = _NO_LIMITS,
        departure: Optional[Departure] = None,
        slow: Optional[float] = None,
    ) -> None:
        """By the *departure* another process may go on with the client; without one none can.

        Requests that take longer than *slow* seconds are told of in the log.
        """
        self._connection = connection
        self._disk = disk
        self._departure = departure or Departure(connection.loop)
        self._counts = disk.place.counts
        self._format = reply_format(structured=agreement.structured)
        self._receive_buffer = ReceiveBuffer(connection)
        self._replies = Replies(connection, self._format)
        self._first_touch = FirstTouch(disk.image, self._counts[REQUESTS])
        self._write_runs = WriteRuns(self._receive_buffer, self._replies)
        tally = disk.place.tally
        self._parking = Parking(self._replies.pieces, limits, ordered=agreement.ordered)
        self._slow_log = None if slow is None else self._make_slow_log(slow)
        self._timing = self._slow_log or (None if tally is None else Timing(tally))
        if self._timing is not None:
            self._parking.on_answer = self._timing.hold_parked
        self._replies.on_unreadable = self._on_unreadable
        self._pace = None if disk.rates is None else Pace(disk.rates, connection, self._counts, tally)
        peer = connection.identity.at(connection.peer)
        remind = connection.loop.remind
        self._commands = Commands(disk, agreement, self._format, peer, remind, encrypted=bool(connection.encryption))
        replies, timing, slow_log, pace = self._replies, self._timing, self._slow_log, self._pace
        self._parked = Parked(connection, disk, replies, self._commands, self._parking, timing, slow_log, pace)
        self._writes = Writes(self._receive_buffer, disk, self._commands, self._parked)
        self.crossing = Crossing(connection, disk, agreement, self._receive_buffer, replies, self._parking, pace)
        self._left = False
        disk.accompany(self._on_wait, self._on_renewed, Held(self._replies, self._parking))

    def _make_slow_log(self, slow: float) -> SlowLog:
        from .slow_log import SlowLog

        disk = self._disk
        return SlowLog(slow, self._connection, self._receive_buffer, self._parking, disk.name, disk.place.tally)

    def run(self) -> None:
        """Serve until the client leaves.

        Raises `ProtocolError` if it has to be thrown out, `Stop` once the requests
        in hand are answered and the worker is to leave, `OSError` if the connection
        breaks.
        """
        try:
            self._run()
        except Disconnected:
            raise
        except ProtocolError:
            self._departure.cancel()
            self._replies.send()  # what came before the fatal request was answered
            raise
        finally:
            self._departure.cancel()
            self._commands.end()
            if self._slow_log is not None:
                self._slow_log.end()

    def _run(self) -> None:
        loop, departure = self._connection.loop, self._departure
        self._send_rest()
        more = self._receive_buffer.end > 0 and not self._parking.full  # another process has received it
        while not self._left:
            if loop.called or departure.under_way:
                if departure.go_on(self.crossing):
                    self._disk.abandon()
                    return
                self._send_rest()
            if not more:
                loop.check(mid_message=True)  # what has come already is answered; the next sleep ends it
                received = self._receive()
                if received == 0:
                    return
                if loop.called:
                    more = received is not None
                    continue
            more = self._work()

    def _receive(self) -> Optional[int]:
        """Receive more, or go on with what waits: the number of bytes, 0 once the client has left, None for none."""
        connection, receive_buffer = self._way(), self._receive_buffer
        background = self._disk.image.background
        received: Optional[int]
        if background is not None and background.busy:
            received = self._parked.receive(receive_buffer.room())
        elif not receive_buffer.end:
            received = connection.receive(receive_buffer.view)
        else:
            received = connection.receive_more(receive_buffer.room())
        receive_buffer.end += received or 0
        return received

    def _way(self) -> Union[Connection, Pace]:
        """By what is received."""
        return self._connection if self._pace is None else self._pace.way()

    # From one process to another

    def thaw(self, session: FrozenSession) -> None:
        """Go on from what another process has frozen; raises like `run`, before which it is to be called."""
        self.crossing.thaw(session, self._parked, self._writes)

    def _send_rest(self) -> None:
        """Replies that another process has left, or this one when it was called."""
        if self._replies.pieces:
            self._disk.place.enter()
            self._replies.send()

    def _on_wait(self) -> None:
        """The image waits for another process: nobody else has to. The gate must not be left meanwhile."""
        self._parked.send_now()
        self._connection.loop.check(mid_message=True)

    def _on_unreadable(self, header: bytes, length: int) -> None:
        """A READ is answered with an error, because its data could not be read when it was sent."""
        offset = self._format.offset_of(header)
        if offset is None:
            offset = self._receive_buffer.offset_of_read(header[wire.COOKIE_IN_REPLY], length)
        error = OSError(errno.EIO, "the data cannot be read")
        self._commands.note_refusal(c.CMD_READ, error, (offset, length))
        if offset >= 0 and self._disk.place.inside:
            self._disk.image.on_unreadable(offset, length)

    def _on_renewed(self) -> None:
        """The disk is another one: what had waited for blocks of the old one is done there."""
        self._commands.renew()
        self._parked.start_again()

    def _work(self) -> bool:
        """Work through the complete requests that were received, and answer them; True if there may be more.

        Goes on with what comes next while it is plain reads and writes, of a disk that
        stays as it is: what is bound here once would cost as much as a request.
        """
        disk, receive_buffer, parking = self._disk, self._receive_buffer, self._parking
        place = disk.place
        disk.enter()
        commands, image = self._commands, disk.image
        buffer, view, page_prefetch, background = (
            receive_buffer.buffer,
            receive_buffer.view,
            commands.page_prefetch,
            image.background,
        )
        unpack_request, unpack_requests = wire.REQUEST.unpack_from, wire.REQUEST.iter_unpack
        ok_prefix, header_size, several = wire.OK_PREFIX, wire.REQUEST.size, _SEVERAL * wire.REQUEST.size
        data_header = self._format.data_header if self._format.chunked else None
        longest_read = HOLE_MINIMUM - 1 if data_header else MAXIMUM_REQUEST
        pieces, counts, send = self._replies.pieces, self._counts, self._replies.send
        append, extend, write_run = pieces.append, pieces.extend, self._write_runs.do
        read: Reader
        receive, pwrite, flat_fd = self._way().receive, os.pwrite, image.flat_fd
        size, read, write, readable_now, changes = image.size, image.read, image.write, image.readable, disk.changes
        first_touch = self._first_touch
        if counts[REQUESTS] >= first_touch.due:
            first_touch.look(image, counts[REQUESTS])
        copied = first_touch.active
        if copied:
            read = first_touch.reader(image)
        batches, plain, timing = 0, True, self._timing
        while True:
            if timing is not None:
                timing.arrived = monotonic()
            noted = wrote = 0  # requests that are in nobody's sum any more, or in another one; WRITEs
            readable, complete = readable_now(), True
            if readable > size:
                readable = size
            writable = readable if commands.writable else -1
            announce = page_prefetch.announce if page_prefetch.active else None
            flat = None if copied and not announce else image.flat
            position, end, run = receive_buffer.start, receive_buffer.end, 0
            full_at = counts[BYTES_READ] + MOST_GATHERED
            if end - position >= several and not parking.blocked:
                if flat is not None and not announce:
                    # Most batches are nothing but reads of what is here, which need not be looked at one by one.
                    total, first = 0, len(pieces)
                    usable = min((end - position) // header_size, _BATCH) * header_size
                    for word, cookie, offset, length in unpack_requests(view[position : position + usable]):
                        stop = offset + length
                        if word != _READ or stop > readable or not 0 < length <= longest_read:
                            break
                        append(data_header(cookie, offset, length) if data_header else ok_prefix + cookie)
                        append(flat[offset:stop])
                        total += length
                    run = (len(pieces) - first) >> 1
                    position += run * header_size
                    counts[BYTES_READ] += total
                if not run and flat_fd is not None:
                    run, total = write_run(position, end, flat_fd, writable)
                    wrote = run
                    position += run * header_size + total
                    counts[BYTES_WRITTEN] += total
            done = run
            for done in range(run + 1, _BATCH + 1):
                if end - position < header_size:
                    done -= 1
                    break
                word, cookie, offset, length = unpack_request(buffer, position)
                stop = offset + length
                if word == _READ and stop <= readable and 0 < length <= longest_read and not parking.blocked:
                    if announce:
                        announce(offset, length)
                    position += header_size
                    if flat is not None:
                        append(data_header(cookie, offset, length) if data_header else ok_prefix + cookie)
                        append(flat[offset:stop])
                        counts[BYTES_READ] += length
                        continue
                    try:
                        data = read(offset, length)
                    except NotLocal as missing:
                        again = partial(commands.read_fresh, cookie, offset, length)
                        parking.enter(
                            missing.ticket, ParkedRequest(c.CMD_READ, cookie, again, (offset, length), notes(length))
                        )
                        noted += 1
                        if parking.full:
                            plain = False
                            break
                        continue
                    except OSError as error:
                        commands.refuse(c.CMD_READ, cookie, error, pieces, (offset, length))
                        continue
                    append(data_header(cookie, offset, length) if data_header else ok_prefix + cookie)
                    extend(data)
                    counts[BYTES_READ] += length
                    if counts[BYTES_READ] > full_at or (len(data) > 1 and len(pieces) > MAXIMUM_PIECES):
                        plain = False
                        break
                elif word == _WRITE and stop <= writable and length < STREAM_FROM and not parking.blocked:
                    payload = position + header_size
                    if payload + length > end:
                        done, complete = done - 1, False
                        break
                    position = payload + length
                    wrote += 1
                    try:
                        if flat_fd is None or pwrite(flat_fd, view[payload:position], offset) != length:
                            write(offset, view[payload:position])
                    except NotLocal as missing:
                        left = [(offset, bytes(view[payload:position]))]
                        again = partial(self._writes.finish, 0, cookie, None, left)
                        parking.enter(
                            missing.ticket,
                            ParkedRequest(c.CMD_WRITE, cookie, again, (offset, length), length, left=left),
                        )
                        noted, wrote = noted + 1, wrote - 1
                        if parking.full:
                            plain = False
                            break
                    except OSError as error:
                        commands.refuse(c.CMD_WRITE, cookie, error, pieces, (offset, length))
                    else:
                        append(ok_prefix + cookie)
                        counts[BYTES_WRITTEN] += length
                else:
                    receive_buffer.start, plain = position, False
                    if timing is not None:
                        timing.hold(done - 1 - noted - wrote, wrote)
                    noted, wrote = done, 0
                    complete = self._execute(word, cookie, offset, length)
                    position, end = receive_buffer.start, receive_buffer.end
                    if not complete:
                        done = noted = done - 1
                        break
                    if parking.full or image is not disk.image or disk.outdated or len(pieces) > MAXIMUM_PIECES:
                        break
                    if counts[BYTES_READ] > full_at:
                        break
            else:
                plain = False
            counts[REQUESTS] += done
            receive_buffer.start = position
            if position == end:
                receive_buffer.start = receive_buffer.end = 0
            if pieces:
                began, count = monotonic(), len(pieces)
                length = send()
                now = monotonic()
                seconds = now - began
                if timing is not None:
                    timing.answered(done - noted - wrote, wrote, now - timing.arrived)
                    if timing.held:
                        timing.depart_held(now)
                if seconds > QUICK or announce:
                    commands.page_prefetch.sent(count, length, seconds)
                if pieces:
                    plain = False  # somebody calls
            batches += 1
            if not plain or batches == _ROUNDS or (background is not None and background.busy):
                place.tell()
                return complete and end - position >= header_size and not parking.full
            if position == end:
                received = receive(view)
                receive_buffer.end = received or 0
            else:
                received = self._receive()
            if not received:
                self._left = received == 0
                return not self._left  # woken: the disk may be another one
            if place.disturbed(changes):
                return True

    def _execute(self, word: int, cookie: bytes, offset: int, length: int) -> bool:
        """Any request that is next in the receive buffer; False if it has to wait for more bytes, or is the last."""
        self._connection.loop.check(mid_message=True)
        magic, flags, command = wire.split_word(word)
        if magic != c.REQUEST_MAGIC:
            raise ProtocolError(f"wrong request magic {magic:#x}")
        if command == c.CMD_WRITE:
            return self._writes.begin(flags, cookie, offset, length)
        self._receive_buffer.start += wire.REQUEST.size
        if command == c.CMD_DISC:
            self._departure.cancel()
            self._parked.finish()
            self._left = True
            return False
        self._parked.execute(command, flags, cookie, offset, length)
        return True
