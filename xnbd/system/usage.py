"""What processes of the server take of the machine, and since when they are there.

It stands in ``/proc``. One line of numbers costs ten microseconds and says all but how much memory is a process's own.
That costs the kernel a quarter of a millisecond, so it is asked again only if that line says that something is new.
"""

from __future__ import annotations

import math
import os
from operator import attrgetter
from time import CLOCK_BOOTTIME, clock_gettime, monotonic, process_time
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


class UsageMeter:
    """Measures the usage of processes, again and again."""

    def __init__(self, most: float = math.inf) -> None:
        """One measurement takes *most* seconds of the processor, or little more."""
        self._most = most
        self._known: Dict[int, _Process] = {}

    def usage(self, pids: Iterable[int]) -> Dict[int, Usage]:
        """The processes of *pids* that are there; those not asked for are forgotten.

        If there is not the time for all, it is for those that have waited for longest. Of the others it is told what
        is known from former calls, if anything is. Memory takes some milliseconds per GiB that a process has mapped.
        """
        known = {pid: self._known.get(pid) or _Process(pid) for pid in set(pids)}
        self._known = known
        until = process_time() + self._most
        for process in sorted(known.values(), key=attrgetter("looked_at")):
            process.look()
            if process_time() > until:
                break
        return {pid: process.usage for pid, process in known.items() if process.usage is not None}


class _Process:
    """One process, as it was *looked_at* last (monotonic seconds)."""

    __slots__ = ("_began", "_changes", "_pid", "_sample", "looked_at", "usage")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begin(0)

    def _begin(self, began: int) -> None:
        """It is one of which nothing is known; *began* is as `_fields` has it."""
        self._began, self.looked_at = began, 0.0
        self._changes: Optional[Tuple[bytes, ...]] = None
        self._sample = began / _TICKS, 0.0
        self.usage: Optional[Usage] = None

    def look(self) -> None:
        """Again. Another process may have the number by now, or none."""
        try:
            fields = _fields(self._pid)
            if int(fields[19]) != self._began:
                self._begin(int(fields[19]))
            memory = self._memory((fields[7], fields[9], fields[21]))
        except (OSError, ValueError):
            self._begin(0)
            return
        self.looked_at = monotonic()
        used = (int(fields[11]) + int(fields[12])) / _TICKS
        self.usage = Usage(self._percent(used), used, memory)

    def _memory(self, changes: Tuple[bytes, ...]) -> int:
        """What it was at the last look, if page faults and resident pages, the *changes*, are what they were then."""
        if self.usage is not None and changes == self._changes:
            return self.usage.memory_bytes
        self._changes = changes
        return _own_memory(self._pid)

    def _percent(self, used: float) -> float:
        """Of the time since the look before, at the first one since the process began."""
        now = clock_gettime(CLOCK_BOOTTIME)
        then, before = self._sample
        if now - then >= _SHORTEST_INTERVAL:
            self._sample = now, used
        return round(100 * (used - before) / max(now - then, 0.01), 1)


def began(pid: int) -> float:
    """When the process began, whatever it has executed since, in seconds since the boot. Raises `OSError`."""
    return int(_fields(pid)[19]) / _TICKS


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
