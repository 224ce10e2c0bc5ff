"""What each command does to a disk, and how it is answered.

A command raises `NotLocal` before it has answered anything, and is done once more
then; so nothing here may count on being called once. Nothing is sent from here: an
answer is a list of pieces (`server.session.replies`), and whoever calls says where it goes.
WRITE has a module of its own, because its payload has (`server.session.writes`).
"""

from __future__ import annotations

import errno
from logging import DEBUG, WARNING
from typing import Dict, List, Optional

from ...errors import ProtocolError, RequestError
from ...log_turns import FAILED, Line, RationedLines, Remind
from ...logs import Fields, about, log
from ...protocol import constants as c
from ...protocol.reply_format import ReplyFormat
from ...protocol.server_handshake import CONTEXTS, Agreement
from ...protocol.transmission import nbd_error
from ...scoreboard.counters import BYTES_READ
from ...text import one_line
from ..disk import Disk
from .block_status import status
from .holes import HOLE_MINIMUM, Holes
from .page_prefetch import PagePrefetch
from .parking import Where
from .replies import Piece

MAXIMUM_REQUEST = 256 << 20
"""Reads and writes above this are refused: no client sends them but by mistake."""

MAY_TAKE_LONG = frozenset((c.CMD_FLUSH, c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS))
"""Replies to what came before these should not wait for them."""

_MAXIMUM_EXTENTS = 1 << 14

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

_MODIFYING = (c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES)
_ENOSPC_BEYOND_END = (c.CMD_WRITE, c.CMD_WRITE_ZEROES)


_NAMES = {
    c.CMD_READ: "READ",
    c.CMD_WRITE: "WRITE",
    c.CMD_FLUSH: "FLUSH",
    c.CMD_TRIM: "TRIM",
    c.CMD_CACHE: "CACHE",
    c.CMD_WRITE_ZEROES: "WRITE_ZEROES",
    c.CMD_BLOCK_STATUS: "BLOCK_STATUS",
}


def request_text(command: int, where: Where) -> str:
    """``READ of 4096 bytes at 0``, or ``FLUSH``; an offset that is negative is not known."""
    offset, length = where
    of = f" of {length} bytes" if length else ""
    return f"{_name_of(command)}{of}" + (f" at {offset}" if offset >= 0 and length else "")


def request_fields(command: int, where: Where, error: Optional[Exception] = None) -> Dict[str, Fields]:
    """The same for ``extra`` of a line, and *error* if the request ended with it."""
    offset, length = where
    return about(error=error, command=_name_of(command), offset=offset if offset >= 0 else None, length=length)


def _name_of(command: int) -> str:
    return _NAMES.get(command, f"command {command}")


def _is_ours(error: Exception) -> bool:
    """Whether *error* tells of this computer, or an origin, and not of a request that nobody could serve."""
    number = getattr(error, "errno", None)
    if isinstance(error, RequestError):
        return number == errno.EIO
    return number != errno.EOPNOTSUPP


