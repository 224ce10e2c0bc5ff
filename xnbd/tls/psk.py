"""Pre-shared keys: the file that ``psktool`` of GnuTLS writes, and how OpenSSL is told of them.

Python's ``ssl`` knows them from 3.13 on. Before that the module sslpsk3 adds them, which the extra ``xnbd[psk]``
installs.
"""

from __future__ import annotations

import ssl
from typing import Dict, Optional, Type, Union

from ..errors import ConfigurationError
from ..text import one_line
from .context import read_file

LONGEST_KEY = 256
"""Bytes of a key that every OpenSSL takes (``PSK_MAX_PSK_LEN``)."""

NO_TEXT = "PSK_IDENTITY_IS_NO_TEXT"
"""The reason of an error that OpenSSL does not have."""


def read_keys(path: str) -> Dict[str, bytes]:
    """The keys in the file *path* by their users: lines ``USER:HEX``. Raises `ConfigurationError`."""
    keys: Dict[str, bytes] = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        user, _, digits = line.strip().rpartition(":")
        if user in keys:
            raise ConfigurationError(f"{path}, line {number}: another key for {user!r}, and only one can be meant")
        keys[user] = _parse_key(digits)
        if not user.isprintable() or not user or not keys[user]:
            raise ConfigurationError(
                f"{path}, line {number}: expected USER:KEY in UTF-8, the key in hex (psktool writes such)"
            )
    if not keys:
        raise ConfigurationError(f"{path} has no keys (psktool -u USER -p {path} adds one)")
    return keys


def _parse_key(digits: str) -> bytes:
    """Empty if *digits* are none, or are too many."""
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        return b""
    return key if len(key) <= LONGEST_KEY else b""


def context_kind(path: str) -> Type[ssl.SSLContext]:
    """A kind of context that knows pre-shared keys, for those in the file *path*. Raises `ConfigurationError`."""
    if hasattr(ssl.SSLContext, "set_psk_server_callback"):
        return ssl.SSLContext
    try:
        from sslpsk3 import SSLPSKContext
    except ImportError:
        raise ConfigurationError(
            f"{path}: pre-shared keys need Python 3.13, or before that the extra psk: pip install 'xnbd[psk]'"
        ) from None
    return SSLPSKContext  # type: ignore[no-any-return]


class ServerKeys:
    """The keys of a server, and which of them the handshake under way has asked for.

    They are *alone* if the server has no certificate.
    """

    def __init__(self, keys: Dict[str, bytes], *, alone: bool) -> None:
        self._keys = keys
        self.alone = alone
        self.user: Optional[str] = None
        """Whose key the client claims to have."""
        self.unknown: Optional[str] = None
        """A name for which there is no key."""

    def __len__(self) -> int:
        return len(self._keys)

    def begin(self) -> None:
        """A handshake begins: forget the one before."""
        self.user = self.unknown = None

    def attach(self, context: ssl.SSLContext) -> None:
        """Answer to the clients of *context*, which is of `context_kind`."""
        context.set_psk_server_callback(self._find)  # type: ignore[attr-defined]

    def _find(self, name: Optional[str]) -> bytes:
        """The key of *name*, or nothing, by which the client is refused."""
        key = self._keys.get(name or "", b"")
        if key:
            self.user = name
        else:
            self.unknown = one_line(name or "")
        return key


def prepare(tls: Union[ssl.SSLObject, ssl.SSLSocket]) -> None:
    """Before the first step of a handshake: sslpsk3 would do this at every step, and each time begin anew."""
    set_up = getattr(tls.context, "setup_psk_callbacks", None)
    if set_up is not None:
        set_up(tls)


def shake_hands(tls: Union[ssl.SSLObject, ssl.SSLSocket]) -> None:
    """Go on with a handshake, as *tls* of ``ssl`` would. Raises `ssl.SSLError`."""
    kind = ssl.SSLObject if isinstance(tls, ssl.SSLObject) else ssl.SSLSocket
    try:
        kind.do_handshake(tls)  # type: ignore[arg-type]
    except SystemError as error:  # sslpsk3 could not decode the name, and OpenSSL has gone on without a key
        failure = ssl.SSLError(ssl.SSL_ERROR_SSL, str(error.__cause__))
        failure.reason = NO_TEXT
        raise failure from error


def was_used(tls: Union[ssl.SSLObject, ssl.SSLSocket]) -> bool:
    """Whether the client of a finished handshake has proved to have the key, and was not let in some other way.

    OpenSSL asks for the key of a client whose cipher does not fit, and then goes on without it. So TLS 1.3 counts
    only where the session goes on from one: there are no tickets, so it goes on from the key. TLS 1.2 says it in the
    name of the cipher.
    """
    if tls.version() == "TLSv1.3":
        return bool(tls.session_reused)
    cipher = tls.cipher()
    return cipher is not None and "PSK" in cipher[0]
