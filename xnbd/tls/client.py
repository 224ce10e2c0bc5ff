"""TLS as the client of an origin: the stream of bytes.

- Nothing waits: `BlockingIOError` says that the descriptor has to be polled for.
- Data goes into private memory. OpenSSL writes there from user space: a page of a mapped file would kill the process.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
from typing import Any, Callable, List, Mapping, Union

from ..errors import TlsFailed
from ..text import one_line
from .client_credentials import ClientCredentials
from .client_words import is_end

RECORD = 16 << 10
"""The most bytes that one record of TLS brings."""


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
        self._has_shaken_hands = False
        context = credentials.context
        context.check_hostname = credentials.compares_names and bool(name) and not only_names
        _refuse_if_no_name(name)
        try:
            self._sock: ssl.SSLSocket = context.wrap_socket(
                sock, do_handshake_on_connect=False, server_hostname=name or None
            )
        except ValueError as error:
            raise _no_name(name) from error

    def fileno(self) -> int:
        return self._sock.fileno()

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `TlsFailed`, `WrongName` for a certificate that is good but for another name, and `OSError`.
        """
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except ssl.SSLError as error:
            raise self._explained(error) from error
        self._has_shaken_hands = True
        return 0

    def _explained(self, error: ssl.SSLError) -> OSError:
        if self._has_shaken_hands and is_end(error):
            return ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        return self._words.explain(error, self._name)

    def names(self) -> List[str]:
        """The names that the other side's certificate is for, fit for a line."""
        certificate: Mapping[str, Any] = self._sock.getpeercert() or {}
        found = [name for _, name in certificate.get("subjectAltName", ())]
        if not found:
            found = [name for part in certificate.get("subject", ()) for key, name in part if key == "commonName"]
        return [one_line(name) for name in found]

    def receive_into(self, view: memoryview) -> int:
        """As many whole records as have come and find room; 0 at the end.

        The last of them is taken from the socket to its end if the *view* has room for one, so that poll(2)
        shows whatever is still there. Raises `BlockingIOError`, `TlsFailed`, and `OSError`.
        """
        received, room, most = 0, len(view), max(len(view) - RECORD, 0)
        read: Callable[[int, memoryview], int] = self._sock.read  # type: ignore[assignment]
        try:
            while received <= most:
                count = read(room - received, view[received:])
                if not count:
                    break
                received += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not received:
                raise BlockingIOError from None
        except ssl.SSLError as error:
            if not received:
                raise self._explained(error) from error
        return received

    def send(self, data: Union[bytes, bytearray]) -> int:
        """Send the beginning of *data*: the number of bytes.

        After a `BlockingIOError` the next call has to begin with the same bytes. Raises also `TlsFailed`, `OSError`.
        """
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Say goodbye, without waiting for an answer."""
        try:
            self._sock.unwrap()
        except (OSError, ValueError):
            pass  # nothing was agreed on yet, or it has gone first, or it does not answer at once
        self._sock.close()


def _refuse_if_no_name(name: str) -> None:
    """As ``ssl`` would, but before it has taken the socket. Raises `TlsFailed`."""
    try:
        name.encode("idna")
    except UnicodeError as error:
        raise _no_name(name) from error


def _no_name(name: str) -> TlsFailed:
    return TlsFailed(f"no certificate can be for the name {name!r}")
