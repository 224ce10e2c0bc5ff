"""Where an origin is, as it stands on a command line: the scheme of a URI chooses the kind of origin.

Nothing of a kind is imported before an address of it is met.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, List, Optional, Sequence

from ..errors import ConfigurationError
from .base import OriginAddress, wrong

Parse = Callable[[str, Optional[str], Optional[str]], OriginAddress]
"""From a URI, a port (which does not belong beside it) and an export's name, if there are any, to an address.

Raises `ConfigurationError`.
"""


def _nbd() -> Parse:
    from .nbd.address import parse_uri

    return parse_uri


def _objects() -> Parse:
    from .objects.address import parse_uri

    return parse_uri


def _rbd() -> Parse:
    from .rbd.address import parse_uri

    return parse_uri


SCHEMES: Dict[str, Callable[[], Parse]] = {
    **dict.fromkeys(("nbd", "nbd+unix", "nbds", "nbds+unix"), _nbd),
    **dict.fromkeys(("http", "https", "s3", "gs", "az"), _objects),
    "rbd": _rbd,
}
"""What imports the kind of origin that a scheme stands for."""

_BETWEEN = re.compile(r" (?=[a-z][a-z0-9+.-]*:)")
"""Between the addresses of one disk that lies in several places."""

_WITHOUT_HOST = ("rbd",)
"""Schemes that no // follows."""


def parse_origin(host_or_uri: str, port: Optional[str] = None, export_name: Optional[str] = None) -> OriginAddress:
    """An origin as it stands on a command line: host and port of an NBD server, or a URI in place of both.

    Several URIs with a blank between them are one disk in several places; the export's name is of the first one.
    A relative path is made absolute: the server may change its directory.
    Raises `ConfigurationError`.
    """
    first, *others = _BETWEEN.split(host_or_uri)
    address = _parse(first, port, export_name)
    if not others:
        return address
    from .several.address import joined

    return joined([address, *(_parse(other, None, None) for other in others)])


def with_others(address: OriginAddress, uris: Sequence[str]) -> OriginAddress:
    """The disk at *address*, which lies at *uris*, too. Raises `ConfigurationError`."""
    if not uris:
        return address
    from .several.address import joined

    return joined([address, *(parse_origin(uri) for uri in uris)])


def _parse(host_or_uri: str, port: Optional[str], export_name: Optional[str]) -> OriginAddress:
    if not is_uri(host_or_uri):
        from .nbd.address import parse_host

        return parse_host(host_or_uri, port, export_name)
    scheme = host_or_uri.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise wrong(host_or_uri, f"expected a URI that begins with {' or '.join(map(beginning, SCHEMES))}")
    return SCHEMES[scheme]()(host_or_uri, port, export_name)


def members_of(address: OriginAddress) -> List[OriginAddress]:
    """The addresses of the places in which the disk at *address* lies, of which there is one mostly."""
    members = _BETWEEN.split(str(address))
    return [address] if len(members) == 1 else [parse_origin(member) for member in members]


def is_uri(text: str) -> bool:
    """Whether *text*, an origin as it stands on a command line, is a URI, perhaps a wrong one, and no host."""
    return "://" in text or (text.partition(":")[0].lower() in _WITHOUT_HOST and ":" in text)


def beginning(scheme: str) -> str:
    """How a URI of this *scheme* begins."""
    return f"{scheme}:" if scheme in _WITHOUT_HOST else f"{scheme}://"


def place_of(address: str) -> str:
    """The `OriginAddress.place` of an origin as it was noted once; the text itself if nobody understands it."""
    try:
        return parse_origin(address).place
    except ConfigurationError:
        return address


def places_of(addresses: str) -> List[str]:
    """The same of each of the places where a disk lies."""
    return [place_of(address) for address in _BETWEEN.split(addresses)]


def overrules(wanted: str, noted: str) -> bool:
    """Whether `OriginAddress.overrules`, of two that are written down; nothing is overruled that nobody understands."""
    try:
        return parse_origin(wanted).overrules(parse_origin(noted))
    except ConfigurationError:
        return False
