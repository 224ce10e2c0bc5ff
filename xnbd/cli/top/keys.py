"""From the bytes that a terminal sends to the names of keys. Pure."""

from __future__ import annotations

import re
from typing import Iterator

_KEYS = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|\x1b[\[O]?|[^\x1b]")
_BEGINNINGS = (b"\x1b", b"\x1b[", b"\x1bO")
_NAMES = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[C": "enter", b"\x1bOC": "enter", b"\r": "enter", b"\n": "enter",
    b"\x1b[D": "back", b"\x1bOD": "back", b"\x1b": "back", b"\x7f": "back", b"\x08": "back",
    b"<": "<", b",": "<", b">": ">", b".": ">",
    b"r": "r", b"q": "q", b"Q": "q", b"\x0c": "redraw",
}  # fmt: skip


class Keys:
    """Keeps what may be the beginning of what a key sends. Keys that mean nothing are left out."""

    def __init__(self) -> None:
        self._part = b""

    @property
    def has_part(self) -> bool:
        """Whether what came last is Escape, or the beginning of another key."""
        return bool(self._part)

    def take(self, data: bytes) -> Iterator[str]:
        """*data* has come."""
        return self._names(self._part + data, whole=False)

    def finish(self) -> Iterator[str]:
        """Nothing more has come for a while: it was Escape."""
        return self._names(self._part, whole=True)

    def _names(self, data: bytes, *, whole: bool) -> Iterator[str]:
        self._part = b""
        for match in _KEYS.finditer(data):
            key = match[0]
            if not whole and match.end() == len(data) and key in _BEGINNINGS:
                self._part = key
            elif key in _NAMES:
                yield _NAMES[key]
