"""A server for a proxy export that has no clients, for as long as the operator wants something of it."""

from __future__ import annotations

import socket
from typing import Optional

from ..errors import CommandError
from ..protocol.server_handshake import Agreement
from ..protocol.server_handshake import Export as Offer
from ..server.session.connection import Connection
from .children import Children
from .client import handshake_loop
from .exports import ProxyExport
from .servers import Servers


class IdleServer:
    """A server whose only client is the wrapper, which says nothing; `close` lets it go.

    Raises `CommandError` if it cannot be started.
    """

    def __init__(self, children: Children, servers: Servers, export: ProxyExport, name: str) -> None:
        """The *export* is called *name*."""
        self.export = export
        self.status: Optional[int] = None
        self._ours, theirs = socket.socketpair()

        def serve() -> int:
            self._ours.close()
            connection = Connection(theirs, handshake_loop(), peer="(the wrapper)")
            return servers.become(connection, export, Agreement(Offer(name, 0, 0, "")))

        try:
            self.pid = children.start(serve, self._ended)
        except OSError as error:
            self._ours.close()
            raise CommandError(f"the wrapper cannot start a process: {error.strerror}") from error
        finally:
            theirs.close()

    def _ended(self, status: int) -> None:
        self.status = status

    def close(self) -> None:
        self._ours.close()
