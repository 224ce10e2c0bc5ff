"""The credentials of a server: what its directory holds, as a context for handshakes.

The directory is laid out as for qemu and nbdkit: ``server-cert.pem`` and ``server-key.pem``, ``ca-cert.pem`` by which
clients are checked, ``ca-crl.pem`` with what was revoked, ``keys.psk`` with pre-shared keys. They are loaded before the
fork, so that no worker needs to be able to read them. A reload loads others, and compares.
"""

from __future__ import annotations

import os
import ssl
from hashlib import sha256
from typing import List, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from . import psk
from .context import exists, load_authorities, load_certificate, load_revocations, new_context, read_file
from .expiry import Expiry, expiries, first_of_each_file, warnings
from .socket_stream import kernel_knows_tls

AUTHORITY, REVOKED, KEYS = "ca-cert.pem", "ca-crl.pem", "keys.psk"
SERVER_CERTIFICATE, SERVER_KEY = "server-cert.pem", "server-key.pem"
FILES = (AUTHORITY, REVOKED, KEYS, SERVER_CERTIFICATE, SERVER_KEY)


class _Loaded(NamedTuple):
    """What was read at one time."""

    context: ssl.SSLContext
    keys: psk.ServerKeys
    valid: List[Expiry]
    digest: bytes
    kernel_encrypts: bool


class ServerCredentials:
    """What the server has in *directory*; *anonymous* clients need no certificate.

    *ciphers* are those of TLS 1.2 in OpenSSL's notation. Raises `ConfigurationError` in one line.
    """

    def __init__(self, directory: str, *, anonymous: bool = False, ciphers: Optional[str] = None) -> None:
        self.directory = directory
        self.anonymous = anonymous
        self._ciphers = ciphers
        self._loaded = self._load()

    def __eq__(self, other: object) -> bool:
        """Whether both were loaded from files of the same content, to be used in the same way."""
        return isinstance(other, ServerCredentials) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> Tuple[object, ...]:
        return self.directory, self.anonymous, self._ciphers, self._loaded.digest

    @property
    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        return self._loaded.context

    @property
    def keys(self) -> psk.ServerKeys:
        """The pre-shared keys of ``context``; perhaps there are none."""
        return self._loaded.keys

    @property
    def kernel_encrypts(self) -> bool:
        """Whether the kernel may encrypt what is sent to clients."""
        return self._loaded.kernel_encrypts

    @property
    def identify_clients(self) -> bool:
        """Whether a client can prove who it is."""
        return self.context.verify_mode != ssl.CERT_NONE or bool(self.keys)

    def _load(self) -> _Loaded:
        directory = self.directory
        if not os.path.isdir(directory):
            raise ConfigurationError(f"--tls {directory}: there is no such directory")
        digest = self._digest()  # before: what changes meanwhile is noticed by the next one
        keys_path, has_certificate = exists(directory, KEYS), exists(directory, SERVER_CERTIFICATE)
        if not keys_path and not has_certificate:
            raise ConfigurationError(f"--tls {directory}: it has neither {SERVER_CERTIFICATE} nor {KEYS}")
        kind = psk.context_kind(keys_path) if keys_path else ssl.SSLContext
        context = new_context(server=True, kind=kind, ciphers=self._ciphers, keys=bool(keys_path))
        valid = self._load_certificates(context) if has_certificate else []
        keys = psk.ServerKeys(psk.read_keys(keys_path) if keys_path else {}, alone=not has_certificate)
        if keys_path:
            keys.attach(context)
        return _Loaded(context, keys, valid, digest, kernel_knows_tls())

    def _digest(self) -> bytes:
        """Of all files."""
        found = sha256()
        for name in FILES:
            path = exists(self.directory, name)
            content = read_file(path) if path else ""
            found.update(f"{name} {len(content)}\n{content}".encode("utf-8", "surrogateescape"))
        return found.digest()

    def _load_certificates(self, context: ssl.SSLContext) -> List[Expiry]:
        """Certificate, key, and by what clients are checked; how long all that is valid."""
        certificate = os.path.join(self.directory, SERVER_CERTIFICATE)
        load_certificate(context, certificate, os.path.join(self.directory, SERVER_KEY))
        authority, revoked = exists(self.directory, AUTHORITY), exists(self.directory, REVOKED)
        if authority:
            load_authorities(context, authority)
            context.verify_mode = ssl.CERT_OPTIONAL if self.anonymous else ssl.CERT_REQUIRED
        elif not self.anonymous:
            raise ConfigurationError(
                f"--tls {self.directory}: it has no {AUTHORITY}, by which clients are checked "
                "(--tls-anonymous lets everybody in)"
            )
        if revoked:
            load_revocations(context, revoked)
        paths = filter(None, (certificate, authority, revoked))
        return first_of_each_file([expiry for path in paths for expiry in expiries(path, read_file(path))])

    @property
    def valid(self) -> List[Expiry]:
        """Until when the certificates and revocation lists of each file are."""
        return self._loaded.valid

    def warnings(self) -> List[str]:
        return warnings(self.valid)
