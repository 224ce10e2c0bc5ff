"""Who holds a lock on a file, as far as the system tells this user: for messages only."""

from __future__ import annotations

import os
from typing import Iterator, List, Set, Tuple

READ, WRITE = "READ", "WRITE"
"""Kinds of locks: shared and exclusive."""

_MOST = 5
_OURS = "xnbd-server"


def describe_holders(fd: int, start: int, count: int, kind: str, *, strangers: bool = False) -> str:
    """Who has a lock of this *kind* on some of these bytes of the file behind *fd*.

    If that cannot be known it is who has the file open, but for servers if only *strangers* are in question.
    """
    status, own = os.fstat(fd), os.getpid()
    pids = set(_lock_holders(status, start, start + count, kind))
    if not pids or min(pids) < 1:  # the table has no process for the lock of an open file
        pids |= {pid for pid in _users_of(status) if not (strangers and _name_of(pid).startswith(_OURS))}
    return _describe(pids - {own}) or "an unknown process"


def describe_strangers(fd: int, start: int, count: int) -> str:
    """Who has a shared lock on some of these bytes if that is no server for sure; else empty."""
    status = os.fstat(fd)
    pids = set(_lock_holders(status, start, start + count, READ))
    if not pids or min(pids) < 1:
        pids |= set(_users_of(status)) - {os.getpid()}
        if any(_name_of(pid).startswith(_OURS) for pid in pids):
            return ""
    return _describe(pids)


def _describe(pids: Set[int]) -> str:
    found = [f"process {pid} ({_name_of(pid)})" for pid in sorted(pids) if pid > 0]
    return ", ".join(found[:_MOST])


def _lock_holders(status: os.stat_result, start: int, stop: int, kind: str) -> Iterator[int]:
    """Process ids from ``/proc/locks`` (``proc_locks(5)``), less than 1 where it has none."""
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for row in _locks():
        if row[3:6:2] != [kind, place]:
            continue
        first, last = int(row[6]), stop if row[7] == "EOF" else int(row[7])
        if first < stop and start <= last:
            yield int(row[4])


def _locks() -> List[List[str]]:
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as table:
            return [line.split() for line in table if "->" not in line]
    except OSError:
        return []


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
