"""Lines that come in floods: for each disk at most one a second, whichever process has it to say.

Which process may, and when, stands in a file in memory that all processes forked from one share (`prepare`). What a
process has to leave out it keeps: the weightiest line of it, and the number of the others. It says that as soon as it
has its turn, or at the latest when its client leaves, so nothing that was counted is lost.

A disk is a number made of its name. Two names may have the same one; then their disks share their turns.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import suppress
from time import monotonic
from typing import Callable, Dict, NamedTuple, Optional, Tuple
from zlib import crc32

from .logs import Fields, log

FAILED, SLOW, DAMAGE = "failed", "slow", "damage"
"""Kinds of lines, each of which has its own turns."""

INTERVAL = 1.0
"""Seconds between two lines."""

_PLACES = 4096
_TIME = struct.Struct("=d")

Remind = Callable[[float, Callable[[], None]], None]
"""Has something done at a time, in monotonic seconds, as soon as the process sleeps or looks whether it is to stop."""


class Turns:
    """When the last lines were written, by all processes that have been forked since this was made."""

    def __init__(self) -> None:
        """Raises `OSError`."""
        self._fd = os.memfd_create("xnbd-log-turns")
        os.ftruncate(self._fd, _PLACES * _TIME.size)
        self._times = mmap.mmap(self._fd, 0)

    def take(self, place: int, now: float) -> bool:
        """Whether it is this process's turn, which takes the turn."""
        if self.next(place) > now:
            return False
        at = place * _TIME.size
        with suppress(OSError):  # another process takes it at this moment
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _TIME.size, at)
            try:
                if self.next(place) <= now:
                    _TIME.pack_into(self._times, at, now + INTERVAL)
                    return True
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, _TIME.size, at)
        return False

    def next(self, place: int) -> float:
        """When there is a turn again, in monotonic seconds."""
        return float(_TIME.unpack_from(self._times, place * _TIME.size)[0])


_shared: Optional[Turns] = None


def prepare() -> Turns:
    """The turns of this process, and of those that it forks from now on. Raises `OSError` the first time."""
    global _shared
    if _shared is None:
        _shared = Turns()
    return _shared


class Line(NamedTuple):
    """What is to be said: *text* and its *arguments* as for `logging`, and the fields of JSON."""

    text: str
    arguments: Tuple[object, ...]
    extra: Dict[str, Fields]


class RationedLines:
    """What one process has to say of one *kind*, about one disk."""

    def __init__(self, level: int, kind: str, disk: str, remind: Remind) -> None:
        self._turns = prepare()
        self._place = crc32(f"{kind} {disk}".encode("utf-8", "surrogateescape")) % _PLACES
        self._level = level
        self._remind = remind
        self._reminded = False
        self._kept: Optional[Line] = None
        self._weight = self._since = 0.0
        self._count = 0

    def say(self, line: Line, weight: float = 0.0, count: int = 1) -> None:
        """Say *line*, now or later, or only count what it tells of, *count* in number, if others weigh more."""
        now = monotonic()
        if self._kept is None:
            self._since = now
        if self._kept is None or weight >= self._weight:
            self._kept, self._weight = line, weight
        self._count += count
        self._try(now)

    def _try(self, now: float) -> None:
        if self._turns.take(self._place, now):
            self._tell(now)
        elif not self._reminded:
            self._reminded = True
            self._remind(max(self._turns.next(self._place), now + INTERVAL / 100), self._on_time)

    def _on_time(self) -> None:
        self._reminded = False
        if self._kept is not None:
            self._try(monotonic())

    def rest(self) -> None:
        """At the end: what was left out, whoever's turn it is."""
        if self._kept is not None:
            self._tell(monotonic())

    def _tell(self, now: float) -> None:
        line, others = self._kept, self._count - 1
        assert line is not None
        self._kept, self._count = None, 0
        more = f" (and {others:,} more in the last {max(1, round(now - self._since))} s)" if others else ""
        fields = {**line.extra["about"], "more": others} if others else line.extra["about"]
        log.log(self._level, f"{line.text}%s", *line.arguments, more, extra={"about": fields})
