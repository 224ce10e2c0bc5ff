"""When to try again what other processes have locked.

Nobody sleeps in a lock. Whoever finds one taken, a fetch or a request that writes, is
locked out until the next turn. All who want the same bytes stand behind the first of
them, who tries for all: they have their turn when that one has got through.

The pause before a lock is tried again grows while it is found taken, in the end by an
eighth of what it was: whoever waits is late by an eighth of the whole wait, and by no
more than a quarter of a second. Each lock has its own pause, so that one that stays
taken delays nobody who wants another. Nor do turns ever take more than a tenth of the
time, however many try: those who need no lock do not stand still behind them.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, Generic, List, Optional, Tuple, TypeVar

_FIRST_PAUSE, _DOUBLED_UNTIL, _LONGEST_PAUSE = 0.0005, 0.008, 0.25
_GROWTH = 1.125

_REST = 9
"""A pause is so many times as long as the turn before it took, if that is longer."""

_LONGEST_REST = 1.0
"""What got through counts to the turn too, and may have been long."""

_NEVER = float("inf")

T = TypeVar("T")

Lock = Tuple[int, int]
"""Whatever names the bytes of a lock."""


class _Taken(Generic[T]):
    """A lock that was found taken: *since* when, and *at* what time to try it again; 0 until that is known."""

    __slots__ = ("at", "pause", "since", "waiting")

    def __init__(self) -> None:
        self.at = self.since = 0.0
        self.pause = _FIRST_PAUSE
        self.waiting: Deque[T] = deque()


class LockRetry(Generic[T]):
    """Those who are locked out. Times are in seconds, *now* monotonic, *used* the processor time of this thread."""

    def __init__(self) -> None:
        self._taken: Dict[Lock, _Taken[T]] = {}
        self._tried: Dict[Lock, _Taken[T]] = {}  # in the turn that is under way, and not found taken again
        self._next = _NEVER  # the earliest time at which a lock is tried again
        self._rest_until = 0.0
        self._used: Optional[float] = None  # at the beginning of the turn that is under way

    @property
    def busy(self) -> bool:
        """Whether `take` wants to be called before anybody sleeps."""
        return bool(self._taken) or self._used is not None

    @property
    def deadline(self) -> Optional[float]:
        """When to call `take`."""
        if not self.busy:
            return None
        return max(self._next, self._rest_until) if self._next and self._used is None else 0.0

    @property
    def oldest(self) -> Optional[float]:
        """Since when the first of them is locked out; None if nobody is, or that is not known yet."""
        return min((taken.since for taken in self._taken.values() if taken.since), default=None)

    def lock_out(self, who: T, lock: Lock) -> None:
        """Have *who*, who has found *lock* taken, wait for the next turn."""
        taken = self._taken.get(lock)
        if taken is None:
            taken = self._tried.pop(lock, None)
            if taken is None:
                taken = _Taken()
            else:
                taken.pause *= 2 if taken.pause < _DOUBLED_UNTIL else _GROWTH
                taken.pause = min(taken.pause, _LONGEST_PAUSE)
                taken.at = 0.0
            self._taken[lock] = taken
            self._next = 0.0
        taken.waiting.append(who)

    def take(self, now: float, used: float) -> List[T]:
        """All whose turn it is: by the next call they have tried, or wait anew."""
        turn = self._end_turn(now, used - self._used) if self._used is not None else []
        if not self._next:
            self._plan(now)
        if now >= max(self._next, self._rest_until):
            for lock, taken in list(self._taken.items()):
                if taken.at <= now:
                    turn.append(taken.waiting.popleft())
                    self._tried[lock] = self._taken.pop(lock)
            self._plan(now)
        if turn:
            self._used = used
        return turn

    def take_older(self, time: float) -> List[T]:
        """All who are locked out since *time* or longer: they wait no more."""
        older: List[T] = []
        for lock, taken in list(self._taken.items()):
            if 0 < taken.since <= time:
                older += self._taken.pop(lock).waiting
        return older

    def clear(self) -> List[T]:
        """All who are locked out: they wait no more."""
        waiting = [who for taken in (*self._taken.values(), *self._tried.values()) for who in taken.waiting]
        self._taken.clear()
        self._tried.clear()
        self._next, self._used = _NEVER, None
        return waiting

    def _plan(self, now: float) -> None:
        for taken in self._taken.values():
            if not taken.at:
                taken.since = taken.since or now
                taken.at = now + taken.pause
        self._next = min((taken.at for taken in self._taken.values()), default=_NEVER)

    def _end_turn(self, now: float, took: float) -> List[T]:
        """Those who stood behind somebody who has got through: it is their turn now."""
        self._used = None
        if self._taken:
            self._rest_until = now + min(_LONGEST_REST, _REST * took)
        free = [who for taken in self._tried.values() for who in taken.waiting]
        self._tried.clear()
        return free
