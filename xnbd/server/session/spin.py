"""When to poll for the next request instead of sleeping.

A sleep and a wake-up, of this process and of a client that sleeps meanwhile, cost
more than a whole request: polling pays where the next one comes soon. How often it
does is kept as an average over the last waits, so that a neighbour that takes the
processor away now and then does not end it. Where it hardly ever pays, polling
stops; it is tried again ever more rarely, a few times in a row, because client and
server find a common beat only after some quick answers. After long waits it is not
tried at all: an idle or slow client costs nothing.
"""

from __future__ import annotations

_WEIGHT = 1 / 32
"""Of the last wait, in the average over all."""

_ENOUGH = 0.25
"""The share of waits that have to be short for polling to go on."""

_TRY = 0.4
"""The share that is assumed when polling is tried again: good for some fifteen waits in vain."""

_SUCCESS = 32
"""Requests that a try has to bring, so that the next one need not be rarer."""

_WAKE_UP = 50e-6
"""Seconds that a wait is longer for this process having slept, and its client after it."""

_FIRST_RETRY = 16
_LAST_RETRY = 4096
_LIKELY = 4
"""A wait that polling might have shortened counts as so many others that were not long."""

_LONG_WAIT = 1e-3


class Spin:
    """Decides how long to poll before sleeping: ``seconds``, which is 0 where polling does not pay."""

    def __init__(self, longest: float) -> None:
        """*longest* seconds is the time allowed."""
        self.seconds = longest
        self._longest = longest
        self._paid = 1.0
        self._hits = 0
        self._retry_after = _FIRST_RETRY
        self._countdown = 0

    def hit(self) -> None:
        """Polling has brought a request."""
        self._paid += (1 - self._paid) * _WEIGHT
        self._hits += 1

    def missed(self, waited: float) -> None:
        """The process had to sleep; the request came after *waited* seconds in all."""
        if not self._longest:
            return
        if self.seconds:
            self._paid -= self._paid * _WEIGHT
            if self._paid < _ENOUGH:
                self._give_up()
        elif waited < _LONG_WAIT:
            self._countdown -= _LIKELY if waited <= self._longest + _WAKE_UP else 1
            if self._countdown <= 0:
                self.seconds, self._paid, self._hits = self._longest, _TRY, 0

    def _give_up(self) -> None:
        self.seconds = 0.0
        if self._hits >= _SUCCESS:
            self._retry_after = _FIRST_RETRY
        self._countdown = self._retry_after
        self._retry_after = min(2 * self._retry_after, _LAST_RETRY)
