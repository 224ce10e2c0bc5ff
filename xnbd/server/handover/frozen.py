"""A session between two requests as data, from which another process goes on with the client.

No request is half done then. What was answered is answered, or its answer is among the
``replies``. What waits is a request again: all that it has done so far may be done
twice. ``contrib/doc/protocols.rst`` has the format, which programs of different
versions have to agree on: a reader refuses what it does not know.
"""

from __future__ import annotations

import os
import struct
from itertools import chain, repeat
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...access.identity import Identity
from ...protocol.server_handshake import CONTEXTS, Agreement, Export
from ...scoreboard.counters import Counts
from ...scoreboard.place import Visit

VERSION = 1

MAGIC = b"XNBDSESS"
"""How the file begins."""

LARGEST = 64 << 20
"""Bytes of the file beyond which a session is not moved: to copy them would take the client too long."""

_REQUEST = struct.Struct("=HH8sQIIi")
"""command, flags, cookie, offset, length, number of pieces, length of the answer or -1; then pieces, answer."""

_PIECE = struct.Struct("=QI")
"""offset and length; the data follows."""


class FrozenRequest(NamedTuple):
    """A request that has been taken off the wire, at *arrived* (monotonic seconds), and is to be done, again perhaps.

    Of a WRITE the *pieces* are still to be written. With an *answer* it is done, and only stands in line.
    """

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    pieces: Sequence[Tuple[int, bytes]] = ()
    answer: Optional[bytes] = None
    arrived: float = 0.0

    def pack(self) -> bytes:
        """All but when it arrived, which is for the letter."""
        head = _REQUEST.pack(*self[:5], len(self.pieces), -1 if self.answer is None else len(self.answer))
        pieces = (_PIECE.pack(at, len(data)) + data for at, data in self.pieces)
        return b"".join((head, *pieces, self.answer or b""))


class FrozenSession(NamedTuple):
    """The session of the client *peer*, who is *identity*, as it was at *frozen_at* (monotonic seconds).

    Its *requests* wait, the bytes *received* have come after these, and the *replies* are still to be sent.
    """

    peer: str
    identity: Identity
    agreement: Agreement
    visit: Visit
    frozen_at: float
    requests: List[FrozenRequest]
    received: bytes
    replies: bytes
    debts: Sequence[float] = ()
    """As of `session.pace.Pace.debts`."""


class Sections(NamedTuple):
    """How many bytes of the file are *requests*, *received* bytes and *replies*, which follow `MAGIC` in this order."""

    requests: int
    received: int
    replies: int


def pack_letter(
    peer: str,
    identity: Identity,
    agreement: Agreement,
    visit: Visit,
    frozen_at: float,
    sections: Sections,
    debts: Sequence[float] = (),
    arrived: Sequence[float] = (),
) -> bytes:
    """What goes with the file."""
    import json

    agreed: Dict[str, Any] = agreement._asdict()
    if agreement.export is not None:
        agreed["export"] = agreement.export._asdict()
    letter = {
        "format": VERSION,
        "peer": peer,
        "identity": identity.names,
        "agreement": agreed,
        "since": visit.since,
        "counters": visit.counts.by_name(),
        "frozen_at": frozen_at,
        "debts": [*debts],
        "arrived": [*arrived],
        **sections._asdict(),
    }
    return json.dumps(letter).encode()


def parse_session(letter: bytes, fd: int) -> FrozenSession:
    """The session from its *letter* and the file behind *fd*. Raises `ValueError` if they make no sense."""
    import json

    try:
        fields = json.loads(letter)
        if fields["format"] != VERSION:
            raise ValueError("the session is in the format of another version")
        sections = Sections(*(int(fields[name]) for name in Sections._fields))
        requests, received, replies = _read_sections(fd, sections)
        arrived = chain(fields.get("arrived", ()), repeat(fields["frozen_at"]))
        return FrozenSession(
            str(fields["peer"]),
            _identity(fields["identity"]),
            _agreement(fields["agreement"]),
            Visit(float(fields["since"]), Counts.named(fields["counters"])),
            float(fields["frozen_at"]),
            [request._replace(arrived=float(when)) for request, when in zip(_parse_requests(requests), arrived)],
            received,
            replies,
            tuple(float(debt) for debt in fields.get("debts", ())),
        )
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"the session cannot be read: {error!r}") from error


def _read_sections(fd: int, sections: Sections) -> List[bytes]:
    total = len(MAGIC) + sum(sections)
    if min(sections) < 0 or os.fstat(fd).st_size != total or os.pread(fd, len(MAGIC), 0) != MAGIC:
        raise ValueError("the session's file is not what its letter says")
    contents, at = [], len(MAGIC)
    for length in sections:
        contents.append(_read_whole(fd, length, at))
        at += length
    return contents


def _read_whole(fd: int, length: int, at: int) -> bytes:
    data = os.pread(fd, length, at)
    if len(data) != length:
        raise ValueError("the session's file is too short")
    return data


def _identity(names: Any) -> Identity:
    if "" in _names(names):
        raise TypeError(names)
    return Identity(_names(names))


def _agreement(fields: Dict[str, Any]) -> Agreement:
    """Raises `TypeError` for what this program does not know: it might be a promise to the client."""
    agreement = Agreement(**fields)._replace(contexts=_names(fields["contexts"]))
    if not set(agreement.contexts) <= set(CONTEXTS):
        raise TypeError(agreement.contexts)
    if agreement.export is not None:
        agreement = agreement._replace(export=_export(fields["export"]))
    for value, default in zip(agreement, Agreement()):
        if default is not None and type(value) is not type(default):
            raise TypeError(value)
    return agreement


def _export(fields: Dict[str, Any]) -> Export:
    return Export(**fields)._replace(contexts=_names(fields["contexts"]))


def _names(names: Any) -> Tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(names)
    return tuple(names)


def _parse_requests(data: bytes) -> List[FrozenRequest]:
    requests, at = [], 0
    while at < len(data):
        command, flags, cookie, offset, length, count, answered = _REQUEST.unpack_from(data, at)
        at += _REQUEST.size
        pieces = []
        for _ in range(count):
            piece_at, size = _PIECE.unpack_from(data, at)
            at += _PIECE.size + size
            pieces.append((piece_at, data[at - size : at]))
        answer = None
        if answered >= 0:
            at += answered
            answer = data[at - answered : at]
        requests.append(FrozenRequest(command, flags, cookie, offset, length, pieces, answer))
    if at != len(data):
        raise ValueError("the session's last request is cut")
    return requests
