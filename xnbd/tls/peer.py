"""Who is at the other end of a finished handshake."""

from __future__ import annotations

import ssl
from typing import Any, Dict, Iterator, Tuple, Union

from ..access.identity import Identity
from ..errors import Refused
from .certificate import certificate_of
from .psk import ServerKeys, was_used

MOST_NAMES = 250
"""Names of a certificate: each is compared with each rule, which takes the time of who may connect."""

_KEYWORDS = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}
"""The keywords of RFC 4514, section 3; other attributes keep the name that OpenSSL has for them."""

_KINDS = {"DNS": "dns", "URI": "uri", "email": "email"}

_Value = Union[str, bytes]
"""Of an attribute: ``ssl`` has bytes for those that are BIT STRINGs, as ``x500UniqueIdentifier`` is."""

_Name = Tuple[Tuple[Tuple[str, _Value], ...], ...]


def identity_of(tls: Union[ssl.SSLObject, ssl.SSLSocket], keys: ServerKeys) -> Identity:
    """The names of the client's certificate, or of the pre-shared key that it has. Raises `Refused`."""
    try:
        certificate = certificate_of(tls)
    except ValueError as error:
        raise Refused("TLS: the client's certificate has a name that cannot be read") from error
    names = list(_names_in(certificate))
    if len(names) > MOST_NAMES:
        raise Refused(f"TLS: the client's certificate has {len(names)} names, and at most {MOST_NAMES} are looked at")
    if not names and keys.user is not None and was_used(tls):
        names = [f"psk:{keys.user}"]
    return Identity(tuple(names))


def _names_in(certificate: Dict[str, Any]) -> Iterator[str]:
    subject = rfc4514(certificate.get("subject", ()))
    if subject:
        yield subject
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in _KINDS and value:
            yield f"{_KINDS[kind]}:{value}"


def rfc4514(name: _Name) -> str:
    """The text of a distinguished name: its last part first. What is no text is in hex, without its type."""
    parts = ["+".join(f"{_KEYWORDS.get(kind, kind)}={_escape(value)}" for kind, value in part) for part in name]
    return ",".join(reversed(parts))


def _escape(value: _Value) -> str:
    """RFC 4514, section 2.4; what is not printable is written in hex, so that a name is fit for a line."""
    if isinstance(value, bytes):
        return f"#{value.hex()}"
    last = len(value) - 1
    return "".join(_escaped(char, first=not at, last=at == last) for at, char in enumerate(value))


def _escaped(char: str, *, first: bool, last: bool) -> str:
    if char in '"+,;<>\\' or (char == "#" and first) or (char == " " and (first or last)):
        return f"\\{char}"
    if char.isprintable():
        return char
    return "".join(f"\\{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
