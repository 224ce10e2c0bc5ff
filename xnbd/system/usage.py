"""What processes of the server take of the machine, and since when they are there.

It stands in ``/proc``. One line of numbers costs ten microseconds and says all but how much memory is a process's own.
That costs the kernel a quarter of a millisecond, so it is asked again only if that line says that something is new.
"""

from __future__ import annotations

import os
import time
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

_SHORTEST_INTERVAL = 0.5
"""Seconds: CPU time is counted in hundredths of a second, which says little about less."""

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")
_LONGEST_ACCOUNT = 4096


class Usage(NamedTuple):
    """What a process uses: *cpu_percent* of one processor, *cpu_seconds* since it began, and memory of its own."""

    cpu_percent: float
    cpu_seconds: float
    memory_bytes: int


class _Account(NamedTuple):
    """Of one process; *memory* is another one when its memory may be: page faults and resident pages."""

    began: int
    cpu_seconds: float
    memory: Tuple[bytes, bytes, bytes]


class UsageMeter:
    """Measures the usage of processes, again and again."""

    def __init__(self, most_looks: Optional[int] = None) -> None:
        """How much memory processes have is asked of so many at each measurement at most; None: of all."""
        self._most_looks = most_looks
        self._known: Dict[int, _Known] = {}

    def usage(self, pids: Iterable[int]) -> Dict[int, Usage]:
        """The processes of *pids* that are there and have had their turn; those not asked for are forgotten.

        ``cpu_percent`` is of the time since the last call, in the first one since the
        process began. Memory takes some milliseconds per GiB that a process has mapped.
        """
        accounts = {pid: account for pid, account in ((pid, _account(pid)) for pid in set(pids)) if account}
        known = {pid: self._known_as(pid, account) for pid, account in accounts.items()}
        self._known = known
        outdated = [pid for pid, account in accounts.items() if known[pid].memory_at != account.memory]
        for pid in sorted(outdated, key=lambda pid: known[pid].looked_at)[: self._most_looks]:
            known[pid].look(pid, accounts[pid])
        now = time.monotonic()
        return {
            pid: Usage(known[pid].percent(account, now), account.cpu_seconds, known[pid].memory)
            for pid, account in accounts.items()
            if known[pid].looked_at
        }

    def _known_as(self, pid: int, account: _Account) -> _Known:
        """What is known of it, unless that is of another process that had the number before."""
        known = self._known.get(pid)
        return known if known is not None and known.began == account.began else _Known(account.began)


class _Known:
    """What is known of one process from former measurements."""

    __slots__ = ("_cpu_seconds", "_time", "began", "looked_at", "memory", "memory_at")

    def __init__(self, began: int) -> None:
        self.began = began
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began / _TICKS
        self._time, self._cpu_seconds = time.monotonic() - age, 0.0
        self.memory, self.looked_at = 0, 0.0
        self.memory_at: Optional[Tuple[bytes, bytes, bytes]] = None

    def percent(self, account: _Account, now: float) -> float:
        used, elapsed = account.cpu_seconds - self._cpu_seconds, now - self._time
        if elapsed >= _SHORTEST_INTERVAL:
            self._time, self._cpu_seconds = now, account.cpu_seconds
        return round(100 * used / max(elapsed, 0.01), 1)

    def look(self, pid: int, account: _Account) -> None:
        """At its memory; nothing new is known of one that has just ended."""
        try:
            self.memory = _own_memory(pid)
        except (OSError, ValueError):
            return
        self.memory_at, self.looked_at = account.memory, time.monotonic()


def began(pid: int) -> float:
    """When the process began, whatever it has executed since, in seconds since the boot. Raises `OSError`."""
    return int(_fields(pid)[19]) / _TICKS


def _account(pid: int) -> Optional[_Account]:
    """None: there is no such process any more."""
    try:
        fields = _fields(pid)
    except OSError:
        return None
    if fields[0] in b"ZX":
        return None
    cpu_seconds = (int(fields[11]) + int(fields[12])) / _TICKS
    return _Account(int(fields[19]), cpu_seconds, (fields[7], fields[9], fields[21]))


def _fields(pid: int) -> List[bytes]:
    """Of ``/proc/PID/stat`` (``proc(5)``), from the state on: the name before it may have any bytes."""
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2].split(None, 22)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _LONGEST_ACCOUNT)
    finally:
        os.close(fd)


def _own_memory(pid: int) -> int:
    """Bytes of the process's anonymous memory, its share of what several have in common (``proc(5)``, PSS).

    Not USS or PSS: to those the mapped pages of the disk count, which are the kernel's page cache.
    Where the kernel does not say, what is not shared. Raises `OSError` if it has ended.
    """
    try:
        lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]
        sizes = dict(line.split(b":", 1) for line in lines)
        return sum(int(sizes[name].split()[0]) << 10 for name in (b"Pss_Anon", b"SwapPss"))
    except (OSError, KeyError):
        resident, shared = map(int, _read(f"/proc/{pid}/statm").split()[1:3])
        return (resident - shared) * _PAGE
