"""The terminal: a screen of its own while it is ours, keys that come at once, and the state from before at every end.

What is written are the few sequences that all terminals of today understand. `Terminal.leave` may be called at any time
and several times.
"""

from __future__ import annotations

import os
import re
import termios
from contextlib import contextmanager, suppress
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from .cells import PLAIN, Styled, fit, width_of

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
"""Another screen, no cursor, nothing on it."""

_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_CLEAR = "\x1b[2J"
_REST_OF_LINE = "\x1b[K"
_NORMAL = "\x1b[0m"

_FALLBACK = (80, 24)

_KEYS = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|\x1b[\[O]?|[^\x1b]")
_NAMES = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up",
    b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"\x1b[C": "enter", b"\x1bOC": "enter", b"\r": "enter", b"\n": "enter",
    b"\x1b[D": "back", b"\x1bOD": "back", b"\x1b": "back", b"\x7f": "back", b"\x08": "back",
    b"<": "<", b",": "<", b">": ">", b".": ">",
    b"r": "r", b"q": "q", b"Q": "q", b"\x0c": "redraw",
}  # fmt: skip


@contextmanager
def _present() -> Iterator[None]:
    """A terminal that has hung up fails in several ways."""
    try:
        yield
    except (OSError, termios.error) as error:
        raise EOFError from error


class Terminal:
    """Standard input and output, both of which are one; *encoding* is that of the output.

    Whatever is done raises `EOFError` if it is gone.
    """

    def __init__(self, encoding: str) -> None:
        self.keyboard = 0
        self._screen = 1
        self._encoding = encoding
        self._former: Optional[List[Any]] = None
        self._pending = b""

    def enter(self) -> None:
        """Make it ours."""
        with _present():
            if self._former is None:
                self._former = termios.tcgetattr(self.keyboard)
            ours = termios.tcgetattr(self.keyboard)
            ours[0] &= ~termios.IXON  # Ctrl-S would have the next frame wait for ever
            ours[3] &= ~(termios.ICANON | termios.ECHO)
            ours[6][termios.VMIN], ours[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self.keyboard, termios.TCSANOW, ours)
        self._write(_ENTER)

    def leave(self) -> None:
        """Everything as it was."""
        former = self._former
        if former is None:
            return
        with suppress(EOFError), _present():
            termios.tcsetattr(self.keyboard, termios.TCSANOW, former)
            self._write(_LEAVE)
        self._former = None

    def size(self) -> Tuple[int, int]:
        """Columns and rows."""
        with suppress(OSError):
            columns, rows = os.get_terminal_size(self._screen)
            return columns or _FALLBACK[0], rows or _FALLBACK[1]
        return _FALLBACK

    def clear(self) -> None:
        """What is there may be of another size."""
        self._write(_CLEAR)

    def draw(self, lines: Sequence[Styled]) -> None:
        """All lines of the screen, in one write."""
        columns, rows = self.size()
        frame = [self._drawn(number, line, columns) for number, line in enumerate(lines[:rows], 1)]
        self._write("".join(frame))

    def _drawn(self, number: int, line: Styled, columns: int) -> str:
        text = fit(line.text.encode(self._encoding, "backslashreplace").decode(self._encoding), columns)
        rest = _REST_OF_LINE if width_of(text) < columns else ""
        styled = f"{line.style}{text}{_NORMAL}" if line.style != PLAIN else text
        return f"\x1b[{number};1H{styled}{rest}"

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding)
        with _present():
            while data:
                data = data[os.write(self._screen, data) :]

    # Keys

    def read_keys(self) -> Iterator[str]:
        """The names of the keys that were pressed; what means nothing is left out."""
        with _present():
            data = os.read(self.keyboard, 1024)
        if not data:
            raise EOFError
        return self._names(self._pending + data, whole=False)

    @property
    def has_part(self) -> bool:
        """Whether what came last is Escape, or the beginning of what another key sends."""
        return bool(self._pending)

    def finish_keys(self) -> Iterator[str]:
        """Nothing more has come for a while: it was Escape."""
        return self._names(self._pending, whole=True)

    def _names(self, data: bytes, *, whole: bool) -> Iterator[str]:
        self._pending = b""
        for match in _KEYS.finditer(data):
            key = match[0]
            if not whole and match.end() == len(data) and key in (b"\x1b", b"\x1b[", b"\x1bO"):
                self._pending = key
            elif key in _NAMES:
                yield _NAMES[key]
