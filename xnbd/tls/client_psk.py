"""A key that both sides know already, in place of certificates, as the client has it.

Python's ``ssl`` can do that from 3.13 on, and before that with sslpsk3, which is the extra ``xnbd[psk]``.
"""

from __future__ import annotations

import os
import pwd
import ssl
import sys
from typing import Any, Optional, Tuple

from ..errors import TlsFailed

_CIPHERS = "PSK:!eNULL:!aNULL:!RSAPSK"
"""For TLS 1.2. Whoever has no key is not spoken to: no cipher here goes with a certificate."""


def use_psk(path: str, user: str) -> Tuple[ssl.SSLContext, str]:
    """A context with the key of *user* (empty: of whoever runs this) from the file at *path*, and the user's name.

    A server that answers with a certificate instead is refused: no authority is trusted. Raises `TlsFailed`.
    """
    context = _new_context()
    name = user or _login_name()
    key = _find_key(path, name)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_ciphers(_CIPHERS)
    context.set_psk_client_callback(lambda _hint: (name, key))
    return context, name


def _new_context() -> Any:
    if sys.version_info >= (3, 13):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        from sslpsk3 import SSLPSKContext
    except ImportError as error:
        raise TlsFailed("tls-psk-file needs Python 3.13, or the package sslpsk3: pip install 'xnbd[psk]'") from error
    return SSLPSKContext(ssl.PROTOCOL_TLS_CLIENT)


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise TlsFailed("tls-psk-file needs a user's name: nbds://NAME@...") from None


def _find_key(path: str, name: str) -> bytes:
    """Lines are ``NAME:KEY``, the key in hexadecimal digits, as ``psktool`` writes them."""
    for user, text in _entries(path):
        if user == name:
            key = _parse_key(text)
            if key is None:
                raise TlsFailed(f"{path} has no key in hexadecimal digits for the user {name!r}")
            return key
    raise TlsFailed(f"{path} has no key for the user {name!r}: name another one, nbds://NAME@...")


def _entries(path: str) -> Any:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise TlsFailed(f"cannot read {path}: {error.strerror}") from error
    return [(user, key.strip()) for user, colon, key in (line.partition(":") for line in lines) if colon]


def _parse_key(text: str) -> Optional[bytes]:
    try:
        return bytes.fromhex(text) or None
    except ValueError:
        return None
