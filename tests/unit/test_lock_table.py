"""What the system's table tells of the locks on one file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from xnbd.system.file_locks import RangeLocks, SharedLocks
from xnbd.system.holders import describe_holders
from xnbd.system.lock_table import READ, WRITE, locks_of


def test_record_locks_of_a_file_are_told_and_no_others(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    fds = [os.open(name, os.O_RDWR | os.O_CREAT) for name in (path, path, path, other)]
    try:
        assert locks_of(fds[0]) == []
        SharedLocks(fds[0]).acquire(7)
        RangeLocks(fds[1]).acquire(100, 50)
        fcntl.flock(fds[0], fcntl.LOCK_EX)
        fcntl.lockf(fds[2], fcntl.LOCK_EX, 0, 1000)
        RangeLocks(fds[3]).acquire(0, 1)
        found = sorted(locks_of(fds[2]), key=lambda lock: lock.first)
        assert [(lock.kind, lock.first, lock.last, lock.open_file) for lock in found] == [
            (READ, 7, 7, True),
            (WRITE, 100, 149, True),
            (WRITE, 1000, (1 << 63) - 1, False),
        ]
        assert [lock.pid > 0 for lock in found] == [False, False, True]
        assert describe_holders(fds[0], 2000, 1, WRITE) == "an unknown process"  # it is this one's
    finally:
        for fd in fds:
            os.close(fd)
