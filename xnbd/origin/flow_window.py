"""How much to ask the origin for at once, where nobody waits for it yet.

Enough to fill the line, and no more: what was asked for ahead is in front of the
next block that somebody needs. A reply that takes longer than the quickest one did
has stood in a queue; from the time that replies take follows whether to ask for more
at once, or for less. Now and then the queue is let run empty, so that a way that has
become longer is not taken for a queue for ever.
"""

from __future__ import annotations

_FIRST, _MOST = 2 << 20, 8 << 20
_TELLING = 128 << 10
"""Bytes from which on a reply tells something: shorter ones stand in no queue of their own making."""

_SHORTEST_QUEUE, _LONGEST_QUEUE = 0.005, 0.05
"""Seconds in the queue that are accepted are as many as the way takes, within these limits."""

_PERIOD = 30.0
_NEVER = float("inf")


class FlowWindow:
    """``size`` is the bytes to ask for at once, never less than *least*."""

    def __init__(self, least: int) -> None:
        self.size = _FIRST
        self._least = least
        self._quickest = self._period_end = _NEVER
        self._reduced_at = 0.0

    def on_reply(self, asked_at: float, now: float, length: int, in_flight: int) -> None:
        """*length* bytes have come, of *in_flight* that were asked for; times in seconds of the monotonic clock."""
        if length < _TELLING:
            return
        if now >= self._period_end or self._period_end == _NEVER:
            self._begin_period(now)
        took = now - asked_at
        quickest = self._quickest = min(self._quickest, took)
        queue = min(max(quickest, _SHORTEST_QUEUE), _LONGEST_QUEUE)
        if took <= quickest + queue / 4:
            if in_flight > self.size // 2:
                self.size = min(_MOST, self.size + length)
        elif took > quickest + queue and asked_at >= self._reduced_at:
            self._reduced_at = now  # what was asked for before tells nothing of the new size
            self.size = max(self._least, int(self.size * max(0.5, (quickest + queue / 2) / took)))

    def _begin_period(self, now: float) -> None:
        if self._period_end != _NEVER:
            self.size = self._least
        self._quickest = _NEVER
        self._period_end = now + _PERIOD
