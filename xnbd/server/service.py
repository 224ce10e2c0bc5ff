"""A disk offered to clients, and what becomes of one client from its connection on."""

from __future__ import annotations

from contextlib import closing
from time import monotonic
from typing import Callable, NamedTuple, Optional

from ..errors import Disconnected, ProtocolError
from ..logs import log
from ..protocol.server_handshake import Agreement, Export, Exports, export_flags
from ..scoreboard.scoreboard import Scoreboard
from ..storage.image import Source
from ..storage.target import reopen
from .disk import Disk
from .handover.arrival import Arrival
from .handover.departure import Departure
from .process_loop import Stop
from .session.connection import Connection
from .session.handshake import greet, greet_oldstyle, negotiate
from .session.loop import Session
from .session.parking import QueueLimits


class Came(NamedTuple):
    """A client that another process had; *tell* is told how many seconds it had to wait."""

    arrival: Arrival
    tell: Callable[[float], None]


class Service(NamedTuple):
    """A disk as it is offered to clients: its source, its export name, and how a client is served; times in seconds."""

    source: Source[Scoreboard]
    scoreboard_fd: int
    export_name: str
    oldstyle: bool = False
    handshake_timeout: float = 10.0
    spin: float = 0.0
    limits: QueueLimits = QueueLimits()
    control_path: Optional[str] = None

    def open_disk(self) -> Disk:
        """For a worker, after the fork. Raises `OSError`."""
        return Disk(self.source, self.scoreboard_fd)

    @property
    def needs_steward(self) -> bool:
        return self.source.mode == "proxy" or self.control_path is not None

    def export(self) -> Export:
        source = self.source
        return Export(self.export_name, source.size, export_flags(readonly=source.readonly), source.description)

    def exports(self) -> Exports:
        """One disk, under its own name and the empty one."""
        export = self.export()
        return Exports(
            names=lambda: [export.name],
            find=lambda name: export if name in ("", export.name) else None,
        )

    def flush(self, *, hurry: bool = False) -> bool:
        """Bring everything to stable storage at the end, unless in a *hurry*; False if any write-back has failed."""
        try:
            with closing(Scoreboard(reopen(self.scoreboard_fd, readonly=False))) as scoreboard:
                if hurry:
                    self.source.write_back(scoreboard).check()
                else:
                    self.source.flush(scoreboard)
        except OSError as error:
            log.error("%s: the last flush failed: %s", self.source.name, error.strerror)
            return False
        return True

    def serve(
        self,
        connection: Connection,
        disk: Disk,
        agreement: Optional[Agreement] = None,
        deadline: Optional[float] = None,
        came: Optional[Came] = None,
        departure: Optional[Departure] = None,
    ) -> None:
        """Serve one client until it leaves or has to go; nothing it does raises.

        *agreement* is what somebody else has negotiated with it already. With a
        *deadline* it has been greeted, and that is when the handshake has to be over. One
        that *came* from another process goes on as it was there. By the *departure* it
        may go to another one.
        """
        try:
            departure = departure or Departure(connection.loop)
            if came is not None:
                self._go_on(connection, disk, came, departure)
                return
            disk.place.welcome(connection.peer)
            self._serve(connection, disk, agreement, deadline, departure)
        except Stop as reason:
            log.info("%s: closed: %s", connection.peer, reason)
            connection.loop.farewell()
            connection.linger()
        except Disconnected as error:
            log.info("%s: connection lost: %s", connection.peer, error)
        except ProtocolError as error:
            log.warning("%s: disconnected: %s", connection.peer, error)
        except OSError as error:
            log.info("%s: connection lost: %s", connection.peer, error.strerror)
        finally:
            disk.part()
            connection.close()

    def _go_on(self, connection: Connection, disk: Disk, came: Came, departure: Departure) -> None:
        frozen = came.arrival.session
        disk.place.welcome(connection.peer, frozen.visit)
        session = Session(connection, disk, frozen.agreement, self.limits, departure)
        session.thaw(frozen)
        pause = monotonic() - frozen.frozen_at
        came.tell(pause)
        log.info("%s: goes on, process %d had it before; pause %.1f ms", connection.peer, came.arrival.pid, pause * 1e3)
        self._run(session, connection, departure)

    def _run(self, session: Session, connection: Connection, departure: Departure) -> None:
        session.run()
        if departure.taken_by:
            log.info("%s: goes over to process %d", connection.peer, departure.taken_by)
        else:
            log.info("%s: left", connection.peer)

    def _serve(
        self,
        connection: Connection,
        disk: Disk,
        agreement: Optional[Agreement],
        deadline: Optional[float],
        departure: Departure,
    ) -> None:
        if agreement is None and self.oldstyle:
            agreement = greet_oldstyle(connection, self.export(), self.handshake_timeout)
        elif agreement is None:
            if deadline is None:
                deadline = greet(connection, self.handshake_timeout)
            agreement = negotiate(connection, self.exports(), deadline)
        if agreement is None:
            log.info("%s: left during the handshake", connection.peer)
            return
        log.info("%s: connected", connection.peer)
        log.debug("%s: agreed on %s", connection.peer, agreement)
        self._run(Session(connection, disk, agreement, self.limits, departure), connection, departure)
