"""The system's table of locks, ``/proc/locks`` (``proc_locks(5)``): all record locks on a file, of whatever process."""

from __future__ import annotations

import os
from typing import List, NamedTuple

READ, WRITE = "READ", "WRITE"
"""Kinds of locks: shared and exclusive."""

_OPEN_FILE = "OFDLCK"
_RECORD_LOCKS = (_OPEN_FILE, "POSIX")
_FIELDS = 8  # one more has who waits for a lock


class HeldLock(NamedTuple):
    """A lock of this *kind* on the bytes from *first* to *last*. One of an open file is no process's: *pid* is < 1."""

    kind: str
    open_file: bool
    pid: int
    first: int
    last: int


def locks_of(fd: int) -> List[HeldLock]:
    """The locks on the file behind *fd*, this process's included. Raises `OSError` if there is no table.

    A file is told by its inode, and by the device if that is what ``stat(2)`` says, which is not so everywhere.
    """
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii", errors="replace") as table:
        rows = [line.split() for line in table if f":{status.st_ino} " in line]
    rows = [row for row in rows if len(row) == _FIELDS and row[1] in _RECORD_LOCKS]
    return [_parse(row) for row in [row for row in rows if row[5] == place] or rows]


def _parse(row: List[str]) -> HeldLock:
    last = (1 << 63) - 1 if row[7] == "EOF" else int(row[7])
    return HeldLock(row[3], row[1] == _OPEN_FILE, int(row[4]), int(row[6]), last)
