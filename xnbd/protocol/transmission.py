"""Requests and replies of the transmission phase.

Source: ``doc/proto.md``, sections "Transmission phase" and "Values".  The header
formats stand here and nowhere else.
"""

from __future__ import annotations

import errno
import struct
from typing import Iterable, Tuple

from . import constants as c

REQUEST = struct.Struct(">Q8sQI")
"""magic and flags and type as one word (`request_word`), cookie, offset, length."""

SIMPLE_REPLY = struct.Struct(">II8s")
"""magic, error, cookie."""

CHUNK = struct.Struct(">IHH8sI")
"""magic, flags, type, cookie, length of what follows."""

DATA_CHUNK = struct.Struct(">IHH8sIQ")
"""a chunk header, then the offset of the data that follows."""

HOLE_CHUNK = struct.Struct(">IHH8sIQI")
"""a chunk header, then offset and length of the hole."""

COOKIE_IN_REPLY = slice(8, 16)
"""Where the cookie stands, in simple replies and in chunks alike."""

OK_PREFIX = struct.pack(">II", c.SIMPLE_REPLY_MAGIC, 0)
"""A simple reply without error is this and the cookie."""

MAXIMUM_MESSAGE = 1024
"""Bytes of the text of an error chunk."""

_ERRNO_TO_NBD = {
    errno.EPERM: c.EPERM, errno.EACCES: c.EPERM, errno.EROFS: c.EPERM,
    errno.ENOMEM: c.ENOMEM,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC, errno.EDQUOT: c.ENOSPC, errno.EFBIG: c.ENOSPC,
    errno.EOVERFLOW: c.EOVERFLOW,
    errno.EOPNOTSUPP: c.ENOTSUP,
    errno.ESHUTDOWN: c.ESHUTDOWN,
}  # fmt: skip


def nbd_error(number: int) -> int:
    """The NBD error for the errno *number*: EIO unless the specification has a closer one."""
    return _ERRNO_TO_NBD.get(number, c.EIO)


def request_word(command: int, flags: int = 0) -> int:
    """The first eight bytes of a request as one number, to recognise it by a single comparison."""
    return c.REQUEST_MAGIC << 32 | flags << 16 | command


def split_word(word: int) -> Tuple[int, int, int]:
    """Magic, flags and command of a request's first eight bytes."""
    return word >> 32, word >> 16 & 0xFFFF, word & 0xFFFF


def pack_simple_reply(cookie: bytes, error: int = 0) -> bytes:
    return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, error, cookie)


def pack_done(cookie: bytes) -> bytes:
    """A whole structured reply that carries nothing: success."""
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_TYPE_NONE, cookie, 0)


def pack_error_chunk(cookie: bytes, error: int, message: str = "", flags: int = c.REPLY_FLAG_DONE) -> bytes:
    text = message.encode()[:MAXIMUM_MESSAGE]
    header = CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_TYPE_ERROR, cookie, 6 + len(text))
    return header + struct.pack(">IH", error, len(text)) + text


def pack_data_chunk(cookie: bytes, offset: int, length: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
    """Header of a chunk of *length* data bytes, which follow it."""
    return DATA_CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_TYPE_OFFSET_DATA, cookie, 8 + length, offset)


def pack_hole_chunk(cookie: bytes, offset: int, length: int, flags: int = c.REPLY_FLAG_DONE) -> bytes:
    return HOLE_CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_TYPE_OFFSET_HOLE, cookie, 12, offset, length)


def pack_block_status(
    cookie: bytes, context: int, extents: Iterable[Tuple[int, int]], flags: int = c.REPLY_FLAG_DONE
) -> bytes:
    """A chunk with *extents*, pairs of length in bytes and status, for the id of a meta *context*."""
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, c.REPLY_TYPE_BLOCK_STATUS, cookie, len(body)) + body
