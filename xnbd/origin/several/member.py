"""One of several origins: its connection, which comes and goes by itself, and how good it is."""

from __future__ import annotations

from time import monotonic
from typing import Dict, List, Optional

from ...logs import log
from ..base import Health, Origin, OriginAddress, OriginLost, Standing, Terms
from ..flow_window import FlowWindow
from .latency import Latency
from .reads import Attempt, Race, Read

_LEAST = 512 << 10
_FIRST_DELAY, _LONGEST_DELAY, _IDLE_DELAY = 0.1, 5.0, 30.0
_FIRST_PROBE, _LONGEST_PROBE = 0.5, 10.0
"""Seconds until a lost one is tried again, and until a slow one is asked for a block that nobody waits for."""

_STALE = 1.0
"""Seconds after which it may be worth knowing whether one that was slower still is."""

_PROBE = 4096
_TRUSTED = 64
"""Good answers in a row after which what was before is forgotten."""

_BAD = 3
"""Errors in a row after which others are asked."""


class Member:
    """The origin at *address*, for *race*; ``attempts`` are all that it was asked for and has not answered.

    ``trouble`` says why it is not ready.
    """

    def __init__(self, address: OriginAddress, race: Race, terms: Terms) -> None:
        self.address = address
        self.origin: Optional[Origin] = None
        self.ready = self.shunned = False
        """Shunned is one that is silent, or answers with errors."""
        self.trouble = ""
        self.changed = False
        self.health = Health.UNTRIED
        self.latency = Latency()
        self.window = FlowWindow(_LEAST)
        self.attempts: Dict[Attempt, None] = {}
        self.in_flight = 0
        self.sent = 0
        """Bytes that were of use since `stand`."""
        self.open_at = 0.0
        self._race = race
        self._terms = terms
        self._delay = 0.0
        self._told = {} if terms.told is None else terms.told
        self._probe_at, self._probe_delay = 0.0, _FIRST_PROBE
        self._answered_at = 0.0
        self._errors = self._good = 0

    # Its connection

    def open(self) -> None:
        """Begin to connect. Raises `OriginLost`, and `OSError`."""
        self.origin = self.address.open(self._race, self._terms)
        self.origin.start()

    def progress(self) -> None:
        """Raises `OriginLost`, and `OSError`."""
        origin = self.origin
        assert origin
        origin.progress()
        if origin.ready and not self.ready:
            self._terms.witness.vouch(self.address, origin.version)
            self.ready, self.health = True, Health.REACHED
            self.trouble, self.changed = "", False
            self._probe_at = 0.0
            if self._told.pop(str(self.address), ""):
                log.info("origin %s: is there again", self.address)

    def is_coming(self, now: float) -> bool:
        """Whether it is not ready, but on its way, or about to be."""
        return not self.ready and (self.origin is not None or self.open_at <= now)

    def lose(self, lost: OriginLost, *, idle: bool) -> List[Attempt]:
        """It is gone; it comes back after a while, a longer one each time. Returns what it had to answer."""
        attempts = list(self.attempts)
        self.changed = lost.changed
        self.trouble = str(lost).removeprefix(f"origin {self.address}: ")
        self.health = Health.REFUSED if lost.changed or lost.refused else Health.UNREACHABLE
        self._delay = min(_LONGEST_DELAY, max(_FIRST_DELAY, 2 * self._delay))
        self.open_at = monotonic() + (_IDLE_DELAY if idle else self._delay)
        self.close()
        return attempts

    def tell_trouble(self) -> None:
        """Say why it is not there, while others are, unless that has been said."""
        if self.trouble and not self.changed and self._told.get(str(self.address)) != self.trouble:
            self._told[str(self.address)] = self.trouble
            log.warning("origin %s: %s; the others are asked", self.address, self.trouble)

    def close(self) -> None:
        origin, self.origin, self.ready, self.shunned = self.origin, None, False, False
        self.attempts.clear()
        self.in_flight = 0
        self.window = FlowWindow(_LEAST)
        if origin is not None:
            origin.close()

    # What it is asked for

    def can_answer(self, read: Read) -> bool:
        if not self.ready or self in read.refused_by or any(attempt.member is self for attempt in read.attempts):
            return False
        assert self.origin
        return self.origin.can_tell_zeros if read.extents else read.length <= self.origin.maximum_read

    def cost(self, unknown: float) -> float:
        """Seconds until one more answer would be here; how quick it is may be *unknown*."""
        return (self.latency.mean or unknown) * (len(self.attempts) + 1)

    @property
    def is_full(self) -> bool:
        """Whether more at once would only queue."""
        return self.in_flight >= self.window.size

    def ask(self, read: Read) -> None:
        """Raises `OSError`."""
        assert self.origin
        attempt = Attempt(self, read, monotonic(), 0 if read.extents else read.length)
        ask = self.origin.query_extents if read.extents else self.origin.read
        ask(attempt, read.offset, read.length)
        self._note(attempt)
        read.attempts.append(attempt)

    def _note(self, attempt: Attempt) -> None:
        if not self.attempts:
            self._answered_at = attempt.asked_at
        self.attempts[attempt] = None
        self.in_flight += attempt.length

    def on_answer(self, attempt: Attempt, error: int, *, counts: bool) -> None:
        """*counts*: the answer was of use."""
        now = monotonic()
        del self.attempts[attempt]
        took = now - attempt.asked_at
        self.latency.add_gap(now - max(self._answered_at, attempt.asked_at))
        self._answered_at = now
        if counts:
            self.sent += attempt.length
        if error:
            self._good = 0
            self._errors += 1
            self.shunned = self.shunned or self._errors >= _BAD
        else:
            self._on_good_answer(attempt, took, now)
        self.in_flight -= attempt.length

    def _on_good_answer(self, attempt: Attempt, took: float, now: float) -> None:
        self._errors = 0
        self.shunned = False
        self._delay = 0.0
        if attempt.read is None:
            self.latency.begin(took)
            return
        self.latency.add(took)
        self.window.on_reply(attempt.asked_at, now, attempt.length, self.in_flight)
        self._good += 1
        if self._good >= _TRUSTED:
            self._probe_delay = _FIRST_PROBE

    # How it is

    @property
    def silent_since(self) -> Optional[float]:
        """Since when nothing has come, though something is wanted."""
        if not self.attempts or self.origin is None:
            return None
        return max(self.origin.heard_at, next(iter(self.attempts)).asked_at)

    def shun(self) -> None:
        """Ask others from now on."""
        self._good = 0
        self.shunned = True

    def probe_due(self, best: float) -> Optional[float]:
        """When to ask it for what nobody waits for: it is shunned, unknown, or was slower than the *best* is."""
        if not self.ready or self.attempts:
            return None
        mean = self.latency.mean
        if self.shunned or mean is None:
            return self._probe_at
        return max(self._probe_at, self._answered_at + _STALE) if mean > best else None

    def probe(self, now: float, offset: int) -> None:
        """Raises `OSError`."""
        assert self.origin
        self._probe_at = now + self._probe_delay
        self._probe_delay = min(_LONGEST_PROBE, 2 * self._probe_delay)
        attempt = Attempt(self, None, now, min(_PROBE, self.origin.size - offset))
        self.origin.read(attempt, offset, attempt.length)
        self._note(attempt)

    @property
    def state(self) -> Health:
        """How it is now."""
        return Health.SLOW if self.ready and self.shunned else self.health

    def stand(self) -> Standing:
        """The same, with what there is to tell since the last time."""
        sent, self.sent = self.sent, 0
        return Standing(self.state, self.latency.mean or 0.0, sent, self.trouble)
