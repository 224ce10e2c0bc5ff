"""Where an origin is, as it stands on a command line: the scheme of a URI chooses the kind of origin.

Nothing of a kind is imported before an address of it is met.
"""

from __future__ import annotations

from typing import Callable, Dict, Optional

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

_WITHOUT_HOST = ("rbd",)
"""Schemes that no // follows."""


def parse_origin(host_or_uri: str, port: Optional[str] = None, export_name: Optional[str] = None) -> OriginAddress:
    """An origin as it stands on a command line: host and port of an NBD server, or a URI in place of both.

    A relative path is made absolute: the server may change its directory.
    Raises `ConfigurationError`.
    """
    if not is_uri(host_or_uri):
        from .nbd.address import parse_host

        return parse_host(host_or_uri, port, export_name)
    scheme = host_or_uri.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise wrong(host_or_uri, f"expected a URI that begins with {' or '.join(map(beginning, SCHEMES))}")
    return SCHEMES[scheme]()(host_or_uri, port, export_name)


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


def overrules(wanted: str, noted: str) -> bool:
    """Whether `OriginAddress.overrules`, of two that are written down; nothing is overruled that nobody understands."""
    try:
        return parse_origin(wanted).overrules(parse_origin(noted))
    except ConfigurationError:
        return False
