"""TLS as the client of an origin: the stream of bytes.

- Nothing waits: `BlockingIOError` says that the descriptor has to be polled for.
- Data goes into private memory. OpenSSL writes there from user space: a page of a mapped file would kill the process.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import List

from ..errors import TlsFailed
from ..text import one_line
from .certificate import certificate_of
from .client_credentials import ClientCredentials
from .client_words import Words
from .memory_stream import is_end
from .socket_stream import SocketStream


class ClientStream:
    """TLS over the connected and non-blocking *sock*, which it takes over.

    The other side has to be *name*, if *credentials* compare names. With *only_names* it need
    not be: `names` is all that may be asked then.
    """

    def __init__(
        self, sock: socket.socket, credentials: ClientCredentials, name: str, *, only_names: bool = False
    ) -> None:
        self._words = credentials.words
        self._name = name
        context = credentials.context
        context.check_hostname = credentials.compares_names and bool(name) and not only_names
        _refuse_if_no_name(name)
        try:
            self._stream = SocketStream(sock, context, partial(_explain, self._words, name), name=name or None)
        except ValueError as error:
            raise _no_name(name) from error
        self.receive_into = self._stream.receive_into
        self.send = self._stream.send

    def fileno(self) -> int:
        return self._stream.fileno()

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `TlsFailed`, `WrongName` for a certificate that is good but for another name, and `OSError`.
        """
        try:
            return self._stream.shake_hands()
        except ssl.SSLError as error:
            raise self._words.explain(error, self._name) from error

    def names(self) -> List[str]:
        """The names that the other side's certificate is for, fit for a line; none if one of them cannot be read."""
        try:
            certificate = certificate_of(self._stream.tls)
        except ValueError:
            return []
        found = [_shown(kind, name) for kind, name in certificate.get("subjectAltName", ())]
        if not found:
            found = [name for part in certificate.get("subject", ()) for key, name in part if key == "commonName"]
        return [one_line(name) for name in found if isinstance(name, str)]  # a bit string is one of bytes

    def close(self) -> None:
        """Say goodbye, without waiting for an answer."""
        with suppress(OSError):
            self._stream.shutdown()
        self._stream.close()


def _shown(kind: str, name: str) -> str:
    """An address that stands among the names of hosts looks like one, and counts for none (RFC 6125)."""
    if kind != "DNS":
        return name
    try:
        ip_address(name)
    except ValueError:
        return name
    return f"{name} (as a host's name)"


def _explain(words: Words, name: str, error: ssl.SSLError) -> OSError:
    """What is wrong after the handshake."""
    if is_end(error):
        return ConnectionResetError(errno.ECONNRESET, "it closed the connection")
    return words.explain(error, name)


def _refuse_if_no_name(name: str) -> None:
    """As ``ssl`` would, but before it has taken the socket. Raises `TlsFailed`."""
    try:
        name.encode("idna")
    except UnicodeError as error:
        raise _no_name(name) from error


def _no_name(name: str) -> TlsFailed:
    return TlsFailed(f"no certificate can be for the name {name!r}")
