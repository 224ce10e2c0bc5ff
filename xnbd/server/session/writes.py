"""WRITEs that the session's loop cannot do with one call: long ones, those with flags, those to refuse.

A long payload goes to the disk piece by piece as it arrives, and is never held whole.
Pieces that have to wait for blocks around them are kept, up to a bound; beyond it
the rest of the payload is not received before they have come. A WRITE that is
refused has a payload too, which has to be taken off the wire.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import List, Optional, Tuple

from ...errors import RequestError
from ...protocol import constants as c
from ...protocol.transmission import REQUEST
from ...scoreboard.counters import BYTES_WRITTEN
from ...storage.image import NotLocal
from ..disk import Disk
from .commands import Commands
from .parked import Parked
from .parking import Where
from .receive_buffer import BUFFER_SIZE, ReceiveBuffer
from .replies import Piece

STREAM_FROM = BUFFER_SIZE // 2 - REQUEST.size
"""Payloads from this size on go to the image as they arrive instead of being collected first."""

_BUFFERED = 8 << 20
"""Bytes of one write that may wait for blocks around them before the rest of it is received."""


class Writes:
    """Large WRITE requests of one client: receives their payload piece by piece and writes it to the disk.

    WRITEs with flags, and those to refuse, come here too.
    """

    def __init__(self, receive_buffer: ReceiveBuffer, disk: Disk, commands: Commands, parked: Parked) -> None:
        self._receive_buffer = receive_buffer
        self._disk = disk
        self._counts = disk.place.counts
        self._commands = commands
        self._parked = parked

    def begin(self, flags: int, cookie: bytes, offset: int, length: int) -> bool:
        """Do the WRITE that is next in the receive buffer; False if its payload is small and not all there yet.

        Raises `ProtocolError` if it is fatal, and like `Connection.receive_rest`.
        """
        receive_buffer = self._receive_buffer
        refusal: Optional[Exception] = None
        try:
            self._commands.check(c.CMD_WRITE, flags, offset, length)
        except RequestError as error:
            refusal = error
        payload = receive_buffer.start + REQUEST.size
        if payload + length > receive_buffer.end:
            if length < STREAM_FROM:
                return False
            self._parked.send_first()
        receive_buffer.start = payload
        left: List[Tuple[int, bytes]] = []
        failure = self._write_pieces(offset, length, refusal, left)
        self._finish_or_park(flags, cookie, failure, left, (offset, length))
        return True

    def go_on(self, flags: int, cookie: bytes, left: List[Tuple[int, bytes]], where: Where) -> None:
        """Do what is *left* of a WRITE for *where*, of which another process has done the rest."""
        self._finish_or_park(flags, cookie, None, left, where)

    def _finish_or_park(
        self, flags: int, cookie: bytes, failure: Optional[Exception], left: List[Tuple[int, bytes]], where: Where
    ) -> None:
        work = partial(self.finish, flags, cookie, failure, left)
        self._parked.do(c.CMD_WRITE, flags, cookie, work, where, sum(len(data) for _, data in left), left)

    def _write_pieces(
        self, offset: int, length: int, failure: Optional[Exception], left: List[Tuple[int, bytes]]
    ) -> Optional[Exception]:
        """Write the payload piece by piece; after a *failure* only take it off the wire.

        Pieces that have to wait for blocks around them are *left*.
        """
        held = 0
        for at, piece in self._receive_buffer.payload(offset, length):
            while failure is None:
                self._disk.catch_up()
                try:
                    self._refuse_if_shrunk(at + len(piece))
                    self._disk.image.write(at, piece)
                    self._counts[BYTES_WRITTEN] += len(piece)
                except NotLocal as missing:
                    if held >= _BUFFERED:
                        self._parked.wait_for(missing.ticket)
                        if missing.ticket.error:
                            failure = OSError(missing.ticket.error, "a block could not be fetched")
                        continue
                    left.append((at, bytes(piece)))
                    held += len(piece)
                except OSError as error:
                    failure = error
                self._disk.image.take(None)
                break
        return failure

    def finish(
        self,
        flags: int,
        cookie: bytes,
        failure: Optional[Exception],
        left: List[Tuple[int, bytes]],
        out: List[Piece],
    ) -> None:
        """Write what was *left* of the payload, and acknowledge the whole in *out*, or raise *failure*."""
        if failure is not None:
            raise failure
        while left:
            self._refuse_if_shrunk(left[-1][0] + len(left[-1][1]))
            self._disk.image.write(*left[-1])
            self._counts[BYTES_WRITTEN] += len(left.pop()[1])
        self._commands.acknowledge(cookie, flags, out)

    def _refuse_if_shrunk(self, stop: int) -> None:
        """Once more, for what is written some time after its request was checked. Raises `OSError`."""
        if stop > self._disk.image.readable():
            raise OSError(errno.EIO, "the disk image has shrunk")
