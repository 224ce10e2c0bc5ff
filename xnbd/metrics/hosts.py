"""By which names this computer may be asked: a browser says in ``Host`` which one it was given.

A page from elsewhere can give its own name this computer's address ("DNS rebinding"). A browser then takes what is
answered here for that page's own, and lets it read. So only names count that nobody elsewhere can give away: addresses,
``localhost``, and what this computer calls itself. Who sends no ``Host`` is no browser.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Iterator, List, Optional, Set

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/@\s]+)(:[0-9]*)?")
_HOSTS, _RESOLVER = Path("/etc/hosts"), Path("/etc/resolv.conf")


class OwnNames:
    """The names of this computer, looked up when they are needed first, without asking anybody."""

    def __init__(self) -> None:
        self._names: Optional[Set[str]] = None

    def include(self, host: str) -> bool:
        """Whether *host*, as a header has it, is one of them, or an address."""
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found[1].rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or _is_address(name.strip("[]")):
            return True
        if self._names is None:
            self._names = set(_own_names(socket.gethostname().lower()))
        return name in self._names


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _own_names(own: str) -> Iterator[str]:
    """*own* and its first part, alone and with the domains that are searched, and its other names in ``/etc/hosts``."""
    short = own.partition(".")[0]
    yield from (own, short)
    for first, *words in _lines(_RESOLVER):
        if first in ("search", "domain"):
            yield from (f"{short}.{domain.strip('.')}" for domain in words)
    for _, *names in _lines(_HOSTS):
        if own in names or short in names:
            yield from names


def _lines(path: Path) -> List[List[str]]:
    """The words of its lines, without comments; none if it cannot be read."""
    text = ""
    with suppress(OSError):
        text = path.read_text(errors="replace").lower()
    lines = (re.split("[#;]", line)[0].split() for line in text.splitlines())
    return [words for words in lines if words]
