"""What the contexts of both sides have in common, and how files of certificates get into one.

TLS 1.2 and 1.3 only, no renegotiation, no session tickets, no compression. Each file that is wrong is a
`ConfigurationError` of one line that names it.
"""

from __future__ import annotations

import os
import ssl
from typing import Optional, Type

from ..errors import ConfigurationError
from ..system.settings_file import LARGEST, read_whole

KERNEL_TLS = 8
"""``SSL_OP_ENABLE_KTLS``: the kernel encrypts what is sent, where it can; ``ssl`` has a name for it from 3.12 on."""

_PARTIAL_CHAIN = 0x80000
"""``X509_V_FLAG_PARTIAL_CHAIN``: ``ssl`` has a name for it from 3.10 on."""

_NEVER = "!aNULL:!eNULL"
_DEFAULT = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES256:ECDHE+AES128:DHE+AESGCM:!SHA1:!AESCCM"
_WITH_KEYS = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256:"


def new_context(
    *, server: bool, kind: Type[ssl.SSLContext] = ssl.SSLContext, ciphers: Optional[str] = None, keys: bool = False
) -> ssl.SSLContext:
    """A context of one *kind* that trusts nobody yet and has no certificate.

    *ciphers*, in OpenSSL's notation, replace the ones of TLS 1.2; with *keys* those for pre-shared keys are among
    the usual ones. Raises `ConfigurationError`.
    """
    context = kind(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | KERNEL_TLS
    if server:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_SINGLE_ECDH_USE | ssl.OP_SINGLE_DH_USE
        context.num_tickets = 0
    wanted = ciphers or (_WITH_KEYS if keys else "") + _DEFAULT
    try:
        context.set_ciphers(f"{wanted}:{_NEVER}")
    except ssl.SSLError as error:
        raise ConfigurationError(f"OpenSSL has no cipher that fits {wanted!r} (openssl ciphers lists them)") from error
    return context


def read_file(path: str) -> str:
    """The text of *path*. Raises `ConfigurationError`."""
    try:
        return read_whole(path, LARGEST).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error


def load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Show the certificate of the file *certificate*, with its chain, to whom *key* belongs."""
    for path, what in ((certificate, "certificate"), (key, "private key")):
        if what.upper() not in read_file(path):
            raise ConfigurationError(f"{path} has no {what} in PEM format")
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _Encrypted:
        raise ConfigurationError(f"{key} is encrypted, and there is nobody to ask for the password") from None
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or ""
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(f"{key} is not the key of {certificate}") from error
        raise ConfigurationError(f"cannot use {certificate} with {key}: {_plain(error)}") from error


class _Encrypted(Exception):
    """A private key wants a password."""


def _no_password() -> str:
    raise _Encrypted


def load_authorities(context: ssl.SSLContext, path: str) -> None:
    """Trust the certificates in the file *path*, as GnuTLS does: also one whose own authority is not there."""
    text = read_file(path)
    before = context.cert_store_stats()["x509"]
    _load(context, path, text)
    if context.cert_store_stats()["x509"] == before:
        raise ConfigurationError(f"{path} has no certificate in PEM format")
    try:
        known = context.get_ca_certs()
    except ValueError as error:  # of ``ssl``, which takes all texts for UTF-8
        raise ConfigurationError(f"cannot use {path}: a certificate there has a name that is no UTF-8") from error
    if not {certificate["issuer"] for certificate in known} <= {certificate["subject"] for certificate in known}:
        context.verify_flags |= _PARTIAL_CHAIN


def load_revocations(context: ssl.SSLContext, path: str) -> None:
    """Refuse the certificates that the lists in the file *path* name; authorities are loaded already.

    Also those of authorities in between are looked up. OpenSSL cannot do that with a chain that ends before its root.
    """
    text = read_file(path)
    if "BEGIN CERTIFICATE" in text:
        raise ConfigurationError(f"{path} has a certificate, where a list of revoked ones is expected")
    before = context.cert_store_stats()["crl"]
    _load(context, path, text)
    if context.cert_store_stats()["crl"] == before:
        raise ConfigurationError(f"{path} has no list of revoked certificates in PEM format")
    is_partial = bool(context.verify_flags & _PARTIAL_CHAIN)
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF if is_partial else ssl.VERIFY_CRL_CHECK_CHAIN


def _load(context: ssl.SSLContext, path: str, text: str) -> None:
    if "-----BEGIN" not in text:
        return
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(f"cannot use {path}: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    """What OpenSSL says, without the places in its source."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason).lower().replace("_", " ") if error.reason else "it is damaged"
    return getattr(error, "strerror", None) or str(error)


def exists(directory: str, name: str) -> Optional[str]:
    """The path of the file *name* in *directory*, if there is one."""
    path = os.path.join(directory, name)
    return path if os.path.lexists(path) else None
