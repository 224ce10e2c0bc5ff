"""How far a copy is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, Deque, MutableMapping, Optional, Protocol, Tuple

from ..errors import ConfigurationError
from .program import say
from .quantities import duration, percentage, rate, size

_LINE_INTERVAL = 5.0
_PACE_TIME = 5.0
_ROOM_FOR_CTRL_C = 3
"""Columns at the bar's right end: the terminal's ``^C`` would wrap there, and leave half a bar on the line above."""
_BAR_FORMAT = "{share} |{bar}| {status}"


class Pace:
    """The speed of the last seconds, which goes down to nothing where a copy stands still."""

    def __init__(self) -> None:
        self._samples: Deque[Tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _PACE_TIME:
            self._samples.popleft()

    def rate(self) -> Optional[float]:
        """Bytes per second; None as long as that is a guess."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end - start > 0.1 else None


def status(done: int, total: int, speed: Optional[float]) -> str:
    """``1.2 GiB of 4 GiB, 112 MiB/s, 25 s left``."""
    text = f"{size(done)} of {size(total)}"
    if speed is None or done >= total:
        return text
    return f"{text}, {rate(speed)}, {duration((total - done) / speed)} left" if speed >= 1 else f"{text}, waiting"


class Display(Protocol):
    """*done* of *total* bytes, as often as they are known."""

    def show(self, done: int, total: int) -> None: ...

    def close(self) -> None: ...


class ProgressLines:
    """A line at the start and then every few seconds, for logs."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._next = 0.0

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._pace.add(now, done)
        if now >= self._next:
            self._next = now + _LINE_INTERVAL
            say(f"{percentage(done, total)}: {status(done, total, self._pace.rate())}")

    def close(self) -> None:
        """Nothing is left to do."""


class ProgressBar:
    """A bar on standard error that follows the terminal's width."""

    def __init__(self) -> None:
        """Raises `ConfigurationError` if tqdm is not installed."""
        try:
            from tqdm import tqdm
        except ImportError:
            raise ConfigurationError("--progress needs the Python module tqdm: install it, or do without") from None
        self._pace = pace = Pace()

        class Bar(tqdm):  # type: ignore[type-arg]
            monitor_interval = 0  # no thread

            @property
            def format_dict(self) -> MutableMapping[str, Any]:
                fields = super().format_dict
                if fields["ncols"]:
                    fields["ncols"] -= _ROOM_FOR_CTRL_C
                done, total = int(fields["n"]), int(fields["total"])
                fields["share"] = f"{percentage(done, total):>7}"
                fields["status"] = status(done, total, pace.rate())
                return fields

        self._make = Bar
        self._bar: Optional[Bar] = None

    def show(self, done: int, total: int) -> None:
        self._pace.add(time.monotonic(), done)
        if self._bar is None:
            self._bar = self._make(
                total=total, initial=done, bar_format=_BAR_FORMAT, dynamic_ncols=True, file=sys.stderr, miniters=0
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


class NoProgress:
    """Without ``--progress``."""

    def show(self, done: int, total: int) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing was shown."""
