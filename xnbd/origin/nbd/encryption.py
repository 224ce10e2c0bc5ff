"""How an origin is spoken to in TLS, as the parameters of its URI say it.

Source of the parameters: ``doc/uri.md`` of NetworkBlockDevice/nbd, and libnbd for the two that name files.
Nothing here imports ``ssl``: that is done when such an origin is first connected to.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Iterator, List, Mapping, NamedTuple, Tuple

from ...system.process import whole_path
from ...system.settings_file import LARGEST, read_whole
from ..base import wrong

PARAMETERS = ("tls-certificates", "tls-hostname", "tls-verify-peer", "tls-psk-file")

_CERTIFICATES = ("ca-cert.pem", "ca-crl.pem", "client-cert.pem", "client-key.pem")
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class Encryption(NamedTuple):
    """Files are whole paths; empty texts stand for what the URI does not say.

    *certificates* is a directory: whom we trust, and our own certificate. Without it the
    system's authorities count, and we show none. The origin's certificate has to be one for
    *hostname*, or for the URI's host. With a *psk_file* there are no certificates on either
    side: both know the key of *user*.
    """

    user: str = ""
    certificates: str = ""
    hostname: str = ""
    verify_peer: bool = True
    psk_file: str = ""

    def parameters(self) -> Iterator[Tuple[str, str]]:
        """What to write into a URI, but for the user."""
        if self.certificates:
            yield "tls-certificates", self.certificates
        if self.psk_file:
            yield "tls-psk-file", self.psk_file
        if self.hostname:
            yield "tls-hostname", self.hostname
        if not self.verify_peer:
            yield "tls-verify-peer", "false"

    def files(self) -> List[str]:
        """What every process reads that connects: those files that are there."""
        named = [os.path.join(self.certificates, name) for name in _CERTIFICATES] if self.certificates else []
        return [path for path in (*named, self.psk_file) if os.path.exists(path)]

    def warnings(self) -> List[str]:
        """A line for each file of certificates that expires soon, or has expired."""
        from ...tls.expiry import OURS_AS_CLIENT, expiries, warnings

        valid = []
        for path in self.files():
            with suppress(OSError):
                valid += expiries(path, read_whole(path, LARGEST).decode("utf-8", "surrogateescape"))
        return warnings(valid, OURS_AS_CLIENT)


def parse_encryption(uri: str, user: str, values: Mapping[str, str]) -> Encryption:
    """From the parameters of *uri*, whose names are known already. Raises `ConfigurationError`."""
    certificates, psk_file = (_whole(uri, name, values) for name in ("tls-certificates", "tls-psk-file"))
    if certificates and psk_file:
        raise wrong(uri, "give tls-certificates or tls-psk-file: with pre-shared keys nobody has a certificate")
    if user and not psk_file:
        raise wrong(uri, "leave out the user's name: only tls-psk-file has a use for it")
    hostname = values.get("tls-hostname", "")
    if "\0" in hostname:
        raise wrong(uri, "tls-hostname has a NUL in it")
    return Encryption(user, certificates, hostname, _is_verified(uri, values.get("tls-verify-peer", "true")), psk_file)


def _whole(uri: str, name: str, values: Mapping[str, str]) -> str:
    path = values.get(name)
    if path is None:
        return ""
    if not path or "\0" in path:
        raise wrong(uri, f"{name} is no path")
    return whole_path(path, f"origin {uri}: {name}")


def _is_verified(uri: str, word: str) -> bool:
    if word.lower() not in _YES + _NO:
        raise wrong(uri, f"tls-verify-peer is {word!r}: expected true or false")
    return word.lower() in _YES
