"""Where an origin that speaks NBD is: a host and port, or an NBD URI.

Source of the URIs: ``doc/uri.md`` of NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import os
import re
from typing import Dict, NamedTuple, Optional, Tuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ...system.process import whole_path
from ...text import is_writable
from ..base import NO_TLS, Origin, Sink, Terms, wrong

URI_PORT = 10809
"""The port that IANA has assigned; it holds for URIs only."""

_MAXIMUM_NAME = 4096
_MAXIMUM_SOCKET_PATH = 107
_BROKEN_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")


class NbdAddress(NamedTuple):
    """*host* and *port*, or *unix_path* (of the abstract namespace if it begins with NUL)."""

    host: str
    port: int
    unix_path: str
    export_name: str

    def __str__(self) -> str:
        """The address as an NBD URI, which `parse_uri` understands."""
        name = _quote(self.export_name)
        if self.unix_path:
            return f"nbd+unix:///{name}?socket={_quote(self.unix_path)}"
        host = quote(self.host, safe=":")
        return f"nbd://{f'[{host}]' if ':' in host else host}:{self.port}/{name}"

    @property
    def local_files(self) -> Dict[str, int]:
        """See `OriginAddress`."""
        return {self.unix_path: os.W_OK} if self.unix_path.startswith("/") else {}

    def open(self, sink: Sink, terms: Terms) -> Origin:
        from .connection import OriginConnection

        return OriginConnection(self, sink, terms)


def parse_host(host: str, port: Optional[str], export_name: Optional[str]) -> NbdAddress:
    """A *host*'s name or address, in brackets perhaps, with its *port*. Raises `ConfigurationError`."""
    if port is None:
        raise wrong(host, "a port has to follow, or give a URI like nbd://host:10809/name")
    bare = host[1:-1] if re.fullmatch(r"\[.*\]", host) else host
    if not bare or _FORBIDDEN.search(bare) or "/" in bare or not _is_text(bare):
        raise wrong(host, "expected a host's name or address, or a URI like nbd://host:10809/name")
    return NbdAddress(bare, _parse_port(host, port), "", _check_name(host, export_name or ""))


def parse_uri(uri: str, port: Optional[str], export_name: Optional[str]) -> NbdAddress:
    """An NBD URI; a relative socket path is made absolute. Raises `ConfigurationError`."""
    parts = _split(uri)
    if port is not None:
        raise wrong(uri, f"leave out the port {port}, it belongs in the URI")
    name = _unquote(parts.path[1:])
    if export_name is not None and name not in ("", export_name):
        raise wrong(uri, f"names another export than {export_name!r}; name it once")
    name = _check_name(uri, export_name or name)
    if parts.scheme == "nbd+unix":
        return NbdAddress("", 0, _socket_path(uri, parts), name)
    host, number = _authority(uri, parts)
    _query(uri, parts)
    return NbdAddress(host, number, "", name)


def _split(uri: str) -> SplitResult:
    if _FORBIDDEN.search(uri) or _BROKEN_ESCAPE.search(uri):
        raise wrong(uri, "is no URI: write special characters as %20 and the like")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise wrong(uri, f"is no URI: {error}") from None
    if "tls-" in parts.query:
        raise wrong(uri, NO_TLS)
    if parts.fragment or uri.endswith("#"):
        raise wrong(uri, "write # in a name as %23")
    return parts


def _authority(uri: str, parts: SplitResult) -> Tuple[str, int]:
    if "@" in parts.netloc:
        raise wrong(uri, "leave out the user's name: only TLS has a use for it")
    match = re.fullmatch(r"(?:\[([^][]+)\]|([^][:]+))(?::(\d*))?", parts.netloc)
    if not match:
        raise wrong(uri, "expected nbd://host/name or nbd://host:port/name, an IPv6 address in []")
    host = _unquote(match[1] or match[2])
    if _FORBIDDEN.search(host) or not _is_text(host):
        raise wrong(uri, "the host's name has characters that no host has")
    return host, _parse_port(uri, match[3]) if match[3] else URI_PORT


def _socket_path(uri: str, parts: SplitResult) -> str:
    path = _query(uri, parts, "socket").get("socket")
    if parts.netloc or not path:
        raise wrong(uri, "expected nbd+unix:///name?socket=PATH, with three slashes and a socket")
    if path.startswith("\0"):
        return path
    if "\0" in path:
        raise wrong(uri, "no path has a NUL in it")
    path = whole_path(path, f"origin {uri}: its socket")
    if len(os.fsencode(path)) > _MAXIMUM_SOCKET_PATH:
        raise wrong(uri, f"a socket's path has at most {_MAXIMUM_SOCKET_PATH} bytes")
    return path


def _query(uri: str, parts: SplitResult, *known: str) -> Dict[str, str]:
    """The URI's parameters; a plus sign stands for itself, as in all URIs that are no web forms."""
    found: Dict[str, str] = {}
    for parameter in filter(None, parts.query.split("&")):
        key, _, value = parameter.partition("=")
        if key not in known or key in found:
            raise wrong(uri, f"parameter {key!r} is {'given twice' if key in known else 'not known'}")
        found[key] = _unquote(value)
    return found


def _parse_port(text: str, port: str) -> int:
    if port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
        return int(port)
    raise wrong(text, f"port {port}: expected a whole number from 1 to 65535")


def _is_text(host: str) -> bool:
    """Whether *host* is UTF-8: other bytes of a command line or a URI are there as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in host)


def _check_name(text: str, name: str) -> str:
    if not is_writable(name) or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > _MAXIMUM_NAME:
        raise wrong(text, f"an export's name has no NUL in it, and at most {_MAXIMUM_NAME} bytes")
    return name


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def _quote(text: str) -> str:
    return quote(text, safe="/", errors="surrogateescape")
