"""The servers that are looked at: each is asked once an interval, over a connection of its own; none is waited for."""

from __future__ import annotations

import math
import os
import select
from pathlib import Path
from time import monotonic
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ...control.asking import Asking
from ...control.client import Departed, Message, shown
from ...errors import ConfigurationError
from ..quantities import duration
from ..query_report import sections, title
from .figures import Figures, History
from .notes import held_by_limits, notes

CELLS = 1024
"""Parts of a map that a server is asked for."""

_COUNTED = ("fetched", "hits", "requests")
"""Sections of ``--query``."""

_FIRST = "..."
"""In place of figures before the first answer."""

_SOON = 0.1
_SILENT_AFTER = 2.0
_BACK_FOR = 30.0


def labels(paths: Sequence[str]) -> Dict[str, str]:
    """What the servers at *paths* are called: the ends of the paths, so long that no two are the same."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = [os.path.join(*part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return dict(zip(paths, map(shown, ends)))
    return dict(zip(paths, map(shown, paths)))


class Server:
    """One server, at the control socket *path*; times are monotonic seconds.

    It is away from the moment on at which it cannot be reached, or hangs up twice in a row.
    """

    def __init__(self, path: str, label: str, interval: float, timeout: float) -> None:
        self.label = label
        self.figures: Optional[Figures] = None
        self.map: List[float] = []
        self.map_every: Optional[float] = None
        """Seconds after which the map is asked for again, if it is wanted."""
        self._map_at = -math.inf
        self.title = ""
        self.facts: List[str] = []
        """As ``--query`` has them, but for what has been counted since the start."""
        self.held = ""
        """Who has to wait because of limits."""
        self._notes: List[str] = []
        self.disk_size = 0
        self.away: Optional[str] = None
        """Why it cannot be reached."""
        self._since = 0.0
        self._back: Optional[str] = None
        self._path = path
        self._interval = interval
        self._timeout = timeout
        self._history = History(label, interval)
        self._asking: Optional[Asking] = None
        self._ask_at = monotonic()
        self._was_lost = False

    @property
    def answer(self) -> Optional[Message]:
        """The last one, if the server is there."""
        return self._history.answer

    @property
    def counts_durations(self) -> Optional[bool]:
        """Whether it tells how long requests took; None: nobody knows."""
        return None if self.answer is None else self.answer.get("durations") is not None

    def fileno(self) -> Optional[int]:
        """To be polled for input, if an answer is to come."""
        return None if self._asking is None else self._asking.fileno()

    def deadline(self) -> float:
        """When `progress` wants to be called."""
        return self._ask_at if self._asking is None else self._asking.deadline()

    @property
    def has_answered(self) -> bool:
        """Whether there is nothing to wait for in this interval."""
        return self._asking is None and monotonic() < self._ask_at

    def hurry(self) -> None:
        """Ask at once."""
        self._ask_at = monotonic()

    def progress(self) -> bool:
        """Do what can be done without waiting; True if there is news."""
        try:
            if self._asking is None:
                if monotonic() < self._ask_at:
                    return False
                self._ask()
                return False
            return self._hear(self._asking)
        except Departed as error:
            return self._lose(error)
        except ConfigurationError as error:
            return self._leave(str(error))
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            return self._leave(f"its answer makes no sense ({error!r}): is it of another version?")

    def _ask(self) -> None:
        self._ask_at = monotonic() + self._interval
        request: Message = {"command": "query", "durations": True, "usage": False}
        if self.map_every is not None and monotonic() >= self._map_at + self.map_every:
            request["map"], self._map_at = CELLS, monotonic()
        self._asking = Asking(self._path, request, self._timeout)

    def _hear(self, asking: Asking) -> bool:
        answer = asking.progress()
        if answer is None:
            return False
        self.hang_up()
        self.take(answer, monotonic())
        return True

    def take(self, answer: Message, now: float) -> None:
        """What was told at the time *now*. Raises several errors if that makes no sense."""
        self.title, self.facts, self._notes = title(answer), sections(answer, _COUNTED), list(notes(answer))
        self.held = held_by_limits(answer)
        self.disk_size = int(answer["disk_size"])
        self.figures = self._history.add(now, answer)
        if answer.get("map") or "blocks" not in answer:
            self.map = [float(part) for part in answer.get("map") or ()]
        if self.away is not None:
            self._back = f"is back, it was away for {duration(now - self._since)}"
            self.away, self._since = None, now
        self._was_lost = False

    def _lose(self, error: Departed) -> bool:
        """It has hung up, as a server does in the moment of an upgrade: ask once more."""
        if self._was_lost:
            return self._leave(str(error))
        self.hang_up()
        self._was_lost = True
        self._ask_at = monotonic() + min(_SOON, self._interval)
        return False

    def _leave(self, reason: str) -> bool:
        self.hang_up()
        if self.away is None:
            self._since = monotonic()
        self.away, self._back = reason, None
        self._history.clear()
        self.figures, self.map, self._notes = None, [], []
        return True

    def hang_up(self) -> None:
        """Give up what was asked for."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.close()

    @property
    def is_there(self) -> bool:
        """Unless it is away, or silent."""
        return self.trouble() in (None, _FIRST)

    def trouble(self) -> Optional[str]:
        """Why there are no figures of now."""
        now = monotonic()
        if self.away is not None:
            return f"away {duration(now - self._since)}: {self.away}"
        if self._asking is not None and now - self._asking.began >= max(_SILENT_AFTER, 2 * self._interval):
            return f"silent {duration(now - self._asking.began)}"
        return None if self.figures is not None else _FIRST

    def notes(self) -> List[str]:
        """What an operator should know besides, the worst first."""
        back = self.back()
        return self._notes if back is None else [back, *self._notes]

    def back(self) -> Optional[str]:
        """That it has come back, for a while."""
        return self._back if monotonic() - self._since < _BACK_FOR else None


class Servers:
    """All of them, in the order of the command line."""

    def __init__(self, paths: Sequence[str], interval: float, timeout: float) -> None:
        called = labels(paths)
        self.all = [Server(path, called[path], interval, timeout) for path in paths]

    def close(self) -> None:
        """Hang up."""
        for server in self.all:
            server.hang_up()

    def wait(self, until: float, wake_by: Mapping[int, Callable[[], None]]) -> bool:
        """Sleep until there is news of a server (then True), one of *wake_by* has input, or it is late enough."""
        poll = select.poll()
        for fd in (*wake_by, *(fd for fd in (server.fileno() for server in self.all) if fd is not None)):
            poll.register(fd, select.POLLIN)
        first = min(until, *(server.deadline() for server in self.all))
        ready: List[Tuple[int, int]] = poll.poll(max(0.0, first - monotonic()) * 1000)
        news = [server.progress() for server in self.all]
        for fd, _ in ready:
            if fd in wake_by:
                wake_by[fd]()
        return any(news)
