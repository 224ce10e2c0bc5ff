"""Whose turn it is to change what a disk's files mean: one command at a time.
 The scoreboard says which command is under way. If one stands there and nobody has the lock `COMMAND`, its process
has died in the middle, and a steward has to make scoreboard and files agree.
"""

from __future__ import annotations

import mmap
import os

from ..system.file_locks import RangeLocks
from .layout import COMMAND, HEAD, put
from .lines import text_of

_AT, _FORM = HEAD.at["command"], HEAD.form["command"]


class CommandTurn:
    """The turn, for a process of the PID namespace *namespace*."""

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, namespace: int) -> None:
        self._map = memory
        self._locks = locks
        self._namespace = namespace

    def begin(self, name: str) -> bool:
        """Take the turn of the command *name*, unless another process has it; the same process must not ask twice."""
        if not self._locks.try_acquire(COMMAND, 1):
            return False
        put(self._map, _AT, _FORM, os.getpid(), self._namespace, name.encode())
        return True

    def end(self, *, whole: bool) -> None:
        """Unless it is *whole*, scoreboard and files may not agree, and that stays noted."""
        if whole:
            put(self._map, _AT, _FORM, 0, 0, b"")
        self._locks.release(COMMAND, 1)

    @property
    def command(self) -> str:
        """The command that is under way, or was when its process died, and that process; empty for none."""
        pid, namespace, name = _FORM.unpack_from(self._map, _AT)
        if not pid:
            return ""
        elsewhere = "" if namespace == self._namespace else " of another PID namespace (container)"
        return f"{text_of(name)} by process {pid}{elsewhere}"
