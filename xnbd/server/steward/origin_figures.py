"""How several origins of one disk are, by what all processes tell of them."""

from __future__ import annotations

from typing import Iterator, List, Optional, Sequence

from ...control.requests import Message
from ...origin.base import OriginAddress
from ...proxy.state.versions import Version
from ...scoreboard.layout import REACHED, REFUSED, SLOW, UNREACHABLE
from ...scoreboard.lines import Line
from ...scoreboard.scoreboard import Scoreboard

_STATES = {REFUSED: "refused", UNREACHABLE: "unreachable", SLOW: "slow", REACHED: "connected"}
"""What is worse goes first, where processes tell different things."""


class OriginFigures:
    """By the *lines* of *scoreboard*'s living processes, and by what all processes have got."""

    def __init__(self, scoreboard: Scoreboard, lines: Sequence[Line]) -> None:
        self._lines = lines
        self._troubles = scoreboard.origin.troubles()
        self._bytes = [
            now - before for now, before in zip(scoreboard.lines.origin_bytes(), scoreboard.origin.bytes_before)
        ]

    def of(self, places: Sequence[OriginAddress], noted: Sequence[Optional[Version]]) -> List[Message]:
        """Of each of *places*, whose version is *noted* perhaps."""
        return [self._figures(number, place, noted[number]) for number, place in enumerate(places)]

    def _figures(self, number: int, place: OriginAddress, noted: Optional[Version]) -> Message:
        told = [line.origins[number] for line in self._lines if line.origins[number][0]]
        health = next((health for health in _STATES if any(health == one for one, _ in told)), None)
        total = sum(self._bytes)
        return {
            "address": str(place),
            "state": "idle" if health is None else _STATES[health],
            "error": self._troubles[number] or None if health in (REFUSED, UNREACHABLE) else None,
            "latency": _mean(micros / 1e6 for one, micros in told if one in (REACHED, SLOW) and micros),
            "bytes": self._bytes[number],
            "share": self._bytes[number] / total if total else None,
            "version": noted.version if noted else None,
            "changed": bool(noted and noted.changed),
        }


def _mean(numbers: Iterator[float]) -> Optional[float]:
    found = list(numbers)
    return sum(found) / len(found) if found else None
