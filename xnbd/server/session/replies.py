"""Replies on their way out, gathered so that one system call sends many.

The queue is a flat list: a header is ``bytes``, the mapped memory that follows it
is a ``memoryview``. Nothing is copied. If the kernel cannot read some of that
memory (the image was truncated, the disk under it failed), the replies concerned
become errors; a reply that has begun to leave cannot, and ends the connection.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Callable, Iterator, List, Optional, Tuple, Union

from ...errors import Disconnected, ProtocolError
from ...protocol.reply_format import ReplyFormat
from .connection import Connection

MAXIMUM_PIECES = 4096
"""Pieces that may pile up before they are sent."""

MOST_GATHERED = 32 << 20
"""Bytes of data from which on replies are sent before the next request is done, unless all of the disk is here.
With more than that unsent a client does not go to another process."""

MOST_DETACHED = MOST_GATHERED + (68 << 20)
"""Bytes that may be copied to be sent later: those that are gathered, one READ of 64 MiB, the most that the usual
clients ask for at once, and headers."""

_IOV_MAX = 1024
_PROBE = 1 << 20

Piece = Union[bytes, memoryview]


class Replies:
    """The replies to one client that are still to be sent. The session appends to ``pieces`` directly."""

    def __init__(self, connection: Connection, reply_format: ReplyFormat) -> None:
        self.pieces: List[Piece] = []
        self._format = reply_format
        self._connection = connection
        self._send_now = connection.transport.send
        self._copy: Optional[mmap.mmap] = None
        self.on_unreadable: Callable[[bytes, int], None] = lambda header, length: None
        """Hears of each reply that has become an error: its header, and how many bytes of data it had."""

    def send(self, *, wait: bool = True) -> int:
        """Send everything, or what leaves without a *wait*: the number of bytes.

        When somebody calls, a client that takes nothing is not waited for: the rest is
        left, as a copy that does not depend on the disk. Raises `Disconnected` if the
        client is gone, `ProtocolError` if a reply that has begun cannot be finished.
        """
        pieces, total = self.pieces, 0
        while pieces:
            group = pieces if len(pieces) <= _IOV_MAX else pieces[:_IOV_MAX]
            try:
                sent = self._send_now(group)
            except BlockingIOError:
                if not wait or (self._connection.loop.called and self.unsent <= MOST_GATHERED and self.detach()):
                    break
                self._connection.wait_for_room()
                continue
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise Disconnected(error.strerror) from error
                self._replace_unreadable()
                continue
            total += sent
            if sent == sum(map(len, group)) and group is pieces:
                pieces.clear()
            else:
                _drop(pieces, sent)
        return total

    @property
    def unsent(self) -> int:
        """Bytes that are still to be sent."""
        return sum(map(len, self.pieces))

    @property
    def attached(self) -> bool:
        """Whether some of what is unsent may be memory that the disk is mapped to."""
        first = self.pieces[0] if self.pieces else b""
        return len(self.pieces) > 1 or (isinstance(first, memoryview) and first.obj is not self._copy)

    def detach(self) -> bool:
        """Let go of the memory that the disk is mapped to; False if that would take too large a copy."""
        length = self.unsent
        if length > MOST_DETACHED:
            return False
        if not self.attached:
            return True
        fd = os.memfd_create("xnbd-replies")
        try:
            length = self.copy_to(fd)
            self._copy = mmap.mmap(fd, length, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.pieces[:] = [memoryview(self._copy)]
        return True

    def copy_to(self, fd: int) -> int:
        """Write what is still to be sent to *fd*, a file in memory: the number of bytes. Raises like `send`."""
        begin = os.lseek(fd, 0, os.SEEK_CUR)
        while True:
            rest = list(self.pieces)
            try:
                while rest:
                    _drop(rest, os.writev(fd, rest[:_IOV_MAX]))
                return os.lseek(fd, 0, os.SEEK_CUR) - begin
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
            os.lseek(fd, begin, os.SEEK_SET)
            self._replace_unreadable()

    def _replace_unreadable(self) -> None:
        """Turn the first reply whose data cannot be read into an error; a later one comes back here."""
        position = 0
        for header, data in _replies(self.pieces):
            length = len(data) + bool(header)
            if not all(map(_can_be_read, data)):
                if not header:
                    raise ProtocolError("the data of a reply that has begun cannot be read")
                self.pieces[position : position + length] = [
                    self._format.error_instead(header, "the data cannot be read")
                ]
                self.on_unreadable(header, sum(map(len, data)))
                return
            position += length
        raise ProtocolError("replies cannot be sent: bad address")


def _drop(pieces: List[Piece], sent: int) -> None:
    """Forget the first *sent* bytes. What is left of a piece, even of a header, is a memoryview."""
    index = 0
    while index < len(pieces) and sent >= len(pieces[index]):
        sent -= len(pieces[index])
        index += 1
    del pieces[:index]
    if sent:
        pieces[0] = memoryview(pieces[0])[sent:]


def _replies(pieces: List[Piece]) -> Iterator[Tuple[bytes, List[memoryview]]]:
    """The queue reply by reply; the header is empty for one that has begun to leave."""
    header, data = b"", []  # type: Tuple[bytes, List[memoryview]]
    for piece in pieces:
        if isinstance(piece, memoryview):
            data.append(piece)
            continue
        if header or data:
            yield header, data
        header, data = piece, []
    yield header, data


def _can_be_read(data: memoryview) -> bool:
    """Whether the kernel can read this memory: tried with a copy into a file of no name."""
    scratch = os.memfd_create("xnbd-probe")
    try:
        while data:
            data = data[os.pwrite(scratch, data[:_PROBE], 0) :]  # short where only the beginning can be read
    except OSError as error:
        if error.errno == errno.EFAULT:
            return False
        raise
    finally:
        os.close(scratch)
    return True
