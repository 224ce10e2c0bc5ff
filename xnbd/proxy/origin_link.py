"""The way to the origin, which comes and goes: opening it, its loss, and when to try again.

What an origin is, and which kind of origin this one is, nobody knows here (`origin.base`).
"""

from __future__ import annotations

from time import monotonic
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..logs import about, log
from ..origin.address import members_of, parse_origin
from ..origin.base import Origin, OriginAddress, OriginLost, Sink, Standing, Terms, Witness
from ..scoreboard.layout import NOT_NEEDED, REACHED, UNREACHABLE
from ..scoreboard.scoreboard import Scoreboard
from ..text import counted
from .state.versions import Versions

CHANGED = (
    "%s: THE DISK THERE HAS CHANGED. What is cached here and what was written is served on, the rest is an error: "
    "bring the former one back, or begin anew with --clear-bitmap, which also forgets what clients have written"
)

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_QUIET = 0.005


class Whereabouts(NamedTuple):
    """Where the origin is: at *first* unless the *scoreboard* has another address."""

    scoreboard: Scoreboard
    first: OriginAddress

    @property
    def generation(self) -> int:
        """Changes whenever the address does."""
        return self.scoreboard.origin.generation

    @property
    def address(self) -> OriginAddress:
        moved = self.scoreboard.origin.address
        return parse_origin(moved) if moved else self.first


class Patience(NamedTuple):
    """Seconds until a connection has to stand, and until blocks that do not come are given up (None: never)."""

    connect: float = 10.0
    origin: Optional[float] = None


class CachedVersions(Witness):
    """Knows by *versions* which disk is cached, whose origin is at *whereabouts*."""

    def __init__(self, whereabouts: Whereabouts, versions: Versions) -> None:
        self._whereabouts = whereabouts
        self._versions = versions

    def vouch(self, address: OriginAddress, version: str) -> None:
        if not version:
            return
        self._compare(address, version)
        noted = self._versions.agree(address.place, version)
        if version != noted:
            raise OriginLost(f"origin {address}: it has {version}, no more {noted}", changed=True)
        if self._versions.note_change(address.place, changed=False):
            log.warning("origin %s: the disk there is the one again that is cached", address)

    def _compare(self, address: OriginAddress, version: str) -> None:
        """With what is noted of the other places of the disk, where that tells anything of this one."""
        for other in members_of(self._whereabouts.address):
            noted = self._versions.of(other.place) if other != address and address.common(version) else None
            reason = contradiction(address, version, other, noted.version) if noted and not noted.changed else ""
            if reason:
                raise OriginLost(f"origin {address}: {reason}", refused=True)

    def note_change(self, address: OriginAddress) -> bool:
        return self._versions.note_change(address.place, changed=True)


def contradiction(address: OriginAddress, version: str, other: OriginAddress, other_version: str) -> str:
    """Why the disk at *address* cannot be the one at the *other* one, by their versions; empty if that may be."""
    here, there = address.common(version), other.common(other_version)
    if not here or here == there or here.partition(" ")[0] != there.partition(" ")[0]:
        return ""
    return f"it has another disk, {version}, than {other}, {other_version}"


