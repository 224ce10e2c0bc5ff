"""Signals of a program that has the terminal.

Those that end it raise `Ended` wherever the program is, so that a write to a terminal that takes nothing ends, too; the
first one does, and all others are ignored then. Those that it goes on after wake it by ``fd``.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager
from typing import Iterator, NoReturn, Set

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RESIZED, STOPPED, CONTINUED = signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT
_NEWS = (RESIZED, STOPPED, CONTINUED)


class Ended(BaseException):
    """The signal *number* says so."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def die(self) -> NoReturn:
        """As others do who have that signal."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(self.number, signal.SIG_DFL)
        os.kill(os.getpid(), self.number)
        raise AssertionError("a signal that ends this process has not")


class Signals:
    """To be `heeded` once; what is ignored when that begins stays so."""

    def __init__(self) -> None:
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        self._reader, self._writer = reader, writer

    def fileno(self) -> int:
        """Has input when there is something to `take`."""
        return self._reader.fileno()

    @contextmanager
    def heeded(self) -> Iterator[None]:
        former = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.getsignal(number) for number in (*_ENDINGS, *_NEWS)}
        for number, handler in handlers.items():
            if number in (RESIZED, CONTINUED) or handler is not signal.SIG_IGN:
                signal.signal(number, _end if number in _ENDINGS else _note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                if signal.getsignal(number) in (_end, _note):
                    signal.signal(number, handler)
            signal.set_wakeup_fd(former)
            self._reader.close()
            self._writer.close()

    def take(self) -> Set[int]:
        """The signals that have come."""
        try:
            return set(self._reader.recv(4096))
        except BlockingIOError:
            return set()


def stop() -> None:
    """Stop as Ctrl-Z does, until somebody lets this process go on."""
    former = signal.signal(STOPPED, signal.SIG_DFL)
    os.kill(os.getpid(), STOPPED)
    signal.signal(STOPPED, former)


def _note(_number: int, _frame: object) -> None:
    """Python has written it to ``fd``."""


def _end(number: int, _frame: object) -> None:
    for other in _ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    raise Ended(number)
