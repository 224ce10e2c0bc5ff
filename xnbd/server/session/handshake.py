"""The handshake over a connection: feeds `protocol.server_handshake`, within one deadline."""

from __future__ import annotations

from time import monotonic
from typing import Callable, Optional

from ...access.identity import Identity
from ...errors import ProtocolError
from ...logs import log
from ...protocol import server_handshake
from ...protocol.server_handshake import Agreement, Export, Exports
from .connection import Connection


def greet(connection: Connection, timeout: float) -> float:
    """Begin a handshake; when it has to be over. Raises like `negotiate`."""
    deadline = monotonic() + timeout
    connection.send_until(server_handshake.pack_greeting(), deadline)
    return deadline


def negotiate(connection: Connection, exports: Callable[[Identity], Exports], deadline: float) -> Optional[Agreement]:
    """The fixed newstyle handshake but for the greeting; None if the client has decided to leave.

    *exports* says what there is for a client of the connection's identity. Raises `ProtocolError` if
    the handshake makes no sense or is not over at *deadline* (monotonic seconds).
    """
    machine = server_handshake.ServerHandshake(exports(connection.identity))
    machine.on_client_flags(int.from_bytes(connection.receive_exactly(4, deadline), "big"))
    while machine.agreement is None and not machine.aborted:
        connection.loop.check()
        if monotonic() > deadline:
            raise ProtocolError("handshake took too long")
        header = connection.receive_exactly(server_handshake.OPTION_HEADER.size, deadline)
        option, length = server_handshake.parse_option_header(header)
        data = connection.receive_exactly(length, deadline)
        reply = machine.on_option(option, data)
        for line in machine.news():
            log.warning("%s: %s", connection.peer, line)
        try:
            connection.send_until(reply, deadline)
        except OSError:
            if not machine.aborted:  # whoever aborts need not wait for the answer
                raise
    return machine.agreement


def greet_oldstyle(connection: Connection, export: Export, timeout: float) -> Agreement:
    """The oldstyle handshake, in which only the server speaks."""
    connection.send_until(server_handshake.pack_oldstyle(export), monotonic() + timeout)
    return server_handshake.agreement_on(export)
