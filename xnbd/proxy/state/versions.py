"""Which version of the origin's disk a cache has blocks of: a section of the state file, from `VERSIONS` on.

An origin that can tell (`Origin.version`) has its version noted when it is met for the first time. The
version counts for a place (`OriginAddress.place`): the same disk has another one elsewhere. Whoever finds
another version at the same place later asks for nothing there, and notes that, so that one process tells it.

The section is optional; zeros, or anything that is damaged, mean that nothing is noted. It has 1,024 bytes,
little-endian: CRC-32 of all that follows (4 bytes), length (4 bytes), and JSON of that length: a list of places, the
one that was noted last at its end, each as the hash of the place, its version, and whether another one was found there.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import List, NamedTuple, Optional

from . import files

VERSIONS = 1024
VERSIONS_SIZE = 1024

_HEAD = struct.Struct("<II")
_NUMBER = struct.Struct("<I")
_HASH = 16
"""Hexadecimal digits that are noted of a place."""


class Version(NamedTuple):
    """What is noted of a *place*: its *version*, and whether the disk there *changed* later, as far as is known."""

    place: str
    version: str
    changed: bool = False


class Versions:
    """The section in the file behind *state_fd*, a description of this process alone: the lock has to end with it."""

    def __init__(self, state_fd: int) -> None:
        self._fd = state_fd

    def of(self, place: str) -> Optional[Version]:
        """What is noted of *place*."""
        name = _name(place)
        return next((known for known in self._read() if known.place == name), None)

    def agree(self, place: str, version: str) -> str:
        """The version that counts for *place*, which is *version* if none was noted. Raises `OSError`."""
        known = self.of(place)
        if known is None:
            with files.opening(self._fd):
                known = self.of(place) or self._put(Version(_name(place), version))
        return known.version

    def replace(self, place: str, version: str) -> None:
        """Have *version* count for *place* from now on. Raises `OSError`."""
        with files.opening(self._fd):
            self._put(Version(_name(place), version))

    def note_change(self, place: str, *, changed: bool) -> bool:
        """Whether it is news that the disk at *place* has changed, or is the noted one again. Raises `OSError`."""
        known = self.of(place)
        if known is None or known.changed == changed:
            return False
        with files.opening(self._fd):
            known = self.of(place)
            if known is None or known.changed == changed:
                return False
            self._put(known._replace(changed=changed))
        return True

    def _read(self) -> List[Version]:
        return parse_versions(files.read_section(self._fd, VERSIONS, VERSIONS_SIZE))

    def _put(self, version: Version) -> Version:
        """`OPENING` is locked."""
        others = [known for known in self._read() if known.place != version.place]
        files.write_section(self._fd, VERSIONS, pack_versions([*others, version]))
        return version


def _name(place: str) -> str:
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:_HASH]


def pack_versions(versions: List[Version]) -> bytes:
    """The whole section; the first places are left out if there is no room for all."""
    data = json.dumps(versions, separators=(",", ":")).encode()
    if len(data) > VERSIONS_SIZE - _HEAD.size:
        return pack_versions(versions[1:])
    checked = _NUMBER.pack(len(data)) + data
    return _NUMBER.pack(zlib.crc32(checked)) + checked.ljust(VERSIONS_SIZE - _NUMBER.size, b"\0")


def parse_versions(section: bytes) -> List[Version]:
    if len(section) < _HEAD.size:
        return []
    checksum, length = _HEAD.unpack_from(section)
    data = section[_HEAD.size : _HEAD.size + length]
    if not length or zlib.crc32(section[_NUMBER.size : _HEAD.size + length]) != checksum:
        return []
    return [Version(*version) for version in json.loads(data)]
