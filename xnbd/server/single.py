"""A server of one client: one process without a master, with a steward beside it if the disk needs one.

The client is connected already. It may go over to another process like this one, which has been
forked for that and gets the disk with the offer (`server.handover`): by `Passage`.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional

from ..protocol.server_handshake import Agreement
from ..system.forking import HAND_OVER
from .disk import Disk
from .handover.arrival import Terms, receive_client
from .handover.departure import Departure, Telling
from .handover.letters import Enclosed, Kit, Letter
from .process_loop import ProcessLoop, Stop
from .reports import Report
from .service import Came, Service
from .session.connection import Connection

ROLE = "serving"


class Passage(NamedTuple):
    """How the client may go over to another process, which reads what is sent to *offering*.

    *fields* tell it how the disk is to be served, besides what the source packs. *report* hears of it.
    """

    offering: socket.socket
    fields: Mapping[str, Any]
    report: Callable[[Report], None]

    def departure(self, loop: ProcessLoop, service: Service, peer: str) -> Departure:
        """That of the client *peer* of this process."""
        enclosed, source = Enclosed(), service.source
        fields = {**self.fields, "disk": source.pack(enclosed), "scoreboard": enclosed(service.scoreboard_fd)}
        kit = Kit(fields, enclosed.fds)
        return Departure(loop, self.offering, source.identity(), Telling.by_reports(self.report, peer), kit)


def serve_one(
    service: Service, connection: Connection, agreement: Optional[Agreement], passage: Optional[Passage] = None
) -> int:
    """Serve the client of *connection*, with which *agreement* is made, if any; the exit status."""
    with _stewarded(service, connection.close) as give_way:
        loop = ProcessLoop()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (HAND_OVER,))
        disk = loop.companion = service.open_disk()
        connection.move_to(loop, service.spin)
        departure = passage.departure(loop, service, connection.peer) if passage else None
        service.serve(connection, disk, agreement, role=ROLE, departure=departure)
        has_gone = _close(disk, loop, departure, give_way)
    return 0 if has_gone or service.flush() else 1


def serve_arrival(service: Service, offer: Letter, loop: ProcessLoop, passage: Passage) -> int:
    """Serve the client that is offered, if anything comes of it; the exit status. Raises `Stop`."""

    def close_first() -> None:
        offer.close()  # the channel's end is heard by the other process

    with _stewarded(service, close_first) as give_way:
        disk = loop.companion = service.open_disk()
        service.rehearse(disk, loop)
        source = service.source
        approach = partial(disk.approach_origin, loop)
        arrival = receive_client(offer, loop, Terms(source.identity(), source.size, disk.image.readonly, approach))
        if arrival is None:
            return 0
        connection = Connection(arrival.sock, loop, service.spin, arrival.peer)
        pid, peer, before = os.getpid(), connection.peer, arrival.pid
        came = Came(arrival, lambda pause: passage.report(Report(pid, peer, moved_from=before, pause=pause)))
        departure = passage.departure(loop, service, peer)
        service.serve(connection, disk, role=ROLE, came=came, departure=departure)
        has_gone = _close(disk, loop, departure, give_way)
    return 0 if has_gone or service.flush() else 1


GiveWay = Callable[[ProcessLoop], None]


def _close(disk: Disk, loop: ProcessLoop, departure: Optional[Departure], give_way: GiveWay) -> bool:
    """The client has left; or has gone to another process, which looks after the disk: then True."""
    disk.close()
    loop.companion = None
    has_gone = departure is not None and departure.taken_by > 0
    if has_gone:
        give_way(loop)
    return has_gone


@contextmanager
def _stewarded(service: Service, close_first: Callable[[], None]) -> Iterator[GiveWay]:
    """A steward beside the one process that serves, if the disk needs one.

    What this yields returns when the operators that the steward has at that moment have their
    answers, while another steward serves those that come, or this process is to stop.
    """
    if not service.needs_steward:
        yield lambda _: None
        return
    from .steward.process import Steward

    lifeline, holder = os.pipe()

    def close_in_steward() -> None:
        os.close(holder)
        close_first()

    pid = Steward(service, service.control_path).spawn(lifeline, close_in_steward)
    os.close(lifeline)

    def give_way(loop: ProcessLoop) -> None:
        os.kill(pid, HAND_OVER)
        with suppress(Stop):
            loop.wait((holder,), 0)  # an error, when nobody has the other end any more

    try:
        yield give_way
    finally:
        os.close(holder)
        os.waitpid(pid, 0)
