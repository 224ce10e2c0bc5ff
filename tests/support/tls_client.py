"""Clients that speak TLS with Python's ``ssl``, and say exactly what a test wants within it, or instead of it.

They share no code with the server.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Optional

from rawclient import ACK, RawClient, pack_option
from server_process import Server, free_port

STARTTLS = 5
TLS_REQUIRED = 0x80000005
POLICY = 0x80000002

HEADER = 5
"""Bytes of a record's header: type, version, length (RFC 8446, section 5.1)."""

HANDSHAKE, APPLICATION_DATA = 22, 23


def context_of(directory: Path, *, verify: bool = True) -> ssl.SSLContext:
    """What a client with the files of *directory* uses; without *verify* it accepts every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = verify
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if verify:
        context.load_verify_locations(directory / "ca-cert.pem")
    if (directory / "client-cert.pem").exists():
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context


def ask_for_tls(client: RawClient) -> RawClient:
    """Up to where the handshake of TLS begins."""
    client.greet()
    assert client.option(STARTTLS) == [(ACK, b"")]
    return client


def start_tls(
    client: RawClient,
    context: ssl.SSLContext,
    *,
    name: str = "localhost",
    session: Optional[ssl.SSLSession] = None,
) -> RawClient:
    """*client*, which has only connected, speaks TLS from now on; the next thing to send is an option."""
    ask_for_tls(client)
    client.sock = context.wrap_socket(client.sock, server_hostname=name, session=session)
    return client


def tls_client(server: Server, directory: Path, export: str = "") -> RawClient:
    """A client of *server* with the files of *directory*, in its transmission phase."""
    client = start_tls(RawClient(server.connect()), context_of(directory))
    assert client.go(export)[-1][0] == ACK
    return client


def is_closed(client: RawClient) -> bool:
    """Wait until the server closes the connection, with an alert or without."""
    try:
        return client.sock.recv(1) == b""
    except (ConnectionResetError, ssl.SSLError):
        return True


def refusal_of(client: RawClient, context: ssl.SSLContext, name: str = "localhost") -> str:
    """Why *client* cannot have TLS, in the words of its library: the alert that came, or why it does not go on itself.

    In TLS 1.3 a client hears only after its handshake what the server thinks of its certificate (RFC 8446, 4.4).
    """
    try:
        start_tls(client, context, name=name)
        client.send(pack_option(3))
        client.sock.recv(1)
    except (ssl.SSLError, ConnectionError) as error:
        return str(error)
    raise AssertionError("the client was not refused")


class RecordClient:
    """TLS over *sock* whose records the test sees before they leave; *context* as in `context_of`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first flight: a ClientHello, not sent yet."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    def shake_hands(self) -> RecordClient:
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._receive()
        self.sock.sendall(self._outgoing.read())
        return self

    def sealed(self, data: bytes) -> bytes:
        """The records of *data*, not sent yet."""
        self.tls.write(data)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.sealed(data))

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                data += self.tls.read(length - len(data))
            except ssl.SSLWantReadError:
                self._receive()
        return data

    def _receive(self) -> None:
        received = self.sock.recv(1 << 16)
        if not received:
            raise EOFError("closed within TLS")
        self._incoming.write(received)

    def go(self, name: str = "") -> RecordClient:
        """Into the transmission phase."""
        data = struct.pack(">I", len(name)) + name.encode() + bytes(2)
        self.send(pack_option(7, data))
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            self.receive(length)
            if kind == ACK:
                return self
            assert not kind & 0x80000000, f"refused: {kind:#x}"


def record_client(server: Server, directory: Path) -> RecordClient:
    """A client of *server* right before its ClientHello."""
    client = ask_for_tls(RawClient(server.connect()))
    return RecordClient(client.sock, context_of(directory))


def record(kind: int, payload: bytes, *, version: int = 0x0303, length: Optional[int] = None) -> bytes:
    """A record, with another *length* in its header than it has."""
    return struct.pack(">BHH", kind, version, len(payload) if length is None else length) + payload


class Stripper:
    """Somebody in the middle, on ``127.0.0.1:port``, who answers STARTTLS himself, as if the server had no TLS.

    All else passes in the clear, both ways. ``option`` is the first one that came after the refusal, or 0.
    """

    def __init__(self, target_port: int, answer: int = 0x80000001) -> None:
        self.port = free_port()
        self.option = 0
        self._target_port, self._answer = target_port, answer
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with (
                sock,
                suppress(OSError, EOFError),
                socket.create_connection(("127.0.0.1", self._target_port)) as server,
            ):
                sock.settimeout(60)
                self._strip(RawClient(sock), RawClient(server))

    def _strip(self, client: RawClient, server: RawClient) -> None:
        client.send(server.receive(18))
        server.send(client.receive(4))
        while True:
            header = client.receive(16)
            _, option, length = struct.unpack(">QII", header)
            if option != STARTTLS:
                break
            client.send(struct.pack(">QIII", 0x3E889045565A9, option, self._answer, 0))
        self.option = option
        server.send(header + client.receive(length))
        backwards = threading.Thread(target=_pump, args=(server.sock, client.sock))
        backwards.start()
        _pump(client.sock, server.sock)
        backwards.join(60)


@contextmanager
def stripped(target_port: int) -> Iterator[Stripper]:
    stripper = Stripper(target_port)
    try:
        yield stripper
    finally:
        stripper.stop()


def _pump(source: socket.socket, destination: socket.socket) -> None:
    with suppress(OSError):
        while True:
            data = source.recv(1 << 16)
            if not data:
                break
            destination.sendall(data)
        destination.shutdown(socket.SHUT_WR)
