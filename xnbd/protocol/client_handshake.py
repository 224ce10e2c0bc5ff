"""The client's handshake as a state machine without I/O: what a server says in, what to answer out.

Source: ``doc/proto.md``, sections "Handshake phase" and "Option types". The
greeting tells which kind of server it is; every kind is asked for the best it can
do. A server is not believed: no length is trusted before it was compared with
what that message can need, and the number of messages is bounded too.
"""

from __future__ import annotations

import struct
from typing import Generator, List, NamedTuple, NoReturn, Optional, Tuple

from ..errors import ProtocolError
from . import constants as c

MAXIMUM_REPLY_DATA = c.MAXIMUM_STRING + 64
"""More data than any reply to an option needs."""

MAXIMUM_REPLIES = 64
"""Replies that one option may have."""

LARGEST_MINIMUM_BLOCK = 4096
"""The proxy asks for whole blocks of this size; a server that wants larger ones is no origin."""

_GREETING = struct.Struct(">QQ")
_OPTION_HEADER = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_OLDSTYLE_EXPORT = struct.Struct(">QI")
_EXPORT = struct.Struct(">QH")
_BLOCK_SIZE = struct.Struct(">III")
_ZEROES = 124
_ERROR_BIT = 1 << 31
_LARGEST_SIZE = (1 << 63) - 1
_SHOWN_TEXT = 200
_TOO_OLD = "its way of negotiating is too old for TLS, which nbds:// insists on"

Step = Generator[int, bytes, None]
Reply = Tuple[int, bytes]


class RemoteExport(NamedTuple):
    """What was agreed on: *size* in bytes, transmission *flags*, the id of ``base:allocation``.

    A read may ask for *maximum_payload* bytes at most. An oldstyle server has one
    disk only and was not told the export's name.
    """

    size: int
    flags: int
    structured: bool = False
    allocation_context: Optional[int] = None
    oldstyle: bool = False
    maximum_payload: int = c.MAXIMUM_PAYLOAD


class TlsDemanded(ProtocolError):
    """The server insists on TLS, which this handshake does without."""


