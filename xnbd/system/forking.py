"""Forking: how every process of this program begins that is not another program.

No child takes a signal with a handler, or a wake-up pipe, that is its parent's, and
none gets back into what its parent was doing: it leaves through one ``os._exit``,
whatever happens in it.
"""

from __future__ import annotations

import os
import signal
from typing import Callable, NoReturn, Tuple

from ..logs import log
from .process import closed_on_error

HAND_OVER = signal.SIGRTMIN + 3
"""The master's order to a worker: let another process go on with the client (`server.handover`)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, HAND_OVER)
"""All for which processes of this program have handlers."""


def fork(role: str, live: Callable[[], int]) -> int:
    """Fork a child that runs *live* and leaves with the status that this returns; returns the child's process id.

    `SIGNALS` are blocked when *live* begins, until it calls `let_signals_in` or
    `reset_signals`: those sent to it meanwhile are kept. The log tells of a child that
    fails by its *role*. Raises `OSError` if there can be no more processes.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pid = os.fork()
        if not pid:
            _live(role, live)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def fork_with_pipe(role: str, live: Callable[[int], int]) -> Tuple[int, int]:
    """Fork like `fork`, with a pipe to the parent: *live* is given its writing end.

    Returns the child's process id, and the pipe's reading end, which breaks with the
    child. Raises `OSError`.
    """
    reading, writing = os.pipe()

    def close_and_live() -> int:
        os.close(reading)
        return live(writing)

    with closed_on_error(reading):
        try:
            return fork(role, close_and_live), reading
        finally:
            os.close(writing)


def _live(role: str, live: Callable[[], int]) -> NoReturn:
    status = 1
    try:
        status = live()
    except BaseException:
        log.exception("%s failed", role)
    finally:
        os._exit(status)


def let_signals_in() -> None:
    """For a child that has handlers of its own by now."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def reset_signals(*numbers: int) -> None:
    """For a child without a need of handlers: let signals in, *numbers* with what they do to any program."""
    signal.set_wakeup_fd(-1)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    let_signals_in()
