"""One disk in several places, as one origin: it lives as long as any of them does.

- Who is asked for what is the business of `dispatch`, and which answer counts that of `reads`.
- Who is lost is tried again with pauses, in the background.
- Whoever comes is asked for nothing before it is clear that it has the disk that is cached (`Witness`).
- Lost is only the last one. Then all begin anew.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

from ...logs import about, log
from ..base import Health, Origin, OriginLost, Sink, Standing, Terms
from .address import SeveralAddresses
from .dispatch import Dispatch
from .member import Member
from .reads import Read

CHANGED = "%s: THE DISK THERE HAS CHANGED. Nothing is read there any more; the other origins are asked"

_LEAST = 4096
_SILENCE = 30.0
"""Seconds after which one that says nothing at all is left for good, if the terms name no shorter time."""

_TELL = 0.1


class SeveralOrigins(Origin):
    """The disk at *addresses*; replies go to *sink*."""

    def __init__(self, addresses: SeveralAddresses, sink: Sink, terms: Terms) -> None:
        self._addresses = addresses
        self._dispatch = Dispatch(sink)
        self._race = self._dispatch.race
        silence = _SILENCE if terms.reply_timeout is None else min(_SILENCE, terms.reply_timeout)
        self._terms = terms._replace(reply_timeout=silence)
        self._members = [Member(address, self._race, self._terms) for address in addresses.members]
        self._dispatch.members = self._members
        self._was_ready = self._has_lost = False
        self._told: Sequence[Health] = ()
        self._tell_at = 0.0

    # What the owner asks

    @property
    def heard_at(self) -> float:  # type: ignore[override]
        return max((origin.heard_at for origin in self._open), default=0.0)

    @property
    def _open(self) -> Iterator[Origin]:
        return (member.origin for member in self._members if member.origin is not None)

    @property
    def _ready(self) -> List[Member]:
        return [member for member in self._members if member.ready]

    @property
    def ready(self) -> bool:
        return any(member.ready for member in self._members)

    @property
    def size(self) -> int:
        return next((member.origin.size for member in self._ready if member.origin), 0)

    @property
    def maximum_read(self) -> int:
        """Of all that are ready; what any of them could if none is any more, as can be between two reads."""
        return min((member.origin.maximum_read for member in self._ready if member.origin), default=_LEAST)

    @property
    def can_tell_zeros(self) -> bool:
        return any(member.origin.can_tell_zeros for member in self._ready if member.origin)

    @property
    def outstanding(self) -> int:
        return len(self._race.reads)

    @property
    def window(self) -> Optional[int]:
        return sum(member.window.size for member in self._ready if not member.shunned)

    @property
    def restless(self) -> bool:
        return any(
            (member.origin is not None and not member.ready) or any(attempt.read is None for attempt in member.attempts)
            for member in self._members
        )

    def unfinished(self) -> List[Any]:
        return [read.token for read in self._race.reads]

    def interests(self) -> List[Tuple[int, int]]:
        return [interest for origin in self._open for interest in origin.interests()]

    @property
    def deadline(self) -> Optional[float]:
        times = [self._dispatch.look_at] if self._race.reads else []
        times += [member.open_at for member in self._members if member.origin is None]
        return min((*times, *(o.deadline for o in self._open if o.deadline is not None)), default=None)

    def news(self) -> Optional[Sequence[Standing]]:
        now, health = monotonic(), [member.state for member in self._members]
        is_time = now >= self._tell_at or not self._race.reads
        if health == self._told and not (is_time and any(member.sent for member in self._members)):
            return None
        self._told, self._tell_at = health, now + _TELL
        return [member.stand() for member in self._members]

    # What the owner does

    def start(self) -> None:
        for member in self._members:
            self._try(member, member.open)
        self._look_for_loss()

    def read(self, token: Any, offset: int, length: int) -> None:
        self._dispatch.begin(Read(token, offset, length))

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        self._dispatch.begin(Read(token, offset, length, extents=True))

    def push(self) -> None:
        for member in self._ready:
            assert member.origin
            self._try(member, member.origin.push)
        self._look_for_loss()

    def progress(self) -> None:
        now = monotonic()
        for member in self._members:
            if member.origin is not None:
                self._try(member, member.progress)
            elif now >= member.open_at:
                self._try(member, member.open)
        self._was_ready = self._was_ready or self.ready
        now = monotonic()
        if now >= self._dispatch.look_at:
            self._dispatch.look(now)
        self.push()

    def close(self) -> None:
        for member in self._members:
            member.close()

    # Who is lost

    def _try(self, member: Member, step: Callable[[], None]) -> None:
        try:
            step()
        except (OriginLost, OSError) as error:
            self._lose(member, error)

    def _lose(self, member: Member, reason: Union[OriginLost, OSError]) -> None:
        """Others are asked for what *member* has not answered."""
        lost = reason if isinstance(reason, OriginLost) else OriginLost(f"origin {member.address}: {reason.strerror}")
        for attempt in member.lose(lost, idle=not self._dispatch.is_active):
            read = attempt.read
            if read is not None:
                read.attempts.remove(attempt)
                if not read.done and not read.attempts:
                    self._dispatch.send(read)
        self._has_lost = True
        self._tell_change(member, lost)

    def _tell_change(self, member: Member, lost: OriginLost) -> None:
        try:
            if lost.changed and self._terms.witness.note_change(member.address):
                log.error(CHANGED, lost)
        except OSError as error:
            log.error("%s (this cannot be noted: %s)", lost, error.strerror, extra=about(error=error))

    def _look_for_loss(self) -> None:
        """Raises `OriginLost` if nobody is there any more, or nobody has come."""
        while self._dispatch.broken:
            self._lose(*self._dispatch.broken.pop())
        if self._has_lost and self.ready:  # else there may be no others, and the owner tells it
            self._has_lost = False
            for member in self._members:
                member.tell_trouble()
        if self.ready or (not self._was_ready and any(True for _ in self._open)):
            return
        self.close()
        reasons = "; ".join(f"{member.address}: {member.trouble}" for member in self._members if member.trouble)
        raise OriginLost(
            f"origin {self._addresses}: {reasons or 'none of them is there'}",
            refused=all(member.health is Health.REFUSED for member in self._members),
            changed=all(member.changed for member in self._members),
        )
