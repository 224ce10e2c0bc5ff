"""How the replies of one session are framed: agreed in the handshake, asked by whoever answers a request.

Source: ``doc/proto.md``, sections "Simple reply message" and "Structured reply chunk
message". Another format of replies belongs here, and nothing else has to know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from . import constants as c
from . import transmission as wire


class ReplyFormat(ABC):
    """The headers of replies. The data of a READ follows its header and is never seen here.

    With ``chunked`` replies a READ may be answered in several chunks, with holes among them.
    """

    chunked: ClassVar[bool]

    @abstractmethod
    def data_header(self, cookie: bytes, offset: int, length: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
        """What precedes *length* bytes of data that were read at *offset*, one byte at least."""

    @abstractmethod
    def nothing_read(self, cookie: bytes) -> bytes:
        """The whole reply to a READ of no bytes."""

    def success(self, cookie: bytes) -> bytes:
        """The whole reply to a command that returns nothing."""
        return wire.OK_PREFIX + cookie

    @abstractmethod
    def error(self, command: int, cookie: bytes, error: int, message: str) -> bytes:
        """The whole reply to *command* with the NBD *error*; the *message* for a person may be left out."""

    @abstractmethod
    def error_instead(self, header: bytes, message: str) -> bytes:
        """The reply, or the chunk of one, that takes the place of data that cannot be read (EIO), by its *header*."""


class SimpleFormat(ReplyFormat):
    """Every reply is a simple one."""

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
    """READ and BLOCK_STATUS have structured replies, their errors too; the other commands have simple ones."""

    chunked = True

    data_header = staticmethod(wire.pack_data_chunk)
    nothing_read = staticmethod(wire.pack_done)

    def error(self, command: int, cookie: bytes, error: int, message: str) -> bytes:
        if command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
            return wire.pack_error_chunk(cookie, error, message)
        return wire.pack_simple_reply(cookie, error)

    def error_instead(self, header: bytes, message: str) -> bytes:
        flags = wire.CHUNK.unpack_from(header)[1]
        return wire.pack_error_chunk(header[wire.COOKIE_IN_REPLY], c.EIO, message, flags)


def reply_format(*, structured: bool) -> ReplyFormat:
    """The format that was agreed on."""
    return StructuredFormat() if structured else SimpleFormat()
