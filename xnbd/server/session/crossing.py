"""A session on its way from one process to another: frozen here between two requests, and thawed there.

How both processes agree on it is the business of `server.handover`.
"""

from __future__ import annotations

import errno
import os
from time import monotonic
from typing import Optional, Tuple

from ...protocol import constants as c
from ...protocol.server_handshake import Agreement
from ...scoreboard.layout import REACHED
from ...system.process import closed_on_error
from ..disk import Disk
from ..handover import frozen
from .connection import Connection
from .pace import Pace
from .parked import Parked
from .parking import Parking
from .receive_buffer import ReceiveBuffer
from .replies import Replies
from .writes import Writes


class Crossing:
    """What a `Departure` takes along of one client's session: its `Traveller`."""

    def __init__(
        self,
        connection: Connection,
        disk: Disk,
        agreement: Agreement,
        receive_buffer: ReceiveBuffer,
        replies: Replies,
        parking: Parking,
        pace: Optional[Pace],
    ) -> None:
        self._connection = connection
        self._disk = disk
        self._agreement = agreement
        self._receive_buffer = receive_buffer
        self._replies = replies
        self._parking = parking
        self._pace = pace

    @property
    def stays(self) -> str:
        """Why no other process can go on with the client; empty if one can."""
        return self._connection.transport.stays

    @property
    def has_origin(self) -> bool:
        """Whether the origin is connected, because blocks had to come from there."""
        background = self._disk.image.background
        return background is not None and background.health == REACHED

    def fileno(self) -> int:
        """The client's descriptor."""
        return self._connection.transport.fileno()

    def let_go(self) -> None:
        """Another process has the client now."""
        self._connection.close()

    def freeze(self) -> Tuple[bytes, int]:
        """The session as it is between two requests: a letter and a file, which the caller closes.

        The session can go on after that all the same. Raises `OSError`, also if there is too much to be moved.
        """
        frozen_at, receive_buffer, place = monotonic(), self._receive_buffer, self._disk.place
        self._disk.leave()
        if self._parking.buffered + self._replies.unsent > frozen.LARGEST:
            raise OSError(errno.EFBIG, "more waits for it than can be moved in a moment")
        waiting = [request.freeze() for request in self._parking.requests()]
        requests = b"".join(request.pack() for request in waiting)
        received = receive_buffer.view[receive_buffer.start : receive_buffer.end]
        fd = os.memfd_create("xnbd-session", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with closed_on_error(fd):
            with open(fd, "wb", closefd=False) as file:
                file.writelines((frozen.MAGIC, requests, received))
            sections = frozen.Sections(len(requests), len(received), self._replies.copy_to(fd))
        client, debts = self._connection, () if self._pace is None else self._pace.debts()
        arrived = [request.arrived for request in waiting]
        letter = frozen.pack_letter(
            client.peer, client.identity, self._agreement, place.visit, frozen_at, sections, debts, arrived
        )
        return letter, fd

    def thaw(self, session: frozen.FrozenSession, parked: Parked, writes: Writes) -> None:
        """Go on from what another process has frozen; raises like `Session.run`, before which it is to be called."""
        if self._pace is not None:
            self._pace.take_over(session.debts)
        receive_buffer = self._receive_buffer
        receive_buffer.end = len(session.received)
        receive_buffer.view[: receive_buffer.end] = session.received
        if session.replies:
            self._replies.pieces.append(memoryview(session.replies))
        self._disk.enter()
        for request in session.requests:
            parked.arrived = request.arrived
            _take_over(request, parked, writes)
        parked.arrived = None


def _take_over(request: frozen.FrozenRequest, parked: Parked, writes: Writes) -> None:
    command, flags, cookie, offset, length, pieces, answer, _ = request
    if answer is not None:
        parked.keep_in_line(command, cookie, answer)
    elif command == c.CMD_WRITE:
        writes.go_on(flags, cookie, list(pieces), (offset, length))
    else:
        parked.execute(command, flags, cookie, offset, length)
