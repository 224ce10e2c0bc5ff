"""A disk offered to clients, and what becomes of one client from its connection on."""

from __future__ import annotations

from contextlib import closing
from typing import NamedTuple, Optional

from ..errors import Disconnected, ProtocolError
from ..logs import log
from ..protocol.negotiation import Agreement, Export, Exports, export_flags
from ..storage.board import Board
from ..storage.image import Source
from ..storage.target import reopen
from .connection import Connection
from .disk import Disk
from .handshake import greet_oldstyle, negotiate
from .session import Session
from .waiting import QueueLimits
from .watch import Stop


class Service(NamedTuple):
    """*source* under the name *export_name*; times in seconds."""

    source: Source
    board_fd: int
    export_name: str
    oldstyle: bool = False
    handshake_timeout: float = 10.0
    spin: float = 0.0
    limits: QueueLimits = QueueLimits()
    control_path: Optional[str] = None

    def open_disk(self) -> Disk:
        """For a worker, after the fork. Raises `OSError`."""
        return Disk(self.source, self.board_fd)

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
            with closing(Board(reopen(self.board_fd, readonly=False))) as board:
                if hurry:
                    self.source.write_back(board).check()
                else:
                    self.source.flush(board)
        except OSError as error:
            log.error("%s: the last flush failed: %s", self.source.name, error.strerror)
            return False
        return True

    def serve(self, connection: Connection, disk: Disk, agreement: Optional[Agreement] = None) -> None:
        """Serve one client until it leaves or has to go; nothing it does raises.

        *agreement* is what somebody else has negotiated with it already.
        """
        try:
            disk.place.welcome(connection.peer)
            self._serve(connection, disk, agreement)
        except Stop as reason:
            log.info("%s: closed: %s", connection.peer, reason)
            connection.watch.farewell()
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

    def _serve(self, connection: Connection, disk: Disk, agreement: Optional[Agreement]) -> None:
        if agreement is None and self.oldstyle:
            agreement = greet_oldstyle(connection, self.export(), self.handshake_timeout)
        elif agreement is None:
            agreement = negotiate(connection, self.exports(), self.handshake_timeout)
        if agreement is None:
            log.info("%s: left during the handshake", connection.peer)
            return
        log.info("%s: connected", connection.peer)
        log.debug("%s: agreed on %s", connection.peer, agreement)
        Session(connection, disk, agreement, self.limits).run()
        log.info("%s: left", connection.peer)
