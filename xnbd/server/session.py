"""One client's requests, from the first to the last.

As many requests as one receive brings are worked through, and all their replies
leave with one gathering send; plain reads and writes take a path of their own
through `Session._work`, everything else goes through `Session._execute`. Whatever
may take long sends the replies before it first.

A request whose blocks are not local is put aside, those behind it go on, and it is
done once more when its blocks have come (`server.deferred`). But for that, replies
leave in the order of the requests.

Mapped data is passed on, never looked at (see `storage.image`).
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Optional

from ..errors import Disconnected, ProtocolError
from ..protocol import constants as c
from ..protocol import transmission as wire
from ..protocol.negotiation import Agreement
from ..storage.board import BYTES_READ, BYTES_WRITTEN, REQUESTS
from ..storage.image import FETCH_STEP, NotLocal
from .commands import MAXIMUM_REQUEST, Commands
from .connection import Connection
from .deferred import Deferred
from .disk import Disk
from .holes import HOLE_MINIMUM
from .inbox import BUFFER_SIZE, Inbox
from .replies import MAXIMUM_PIECES, Replies
from .waiting import QueueLimits, Waiting, WaitingRoom
from .writes import Writes

_BATCH = 4096
"""Requests answered in one go: many enough to cost little each, few enough to keep their replies in memory."""

_NO_LIMITS = QueueLimits()

_LONG = 1 << 20
"""Bytes from which on a request that waits for all of its blocks takes memory worth counting."""

_AT_ONCE = {c.CMD_READ: MAXIMUM_REQUEST, c.CMD_CACHE: FETCH_STEP}
"""Bytes of one request whose blocks are fetched at once."""

_READ = wire.request_word(c.CMD_READ)
_WRITE = wire.request_word(c.CMD_WRITE)


class Session:
    """The transmission phase of *connection*, over *disk*, as agreed in the handshake."""

    def __init__(
        self, connection: Connection, disk: Disk, agreement: Agreement, limits: QueueLimits = _NO_LIMITS
    ) -> None:
        self._connection = connection
        self._disk = disk
        self._counts = disk.place.counts
        self._structured = agreement.structured
        self._inbox = Inbox(connection)
        self._replies = Replies(connection)
        self._room = WaitingRoom(self._replies.pieces, limits, ordered=agreement.ordered)
        self._commands = Commands(disk, agreement, connection.peer)
        self._deferred = Deferred(connection, disk, self._replies, self._commands, self._room)
        self._writes = Writes(self._inbox, disk, self._commands, self._deferred)
        self._left = False
        disk.image.wait_with(self._on_wait)

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
            self._replies.send()  # what came before the fatal request was answered
            raise
        finally:
            self._commands.end()

    def _run(self) -> None:
        connection, replies, disk, place = self._connection, self._replies, self._disk, self._disk.place
        inbox, commands, deferred = self._inbox, self._commands, self._deferred
        check, receive, view, work = connection.watch.check, connection.receive, inbox.view, self._work
        while not self._left:
            check(mid_message=True)  # what has come already is answered; the next sleep ends it
            if inbox.start > BUFFER_SIZE // 2:
                inbox.move_to_front()
            background = disk.image.background
            received: Optional[int]
            if background is not None and background.busy:
                received = deferred.receive(view[inbox.end :])
            elif not inbox.end:
                received = receive(view)
            else:
                received = connection.receive_rest(view[inbox.end :])
            if received == 0:
                return
            inbox.end += received or 0
            more = True
            while more:
                place.enter()
                if disk.outdated:
                    deferred.renew()
                more = work()
                place.leave()
                began, waits, pieces = monotonic(), connection.waits, len(replies.pieces)
                length = replies.send()
                if connection.waits == waits:  # else it was the client that took its time
                    commands.read_ahead.sent(pieces, length, monotonic() - began)
                place.tell()

    def _on_wait(self) -> None:
        """The image waits for another process: nobody else has to. The gate must not be left meanwhile."""
        self._deferred.send_now()
        self._connection.watch.check(mid_message=True)

    def _work(self) -> bool:
        """Work through the complete requests that were received; True if there may be more than fit in one go."""
        inbox, commands, image = self._inbox, self._commands, self._disk.image
        buffer, view, read_ahead = inbox.buffer, inbox.view, commands.read_ahead
        unpack_request, pack_data_chunk, ok_prefix = wire.REQUEST.unpack_from, wire.pack_data_chunk, wire.OK_PREFIX
        pieces = self._replies.pieces
        append, extend = pieces.append, pieces.extend
        structured, room = self._structured, self._room
        readable = min(image.readable(), image.size)
        flat, read, write = image.flat, image.read, image.write
        writable = -1 if image.readonly else readable
        announce = read_ahead.announce if read_ahead.active else None
        longest_read = HOLE_MINIMUM - 1 if structured else MAXIMUM_REQUEST
        position, end = inbox.start, inbox.end
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
                    again = partial(commands.read_fresh, cookie, offset, length)
                    room.enter(missing.ticket, Waiting(c.CMD_READ, cookie, again, (offset, length), _notes(length)))
                    if room.full:
                        break
                    continue
                except OSError as error:
                    commands.refuse(c.CMD_READ, cookie, error, pieces, (offset, length))
                    continue
                append(pack_data_chunk(cookie, offset, length) if structured else ok_prefix + cookie)
                extend(data)
                counts[BYTES_READ] += length
                if len(data) > 1 and len(pieces) > MAXIMUM_PIECES:
                    break
            elif word == _WRITE and stop <= writable and position + 28 + length <= end and not room.blocked:
                payload = position + 28
                position = payload + length
                try:
                    write(offset, view[payload:position])
                except NotLocal as missing:
                    left = [(offset, bytes(view[payload:position]))]
                    again = partial(self._writes.finish, 0, cookie, None, left)
                    room.enter(missing.ticket, Waiting(c.CMD_WRITE, cookie, again, (offset, length), length))
                    if room.full:
                        break
                except OSError as error:
                    commands.refuse(c.CMD_WRITE, cookie, error, pieces, (offset, length))
                else:
                    append(ok_prefix + cookie)
                    counts[BYTES_WRITTEN] += length
            else:
                inbox.start = position
                if not self._execute(word, cookie, offset, length):
                    counts[REQUESTS] += done - 1
                    return False
                position, end = inbox.start, inbox.end
                if room.full or image is not self._disk.image or self._disk.outdated or len(pieces) > MAXIMUM_PIECES:
                    break
        counts[REQUESTS] += done
        inbox.start = position
        if position == end:
            inbox.start = inbox.end = 0
        return end - position >= 28 and not room.full

    def _execute(self, word: int, cookie: bytes, offset: int, length: int) -> bool:
        """Any request that is next in the inbox; False if it has to wait for more bytes, or is the last."""
        self._connection.watch.check(mid_message=True)
        magic, flags, command = wire.split_word(word)
        if magic != c.REQUEST_MAGIC:
            raise ProtocolError(f"wrong request magic {magic:#x}")
        if command == c.CMD_WRITE:
            return self._writes.begin(flags, cookie, offset, length)
        self._inbox.start += wire.REQUEST.size
        if command == c.CMD_DISC:
            self._deferred.finish()
            self._left = True
            return False
        work = partial(self._commands.execute, command, flags, cookie, offset, length)
        notes = _notes(min(length, _AT_ONCE[command])) if command in _AT_ONCE else 0
        self._deferred.do(command, cookie, work, (offset, length), notes)
        return True


def _notes(length: int) -> int:
    """Bytes that are held for a request that waits for *length* bytes: the proxy notes each of their blocks."""
    return length >> 5 if length >= _LONG else 0
