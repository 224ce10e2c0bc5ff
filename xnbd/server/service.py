"""A disk offered to clients, and what becomes of one client from its connection on."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, closing, suppress
from time import monotonic
from typing import Callable, NamedTuple, Optional, Tuple

from ..access.identity import NOBODY, Identity
from ..access.rights import Access
from ..errors import Disconnected, ProtocolError
from ..logs import about, log, set_subject
from ..protocol.server_handshake import Agreement, Denied, Export, Exports, contexts_of, export_flags
from ..scoreboard.rates import RateBoard, Rates, read_rates
from ..scoreboard.scoreboard import Scoreboard
from ..scoreboard.tally import Tally
from ..storage.image import Source
from ..storage.target import reopen
from ..system.process import set_title
from .configuration import Configuration
from .disk import Disk
from .handover.arrival import Arrival
from .handover.departure import Departure
from .handover.frozen import parse_session
from .handover.letters import claim
from .process_loop import ProcessLoop, Stop
from .session.connection import Connection
from .session.handshake import Tls, greet, greet_oldstyle, negotiate
from .session.loop import Session

_NEWS_AFTER = 0.002
"""Seconds after which others hear that a client has come: woken up, they would take the processor from its process."""


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
    configuration: Configuration = Configuration()
    spin: float = 0.0
    control_path: Optional[str] = None
    tally_fds: Tuple[int, ...] = ()
    """The tally for metrics, if there are any, and those that former programs have left."""
    slow: Optional[float] = None
    """Seconds from which on requests are told of in the log, if any are."""
    rates_fd: Optional[int] = None
    """Where the limits are (`scoreboard.rates`), if there can be any."""

    @property
    def access(self) -> Access:
        return self.configuration.access

    @property
    def tls(self) -> Optional[Tls]:
        return self.configuration.tls

    def open_disk(self) -> Disk:
        """For a worker, after the fork. Raises `OSError`."""
        return Disk(self.source, self.scoreboard_fd, self.export_name, self.open_tally(), self.open_rates())

    def open_tally(self) -> Optional[Tally]:
        """A line for this process, after the fork, if there are metrics. Without one its work is not counted there."""
        if not self.tally_fds:
            return None
        try:
            return Tally(self.tally_fds[0], self.export_name)
        except OSError as error:
            log.warning("metrics do not count what process %d does: %s", os.getpid(), error)
            return None

    def open_rates(self) -> Optional[RateBoard]:
        """The limits for this process, after the fork. Without them its client is not held to any."""
        if self.rates_fd is None:
            return None
        try:
            return RateBoard(self.rates_fd, self.export_name, self.configuration.rates)
        except OSError as error:
            log.warning("process %d cannot hold its clients to limits: %s", os.getpid(), error)
            return None

    @property
    def rates(self) -> Optional[Rates]:
        """The limits that hold now, if there can be any."""
        if self.rates_fd is None:
            return None
        return read_rates(self.rates_fd, self.export_name) or self.configuration.rates

    @property
    def needs_steward(self) -> bool:
        return self.source.mode == "proxy" or self.control_path is not None

    def export(self) -> Export:
        source = self.source
        flags = export_flags(readonly=source.readonly)
        return Export(self.export_name, source.size, flags, source.description, contexts_of(source.mode))

    def exports(self, identity: Identity = NOBODY) -> Exports:
        """One disk, under its own name and the empty one, as far as it is there for a client with *identity*."""
        export, rights = self.export(), self.access.rights_of(identity)
        return Exports(
            names=lambda: [export.name] if rights.may_open(export.name) else [],
            find=lambda name: rights.offer(export) if name in ("", export.name) else None,
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
            log.error("%s: the last flush failed: %s", self.source.name, error.strerror, extra=about(error=error))
            return False
        return True

    def serve(
        self,
        connection: Connection,
        disk: Disk,
        agreement: Optional[Agreement] = None,
        deadline: Optional[float] = None,
        role: str = "worker for",
        came: Optional[Came] = None,
        departure: Optional[Departure] = None,
    ) -> None:
        """Serve one client until it leaves or has to go; nothing it does raises.

        *agreement* is what somebody else has negotiated with it already. With a
        *deadline* it has been greeted, and that is when the handshake has to be over.
        *role* is what the process calls itself. One that *came* from another process goes
        on as it was there. By the *departure* it may go to another one.
        """
        try:
            set_subject(export=self.export_name, peer=connection.peer)
            departure = departure or Departure(connection.loop)
            set_title(role, connection.peer, self.source.name)
            if came is not None:
                self._go_on(connection, disk, came, departure, role)
                return
            disk.place.welcome(connection.peer)
            agreement = agreement or self._negotiate(connection, deadline)
            if agreement is None:
                log.info("%s: left during the handshake", connection.peer)
                return
            known = self._recognise(connection, disk, role)
            log.info("%s: connected%s", connection.peer, known)
            log.debug("%s: agreed on %s", connection.peer, agreement)
            session = self._session(connection, disk, agreement, departure)
            session.run()
            _tell_end(connection, departure)
        except Stop as reason:
            log.info("%s: closed: %s", connection.peer, reason)
            connection.loop.farewell()
            connection.linger()
        except Disconnected as error:
            log.info("%s: connection lost: %s", connection.peer, error)
        except (ProtocolError, Denied) as error:
            log.warning("%s: disconnected: %s", connection.peer, error)
        except OSError as error:
            log.info("%s: connection lost: %s", connection.peer, error.strerror, extra=about(error=error))
        finally:
            disk.part()
            connection.close()
            set_subject(peer=None, identity=None)

    def _negotiate(self, connection: Connection, deadline: Optional[float]) -> Optional[Agreement]:
        if self.oldstyle:
            export = self.access.rights_of(connection.identity).offer(self.export())
            return greet_oldstyle(connection, export, self.configuration.handshake_timeout)
        if deadline is None:
            deadline = greet(connection, self.configuration.handshake_timeout)
        return negotiate(connection, self.exports, deadline, self.tls)

    def _recognise(self, connection: Connection, disk: Disk, role: str) -> str:
        """It is known who the client is: have others know, too. What the log says of it."""
        identity = connection.identity
        disk.place.tell_identity(str(identity) if identity.names else "", connection.encryption)
        set_subject(identity=identity if identity.names else None)
        if identity.at(connection.peer) != connection.peer:
            set_title(role, identity.at(connection.peer), self.source.name)
        who = f" as {identity}" if identity.names else ""
        return who + (f" over {connection.encryption}" if connection.encryption else "")

    def _go_on(self, connection: Connection, disk: Disk, came: Came, departure: Departure, role: str) -> None:
        _sock, frozen, before, rest = came.arrival
        with rest, ExitStack() as news:
            disk.place.welcome(connection.peer, frozen.visit)
            session = self._session(connection, disk, frozen.agreement, departure)
            session.thaw(frozen)
            pause = monotonic() - frozen.frozen_at
            connection.identity = frozen.identity
            known = self._recognise(connection, disk, role)
            text = "%s: goes on%s, process %d had it before; pause %.1f ms"
            news.callback(log.info, text, connection.peer, known, before, pause * 1e3)
            news.callback(rest.close)
            news.callback(came.tell, pause)
            departure.first = news.close
            connection.loop.remind(monotonic() + _NEWS_AFTER, news.close)
            session.run()
        _tell_end(connection, departure)

    def rehearse(self, disk: Disk, loop: ProcessLoop) -> None:
        """Freeze and thaw a session without a client, because one is about to come.

        What a process that was forked does for the first time takes several times as long, because it copies each page
        of memory that it writes to. Does nothing if there is something short.
        """
        with suppress(OSError):
            ours, theirs = socket.socketpair()
            with ours, theirs, closing(Connection(ours, loop, self.spin, "nobody")) as connection:
                session = self._session(connection, disk, Agreement(self.export()), Departure(loop))
                letter, fd = session.crossing.freeze()
                with os.fdopen(fd):
                    session.thaw(parse_session(letter, fd))
                    claim(fd)
        disk.part()

    def _session(
        self, connection: Connection, disk: Disk, agreement: Agreement, departure: Optional[Departure]
    ) -> Session:
        return Session(connection, disk, agreement, self.configuration.queue_limits, departure, self.slow)


def _tell_end(connection: Connection, departure: Departure) -> None:
    if departure.taken_by:
        log.info("%s: goes over to process %d", connection.peer, departure.taken_by)
    else:
        log.info("%s: left", connection.peer)
