"""Pauses before what has failed is tried again."""

from __future__ import annotations

FIRST = 1.0
LONGEST = 30.0


class Pauses:
    """How many seconds to wait: twice as many after each failure in a row."""

    def __init__(self) -> None:
        self.failures = 0

    def next(self) -> float:
        pause = min(LONGEST, FIRST * (1 << min(self.failures, 10)))
        self.failures += 1
        return pause
