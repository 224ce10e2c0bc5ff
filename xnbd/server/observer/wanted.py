"""What one look at ``/status`` is to tell, beyond the usual: ``/status?export=NAME&map=CELLS&durations=1&usage=0``."""

from __future__ import annotations

from typing import List, NamedTuple, Optional
from urllib.parse import parse_qs

_MOST_CELLS = 1 << 14
_LEAST_SHARE = 0.001
_KNOWN = ("export", "map", "durations", "usage")


class NoSuchExport(LookupError):
    """It is not served here."""


class Wanted(NamedTuple):
    """*export*: of this one only; *cells*: parts of the map of a proxy's disk; *durations*: how long requests took.

    Without *usage* memory and processor time of processes, a third of a millisecond each, are left out.
    """

    export: Optional[str] = None
    cells: Optional[int] = None
    durations: bool = False
    usage: bool = True


def parse_wanted(query: str) -> Wanted:
    """The *query* of a URL; raises `ValueError` with the reason."""
    fields = {name: values[-1] for name, values in parse_qs(query, errors="surrogateescape").items()}
    unknown = fields.keys() - set(_KNOWN)
    if unknown:
        raise ValueError(f"there is no {min(unknown)!r} to be asked for; there are: {', '.join(_KNOWN)}")
    text = fields.get("map")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 9 and 0 < int(text) <= _MOST_CELLS):
        raise ValueError(f"map has to be a number from 1 to {_MOST_CELLS}")
    cells = None if text is None else int(text)
    return Wanted(fields.get("export"), cells, fields.get("durations", "0") != "0", fields.get("usage") != "0")


def rounded(shares: List[float]) -> List[float]:
    """A map in few bytes. Only nothing is 0, and only everything is 1."""
    return [share if share in (0, 1) else max(_LEAST_SHARE, round(share, 3)) for share in shares]