class OriginLink:
    """The origin at *whereabouts* with a disk of *size* bytes, in one of *versions*; replies go to *sink*.

    ``origin`` is None while nothing is under way to it; ``trouble`` says why it was lost
    last, until it has answered. ``returns`` counts how often it has answered again after that.
    ``has_changed``: the disk there is another one; what is missing does not come, unless that changes again.
    """

    def __init__(self, whereabouts: Whereabouts, patience: Patience, size: int, versions: Versions, sink: Sink) -> None:
        self.origin: Optional[Origin] = None
        self.trouble = ""
        self.returns = 0
        self.has_changed = False
        self._witness = CachedVersions(whereabouts, versions)
        self._parting_news: Optional[Sequence[Standing]] = None
        self._is_admitted = False
        self._whereabouts = whereabouts
        self._generation = whereabouts.generation
        self._terms = Terms(size, patience.connect, patience.origin, self._witness, told={})
        self._sink = sink
        self._delay = 0.0
        self._open_at = 0.0

    @property
    def ready(self) -> bool:
        """Whether the origin can be asked."""
        return self._is_admitted and self.origin is not None and self.origin.ready

    @property
    def refuses(self) -> bool:
        """Whether there is no use in waiting: the disk there was another one, and nobody looks again just now."""
        return self.has_changed and self.origin is None

    @property
    def fetch_size(self) -> int:
        """Bytes that are worth asking the origin for at once."""
        return self._whereabouts.address.fetch_size

    @property
    def quiet(self) -> bool:
        """What `Background.quiet` tells."""
        return self.origin is None or monotonic() > self.origin.heard_at + _QUIET

    @property
    def health(self) -> int:
        """What `Background.health` tells."""
        if self.ready:
            return REACHED
        return UNREACHABLE if self.trouble else NOT_NEEDED

    @property
    def window(self) -> Optional[int]:
        """See `Origin`."""
        return self.origin.window if self.origin is not None and self.ready else None

    @property
    def restless(self) -> bool:
        """See `Origin`."""
        return self.origin is not None and self.origin.restless

    def news(self) -> Optional[Sequence[Standing]]:
        """See `Origin`."""
        parting, self._parting_news = self._parting_news, None
        return parting or (self.origin.news() if self.origin is not None else None)

    @property
    def is_outdated(self) -> bool:
        """Whether the origin is elsewhere now: then call `move`."""
        return self._generation != self._whereabouts.generation

    def interests(self) -> List[Tuple[int, int]]:
        """What `Background.interests` tells."""
        return self.origin.interests() if self.origin is not None else []

    def deadline(self, *, needed: bool) -> Optional[float]:
        """When there is something to do, in monotonic seconds; with *needed* `open` is wanted if it is not open."""
        if self.origin is not None:
            return self.origin.deadline
        return self._open_at if needed else None

    def open(self) -> None:
        """Begin to connect, unless it is too early for that. Raises `OriginLost`, and `OSError`."""
        if monotonic() >= self._open_at:
            self.origin = self._whereabouts.address.open(self._sink, self._terms)
            self.origin.start()

    def progress(self, origin: Origin) -> None:
        """What *origin* does next, and what has to be looked at once it is ready. Raises `OriginLost`, `OSError`."""
        origin.progress()
        if not self._is_admitted and origin.ready:
            self._admit(origin)

    def _admit(self, origin: Origin) -> None:
        """Nothing is asked before it is clear that this is the disk that is cached."""
        self._witness.vouch(self._whereabouts.address, origin.version)
        self._is_admitted, self.has_changed = True, False

    def on_answer(self) -> None:
        """The origin has answered a request, and well."""
        if self._delay or self.trouble:
            self._delay, self.trouble = 0.0, ""
            self.returns += 1
            log.info("origin %s: answers again", self._whereabouts.address)

    def lose(self, reason: Union[OriginLost, OSError], waiting: int) -> List[Any]:
        """The origin is lost, or could not be opened: `open` it again after a while, for a longer while each time.

        *waiting* requests wait to be asked for. Returns the tokens of those that were asked for and are not done.
        """
        if self.origin is not None:
            self._parting_news = self.origin.news()
        unfinished = self._drop()
        where = f"origin {self._whereabouts.address}: "
        text = f"{where}{reason.strerror}" if isinstance(reason, OSError) else str(reason)
        trouble = text.removeprefix(where)  # who reads it sees the address beside it, and there is little room
        if isinstance(reason, OriginLost) and reason.changed:
            self._on_change(text)
        elif trouble != self.trouble:
            waits = counted(waiting + len(unfinished), "request waits", "requests wait")
            log.warning("%s; %s for it, trying again", text, waits)
        self.trouble = trouble
        self._open_at = monotonic() + self._delay
        self._delay = min(_LONGEST_DELAY, max(_FIRST_DELAY, 2 * self._delay))
        return unfinished

    def _on_change(self, text: str) -> None:
        """Of all processes one tells it, and loudly: nobody should wait for what does not come."""
        self.has_changed = True
        try:
            if self._witness.note_change(self._whereabouts.address):
                log.error(CHANGED, text)
        except OSError as error:
            log.error("%s (this cannot be noted: %s)", text, error.strerror, extra=about(error=error))

    def move(self) -> List[Any]:
        """Leave the origin for the one that is at its new place; returns what `lose` does."""
        self._generation = self._whereabouts.generation
        self._delay = self._open_at = 0.0
        self.has_changed = False
        return self._drop()

    def _drop(self) -> List[Any]:
        origin, self.origin, self._is_admitted = self.origin, None, False
        if origin is None:
            return []
        unfinished = origin.unfinished()
        origin.close()
        return unfinished

    def leave(self, patience: float) -> None:
        """Close for good once what was asked for has come, after *patience* seconds at the latest."""
        until = monotonic() + patience
        try:
            while self.origin is not None and self.ready and self.origin.outstanding and monotonic() < until:
                self.origin.wait(0.1)
        except OriginLost:
            pass  # it was quicker to leave
        self._drop()
