"""An origin that behaves in TLS as a test tells it: what `lying_origin` is without.

The bytes of TLS go through memory, so that a test can send as many of them as it likes.
"""

from __future__ import annotations

import ssl
import warnings
from pathlib import Path
from typing import Optional

from lying_origin import Visitor, greeting, option_reply
from rawclient import ACK

STARTTLS = 5


def server_context(directory: Path, *, wants_certificate: bool = False) -> ssl.SSLContext:
    """Of a server with the files of *directory* (`certificates`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
    if wants_certificate:
        context.load_verify_locations(directory / "ca-cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def old_context(directory: Path) -> ssl.SSLContext:
    """Of a server that has nothing newer than TLS 1.1."""
    context = server_context(directory)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def grant_tls(visitor: Visitor) -> None:
    """The greeting, and consent to STARTTLS, which has to be what is asked for first."""
    visitor.send(greeting())
    visitor.receive(4)
    assert visitor.option() == (STARTTLS, b"")
    visitor.send(option_reply(STARTTLS, ACK))


class TlsVisitor(Visitor):
    """The client of one connection, after `grant_tls`: what is sent and received goes through TLS."""

    def __init__(self, visitor: Visitor, context: ssl.SSLContext) -> None:
        super().__init__(visitor.sock)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)

    def shake_hands(self, limit: Optional[int] = None) -> TlsVisitor:
        """The whole handshake; EOFError after *limit* bytes of ours."""
        sent = 0
        while True:
            done = False
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self.sock.sendall(self._out.read())  # the alert
                raise EOFError from None
            data = self._out.read()
            self.sock.sendall(data if limit is None else data[: limit - sent])
            sent += len(data)
            if limit is not None and sent >= limit:
                raise EOFError
            if done:
                return self
            self._hear()

    def _hear(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError
        self._in.write(data)

    def records(self, data: bytes) -> bytes:
        """*data* as it goes over the wire."""
        self._tls.write(data)
        return self._out.read()

    def send(self, data: bytes) -> None:
        for at in range(0, len(data), 1 << 14):
            self.sock.sendall(self.records(data[at : at + (1 << 14)]))

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self._tls.read(length - len(data))
            except ssl.SSLWantReadError:
                self._hear()
                continue
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def ends_politely(self) -> bool:
        """Wait until the client leaves; whether TLS says so, too."""
        while True:
            try:
                if not self._tls.read(1 << 14):
                    return True
            except ssl.SSLWantReadError:
                try:
                    self._hear()
                except EOFError:
                    return False
