"""Where an origin is that is an object: on a web server, or in a store of S3, Google or Azure.

No address holds a credential: addresses stand in command lines, logs and files that others may read.
One that does is refused, and not repeated in the message.
"""

from __future__ import annotations

import os
import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from ...text import is_writable
from ..base import Origin, OriginAddress, Sink, Terms, wrong
from .credentials import credential_files
from .settings import is_server_url

FETCH_SIZE = 256 << 10

_WEB = ("http", "https")
_PARAMETERS: Mapping[str, Tuple[str, ...]] = {
    "s3": ("endpoint", "region", "profile", "virtual-host", "anonymous"),
    "gs": ("endpoint", "anonymous"),
    "az": ("account", "endpoint", "anonymous"),
}
_SWITCHES = ("anonymous", "virtual-host")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")
_BROKEN_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
_MD5 = re.compile('ETag "?[0-9a-f]{32}"?')
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._$-]*")
_CREDENTIALS = re.compile(r"//[^/?#]*@|\?.*|#.*")

_WHERE_CREDENTIALS_ARE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY have them, or ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS names a file with them",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY have them",
}
_SIGNED = (
    "no '?' and no '#' belong in the address of a web page: a signature would be seen by all, and ends some day "
    "(~/.netrc has the password for a web server)"
)


class ObjectAddress(NamedTuple):
    """The object *key* on the web server *container* (host and port), or in that bucket or container of a store."""

    scheme: str
    container: str
    key: str
    parameters: Tuple[Tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The address as a URI, which `parse_uri` understands."""
        query = "&".join(f"{name}={quote(value, safe='/:,')}" for name, value in self.parameters)
        return f"{self._uri}{'?' if query else ''}{query}"

    @property
    def _uri(self) -> str:
        return f"{self.scheme}://{self.container}/{quote(self.key, safe='/')}"

    def parameter(self, name: str) -> str:
        """Its value; empty if it is not there."""
        return dict(self.parameters).get(name, "")

    @property
    def fetch_size(self) -> int:
        """See `OriginAddress`: a request costs a store as much as a few hundred kilobytes do."""
        return FETCH_SIZE

    @property
    def starts_threads(self) -> bool:
        """See `OriginAddress`."""
        return True

    @property
    def place(self) -> str:
        """See `OriginAddress`: whose credentials are used, and where the store's region is, makes no other object."""
        told = tuple(pair for pair in self.parameters if pair[0] in ("endpoint", "account"))
        return str(self._replace(parameters=told))

    def overrules(self, noted: OriginAddress) -> bool:
        """See `OriginAddress`."""
        return noted.place == self.place

    @property
    def local_files(self) -> Dict[str, int]:
        """See `OriginAddress`."""
        return dict.fromkeys(credential_files(self.scheme), os.R_OK)

    def common(self, version: str) -> str:
        """See `OriginAddress`: S3 has the MD5 of what was sent in one part, and web servers date and size mostly."""
        if self.scheme == "s3":
            return f"s3 {version}" if _MD5.fullmatch(version) else ""
        return f"web {version}" if self.scheme in _WEB and version.startswith('ETag "') else ""

    def warnings(self) -> List[str]:
        """See `OriginAddress`."""
        return []

    def open(self, sink: Sink, terms: Terms) -> Origin:
        from .origin import ObjectOrigin

        return ObjectOrigin(self, sink, terms)


def parse_uri(uri: str, port: Optional[str], export_name: Optional[str]) -> ObjectAddress:
    """Raises `ConfigurationError`."""
    shown = redacted(uri)
    if port is not None:
        raise wrong(shown, f"leave out the port {port}, it belongs in the URI")
    if export_name is not None:
        raise wrong(shown, "an object has no exports: leave out the export's name")
    if _FORBIDDEN.search(uri) or _BROKEN_ESCAPE.search(uri) or not is_writable(uri):
        raise wrong(shown, "blanks and control characters are written as %20 and the like")
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise wrong(shown, str(error)) from None
    if "@" in parts.netloc:
        where = _WHERE_CREDENTIALS_ARE.get(parts.scheme, "~/.netrc has them")
        raise wrong(shown, f"no user and no password belong in an address: it is seen by all ({where})")
    return _parse_web(parts, shown, uri) if parts.scheme in _WEB else _parse_store(parts, shown)


def redacted(uri: str) -> str:
    """The address of something, without what may be a password or a signature."""
    return _CREDENTIALS.sub(lambda match: "//***@" if match[0].startswith("//") else match[0][0] + "…", uri)


def _parse_web(parts: SplitResult, shown: str, uri: str) -> ObjectAddress:
    if "?" in uri or "#" in uri:
        raise wrong(shown, _SIGNED)
    if not parts.hostname:
        raise wrong(shown, "expected a host, as in https://host/disk.raw")
    return ObjectAddress(parts.scheme, parts.netloc.lower(), _key(parts, shown))


def _parse_store(parts: SplitResult, shown: str) -> ObjectAddress:
    if not _BUCKET.fullmatch(parts.netloc):
        raise wrong(shown, f"expected {parts.scheme}://BUCKET/KEY")
    if parts.fragment:
        raise wrong(shown, "a '#' in a key is written as %23")
    return ObjectAddress(parts.scheme, parts.netloc, _key(parts, shown), _parameters(parts, shown))


def _key(parts: SplitResult, shown: str) -> str:
    """The path; what stands between its slashes has to be a name."""
    try:
        key = unquote(parts.path[1:], errors="strict")
    except UnicodeDecodeError:
        raise wrong(shown, "expected a path in UTF-8") from None
    if any(name in ("", ".", "..") for name in key.split("/")):
        raise wrong(shown, "expected the path of an object: names with one slash between them")
    return key


def _parameters(parts: SplitResult, shown: str) -> Tuple[Tuple[str, str], ...]:
    known, found = _PARAMETERS[parts.scheme], {}
    for pair in parts.query.split("&") if parts.query else ():
        name, _, value = pair.partition("=")
        if name not in known or name in found:
            raise wrong(shown, f"after '?' expected {', '.join(known)}, each once, and no credentials")
        found[name] = _checked_value(name, unquote(value), shown)
    return tuple((name, found[name]) for name in known if name in found)


def _checked_value(name: str, value: str, shown: str) -> str:
    if name in _SWITCHES and value != "yes":
        raise wrong(shown, f"{name} is yes or not there")
    if name == "endpoint":
        return _checked_endpoint(value, shown)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise wrong(shown, f"{name} is a name")
    return value


def _checked_endpoint(value: str, shown: str) -> str:
    if not is_server_url(value):
        raise wrong(shown, "endpoint is the URL of the store's server, as in endpoint=https://host:8080")
    return value.rstrip("/")
