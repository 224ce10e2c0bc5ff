"""The address of a disk that lies in several places: their addresses, with a blank between them.

No address of one place has a blank in it.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

from ...errors import ConfigurationError
from ..base import Origin, OriginAddress, Sink, Terms, wrong

MOST = 8
"""Places of one disk: as many as a scoreboard's line has room for."""


class SeveralAddresses(NamedTuple):
    """Two places or more, *members*, none of them twice."""

    members: Tuple[OriginAddress, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.members))

    @property
    def fetch_size(self) -> int:
        """See `OriginAddress`: any of them may be asked."""
        return max(member.fetch_size for member in self.members)

    @property
    def starts_threads(self) -> bool:
        """See `OriginAddress`."""
        return any(member.starts_threads for member in self.members)

    @property
    def place(self) -> str:
        """See `OriginAddress`."""
        return " ".join(member.place for member in self.members)

    def overrules(self, noted: OriginAddress) -> bool:
        """See `OriginAddress`: all places that were noted are among these, each as it was or said anew."""
        return all(any(_counts_for(new, old) for new in self.members) for old in _members(noted))

    @property
    def local_files(self) -> Dict[str, int]:
        """See `OriginAddress`."""
        return {path: rights for member in self.members for path, rights in member.local_files.items()}

    def warnings(self) -> List[str]:
        """See `OriginAddress`."""
        return [warning for member in self.members for warning in member.warnings()]

    def common(self, version: str) -> str:
        """See `OriginAddress`."""
        return ""

    def open(self, sink: Sink, terms: Terms) -> Origin:
        from .origin import SeveralOrigins

        return SeveralOrigins(self, sink, terms)


def _counts_for(new: OriginAddress, old: OriginAddress) -> bool:
    return new == old or new.overrules(old)


def _members(address: OriginAddress) -> Tuple[OriginAddress, ...]:
    """The places at *address*, of which there is one mostly."""
    return address.members if isinstance(address, SeveralAddresses) else (address,)


def joined(addresses: Sequence[OriginAddress]) -> OriginAddress:
    """One address of them all. Raises `ConfigurationError`."""
    members = [member for address in addresses for member in _members(address)]
    if len(members) == 1:
        return members[0]
    places = [member.place for member in members]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise wrong(str(members[number]), "is named twice")
    if len(members) > MOST:
        raise ConfigurationError(f"a disk has at most {MOST} origins, not {len(members)}", 2)
    return SeveralAddresses(tuple(members))
