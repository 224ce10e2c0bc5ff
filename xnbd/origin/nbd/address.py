"""Where an origin that speaks NBD is: a host and port, or an NBD URI.

Source of the URIs: ``doc/uri.md`` of NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import os
import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ...system.process import whole_path
from ...text import is_writable
from ..base import BLOCK, Origin, OriginAddress, Sink, Terms, wrong
from .encryption import PARAMETERS, Encryption, parse_encryption

URI_PORT = 10809
"""The port that IANA has assigned; it holds for URIs only."""

_MAXIMUM_NAME = 4096
_MAXIMUM_SOCKET_PATH = 107
_BROKEN_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")


class NbdAddress(NamedTuple):
    """*host* and *port*, or *unix_path* (of the abstract namespace if it begins with NUL); in the clear or not."""

    host: str
    port: int
    unix_path: str
    export_name: str
    encryption: Optional[Encryption] = None

    def __str__(self) -> str:
        """The address as an NBD URI, which `parse_uri` understands."""
        user, parameters = "", []
        if self.encryption:
            user = f"{quote(self.encryption.user, safe='', errors='surrogateescape')}@" if self.encryption.user else ""
            parameters = [f"{key}={_quote(value)}" for key, value in self.encryption.parameters()]
        if self.unix_path:
            parameters.insert(0, f"socket={_quote(self.unix_path)}")
        query = f"?{'&'.join(parameters)}" if parameters else ""
        return f"{self._scheme}://{user}{self._server}/{_quote(self.export_name)}{query}"

    @property
    def _scheme(self) -> str:
        return f"nbd{'s' if self.encryption else ''}{'+unix' if self.unix_path else ''}"

    @property
    def _server(self) -> str:
        if self.unix_path:
            return ""
        host = quote(self.host, safe=":")
        return f"{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def fetch_size(self) -> int:
        """See `OriginAddress`: what NBD servers send costs them little more than its bytes."""
        return BLOCK

    @property
    def starts_threads(self) -> bool:
        """See `OriginAddress`."""
        return False

    @property
    def place(self) -> str:
        """See `OriginAddress`: the disk is the same one in the clear and in TLS."""
        return str(self._replace(encryption=None))

    def overrules(self, noted: OriginAddress) -> bool:
        """See `OriginAddress`: how to encrypt is said anew, but what was encrypted is not sent in the clear again."""
        return self.encryption is not None and noted.place == self.place

    @property
    def tls_name(self) -> str:
        """The name that the origin's certificate has to be for; empty where there is none to ask for."""
        if self.encryption and self.encryption.hostname:
            return self.encryption.hostname
        return self.host.partition("%")[0]

    @property
    def local_files(self) -> Dict[str, int]:
        """See `OriginAddress`."""
        socket = {self.unix_path: os.W_OK} if self.unix_path.startswith("/") else {}
        return {**socket, **dict.fromkeys(self.encryption.files() if self.encryption else [], os.R_OK)}

    def common(self, version: str) -> str:
        """See `OriginAddress`."""
        return ""

    def warnings(self) -> List[str]:
        """See `OriginAddress`."""
        return self.encryption.warnings() if self.encryption else []

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
    """An NBD URI; relative paths in it are made absolute. Raises `ConfigurationError`."""
    parts = _split(uri)
    if port is not None:
        raise wrong(uri, f"leave out the port {port}, it belongs in the URI")
    name = _unquote(parts.path[1:])
    if export_name is not None and name not in ("", export_name):
        raise wrong(uri, f"names another export than {export_name!r}; name it once")
    name = _check_name(uri, export_name or name)
    is_unix, is_encrypted = parts.scheme.endswith("+unix"), parts.scheme.startswith("nbds")
    user, at, server = parts.netloc.rpartition("@")
    if at and not is_encrypted:
        raise wrong(uri, "leave out the user's name: only TLS (nbds://) has a use for it")
    known = [*(["socket"] if is_unix else []), *(PARAMETERS if is_encrypted else [])]
    values = _query(uri, parts, *known)
    encryption = parse_encryption(uri, _user(uri, user), values) if is_encrypted else None
    if is_unix:
        return _check_trust(uri, NbdAddress("", 0, _socket_path(uri, server, values), name, encryption))
    host, number = _authority(uri, server)
    return NbdAddress(host, number, "", name, encryption)


def _user(uri: str, quoted: str) -> str:
    user = _unquote(quoted)
    if _FORBIDDEN.search(user) or ":" in user:
        raise wrong(uri, "no user has a name with a colon, a space or a control character in it")
    return user


def _check_trust(uri: str, address: NbdAddress) -> NbdAddress:
    """A socket has no name for a certificate to be compared with, and the system's authorities vouch for everybody."""
    how = address.encryption
    if how and how.verify_peer and not (how.certificates or how.psk_file or how.hostname):
        raise wrong(uri, "add tls-certificates=DIRECTORY, or tls-hostname=NAME of the origin's certificate")
    return address


def _split(uri: str) -> SplitResult:
    if _FORBIDDEN.search(uri) or _BROKEN_ESCAPE.search(uri):
        raise wrong(uri, "is no URI: write special characters as %20 and the like")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise wrong(uri, f"is no URI: {error}") from None
    if parts.fragment or uri.endswith("#"):
        raise wrong(uri, "write # in a name as %23")
    return parts


def _authority(uri: str, server: str) -> Tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^][]+)\]|([^][:]+))(?::(\d*))?", server)
    if not match:
        scheme = uri.partition(":")[0].lower()
        raise wrong(uri, f"expected {scheme}://host/name or {scheme}://host:port/name, an IPv6 address in []")
    host = _unquote(match[1] or match[2])
    if _FORBIDDEN.search(host) or not _is_text(host):
        raise wrong(uri, "the host's name has characters that no host has")
    return host, _parse_port(uri, match[3]) if match[3] else URI_PORT


def _socket_path(uri: str, server: str, values: Mapping[str, str]) -> str:
    path = values.get("socket")
    if server or not path:
        scheme = uri.partition(":")[0].lower()
        raise wrong(uri, f"expected {scheme}:///name?socket=PATH, with three slashes and a socket")
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
        if key in PARAMETERS and key not in known:
            raise wrong(uri, f"{key} needs TLS: write nbds in place of nbd")
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
