"""When to poll for the next request instead of sleeping.

A sleep and a wake-up cost more than a whole request, so polling pays where the
next one comes soon. Where it does not, polling stops after a few attempts in
vain, and is tried again ever more rarely; after long waits not at all.
"""

from __future__ import annotations

_PATIENCE = 4
_FIRST_RETRY = 16
_LAST_RETRY = 4096
_LONG_WAIT = 1e-3


class Spin:
    """``seconds`` is how long to poll now: the *longest* time allowed, or 0 where it has not paid."""

    def __init__(self, longest: float) -> None:
        self.seconds = longest
        self._longest = longest
        self._misses = 0
        self._retry_after = _FIRST_RETRY
        self._countdown = 0

    def hit(self) -> None:
        """Polling has brought a request."""
        self._misses = 0
        self._retry_after = _FIRST_RETRY

    def missed(self, waited: float) -> None:
        """The process had to sleep; the request came after *waited* seconds in all."""
        if not self._longest:
            return
        if self.seconds:
            self._misses += 1
            if self._misses >= _PATIENCE:
                self.seconds = 0.0
                self._countdown = self._retry_after
                self._retry_after = min(2 * self._retry_after, _LAST_RETRY)
        elif waited < _LONG_WAIT:
            self._countdown -= 1
            if self._countdown <= 0:
                self.seconds = self._longest
                self._misses = _PATIENCE - 1
