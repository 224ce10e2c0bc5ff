"""TLS as the client of an origin: whom we trust, what we show, and the stream of bytes.

- Files are read for each connection, so a new certificate counts from the next one on.
- Nothing falls back: not to the clear, not to a version below 1.2, not from a pre-shared key to a certificate.
- Nothing waits: `BlockingIOError` says that the descriptor has to be polled for.
- Data goes into private memory. OpenSSL writes there from user space: a page of a mapped file would kill the process.
- What is secret never gets into a message.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from typing import Any, List, Mapping, Union

from ..errors import TlsFailed
from .client_psk import use_psk
from .words import CertificateWords, PskWords, Words

RECORD = 16 << 10
"""The most bytes that one record of TLS brings."""


class Credentials:
    """Whom we trust and what we show, read from files just now; ``words`` are for what goes wrong.

    *certificates* is a directory, *psk_file* a file with the key of *user*; without either the
    system's authorities count. Raises `TlsFailed`.
    """

    words: Words

    def __init__(self, certificates: str, psk_file: str, user: str, *, verify_peer: bool) -> None:
        if psk_file:
            self.context, name = use_psk(psk_file, user)
            self.words = PskWords(name, psk_file)
        else:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            shown = _show(self.context, certificates) if certificates else ""
            self.words = CertificateWords(certificates, shown)
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
            if verify_peer:
                _trust(self.context, certificates)
        self.compares_names = verify_peer and not psk_file
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION


def _show(context: ssl.SSLContext, directory: str) -> str:
    """Have our own certificate shown, if there is one: its path, or an empty text."""
    certificate, key = (os.path.join(directory, f"client-{part}.pem") for part in ("cert", "key"))
    if not os.path.lexists(certificate) and not os.path.lexists(key):
        return ""
    for path in (certificate, key):
        require_readable(path)
    try:
        context.load_cert_chain(certificate, key, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsFailed(f"{key} is not the key of {certificate}") from error
        raise TlsFailed(f"{certificate} and {key} are no certificate with its key in PEM") from error
    return certificate


def _no_password() -> str:
    """Nobody is there to be asked; an encrypted key cannot be used."""
    raise TlsFailed("our key is encrypted: store it without a password")


def _trust(context: ssl.SSLContext, directory: str) -> None:
    if not directory:
        context.load_default_certs()
        return
    authorities, revoked = (os.path.join(directory, name) for name in ("ca-cert.pem", "ca-crl.pem"))
    _load(context, authorities, "certificate")
    if os.path.lexists(revoked):
        _load(context, revoked, "list of revoked certificates")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load(context: ssl.SSLContext, path: str, what: str) -> None:
    require_readable(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsFailed(f"{path} holds no {what} in PEM") from error


def require_readable(path: str) -> None:
    """Raises `TlsFailed`, which names the file; OpenSSL would not."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise TlsFailed(f"cannot read {path}: {error.strerror}") from error


class ClientStream:
    """TLS over the connected and non-blocking *sock*, which it takes over.

    The other side has to be *name*, if *credentials* compare names. With *only_names* it need
    not be: `names` is all that may be asked then.
    """

    def __init__(self, sock: socket.socket, credentials: Credentials, name: str, *, only_names: bool = False) -> None:
        self._words = credentials.words
        self._name = name
        context = credentials.context
        context.check_hostname = credentials.compares_names and bool(name) and not only_names
        try:
            self._sock = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=name or None)
        except ValueError as error:  # UnicodeError is one
            raise TlsFailed(f"no certificate can be for the name {name!r}") from error

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
            raise self._words.explain(error, self._name) from error
        return 0

    def names(self) -> List[str]:
        """The names that the other side's certificate is for."""
        certificate: Mapping[str, Any] = self._sock.getpeercert() or {}
        found = [value for _, value in certificate.get("subjectAltName", ())]
        return found or [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]

    def receive_into(self, view: memoryview) -> int:
        """As many whole records as have come and find room; 0 at the end.

        The last of them is taken from the socket to its end if the *view* has room for one, so that poll(2)
        shows whatever is still there. Raises `BlockingIOError`, `TlsFailed`, and `OSError`.
        """
        received, most = 0, max(len(view) - RECORD, 0)
        while received <= most:
            try:
                count = self._receive(view[received:])
            except (BlockingIOError, TlsFailed):
                if not received:
                    raise
                break
            if not count:
                break
            received += count
        return received

    def _receive(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise self._words.explain(error, self._name) from error

    def send(self, data: Union[bytes, bytearray]) -> int:
        """Send the beginning of *data*: the number of bytes.

        After a `BlockingIOError` the next call has to begin with the same bytes. Raises also `TlsFailed`, `OSError`.
        """
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise self._words.explain(error, self._name) from error

    def close(self) -> None:
        """Say goodbye, without waiting for an answer."""
        try:
            self._sock.unwrap()
        except (OSError, ValueError):
            pass  # nothing was agreed on yet, or it has gone first, or it does not answer at once
        self._sock.close()