def _described(error: Exception) -> str:
    """``No space left on device (ENOSPC)``."""
    number = getattr(error, "errno", None) or errno.EIO
    return f"{_reason(error)} ({errno.errorcode.get(number, number)})"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class Commands:
    """The commands of one client, WRITE and DISC excepted: checks each, does it on the disk, and answers it."""

    def __init__(
        self,
        disk: Disk,
        agreement: Agreement,
        replies: ReplyFormat,
        peer: str,
        remind: Remind,
        *,
        encrypted: bool = False,
    ) -> None:
        """*peer* is the client's name in the log, *replies* the format of the answers, *encrypted* its bytes.

        *remind* is the process's loop's.
        """
        self._encrypted = encrypted
        self._disk = disk
        self._counts = disk.place.counts
        self._tally = disk.place.tally
        self._format = replies
        self._contexts = agreement.contexts
        self._readonly = agreement.readonly
        self._told_of_writer = False
        self._peer = peer
        self._export = disk.name
        self._failures = RationedLines(WARNING, FAILED, disk.name, remind)
        self.renew()
        self._commands = {
            c.CMD_READ: self._read,
            c.CMD_FLUSH: self._flush,
            c.CMD_TRIM: self._trim,
            c.CMD_CACHE: self._cache,
            c.CMD_WRITE_ZEROES: self._write_zeroes,
            c.CMD_BLOCK_STATUS: self._block_status,
        }

    def renew(self) -> None:
        """Go on with the image that the disk has now."""
        self._image = self._disk.image
        self.writable = not (self._image.readonly or self._readonly)
        self.page_prefetch = PagePrefetch(self._image, encrypted=self._encrypted)
        self._holes = Holes(self._image)

    def execute(self, command: int, flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        """Do any request but WRITE and DISC, and answer it in *out*.

        Raises like `check`, `NotLocal`, and `OSError`. What leaves the gate leaves it for
        another image perhaps: it is the caller who has to `renew` then.
        """
        self.check(command, flags, offset, length)
        self._commands[command](flags, cookie, offset, length, out)

    def check(self, command: int, flags: int, offset: int, length: int) -> None:
        """Raises `RequestError` for a request that nothing can be done about, `ProtocolError` for a fatal one."""
        image = self._image
        if command not in _KNOWN_FLAGS:
            raise RequestError(errno.EINVAL, f"unknown command {command}")
        if image.readonly and command in _MODIFYING:
            raise ProtocolError("client writes to a read-only disk")
        if self._readonly and command in _MODIFYING:
            self._tell_of_writer(command)
            raise RequestError(errno.EPERM, "you may only read this disk")
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

    def _tell_of_writer(self, command: int) -> None:
        """The first time: a client that does not mind its flags may try a thousand times."""
        if not self._told_of_writer:
            self._told_of_writer = True
            log.warning(
                "%s: export %r: %s refused: this client may only read it", self._peer, self._export, _NAMES[command]
            )

    def refuse(self, command: int, cookie: bytes, error: Exception, out: List[Piece], where: Where) -> None:
        """Answer with *error* a request for *where*; what is wrong here, and not with the request, is for the log."""
        number = nbd_error(getattr(error, "errno", None) or errno.EIO)
        out.append(self._format.error(command, cookie, number, _reason(error)))
        self.note_refusal(command, error, where)

    def note_refusal(self, command: int, error: Exception, where: Where) -> None:
        """A request for *where* is answered with *error*."""
        if _is_ours(error):
            text, extra = "%s: export %r: %s failed: %s", request_fields(command, where, error)
            arguments = (self._peer, self._export, request_text(command, where), _described(error))
            self._failures.say(Line(text, arguments, extra))
        elif log.isEnabledFor(DEBUG):
            text, extra = "%s: %s refused: %s", request_fields(command, where, error)
            log.debug(text, self._peer, request_text(command, where), one_line(_reason(error)), extra=extra)
        if self._tally is not None:
            self._tally.refused(command, nbd_error(getattr(error, "errno", None) or errno.EIO))

    def end(self) -> None:
        """The client has left: what was left out in the log is told."""
        self._failures.rest()

    def acknowledge(self, cookie: bytes, flags: int, out: List[Piece]) -> None:
        """Success of a command that returns nothing, durable if *flags* ask for it."""
        if flags & c.CMD_FLAG_FUA:
            self._flush_image()
        out.append(self._format.success(cookie))

    def _flush_image(self) -> None:
        """Outside the gate: it changes nothing, and may take long."""
        with self._disk.outside():
            self._image.flush()

    # READ

    def _read(self, flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        if length and self.page_prefetch.active:
            self.page_prefetch.announce(offset, length)
        if flags & c.CMD_FLAG_DF and not self._format.chunked:
            raise RequestError(errno.EINVAL, "DF needs structured replies")
        if not length:
            out.append(self._format.nothing_read(cookie))
        elif flags & c.CMD_FLAG_DF or length < HOLE_MINIMUM or not self._format.chunked:
            self._append_data(cookie, offset, length, c.REPLY_FLAG_DONE, out)
        else:
            self._read_around_holes(cookie, offset, length, out)
        self._counts[BYTES_READ] += length

    def read_fresh(self, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        """A plain READ without long holes, which had been checked before it had to wait for its blocks."""
        data = self._image.read_fresh(offset, length)
        out.append(self._format.data_header(cookie, offset, length))
        out.extend(data)
        self._counts[BYTES_READ] += length

    def _read_around_holes(self, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        """A structured answer in which long holes are chunks without data."""
        if self._image.background is not None:
            self._image.read(offset, length)  # all of it is here, or nothing has been said yet
        parts = list(self._holes.parts(offset, length))
        for part, (hole, at, count) in enumerate(parts, 1):
            flags = c.REPLY_FLAG_DONE if part == len(parts) else 0
            if hole:
                out.append(self._format.hole(cookie, at, count, flags))
            else:
                self._append_data(cookie, at, count, flags, out)

    def _append_data(self, cookie: bytes, offset: int, length: int, flags: int, out: List[Piece]) -> None:
        data = self._image.read(offset, length)
        out.append(self._format.data_header(cookie, offset, length, flags))
        out.extend(data)

    # The other commands

    def _flush(self, _flags: int, cookie: bytes, _offset: int, _length: int, out: List[Piece]) -> None:
        self.acknowledge(cookie, c.CMD_FLAG_FUA, out)

    def _trim(self, flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        if length:
            self._image.trim(offset, length)
            self._holes.forget()
        self.acknowledge(cookie, flags, out)

    def _cache(self, _flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        if length:
            self._image.fetch(offset, length)
        self.acknowledge(cookie, 0, out)

    def _write_zeroes(self, flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        if length:
            may_trim, fast = not flags & c.CMD_FLAG_NO_HOLE, bool(flags & c.CMD_FLAG_FAST_ZERO)
            self._image.write_zeroes(offset, length, may_trim=may_trim, fast=fast)
            self._holes.forget()
        self.acknowledge(cookie, flags, out)

    def _block_status(self, flags: int, cookie: bytes, offset: int, length: int, out: List[Piece]) -> None:
        if not self._contexts:
            raise RequestError(errno.EINVAL, "no meta context was negotiated")
        if not length:
            raise RequestError(errno.EINVAL, "block status of nothing")
        limit = 1 if flags & c.CMD_FLAG_REQ_ONE else _MAXIMUM_EXTENTS
        for context in self._contexts:
            done = c.REPLY_FLAG_DONE if context is self._contexts[-1] else 0
            extents = status(context, self._image, offset, length, limit)
            out.append(self._format.block_status(cookie, CONTEXTS[context], extents, done))
