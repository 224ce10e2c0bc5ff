"""Waiting for descriptors, on a computer that is short of memory for a moment, and reading what is there."""

from __future__ import annotations

import os
import select
import time
from typing import List, Optional, Tuple

_PAUSE = 0.1


def poll_patiently(poll: select.poll, timeout: Optional[float] = None) -> List[Tuple[int, int]]:
    """What ``poll.poll(timeout)`` returns; nothing, after a pause, if that fails, as for want of memory.

    For a loop that must not end. *timeout* is in milliseconds. Whoever calls has to be
    ready for nothing before its time.
    """
    try:
        return poll.poll(timeout)
    except OSError:
        pass
    time.sleep(_PAUSE if timeout is None else min(_PAUSE, timeout / 1000))
    return []


def read_pipe(fd: int, length: int) -> bytes:
    """At most *length* bytes of what a non-blocking pipe holds."""
    try:
        return os.read(fd, length)
    except BlockingIOError:
        return b""
