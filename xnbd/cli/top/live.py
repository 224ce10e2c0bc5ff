"""``--top`` on a terminal: the loop over servers, keys and signals."""

from __future__ import annotations

import math
from contextlib import suppress
from time import monotonic
from typing import Iterable

from .keys import Keys
from .servers import Servers
from .signals import CONTINUED, RESIZED, STOPPED, Ended, Signals, stop
from .terminal import Terminal
from .views import Views

_TOGETHER = 0.05
"""Seconds for which answers are collected before they are drawn."""

_ESCAPE = 0.1
"""Seconds after which Escape is no part of what another key sends."""


def show_live(servers: Servers, interval: float, encoding: str) -> None:
    """Until somebody presses q, or the terminal is gone. A signal ends the process."""
    signals = Signals()
    try:
        with signals.heeded(), suppress(EOFError):
            terminal = Terminal(encoding)
            try:
                terminal.enter()
                _Live(servers, interval, signals, terminal, encoding).run()
            finally:
                _leave(terminal)
    except Ended as end:
        end.die()


def _leave(terminal: Terminal) -> None:
    try:
        terminal.leave()
    except Ended:  # in the middle of it; there is no second one
        terminal.leave()
        raise


class _Live:
    def __init__(self, servers: Servers, interval: float, signals: Signals, terminal: Terminal, encoding: str) -> None:
        self._servers = servers
        self._interval = interval
        self._signals = signals
        self._terminal = terminal
        self._views = Views(servers.all, encoding)
        self._draw_at = monotonic()
        self._keys = Keys()
        self._escape_at = math.inf
        self._goes_on = True

    def run(self) -> None:
        """Raises `EOFError` when the terminal is gone."""
        wake_by = {self._terminal.keyboard: self._read_keys, self._signals.fileno(): self._heed}
        while self._goes_on:
            if monotonic() >= self._draw_at:
                self._draw()
            if self._servers.wait(min(self._draw_at, self._escape_at), wake_by):
                self._draw_at = min(self._draw_at, monotonic() + _TOGETHER)
            if monotonic() >= self._escape_at:
                self._press(self._keys.finish())

    def _draw(self) -> None:
        columns, rows = self._terminal.size()
        self._terminal.draw(self._views.lines(columns, rows))
        self._draw_at = monotonic() + self._interval

    def _read_keys(self) -> None:
        self._press(self._keys.take(self._terminal.read()))

    def _press(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key == "q":
                self._goes_on = False
            elif key == "redraw":
                self._terminal.clear()
            else:
                self._views.press(key)
        now = monotonic()
        self._draw_at, self._escape_at = now, now + _ESCAPE if self._keys.has_part else math.inf

    def _heed(self) -> None:
        came = self._signals.take()
        if STOPPED in came:
            self._terminal.leave()
            stop()
        if came & {STOPPED, CONTINUED}:
            self._terminal.enter()
        if RESIZED in came:
            self._terminal.clear()
        self._draw_at = monotonic()
