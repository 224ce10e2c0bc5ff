"""The terminal: a screen of its own while it is ours, keys that come at once, and the state from before at every end.

What is written are the few sequences that all terminals of today understand. `Terminal.leave` may be called at any time
and several times.
"""

from __future__ import annotations

import errno
import os
import termios
from contextlib import contextmanager, suppress
from typing import Any, Iterator, List, Sequence, Tuple

from .cells import PLAIN, Styled, fit, width_of

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
"""Another screen, no cursor, nothing on it."""

_LEAVE = "\x1b[0m\x1b[999;1H\x1b[K\x1b[?25h\x1b[?1049l"
"""Also where there is no other screen: then what comes next is below ours."""
_CLEAR = "\x1b[2J"
_REST_OF_LINE = "\x1b[K"
_NORMAL = "\x1b[0m"

_FALLBACK = (80, 24)


@contextmanager
def _present() -> Iterator[None]:
    """A terminal that has hung up fails in several ways."""
    try:
        yield
    except (OSError, termios.error) as error:
        raise EOFError from error


def _set_attributes(fd: int, attributes: List[Any]) -> None:
    """In the background this process is stopped here; when it comes to the front the call has failed."""
    while True:
        try:
            termios.tcsetattr(fd, termios.TCSANOW, attributes)
            return
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


class Terminal:
    """Standard input and output, both of which are one; *encoding* is that of the output.

    Whatever is done raises `EOFError` if it is gone.
    """

    def __init__(self, encoding: str) -> None:
        self.keyboard = 0
        self._screen = 1
        self._encoding = encoding
        with _present():
            self._former: List[Any] = termios.tcgetattr(self.keyboard)
        self._is_ours = False

    def enter(self) -> None:
        """Make it ours."""
        self._is_ours = True
        ours = [*self._former[:6], list(self._former[6])]
        ours[0] &= ~termios.IXON  # Ctrl-S would have the next frame wait for ever
        ours[3] &= ~(termios.ICANON | termios.ECHO)
        ours[6][termios.VMIN], ours[6][termios.VTIME] = 1, 0
        with _present():
            _set_attributes(self.keyboard, ours)
        self._write(_ENTER)

    def leave(self) -> None:
        """Everything as it was."""
        if not self._is_ours:
            return
        with suppress(EOFError), _present():
            _set_attributes(self.keyboard, self._former)
            termios.tcflush(self._screen, termios.TCOFLUSH)  # a terminal that takes nothing is not waited for
            self._write(_LEAVE)
        self._is_ours = False

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

    def read(self) -> bytes:
        """What keys have sent."""
        with _present():
            data = os.read(self.keyboard, 1024)
        if not data:
            raise EOFError
        return data
