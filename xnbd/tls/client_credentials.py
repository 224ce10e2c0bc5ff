"""The credentials of a proxy for its origin: whom we trust, and what we show.

- Files are read for each connection, so a new certificate counts from the next one on.
- Nothing falls back: not to a version below 1.2, and not from a pre-shared key to a certificate.
- What is secret never gets into a message.
"""

from __future__ import annotations

import os
import pwd
import ssl
from typing import Any, Tuple

from ..errors import ConfigurationError
from . import psk
from .client_words import CertificateWords, PskWords, Words
from .context import KERNEL_TLS, exists, load_authorities, load_certificate, load_revocations, new_context

AUTHORITY, REVOKED = "ca-cert.pem", "ca-crl.pem"
CERTIFICATE, KEY = "client-cert.pem", "client-key.pem"

_KEY_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK"
"""For TLS 1.2: none of them goes with a certificate."""


class ClientCredentials:
    """Whom we trust and what we show, read from files just now; ``words`` are for what goes wrong.

    *certificates* is a directory, *psk_file* a file with the key of *user*; without either the
    system's authorities count, and nothing is shown. Raises `ConfigurationError` in one line.
    """

    words: Words

    def __init__(self, certificates: str, psk_file: str, user: str, *, verify_peer: bool) -> None:
        self.compares_names = verify_peer and not psk_file
        if psk_file:
            self.context, name = _context_with_key(psk_file, user)
            self.words = PskWords(name, psk_file)
        else:
            self.context = new_context(server=False)
            self.words = CertificateWords(certificates, _show(self.context, certificates))
            _trust(self.context, certificates, verify_peer=verify_peer)
        # What is sent is little, and the kernel would not receive TLS 1.3.
        self.context.options &= ~KERNEL_TLS


def _show(context: ssl.SSLContext, directory: str) -> str:
    """Have our own certificate shown, if there is one: its path, or an empty text."""
    if not directory or not (exists(directory, CERTIFICATE) or exists(directory, KEY)):
        return ""
    certificate = os.path.join(directory, CERTIFICATE)
    load_certificate(context, certificate, os.path.join(directory, KEY))
    return certificate


def _trust(context: ssl.SSLContext, directory: str, *, verify_peer: bool) -> None:
    context.check_hostname = False  # each connection has its own say
    context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
    if not verify_peer:
        return
    if not directory:
        context.load_default_certs()
        return
    load_authorities(context, os.path.join(directory, AUTHORITY))
    revoked = exists(directory, REVOKED)
    if revoked:
        load_revocations(context, revoked)


def _context_with_key(path: str, user: str) -> Tuple[Any, str]:
    """A context with the key of *user* (empty: of whoever runs this) from the file at *path*, and the user's name.

    A server that shows a certificate instead is refused, because no authority is trusted.
    """
    kind = psk.context_kind(path)
    name = user or _login_name()
    key = psk.read_keys(path).get(name)
    if key is None:
        raise ConfigurationError(f"{path} has no key for the user {name!r}; another user is named by nbds://USER@...")
    context: Any = new_context(server=False, kind=kind, ciphers=_KEY_CIPHERS)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if kind is not ssl.SSLContext:
        # With TLS 1.3 OpenSSL takes the key for a session of another context, because Python names its own.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_psk_client_callback(lambda _hint: (name, key))
    return context, name


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ConfigurationError("pre-shared keys belong to users: name one by nbds://USER@...") from None
