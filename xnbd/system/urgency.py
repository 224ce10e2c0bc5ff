"""Moments in which somebody waits for this process alone."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import Iterator

_AHEAD = 10
"""Steps of ``nice(2)``: each of them is a quarter more of the processor, and an earlier turn after a sleep."""


@contextmanager
def urgent() -> Iterator[None]:
    """Go ahead of processes that are not urgent, if the system lets this one: root's do, others by ``RLIMIT_NICE``."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, usual - _AHEAD)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, usual)
