"""Where an origin is that is an image in a Ceph cluster.

No address holds a key: addresses stand in command lines, logs and files that others may read. The key is in
the keyring that Ceph's configuration names. What may be one is not repeated in a message.
"""

from __future__ import annotations

import os
import re
from typing import Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import quote, unquote

from ...system.process import whole_path
from ..base import Origin, OriginAddress, Sink, Terms, wrong

SCHEME = "rbd"
FETCH_SIZE = 64 << 10

_EXPECTED = "expected rbd:POOL/IMAGE@SNAPSHOT or rbd:POOL/NAMESPACE/IMAGE@SNAPSHOT"
_EXAMPLE = "rbd:POOL/IMAGE@SNAPSHOT?conf=PATH&id=NAME"
_PARAMETERS = ("conf", "id")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f]")
_BROKEN_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
_TAIL = re.compile(r"[?:#].*")


class RbdAddress(NamedTuple):
    """The *image* in *pool*, at *snapshot* or, if that is empty, as it is; *namespace* is empty for the default one.

    *conf* is the path of Ceph's configuration (empty: where its tools look), *id* who asks, without ``client.``.
    """

    pool: str
    namespace: str
    image: str
    snapshot: str
    conf: str = ""
    id: str = ""

    def __str__(self) -> str:
        """The address as a URI, which `parse_uri` understands."""
        names = "/".join(quote(name, safe="") for name in (self.pool, self.namespace, self.image) if name)
        snapshot = f"@{quote(self.snapshot, safe='')}" if self.snapshot else ""
        values = (("conf", self.conf), ("id", self.id))
        query = "&".join(f"{name}={quote(value, safe='/:,')}" for name, value in values if value)
        return f"{SCHEME}:{names}{snapshot}{'?' if query else ''}{query}"

    @property
    def fetch_size(self) -> int:
        """See `OriginAddress`: a request costs Ceph as much as some ten kilobytes do."""
        return FETCH_SIZE

    @property
    def starts_threads(self) -> bool:
        """See `OriginAddress`."""
        return True

    @property
    def place(self) -> str:
        """See `OriginAddress`: who asks makes no other image; the configuration may be another cluster's."""
        return str(self._replace(id=""))

    def overrules(self, noted: OriginAddress) -> bool:
        """See `OriginAddress`."""
        return noted.place == self.place

    def common(self, version: str) -> str:
        """See `OriginAddress`: the numbers of an image and its snapshot are another cluster's in a copy of it."""
        return ""

    @property
    def local_files(self) -> Dict[str, int]:
        """See `OriginAddress`; which keyring is read only Ceph's configuration tells."""
        return {self.conf: os.R_OK} if self.conf else {}

    def warnings(self) -> List[str]:
        """See `OriginAddress`."""
        if self.snapshot:
            return []
        return [
            f"origin {self}: an image without a snapshot may change under the cache, which would then be of two disks: "
            "name a snapshot (IMAGE@SNAPSHOT)"
        ]

    def open(self, sink: Sink, terms: Terms) -> Origin:
        from .origin import RbdOrigin

        return RbdOrigin(self, sink, terms)


def parse_uri(uri: str, port: Optional[str], export_name: Optional[str]) -> RbdAddress:
    """A relative path of the configuration is made absolute. Raises `ConfigurationError`."""
    text = uri.partition(":")[2]
    shown = f"{SCHEME}:{_TAIL.sub('…', text)}"
    if port is not None:
        raise wrong(shown, f"leave out the port {port}: the configuration of Ceph has the addresses of its monitors")
    if export_name is not None:
        raise wrong(shown, "an image has no exports: leave out the export's name")
    if _FORBIDDEN.search(text) or _BROKEN_ESCAPE.search(text) or "#" in text:
        raise wrong(shown, "blanks, '#' and control characters are written as %20 and the like")
    path, _, query = text.partition("?")
    if ":" in path:
        raise wrong(shown, f"options stand behind a '?', as in {_EXAMPLE}, and a ':' in a name is %3A")
    names, at, snapshot = path.partition("@")
    found = [_name(part, shown) for part in names.split("/")]
    if len(found) not in (2, 3):
        raise wrong(shown, _EXPECTED)
    pool, *namespace, image = found
    return RbdAddress(
        pool, namespace[0] if namespace else "", image, _name(snapshot, shown) if at else "", *_parameters(query, shown)
    )


def _name(quoted: str, shown: str) -> str:
    """Of a pool, a namespace, an image or a snapshot: in none of them Ceph allows what stands between them."""
    name = _unquote(quoted, shown)
    if not name or not name.isprintable() or "/" in name or "@" in name:
        raise wrong(shown, _EXPECTED)
    return name


def _unquote(quoted: str, shown: str) -> str:
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        raise wrong(shown, "expected names in UTF-8") from None


def _parameters(query: str, shown: str) -> Tuple[str, str]:
    found: Dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in _PARAMETERS or name in found or not value:
            raise wrong(shown, "behind the '?' expected conf=PATH and id=NAME, each once; keys are in keyrings")
        found[name] = _unquote(value, shown)
    conf, who = found.get("conf", ""), found.get("id", "")
    if not conf.isprintable():
        raise wrong(shown, "conf is the path of a configuration of Ceph")
    if not re.fullmatch(r"[^\s/]*", who) or who.startswith("client."):
        raise wrong(shown, "id is the name of a client of Ceph, without client.")
    return whole_path(conf, f"origin {shown}: conf") if conf else "", who
