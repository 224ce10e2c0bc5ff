"""The handshake over a connection: feeds `protocol.server_handshake`, within one deadline."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

from ...access.identity import Identity
from ...errors import ProtocolError, Refused
from ...logs import log
from ...protocol import server_handshake
from ...protocol.server_handshake import Agreement, Export, Exports, Security, ServerHandshake
from .connection import Connection

if TYPE_CHECKING:
    from ...tls.credentials import ServerCredentials


def greet(connection: Connection, timeout: float) -> float:
    """Begin a handshake; when it has to be over. Raises like `negotiate`."""
    deadline = monotonic() + timeout
    connection.send_until(server_handshake.pack_greeting(), deadline)
    return deadline


class Tls(NamedTuple):
    """TLS for clients: what the server has for it, and whether they have to begin it."""

    credentials: ServerCredentials
    required: bool = True


ExportsOf = Callable[[Identity], Exports]
"""What there is for a client with this identity."""


def negotiate(
    connection: Connection, exports: ExportsOf, deadline: float, tls: Optional[Tls] = None
) -> Optional[Agreement]:
    """The fixed newstyle handshake but for the greeting; None if the client has decided to leave.

    Raises `ProtocolError` if the handshake makes no sense or is not over at *deadline* (monotonic seconds).
    """
    security = Security.NONE if tls is None else Security.REQUIRED if tls.required else Security.OFFERED
    machine = server_handshake.ServerHandshake(exports(connection.identity), security)
    machine.on_client_flags(int.from_bytes(connection.receive_exactly(4, deadline), "big"))
    while machine.agreement is None and not machine.aborted:
        connection.loop.check()
        if monotonic() > deadline:
            raise ProtocolError("handshake took too long")
        _answer(connection, machine, deadline)
        if machine.starttls:
            assert tls is not None
            _secure(connection, tls.credentials, deadline)
            machine = machine.secured(exports(connection.identity))
    return machine.agreement


def _answer(connection: Connection, machine: ServerHandshake, deadline: float) -> None:
    """Receive one option, and send the reply to it."""
    header = connection.receive_exactly(server_handshake.OPTION_HEADER.size, deadline)
    option, length = server_handshake.parse_option_header(header)
    data = connection.receive_exactly(length, deadline)
    reply = machine.on_option(option, data)
    for line in machine.news():
        log.warning("%s: %s", connection.peer, line)
    if machine.starttls and connection.receive_now(memoryview(bytearray(1))) is not None:
        raise ProtocolError("bytes in the clear came after STARTTLS")  # CVE-2021-3716
    try:
        connection.send_until(reply, deadline)
    except OSError:
        if not machine.aborted:  # whoever aborts need not wait for the answer
            raise


def _secure(connection: Connection, credentials: ServerCredentials, deadline: float) -> None:
    """Shake hands as TLS does it, and go on over that: the client is now who it has proved to be.

    Raises `ProtocolError` with what was wrong, when the client has had the time to hear it.
    """
    from .tls_transport import TlsTransport

    transport = TlsTransport(connection.transport.detach(), credentials)
    connection.use(transport)
    try:
        while events := transport.shake_hands():
            connection.wait_until(events, deadline)
    except Refused:
        connection.linger()
        raise
    connection.identity = Identity((*transport.identity.names, *connection.identity.names))
    connection.encryption = transport.description


def greet_oldstyle(connection: Connection, export: Export, timeout: float) -> Agreement:
    """The oldstyle handshake, in which only the server speaks."""
    connection.send_until(server_handshake.pack_oldstyle(export), monotonic() + timeout)
    return server_handshake.agreement_on(export)
