"""Requests under way and the replies to them: bytes in, a sink's methods called, no I/O.

Source: ``doc/proto.md``, section "Transmission phase". The origin is not believed:
a reply has to belong to a request, its pieces have to lie within it, must not
overlap and must be all there before the request counts as done. Data goes to the
sink before that is known, so it is good only once ``on_done`` says so.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Any, Callable, Dict, List, Optional, Tuple

from ...errors import ProtocolError
from ...protocol import constants as c
from ...protocol import transmission as wire
from ..base import Sink

COLLECT = 256 << 10
"""Data up to this size is handed over whole, more of it as it arrives. As fast, and easier to keep."""

_BLOCK = 4096
_MAXIMUM_EXTENTS = 1 << 20
_MAXIMUM_ERROR = 6 + c.MAXIMUM_STRING + 8
_MAXIMUM_GAPS = 1 << 13

_READ = wire.request_word(c.CMD_READ)
_BLOCK_STATUS = wire.request_word(c.CMD_BLOCK_STATUS)
_HOLE = struct.Struct(">QI")
_EXTENT = struct.Struct(">II")
_OFFSET = struct.Struct(">Q")
_U32 = struct.Struct(">I")
_ERROR = struct.Struct(">IH")
_ERRORS = (c.EPERM, c.EIO, c.ENOMEM, c.EINVAL, c.ENOSPC, c.EOVERFLOW, c.ENOTSUP)
_ERROR_BIT = 1 << 15
_END_OF_DISK = 1 << 64

Step = Callable[[memoryview, int, int], int]


class _Request:
    """A request that waits for its reply, and which parts of it are still missing."""

    __slots__ = ("command", "error", "gaps", "length", "offset", "token")

    def __init__(self, token: Any, command: int, offset: int, length: int) -> None:
        self.token = token
        self.command = command
        self.offset = offset
        self.length = length
        self.error = 0
        self.gaps: Optional[List[Tuple[int, int]]] = None

    def note_received(self, offset: int, length: int) -> None:
        """Note that these bytes are in the reply. Raises `ProtocolError` if they must not be."""
        gaps = self.gaps
        if gaps is None:
            gaps = self.gaps = [(self.offset, self.offset + self.length)]
        end = offset + length
        index = bisect_right(gaps, (offset, _END_OF_DISK)) - 1
        if index < 0 or not length or end > gaps[index][1]:
            raise ProtocolError(
                f"a chunk of {length} bytes at {offset} does not belong in the reply, or came twice, "
                f"where {self.length} bytes at {self.offset} were asked for"
            )
        gap_start, gap_end = gaps[index]
        rest = [part for part in ((gap_start, offset), (end, gap_end)) if part[0] < part[1]]
        gaps[index : index + 1] = rest
        if len(gaps) > _MAXIMUM_GAPS:
            raise ProtocolError("a reply is cut into too many pieces")


class ReplyParser:
    """All requests of one connection, in the order in which they were asked."""

    def __init__(self, sink: Sink) -> None:
        self.pending: Dict[bytes, _Request] = {}
        self._sink = sink
        self._cookies = 0
        self._structured = False
        self._context: Optional[int] = None
        # The rest of a reply that is handed over as it arrives:
        self._resume: Optional[Step] = None
        self._cookie = b""
        self._position = 0
        self._left = 0
        self._last = False

    def agree(self, structured: bool, context: Optional[int]) -> None:
        """What the handshake brought."""
        self._structured = structured
        self._context = context

    def ask_read(self, token: Any, offset: int, length: int) -> bytes:
        """A READ, ready to be sent."""
        return self._ask(token, _READ, offset, length)

    def ask_block_status(self, token: Any, offset: int, length: int) -> bytes:
        """A BLOCK_STATUS, ready to be sent."""
        return self._ask(token, _BLOCK_STATUS, offset, length)

    def _ask(self, token: Any, word: int, offset: int, length: int) -> bytes:
        self._cookies += 1
        cookie = self._cookies.to_bytes(8, "big")
        self.pending[cookie] = _Request(token, word & 0xFFFF, offset, length)
        return wire.REQUEST.pack(word, cookie, offset, length)

    def parse(self, view: memoryview, end: int) -> int:
        """Work through ``view[:end]``: how many of these bytes are done with.

        The others have to stand in front of the next call's. Raises `ProtocolError`
        if the origin must not be listened to any more.
        """
        start = 0
        while True:
            if self._resume is not None:
                start = self._resume(view, start, end)
                if self._resume is not None:
                    return start
            if self._structured:
                start = self._take_plain_chunks(view, start, end)
                after = self._take_chunk(view, start, end)
            else:
                start = self._take_plain_replies(view, start, end)
                after = self._take_simple(view, start, end)
            if after == start:
                return start
            start = after

    # The usual: a READ answered in one piece, and all of it is there

    def _take_plain_replies(self, view: memoryview, start: int, end: int) -> int:
        pending, on_data, on_done = self.pending, self._sink.on_data, self._sink.on_done
        unpack, magic_wanted = wire.SIMPLE_REPLY.unpack_from, c.SIMPLE_REPLY_MAGIC
        while end - start > 16:
            magic, error, cookie = unpack(view, start)
            request = pending.get(cookie)
            if magic != magic_wanted or error or request is None:
                return start
            data = start + 16
            stop = data + request.length
            if stop > end or request.command != c.CMD_READ:
                return start
            del pending[cookie]
            on_data(request.token, request.offset, view[data:stop])
            on_done(request.token, 0)
            start = stop
        return start

    def _take_plain_chunks(self, view: memoryview, start: int, end: int) -> int:
        pending, on_data, on_done = self.pending, self._sink.on_data, self._sink.on_done
        unpack = wire.DATA_CHUNK.unpack_from
        wanted = (c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_TYPE_OFFSET_DATA)
        while end - start > 28:
            magic, flags, kind, cookie, length, offset = unpack(view, start)
            request = pending.get(cookie)
            if (magic, flags, kind) != wanted or request is None:
                return start
            data = start + 28
            stop = start + 20 + length
            if stop > end or offset != request.offset or length != request.length + 8:
                return start
            if request.command != c.CMD_READ or request.gaps is not None or request.error:
                return start
            del pending[cookie]
            on_data(request.token, offset, view[data:stop])
            on_done(request.token, 0)
            start = stop
        return start

    # Everything else; each returns *start* if not enough of the message is there

    def _take_simple(self, view: memoryview, start: int, end: int) -> int:
        payload = start + wire.SIMPLE_REPLY.size
        if payload > end:
            return start
        magic, error, cookie = wire.SIMPLE_REPLY.unpack_from(view, start)
        if magic != c.SIMPLE_REPLY_MAGIC:
            raise ProtocolError(f"wrong reply magic {magic:#x}")
        request = self._find(cookie)
        if error:
            request.error = error
            self._finish(cookie, request)
            return payload
        if self._structured or request.command != c.CMD_READ:
            raise ProtocolError("a simple reply where a structured one was agreed on")
        if request.length <= COLLECT and payload + request.length > end:
            return start
        request.note_received(request.offset, request.length)
        self._begin(self._take_data, cookie, request.offset, request.length, last=True)
        return payload

    def _take_chunk(self, view: memoryview, start: int, end: int) -> int:
        payload = start + wire.CHUNK.size
        if payload > end:
            return self._take_error_reply(view, start, end)
        magic, flags, kind, cookie, length = wire.CHUNK.unpack_from(view, start)
        if magic != c.STRUCTURED_REPLY_MAGIC:
            return self._take_simple(view, start, end)
        request = self._find(cookie)
        last = bool(flags & c.REPLY_FLAG_DONE)
        if kind == c.REPLY_TYPE_OFFSET_DATA and request.command == c.CMD_READ and length > 8:
            taken = self._on_data_chunk(view[payload:end], cookie, length, last)
        elif kind == c.REPLY_TYPE_OFFSET_HOLE and request.command == c.CMD_READ and length == _HOLE.size:
            taken = self._on_hole_chunk(view[payload:end], request)
        elif kind == c.REPLY_TYPE_BLOCK_STATUS and request.command == c.CMD_BLOCK_STATUS:
            taken = self._on_status_chunk(view[payload:end], cookie, length, last)
        elif kind & _ERROR_BIT and _ERROR.size <= length <= _MAXIMUM_ERROR:
            taken = self._on_error_chunk(view[payload:end], request, kind, length)
        elif kind == c.REPLY_TYPE_NONE and last and not length:
            taken = 0
        else:
            raise ProtocolError(f"a chunk of type {kind} with {length} bytes has no place in this reply")
        if taken < 0:
            return start
        if last and self._resume is None:
            self._finish(cookie, request)
        return payload + taken

    def _take_error_reply(self, view: memoryview, start: int, end: int) -> int:
        """A simple reply at the end of what was received: it is shorter than a chunk's header."""
        if end - start < wire.SIMPLE_REPLY.size:
            return start
        (magic,) = _U32.unpack_from(view, start)
        return start if magic == c.STRUCTURED_REPLY_MAGIC else self._take_simple(view, start, end)

    # Chunks, by type; each returns how much of the payload is done with, -1 if more of it is needed

    def _on_data_chunk(self, payload: memoryview, cookie: bytes, length: int, last: bool) -> int:
        if len(payload) < (length if length <= COLLECT + _OFFSET.size else _OFFSET.size):
            return -1
        (offset,) = _OFFSET.unpack_from(payload)
        self.pending[cookie].note_received(offset, length - _OFFSET.size)
        self._begin(self._take_data, cookie, offset, length - _OFFSET.size, last)
        return _OFFSET.size

    def _on_hole_chunk(self, payload: memoryview, request: _Request) -> int:
        if len(payload) < _HOLE.size:
            return -1
        offset, length = _HOLE.unpack_from(payload)
        request.note_received(offset, length)
        self._sink.on_hole(request.token, offset, length)
        return _HOLE.size

    def _on_status_chunk(self, payload: memoryview, cookie: bytes, length: int, last: bool) -> int:
        extents, rest = divmod(length - _U32.size, _EXTENT.size)
        if rest or not 0 < extents <= _MAXIMUM_EXTENTS:
            raise ProtocolError(f"a block status of {length} bytes")
        if len(payload) < _U32.size:
            return -1
        request = self.pending[cookie]
        if _U32.unpack_from(payload) != (self._context,) or request.gaps is not None:
            raise ProtocolError("a block status that was not asked for")
        request.gaps = []
        self._begin(self._take_extents, cookie, 0, length - _U32.size, last)
        return _U32.size

    def _on_error_chunk(self, payload: memoryview, request: _Request, kind: int, length: int) -> int:
        if len(payload) < length:
            return -1
        error, text = _ERROR.unpack_from(payload)
        if not error or _ERROR.size + text > length:
            raise ProtocolError(f"error chunk of {length} bytes with error {error} and {text} bytes of text")
        request.error = request.error or error
        return length

    # Payloads that are handed over as they arrive

    def _begin(self, step: Step, cookie: bytes, position: int, left: int, last: bool) -> None:
        self._resume = step
        self._cookie = cookie
        self._position = position
        self._left = left
        self._last = last

    def _take_data(self, view: memoryview, start: int, end: int) -> int:
        """Pieces end where a block ends, so that nobody has to write a block twice."""
        count = min(self._left, end - start)
        if count < self._left:
            count -= (self._position + count) % _BLOCK
            if count <= 0:
                return start
        request = self.pending[self._cookie]
        self._sink.on_data(request.token, self._position, view[start : start + count])
        self._advance(count, count)
        return start + count

    def _take_extents(self, view: memoryview, start: int, end: int) -> int:
        count = min(self._left, end - start) // _EXTENT.size * _EXTENT.size
        if not count:
            return start
        request, position = self.pending[self._cookie], self._position
        extents = []
        for length, flags in _EXTENT.iter_unpack(view[start : start + count]):
            inside = min(length, request.length - position)
            if inside <= 0:
                raise ProtocolError("a block status with an empty extent, or one beyond the request")
            extents.append((inside, bool(flags & c.STATE_ZERO)))
            position += inside
        self._sink.on_extents(request.token, extents)
        self._advance(count, position - self._position)
        return start + count

    def _advance(self, taken: int, covered: int) -> None:
        self._left -= taken
        self._position += covered
        if not self._left:
            self._resume = None
            if self._last:
                self._finish(self._cookie, self.pending[self._cookie])

    # What they share

    def _find(self, cookie: bytes) -> _Request:
        request = self.pending.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply to no request, with cookie {cookie.hex()}")
        return request

    def _finish(self, cookie: bytes, request: _Request) -> None:
        """The last piece is there. An origin that shuts down leaves the request to the next connection."""
        if request.error == c.ESHUTDOWN:
            raise ProtocolError("it is shutting down")
        if not request.error and (request.gaps is None or request.gaps):
            raise ProtocolError("a reply that ends before all of it has come")
        del self.pending[cookie]
        error = request.error if request.error in _ERRORS else c.EIO if request.error else 0
        self._sink.on_done(request.token, error)
