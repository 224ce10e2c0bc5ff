"""When to try again what other processes have locked.

Nobody sleeps in a lock. Whoever finds one taken, a fetch or a request that writes, is
locked out until the next turn, in which all who are locked out try again together.
Turns come less often while nobody gets through, and never take more than a tenth of
the time, however many try: those who need no lock do not stand still behind them.
"""

from __future__ import annotations

from typing import Generic, List, Optional, TypeVar

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.008

_REST = 9
"""A pause is so many times as long as the turn before it took, if that is longer."""

_LONGEST_REST = 1.0
"""What got through counts to the turn too, and may have been long."""

T = TypeVar("T")


class Turns(Generic[T]):
    """Those who are locked out. Times are in seconds, *now* monotonic, *used* the processor time of this thread."""

    def __init__(self) -> None:
        self._locked_out: List[T] = []
        self._at = 0.0  # the next turn, 0 until that is known
        self._pause = _FIRST_PAUSE
        self._rest = 0.0
        self._trying = 0
        self._used: Optional[float] = None  # at the beginning of the turn that is under way

    @property
    def busy(self) -> bool:
        """Whether `take` wants to be called before anybody sleeps."""
        return bool(self._locked_out) or self._used is not None

    @property
    def deadline(self) -> Optional[float]:
        """When to call `take`."""
        return self._at if self._locked_out else None

    def lock_out(self, who: T) -> None:
        """Have *who* wait for the next turn."""
        self._locked_out.append(who)

    def take(self, now: float, used: float) -> List[T]:
        """All who are locked out, if it is their turn: by the next call they have tried, or wait anew."""
        if self._used is not None:
            self._end_turn(used - self._used)
        if not self._locked_out:
            return []
        if not self._at:
            self._at = now + max(self._pause, self._rest)
        if now < self._at:
            return []
        turn, self._locked_out = self._locked_out, []
        self._at, self._trying, self._used = 0.0, len(turn), used
        return turn

    def _end_turn(self, took: float) -> None:
        in_vain = len(self._locked_out) >= self._trying
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause) if in_vain else _FIRST_PAUSE
        self._rest = min(_LONGEST_REST, _REST * took) if self._locked_out else 0.0
        self._used = None
