"""How the replies of one session are framed: agreed in the handshake, asked by whoever answers a request.

Source: ``doc/proto.md``, sections "Simple reply message" and "Structured reply chunk
message". Another format of replies belongs here, and nothing else has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Optional, Sequence, Tuple

from . import constants as c
from . import transmission as wire


class ReplyFormat(ABC):
    """How the replies of one session begin. The data of a READ follows its header and is never seen here.

    A *cookie* is what a reply repeats of its request; nobody else looks into it. With
    ``chunked`` replies a READ may be answered in several chunks, with holes among
    them, and a BLOCK_STATUS can be answered; no other format is asked for either.
    """

    chunked: ClassVar[bool]

    @abstractmethod
    def data_header(self, cookie: bytes, offset: int, length: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
        """What precedes *length* bytes of data that were read at *offset*, one byte at least."""

    @abstractmethod
    def nothing_read(self, cookie: bytes) -> bytes:
        """The whole reply to a READ of no bytes."""

    def hole(self, cookie: bytes, offset: int, length: int, flags: int) -> bytes:
        """A chunk of a READ that says: *length* bytes at *offset* are zeros."""
        raise TypeError("this format has no chunks")

    def block_status(
        self, cookie: bytes, context: int, extents: Sequence[Tuple[int, int]], flags: int = c.REPLY_FLAG_DONE
    ) -> bytes:
        """A chunk of a BLOCK_STATUS: *extents*, pairs of length in bytes and status, for the id of a *context*."""
        raise TypeError("this format has no chunks")

    def success(self, cookie: bytes) -> bytes:
        """The whole reply to a command that returns nothing."""
        return wire.OK_PREFIX + cookie

    @abstractmethod
    def error(self, command: int, cookie: bytes, error: int, message: str) -> bytes:
        """The whole reply to *command* with the NBD *error*; the *message* for a person may be left out."""

    def offset_of(self, header: bytes) -> Optional[int]:
        """The offset of the data behind *header*, if that says so."""
        return None

    @abstractmethod
    def error_instead(self, header: bytes, message: str) -> bytes:
        """The reply, or the chunk of one, that takes the place of data that cannot be read (EIO), by its *header*."""


class SimpleFormat(ReplyFormat):
    """The format in which every reply is a simple one."""

    chunked = False

    def data_header(self, cookie: bytes, offset: int, length: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
        return wire.OK_PREFIX + cookie

    def nothing_read(self, cookie: bytes) -> bytes:
        return wire.OK_PREFIX + cookie

    def error(self, command: int, cookie: bytes, error: int, message: str) -> bytes:
        return wire.pack_simple_reply(cookie, error)

    def error_instead(self, header: bytes, message: str) -> bytes:
        return wire.pack_simple_reply(header[wire.COOKIE_IN_REPLY], c.EIO)


class StructuredFormat(ReplyFormat):
    """The format with structured replies to READ and BLOCK_STATUS, errors too, and simple ones to all else."""

    chunked = True

    data_header = staticmethod(wire.pack_data_chunk)
    nothing_read = staticmethod(wire.pack_done)
    hole = staticmethod(wire.pack_hole_chunk)
    block_status = staticmethod(wire.pack_block_status)

    def error(self, command: int, cookie: bytes, error: int, message: str) -> bytes:
        if command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
            return wire.pack_error_chunk(cookie, error, message)
        return wire.pack_simple_reply(cookie, error)

    def offset_of(self, header: bytes) -> Optional[int]:
        return int(wire.DATA_CHUNK.unpack_from(header)[-1])

    def error_instead(self, header: bytes, message: str) -> bytes:
        flags = wire.CHUNK.unpack_from(header)[1]
        return wire.pack_error_chunk(header[wire.COOKIE_IN_REPLY], c.EIO, message, flags)


def reply_format(*, structured: bool) -> ReplyFormat:
    """The format that was agreed on."""
    return StructuredFormat() if structured else SimpleFormat()
