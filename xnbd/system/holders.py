"""Who holds a lock on a file, as far as the system tells this user: for messages only."""

from __future__ import annotations

import os
from typing import Iterator, List, Set, Tuple

from .lock_table import READ, locks_of

_MOST = 5
_OURS = "xnbd-server"


def describe_holders(fd: int, start: int, count: int, kind: str, *, strangers: bool = False) -> str:
    """Who has a lock of this *kind* on some of these bytes of the file behind *fd*.

    If that cannot be known it is who has the file open, but for servers if only *strangers* are in question.
    """
    status, own = os.fstat(fd), os.getpid()
    pids = _lock_holders(fd, start, count, kind)
    if not pids or min(pids) < 1:  # the table has no process for the lock of an open file
        pids |= {pid for pid in _users_of(status) if not (strangers and _name_of(pid).startswith(_OURS))}
    return _describe(pids - {own}) or "an unknown process"


def describe_strangers(fd: int, start: int, count: int) -> str:
    """Who has a shared lock on some of these bytes if that is no server for sure; else empty."""
    status = os.fstat(fd)
    pids = _lock_holders(fd, start, count, READ)
    if not pids or min(pids) < 1:
        pids |= set(_users_of(status)) - {os.getpid()}
        if any(_name_of(pid).startswith(_OURS) for pid in pids):
            return ""
    return _describe(pids)


def _describe(pids: Set[int]) -> str:
    found = [f"process {pid} ({_name_of(pid)})" for pid in sorted(pids) if pid > 0]
    return ", ".join(found[:_MOST])


def _lock_holders(fd: int, start: int, count: int, kind: str) -> Set[int]:
    """Process ids, less than 1 where the table has none; empty where there is no table."""
    try:
        locks = locks_of(fd)
    except OSError:
        return set()
    return {lock.pid for lock in locks if lock.kind == kind and lock.first < start + count and start <= lock.last}


def _users_of(status: os.stat_result) -> Iterator[int]:
    for pid in _numbers("/proc"):
        if (status.st_dev, status.st_ino) in _open_files(pid):
            yield pid


def _open_files(pid: int) -> Set[Tuple[int, int]]:
    """Devices and inodes; nothing of another user's process, or one that has just ended."""
    try:
        found = [os.stat(f"/proc/{pid}/fd/{number}") for number in _numbers(f"/proc/{pid}/fd")]
    except OSError:
        return set()
    return {(status.st_dev, status.st_ino) for status in found}


def _numbers(directory: str) -> List[int]:
    with os.scandir(directory) as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def _name_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "it has ended"
