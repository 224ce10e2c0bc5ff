"""Processes that sleep with replies which are still to be sent and point into the cache.

A process is outside the gate while it sleeps. So what is closed behind the gate does not keep it from sending such
replies when it wakes up. It shows that by a number in its line, a new one each time, and takes it back when the replies
have left, or when it has copied them. Who is about to give the space of blocks back waits for that
(`proxy.letting_go`).
"""

from __future__ import annotations

import mmap
from typing import List, Tuple

from .layout import HEAD, LINE, put
from .lines import Lines

_LETTINGS, _NUMBER = HEAD.at["lettings"], HEAD.form["lettings"]
_HOLDING, _HELD = LINE.at["holding"], LINE.form["holding"]

Hold = Tuple[int, int]
"""The offset of a line, and the number that stood there."""


class Holders:
    """The processes of all *lines* in *memory* that hold such replies."""

    def __init__(self, memory: mmap.mmap, lines: Lines) -> None:
        self._map = memory
        self._lines = lines

    def now(self) -> List[Hold]:
        """All of them, for a process that has closed the gate: nobody else comes to hold what was there before."""
        holds = [(at, self._held(at)) for at in self._lines.used()]
        return [hold for hold in holds if hold[1]]

    def call(self) -> None:
        """Have all of them copy what they hold."""
        (number,) = _NUMBER.unpack_from(self._map, _LETTINGS)
        put(self._map, _LETTINGS, _NUMBER, (number + 1) & 0xFFFFFFFF)
        self._lines.wake_all()

    def still(self, holds: List[Hold]) -> List[Hold]:
        """Those of *holds* that have not been taken back by a living process."""
        return [(at, number) for at, number in holds if self._held(at) == number and self._lines.is_alive(at)]

    def _held(self, at: int) -> int:
        return int(_HELD.unpack_from(self._map, at + _HOLDING)[0])
