"""Who of several origins is asked for what.

- A read goes to who is likely to have answered first, by how long its answers take and how many are due. So one
  read alone goes to the quickest, and of many the quicker ones get more.
- One that is late is asked of another one too, if not too many were lately. One that is silent is left at once
  for all it was asked for.
- Who is slow, or not known yet, is asked now and then for a block that nobody waits for.
"""

from __future__ import annotations

from time import monotonic
from typing import List, Optional, Sequence, Tuple

from ...logs import log
from ..base import BLOCK, Health, Sink
from .member import Member
from .reads import Race, Read

_ACTIVE = 10.0
_LOOK = 0.05
"""Seconds between two looks at what is late, at least."""

_HOPE = 5.0
"""Seconds that a read which nobody there can answer waits for somebody who comes just now."""

_MOST_SECONDS, _SHARE = 8.0, 0.1
"""Requests that may be asked twice though nobody is silent: so many at once, and of all of them this part."""


class Dispatch:
    """Asks ``members``, which are yet to be named, for what *sink* wants.

    ``broken`` are those that could not be asked, with the reasons: the owner has to close them.
    """

    def __init__(self, sink: Sink) -> None:
        self.race = Race(sink, self._ask_again)
        self.members: Sequence[Member] = ()
        self.broken: List[Tuple[Member, OSError]] = []
        self.look_at = 0.0
        """When to `look`, in monotonic seconds."""
        self._asked_at = 0.0
        self._asked_for = 0
        self._seconds = _MOST_SECONDS

    @property
    def is_active(self) -> bool:
        """Whether anything was wanted lately."""
        return monotonic() <= self._asked_at + _ACTIVE

    def _has_others(self, member: Member) -> bool:
        return any(other.ready for other in self.members if other is not member)

    def begin(self, read: Read) -> None:
        now = monotonic()
        if not self.race.reads:
            self.look_at = now + _LOOK
        if not self.is_active:
            self._hurry(now)
        self._asked_at, self._asked_for = now, read.offset
        self._seconds = min(_MOST_SECONDS, self._seconds + _SHARE)
        self.race.reads[read] = None
        self.send(read)  # `look` sees to what nobody can be asked for just now

    def _hurry(self, now: float) -> None:
        """Who is lost is tried soon."""
        for member in self.members:
            if member.health is not Health.REFUSED:
                member.open_at = min(member.open_at, now)

    def send(self, read: Read, *, healthy: bool = False) -> bool:
        """Have somebody answer *read*, only a *healthy* one perhaps; False if nobody can be asked."""
        while True:
            member = self._choose(read, healthy=healthy)
            if member is None:
                return False
            try:
                member.ask(read)
            except OSError as error:  # its origin may be at work, so that it must not be closed here
                member.ready = False
                self.broken.append((member, error))
            else:
                return True

    def _choose(self, read: Read, *, healthy: bool) -> Optional[Member]:
        """Who is likely to have answered first."""
        able = [member for member in self.members if member.can_answer(read) and not (healthy and member.shunned)]
        unknown = max((member.latency.mean or 0.0 for member in able), default=0.0)
        return min(
            able,
            key=lambda member: (member.shunned, member.is_full, member.cost(unknown), len(member.attempts)),
            default=None,
        )

    def look(self, now: float) -> None:
        """See what is late, who is silent, what nobody was asked for, and who is to be tried."""
        self.look_at = now + _LOOK
        ready = [member for member in self.members if member.ready]
        for member in ready:
            since = member.silent_since
            if since is not None and now - since > member.latency.silent_after:
                self._leave(member, now - since)
            else:
                self._ask_for_late(member, now)
        for read in [read for read in self.race.reads if not read.attempts]:
            if not self.send(read) and not self._has_hope(read, now):
                self.race.finish(read, read.error)
        if len(ready) > 1 and self.is_active:
            self._probe(ready, now)

    def _ask_again(self, read: Read) -> bool:
        """Others are asked for *read*, which one could not; False if nobody can, and nobody is about to come."""
        now = monotonic()
        if self.send(read):
            return True
        self._hurry(now)
        return self._has_hope(read, now)

    def _has_hope(self, read: Read, now: float) -> bool:
        """Whether somebody may come soon who can answer *read*."""
        absent = [member for member in self.members if not member.ready]
        return now < read.since + _HOPE and any(member.is_coming(now) for member in absent)

    def _leave(self, member: Member, silence: float) -> None:
        """*member* is silent: others are asked for all that it has not answered."""
        if not member.shunned and self._has_others(member):
            log.info("origin %s: silent for %.1f s; the others are asked", member.address, silence)
        member.shun()
        for attempt in list(member.attempts):
            read = attempt.read
            if read is not None and not read.done and len(read.attempts) == 1:
                self.send(read, healthy=True)

    def _ask_for_late(self, member: Member, now: float) -> None:
        """Ask others, too, for what takes *member* unusually long."""
        late_after = member.latency.late_after
        for attempt in list(member.attempts):
            if now - attempt.asked_at <= late_after or self._seconds < 1:
                return
            read = attempt.read
            if read is not None and not read.done and len(read.attempts) == 1 and self.send(read, healthy=True):
                self._seconds -= 1

    def _probe(self, ready: List[Member], now: float) -> None:
        best = min((m.latency.mean for m in ready if m.latency.mean is not None and not m.shunned), default=0.0)
        for member in ready:
            due = member.probe_due(best)
            if due is not None and now >= due:
                try:
                    member.probe(now, self._asked_for // BLOCK * BLOCK)
                except OSError as error:
                    self.broken.append((member, error))
