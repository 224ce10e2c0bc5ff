"""One client from its connection on: a process that negotiates, and then becomes the client's server.

Runs after the fork. Until the client has chosen a disk SIGTERM ends the process on
the spot; from then on the server has its own ways.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from typing import Dict, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError, Disconnected, ProtocolError, RequestError
from ..logs import log
from ..origin.base import OriginLost
from ..origin.probe import probe
from ..protocol.server_handshake import Agreement, Exports
from ..protocol.server_handshake import Export as Offer
from ..proxy.state.opening import is_switched, known_size
from ..server.lobby import Guest
from ..server.process_loop import ProcessLoop
from ..server.session.connection import Connection
from ..server.session.handshake import negotiate
from ..storage.target import usable_size
from ..system.process import set_title
from .database import Database
from .exports import ProxyExport, StoredExport, TargetExport
from .servers import Servers

PROGRAM = "xnbd-wrapper"

_PROBE_TIME = 5.0
_REPORT_TIME = 2.0
_LARGEST_REPORT = 64 << 10


class ClientReport(NamedTuple):
    """What the process of a client tells the wrapper: the client's address, and the export it has chosen.

    If that export is a proxy which was switched past the wrapper, *switched_image* is its cache image.
    """

    pid: int
    peer: str
    export: str
    switched_image: str = ""


def receive_report(reports: socket.socket) -> Optional[ClientReport]:
    """The next report, if there is one."""
    try:
        return ClientReport(*json.loads(reports.recv(_LARGEST_REPORT)))
    except BlockingIOError:
        return None


def _send_report(reports: socket.socket, report: ClientReport) -> None:
    reports.settimeout(_REPORT_TIME)
    try:
        reports.send(json.dumps(report).encode())
    except OSError as error:  # the wrapper is gone or hangs: this client has a server all the same
        log.info("the wrapper does not listen: %s", error)


class Catalogue:
    """What one client can choose from; what was found out about a disk holds for this handshake."""

    def __init__(self, database: Database, servers: Servers) -> None:
        self._database = database
        self._servers = servers
        self._sizes: Dict[StoredExport, int] = {}
        self.offered: Dict[str, StoredExport] = {}
        """What stood behind the names when the client last heard of them."""
        self.switched: Dict[str, TargetExport] = {}
        """What the database still says to be proxies."""

    def exports(self) -> Exports:
        return Exports(
            names=lambda: list(self._entries()),
            find=self.offer,
            structured=self._servers.extended,
        )

    def offer(self, name: str) -> Optional[Offer]:
        """The disk *name*. Raises `RequestError` if it is there, but cannot be had now."""
        found = self._find(name)
        if found is None:
            return None
        real_name, export = found
        if isinstance(export, ProxyExport) and is_switched(export.bitmap_path):
            export = self.switched[real_name] = TargetExport(export.image_path)
        self.offered[real_name] = export
        size = self._size(real_name, export)
        return Offer(real_name, size, self._servers.flags(export), self._servers.describe(export))

    def _find(self, name: str) -> Optional[Tuple[str, StoredExport]]:
        """The export *name*; the empty name stands for the only one there is."""
        entries = self._entries()
        if not name and len(entries) == 1:
            return next(iter(entries.items()))
        real_name = self._database.real_name(name)
        return None if real_name is None else (real_name, entries[real_name])

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
                log.warning("export %r cannot be served: %s", name, error)
                raise RequestError(errno.EIO, "this disk is not available at the moment") from error
        return self._sizes[export]

    def _find_size(self, export: StoredExport) -> int:
        if isinstance(export, ProxyExport):
            size = known_size(export.bitmap_path)
            return probe(export.origin, timeout=_PROBE_TIME) if size is None else size
        return usable_size(export.image_path, readonly=self._servers.readonly or self._servers.cow)


class Client(NamedTuple):
    """A *guest* that was greeted and has spoken, and what its process needs."""

    guest: Guest
    database: Database
    servers: Servers
    reports: socket.socket

    def serve(self) -> int:
        """Life of the process: negotiate, then be the server of the chosen disk. The exit status."""
        connection = Connection(self.guest.sock, _handshake_loop(), peer=self.guest.peer)
        set_title("negotiating with", connection.peer, program=PROGRAM)
        catalogue = Catalogue(self.database, self.servers)
        agreement = self._negotiate(connection, catalogue)
        if agreement is None or agreement.export is None:
            connection.close()
            return 0
        name = agreement.export.name
        log.info("%s: export %r, served by process %d", connection.peer, name, os.getpid())
        switched = catalogue.switched.get(name)
        report = ClientReport(os.getpid(), connection.peer, name, switched.image_path if switched else "")
        _send_report(self.reports, report)
        self.reports.close()
        self.database.close()
        return self.servers.become(self.guest.sock, catalogue.offered[name], agreement)

    def _negotiate(self, connection: Connection, catalogue: Catalogue) -> Optional[Agreement]:
        peer = connection.peer
        try:
            agreement = negotiate(connection, catalogue.exports(), self.guest.deadline)
            if agreement is None:
                log.info("%s: left during the handshake", peer)
            return agreement
        except Disconnected as error:
            log.info("%s: connection lost: %s", peer, error)
        except ProtocolError as error:
            log.warning("%s: disconnected: %s", peer, error)
        except OSError as error:
            log.info("%s: connection lost: %s", peer, error.strerror)
        return None


def _handshake_loop() -> ProcessLoop:
    """What a handshake is watched by; a signal that ends the wrapper ends this process at once."""
    deadly = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, deadly)
    loop = ProcessLoop()
    for number in deadly:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, deadly)
    return loop
