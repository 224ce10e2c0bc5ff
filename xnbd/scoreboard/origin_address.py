"""Where a proxy's origin is, for all its processes.

Address and checksum come before the new generation. So a process that sees another generation finds the new address, or
none if its writer died in the middle.
"""

from __future__ import annotations

import mmap
import zlib
from typing import List, Optional

from .layout import HEAD, LONGEST_ADDRESS, ORIGINS, TROUBLE, put

_AT, _FORM = HEAD.at["address"], HEAD.form["address"]
_TEXT_AT = HEAD.at["address_text"]
_BEFORE_AT, _BEFORE = HEAD.at["origin_bytes_before"], HEAD.form["origin_bytes_before"]
_GENERATION_AT, _GENERATION = HEAD.at["generation"], HEAD.form["generation"]


_TROUBLES_AT = HEAD.at["origin_troubles"]
"""Bytes for what is told of each of several origins."""


class OriginPlace:
    """The origin's address, and how often it was changed."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._map = memory

    @property
    def generation(self) -> int:
        """Changes whenever the address does."""
        return int(_GENERATION.unpack_from(self._map, _GENERATION_AT)[0])

    @property
    def address(self) -> str:
        """The origin's address; empty if none is noted, or not to its end."""
        return self.whole_address() or ""

    @address.setter
    def address(self, address: str) -> None:
        text = address.encode("utf-8", "surrogateescape")
        if len(text) > LONGEST_ADDRESS:
            raise ValueError("address too long")
        self._map[_AT : _TEXT_AT + len(text)] = _FORM.pack(zlib.crc32(text), len(text)) + text
        put(self._map, _GENERATION_AT, _GENERATION, (self.generation + 1) & 0xFFFFFFFF)

    def troubles(self) -> List[str]:
        """Why each of several origins could not be reached last."""
        starts = range(_TROUBLES_AT, _TROUBLES_AT + ORIGINS * TROUBLE, TROUBLE)
        return [self._map[at : at + TROUBLE].rstrip(b"\0").decode("utf-8", "replace") for at in starts]

    @property
    def bytes_before(self) -> List[int]:
        """What each of several origins had sent (`Lines.origin_bytes`) when they became the origins."""
        return list(_BEFORE.unpack_from(self._map, _BEFORE_AT))

    @bytes_before.setter
    def bytes_before(self, sums: List[int]) -> None:
        put(self._map, _BEFORE_AT, _BEFORE, *sums)

    def whole_address(self) -> Optional[str]:
        """The origin's address, empty if none is noted; None if its writer died before the end."""
        checksum, length = _FORM.unpack_from(self._map, _AT)
        text = self._map[_TEXT_AT : _TEXT_AT + min(length, LONGEST_ADDRESS)]
        return text.decode("utf-8", "surrogateescape") if zlib.crc32(text) == checksum else None
