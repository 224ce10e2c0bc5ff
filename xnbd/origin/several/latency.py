"""How long one origin takes to answer, and from when on it is late: pure arithmetic.

Mean and deviation follow the answers much as TCP's do (RFC 6298). A request is late beyond what its own
origin's answers tell, and never within `FLOOR`. An origin is silent if nothing at all comes of it for far
longer than was usual between two answers while it was asked for several things at once: a long queue
makes every answer late, but no pause.
"""

from __future__ import annotations

from typing import Optional

FLOOR = 0.2
_UNKNOWN = 0.5
_SILENCE = 0.5
"""Seconds."""

_USUAL_GAPS = 8
_UP, _DOWN = 8, 3
"""The part that a new answer has in the mean: one that was held up by chance is soon forgotten."""


class Latency:
    """Of one origin; all times are seconds. ``mean`` is None while nothing is known."""

    def __init__(self) -> None:
        self.mean: Optional[float] = None
        self._deviation = 0.0
        self._gap = 0.0

    def add(self, took: float) -> None:
        """An answer has come after so long."""
        if self.mean is None:
            self.begin(took)
            return
        self._deviation += (abs(took - self.mean) - self._deviation) / 4
        self.mean += (took - self.mean) / (_UP if took > self.mean else _DOWN)

    def begin(self, took: float) -> None:
        """An answer has come after so long, and what was before tells nothing any more."""
        self.mean, self._deviation = took, took / 2

    def add_gap(self, gap: float) -> None:
        """So long nothing has come while something was wanted, and then it did."""
        self._gap += (gap - self._gap) / 8

    @property
    def late_after(self) -> float:
        """How long a request may take."""
        return _UNKNOWN if self.mean is None else max(FLOOR, self.mean + 4 * self._deviation)

    @property
    def silent_after(self) -> float:
        """How long nothing may come while something is wanted."""
        return max(_SILENCE, _USUAL_GAPS * self._gap)