class ClientHandshake:
    """The way to one export of one server; ``export`` is None until it is agreed on.

    With *tls* nothing is asked for in the clear but TLS itself, and without it there is no way.
    ``starts_tls`` tells that TLS has to be set up now: nothing that comes is for `receive`
    until `on_tls` was called.
    """

    def __init__(self, export_name: str, *, tls: bool = False) -> None:
        self.export: Optional[RemoteExport] = None
        self.starts_tls = False
        self._tls = tls
        self._name = export_name
        self._raw_name = export_name.encode("utf-8", "surrogateescape")
        self._option = 0
        self._structured = False
        self._context: Optional[int] = None
        self._maximum_payload = c.MAXIMUM_PAYLOAD
        self._outbox = b""
        self._received = bytearray()
        self._steps = self._talk()
        self._needed = next(self._steps)

    @property
    def wanted(self) -> int:
        """Bytes without which the dialogue does not go on."""
        return self._needed - len(self._received)

    def receive(self, data: bytes) -> bytes:
        """Take what the server said, `wanted` bytes at most; returns what to send to it.

        Raises `ProtocolError`, with a message for people, if this server is no use.
        """
        self._received += data
        while self.export is None and not self.starts_tls and len(self._received) >= self._needed:
            part = bytes(self._received[: self._needed])
            del self._received[: self._needed]
            try:
                self._needed = self._steps.send(part)
            except StopIteration:
                break
        if self.export is not None and self._received:
            raise ProtocolError("it goes on talking after the handshake")
        if self.starts_tls and self._received:
            raise ProtocolError("it goes on in the clear where TLS was agreed on")
        answer, self._outbox = self._outbox, b""
        return answer

    def on_tls(self) -> bytes:
        """TLS is set up: returns what to send first. Nothing is known yet, but what the greeting said."""
        self.starts_tls = False
        return self.receive(b"")

    def end_means(self) -> str:
        """What it means if the server closes the connection now."""
        if self._option == c.OPT_EXPORT_NAME:
            return f"it closed the connection when asked for an export named {self._name!r}: it seems to have none"
        if self._option == c.OPT_STARTTLS:
            return "it closed the connection when asked for TLS"
        return "it closed the connection during the handshake"

    # The handshake, from the first byte to the last

    def _talk(self) -> Step:
        magic, kind = _GREETING.unpack((yield _GREETING.size))
        if magic != c.NBDMAGIC or kind not in (c.OLDSTYLE_MAGIC, c.IHAVEOPT):
            raise ProtocolError("it is no NBD server: its greeting begins with other bytes")
        if kind == c.OLDSTYLE_MAGIC:
            if self._tls:
                raise ProtocolError(_TOO_OLD)
            yield from self._take_oldstyle_export()
            return
        (offered,) = _U16.unpack((yield _U16.size))
        fixed = bool(offered & c.FLAG_FIXED_NEWSTYLE)
        if self._tls and not fixed:
            raise ProtocolError(_TOO_OLD)
        no_zeroes = bool(offered & c.FLAG_NO_ZEROES)
        accepted = (c.FLAG_C_FIXED_NEWSTYLE if fixed else 0) | (c.FLAG_C_NO_ZEROES if no_zeroes else 0)
        self._outbox += _U32.pack(accepted)
        if self._tls:
            yield from self._start_tls()
        if fixed:
            yield from self._ask_for_structured_replies()
            if self._structured:
                yield from self._ask_for_allocation()
            yield from self._go()
        if self.export is None:
            yield from self._ask_by_export_name(no_zeroes)

    def _start_tls(self) -> Step:
        """STARTTLS; whoever else answers than with a plain yes gets nothing: there is no way back to the clear."""
        kind, text, replies = yield from self._ask(c.OPT_STARTTLS)
        if kind != c.REP_ACK or text or replies:
            said = f" (it says: {_readable(text)})" if text else ""
            raise ProtocolError(f"it offers no TLS, which nbds:// insists on{said}")
        self.starts_tls = True
        yield 0

    def _take_oldstyle_export(self) -> Step:
        size, flags = _OLDSTYLE_EXPORT.unpack_from((yield _OLDSTYLE_EXPORT.size + _ZEROES))
        self.export = RemoteExport(_check_size(size), flags & 0xFFFF, oldstyle=True)

    def _ask_for_structured_replies(self) -> Step:
        kind, _, replies = yield from self._ask(c.OPT_STRUCTURED_REPLY)
        if replies:
            raise ProtocolError(f"option reply of type {replies[0][0]} that was not asked for")
        self._structured = kind == c.REP_ACK

    def _ask_for_allocation(self) -> Step:
        query = _string(self._raw_name) + _U32.pack(1) + _string(c.BASE_ALLOCATION.encode())
        kind, _, replies = yield from self._ask(c.OPT_SET_META_CONTEXT, query)
        if kind != c.REP_ACK or not replies:
            return
        if len(replies) > 1 or replies[0][0] != c.REP_META_CONTEXT or len(replies[0][1]) < 4:
            raise ProtocolError("the meta context that was asked for is not what it answers")
        data = replies[0][1]
        if data[4:] != c.BASE_ALLOCATION.encode():
            raise ProtocolError(f"meta context {_readable(data[4:])!r} was not asked for")
        (self._context,) = _U32.unpack_from(data)

    def _go(self) -> Step:
        """GO; ``export`` stays None if the server does not know this option."""
        request = _string(self._raw_name) + struct.pack(">HH", 1, c.INFO_BLOCK_SIZE)
        kind, error, replies = yield from self._ask(c.OPT_GO, request)
        if kind == c.REP_ERR_UNSUP:
            return
        if kind != c.REP_ACK:
            self._refused(kind, error)
        export: Optional[Tuple[int, int]] = None
        for answered, data in replies:
            if answered != c.REP_INFO or len(data) < 2:
                raise ProtocolError(f"option reply of type {answered} that is no information")
            (info,) = _U16.unpack_from(data)
            if info == c.INFO_EXPORT:
                export = self._parse_export(data[2:], export)
            elif info == c.INFO_BLOCK_SIZE:
                self._parse_block_size(data[2:])
        if export is None:
            raise ProtocolError("it grants the export without telling its size")
        self._agree(*export)

    def _ask_by_export_name(self, no_zeroes: bool) -> Step:
        self._send_option(c.OPT_EXPORT_NAME, self._raw_name)
        size, flags = _EXPORT.unpack_from((yield _EXPORT.size + (0 if no_zeroes else _ZEROES)))
        self._agree(size, flags)

    # Its parts

    def _send_option(self, option: int, data: bytes) -> None:
        self._option = option
        self._outbox += _OPTION_HEADER.pack(c.IHAVEOPT, option, len(data)) + data

    def _ask(self, option: int, data: bytes = b"") -> Generator[int, bytes, Tuple[int, bytes, List[Reply]]]:
        """Send an option: type and data of its last reply, and the replies before that."""
        self._send_option(option, data)
        replies: List[Reply] = []
        while len(replies) < MAXIMUM_REPLIES:
            kind, answer = yield from self._take_reply(option)
            if kind == c.REP_ERR_TLS_REQD:
                raise TlsDemanded("it demands TLS" if not self._tls else "it demands TLS where there is TLS already")
            if kind == c.REP_ACK or kind & _ERROR_BIT:
                return kind, answer, replies
            replies.append((kind, answer))
        raise ProtocolError(f"more than {MAXIMUM_REPLIES} replies to option {option}")

    def _take_reply(self, option: int) -> Generator[int, bytes, Reply]:
        magic, answered, kind, length = _OPTION_REPLY.unpack((yield _OPTION_REPLY.size))
        if magic != c.OPTION_REPLY_MAGIC:
            raise ProtocolError(f"wrong option reply magic {magic:#x}")
        if answered != option:
            raise ProtocolError(f"reply to option {answered}, which was not sent")
        if length > MAXIMUM_REPLY_DATA:
            raise ProtocolError(f"reply to option {option} announces {length} bytes of data")
        return kind, (yield length)

    def _parse_export(self, data: bytes, earlier: Optional[Tuple[int, int]]) -> Tuple[int, int]:
        if len(data) != _EXPORT.size:
            raise ProtocolError(f"size and flags of the export have {len(data)} bytes")
        size, flags = _EXPORT.unpack(data)
        if earlier not in (None, (size, flags)):
            raise ProtocolError("it tells two sizes of one export")
        return size, flags

    def _parse_block_size(self, data: bytes) -> None:
        if len(data) != _BLOCK_SIZE.size:
            raise ProtocolError(f"block sizes have {len(data)} bytes")
        minimum, _, maximum = _BLOCK_SIZE.unpack(data)
        if not minimum or minimum & (minimum - 1):
            raise ProtocolError(f"minimum block size of {minimum} bytes is no power of two")
        if minimum > LARGEST_MINIMUM_BLOCK:
            raise ProtocolError(f"it wants requests of {minimum} bytes at least, more than {LARGEST_MINIMUM_BLOCK}")
        self._maximum_payload = min(maximum, c.MAXIMUM_PAYLOAD)

    def _agree(self, size: int, flags: int) -> None:
        payload = self._maximum_payload
        if payload < min(_check_size(size), LARGEST_MINIMUM_BLOCK):
            raise ProtocolError(f"it wants requests of {payload} bytes at most, less than {LARGEST_MINIMUM_BLOCK}")
        self.export = RemoteExport(size, flags, self._structured, self._context, maximum_payload=payload)

    def _refused(self, kind: int, text: bytes) -> NoReturn:
        reasons = {
            c.REP_ERR_UNKNOWN: f"it has no export named {self._name!r}",
            c.REP_ERR_POLICY: f"it does not let us have the export {self._name!r}",
            c.REP_ERR_SHUTDOWN: "it is shutting down",
        }
        reason = reasons.get(kind, f"it refuses the export {self._name!r} (error {kind - _ERROR_BIT})")
        raise ProtocolError(f"{reason} (it says: {_readable(text)})" if text else reason)


def _string(raw: bytes) -> bytes:
    return _U32.pack(len(raw)) + raw


def _check_size(size: int) -> int:
    if not 0 < size <= _LARGEST_SIZE:
        raise ProtocolError(f"a disk of {size} bytes is not possible")
    return size


def _readable(text: bytes) -> str:
    """The server's words, fit for a log line."""
    shown = text[:_SHOWN_TEXT].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
