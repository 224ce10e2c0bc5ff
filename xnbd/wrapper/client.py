"""One client from its connection on: a process that negotiates, and then becomes the client's server.

Runs after the fork. Until the client has chosen a disk SIGTERM ends the process on
the spot; from then on the server has its own ways.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from ..access.identity import Identity
from ..access.rights import EVERYBODY, Access, Rights
from ..errors import ConfigurationError, Disconnected, ProtocolError, RequestError
from ..logs import about, log, set_subject
from ..origin.base import OriginLost
from ..origin.probe import probe
from ..protocol.server_handshake import Agreement, Exports
from ..protocol.server_handshake import Export as Offer
from ..proxy.state.known import is_switched, known_size
from ..server.lobby import Guest
from ..server.process_loop import ProcessLoop
from ..server.reports import Report
from ..server.session.connection import Connection
from ..server.session.handshake import Tls, negotiate
from ..storage.target import usable_size
from ..system.forking import HAND_OVER
from ..system.process import set_title
from .database import Database
from .exchange import Exchange
from .exports import ProxyExport, StoredExport, TargetExport
from .reports import ClientReport, send_report
from .servers import Servers

PROGRAM = "xnbd-wrapper"

_PROBE_TIME = 5.0


class Catalogue:
    """What one client with *rights* can choose from; what was found out about a disk holds for this handshake."""

    def __init__(self, database: Database, servers: Servers, rights: Rights) -> None:
        self._database = database
        self._servers = servers
        self._rights = rights
        self._sizes: Dict[StoredExport, int] = {}
        self.offered: Dict[str, StoredExport] = {}
        """What stood behind the names when the client last heard of them."""
        self.switched: Dict[str, TargetExport] = {}
        """What the database still says to be proxies."""

    def exports(self) -> Exports:
        return Exports(
            names=lambda: list(self._visible()),
            find=self.offer,
            structured=self._servers.extended,
        )

    def offer(self, name: str) -> Optional[Offer]:
        """The disk *name*. Raises `RequestError` if it is there, but cannot be had now, and `Denied`."""
        found = self._find(name)
        if found is None:
            return None
        real_name, export = found
        if isinstance(export, ProxyExport) and is_switched(export.bitmap_path):
            export = self.switched[real_name] = TargetExport(export.image_path)
        self.offered[real_name] = export
        size = self._size(real_name, export)
        servers = self._servers
        offer = Offer(real_name, size, servers.flags(export), servers.describe(export), servers.contexts(export))
        return self._rights.offer(offer)

    def _find(self, name: str) -> Optional[Tuple[str, StoredExport]]:
        """The export *name*; the empty name stands for the only one that the client may open. Raises `Denied`."""
        if not name:
            visible = self._visible()
            if len(visible) == 1:
                return next(iter(visible.items()))
        entries = self._entries()
        real_name = self._database.real_name(name)
        if real_name is None:
            return None
        self._rights.check(real_name)  # before anything is looked at: a denied disk must not show by being slow
        return real_name, entries[real_name]

    def _visible(self) -> Dict[str, StoredExport]:
        return {name: export for name, export in self._entries().items() if self._rights.may_open(name)}

    def _entries(self) -> Dict[str, StoredExport]:
        try:
            return self._database.current()
        except ConfigurationError as error:
            log.error("%s", error)
            return {}

    def _size(self, name: str, export: StoredExport) -> int:
        if export not in self._sizes:
            try:
                self._sizes[export] = self._find_size(export)
            except (ConfigurationError, OriginLost, OSError) as error:
                log.warning("export %r cannot be served: %s", name, error, extra=about(export=name, error=error))
                raise RequestError(errno.EIO, "this disk is not available at the moment") from error
        return self._sizes[export]

    def _find_size(self, export: StoredExport) -> int:
        if isinstance(export, ProxyExport):
            size = known_size(export.bitmap_path)
            return probe(export.origin, timeout=_PROBE_TIME).size if size is None else size
        return usable_size(export.image_path, readonly=self._servers.readonly or self._servers.cow)


class Client(NamedTuple):
    """A *guest* that was greeted and has spoken, and what its process needs."""

    guest: Guest
    database: Database
    servers: Servers
    reports: socket.socket
    exchange: Exchange
    access: Access = EVERYBODY
    tls: Optional[Tls] = None

    def serve(self) -> int:
        """Life of the process: negotiate, then be the server of the chosen disk. The exit status."""
        connection = Connection(self.guest.sock, handshake_loop(), peer=self.guest.peer)
        set_title("negotiating with", connection.peer, program=PROGRAM)
        set_subject(peer=connection.peer)
        catalogues: List[Catalogue] = []

        def exports(identity: Identity) -> Exports:
            catalogues.append(Catalogue(self.database, self.servers, self.access.rights_of(identity)))
            return catalogues[-1].exports()

        agreement = self._negotiate(connection, exports)
        if agreement is None or agreement.export is None:
            connection.close()
            return 0
        catalogue, name = catalogues[-1], agreement.export.name
        export = catalogue.offered[name]
        set_subject(export=name, identity=connection.identity if connection.identity.names else None)
        log.info("%s: export %r, served by process %d", connection.peer, name, os.getpid())
        switched = catalogue.switched.get(name)
        image = switched.image_path if switched else ""
        report = Report(os.getpid(), connection.peer, stays=self.servers.stays)
        send_report(self.reports, ClientReport(report, name, image))
        self.database.close()
        self.exchange.offers.close()
        return self.servers.become(connection, export, agreement, self.exchange.passage(name, export, self.reports))

    def _negotiate(self, connection: Connection, exports: Callable[[Identity], Exports]) -> Optional[Agreement]:
        peer = connection.peer
        try:
            agreement = negotiate(connection, exports, self.guest.deadline, self.tls)
            if agreement is None:
                log.info("%s: left during the handshake", peer)
            return agreement
        except Disconnected as error:
            log.info("%s: connection lost: %s", peer, error)
        except ProtocolError as error:
            log.warning("%s: disconnected: %s", peer, error)
        except OSError as error:
            log.info("%s: connection lost: %s", peer, error.strerror, extra=about(error=error))
        return None


def handshake_loop() -> ProcessLoop:
    """A loop without handlers: what ends the wrapper ends this process at once, what servers are told by is ignored.

    The order to hand the client over is kept for the server.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (HAND_OVER,))
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    return ProcessLoop(handle_signals=False)
