"""What processes of the server take of the machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Dict, Iterable, NamedTuple, Optional

if TYPE_CHECKING:
    import psutil

_SHORTEST_INTERVAL = 0.5
"""Seconds: CPU time is counted in hundredths of a second, which says little about less."""


class Usage(NamedTuple):
    """What a process uses: *cpu_percent* of one processor, *cpu_seconds* since it began, and memory of its own."""

    cpu_percent: float
    cpu_seconds: float
    memory_bytes: int


class _Sample(NamedTuple):
    time: float
    cpu_seconds: float


class UsageMeter:
    """Measures the usage of processes, again and again."""

    def __init__(self) -> None:
        self._processes: Dict[int, psutil.Process] = {}
        self._samples: Dict[int, _Sample] = {}

    def usage(self, pids: Iterable[int]) -> Dict[int, Usage]:
        """The processes of *pids* that are there; those not asked for are forgotten.

        ``cpu_percent`` is of the time since the last call, in the first one since the
        process began. Memory takes some milliseconds per GiB that a process has mapped.
        """
        wanted = set(pids)
        for pid in set(self._processes) - wanted:
            self._forget(pid)
        found = ((pid, self._look_at(pid)) for pid in wanted)
        return {pid: usage for pid, usage in found if usage is not None}

    def _forget(self, pid: int) -> None:
        self._processes.pop(pid, None)
        self._samples.pop(pid, None)

    def _look_at(self, pid: int) -> Optional[Usage]:
        import psutil

        try:
            process = self._processes.get(pid)
            if process is None or not process.is_running():  # another one may have the number by now
                self._forget(pid)
                process = self._processes[pid] = psutil.Process(pid)
            times = process.cpu_times()
            used = times.user + times.system
            return Usage(self._percent(process, used), used, _own_memory(process))
        except psutil.Error:
            self._forget(pid)
            return None

    def _percent(self, process: psutil.Process, used: float) -> float:
        now = time.monotonic()
        before = self._samples.get(process.pid)
        if before is None:
            self._samples[process.pid] = _Sample(now, used)
            return _percentage(used, time.time() - process.create_time())
        if now - before.time >= _SHORTEST_INTERVAL:
            self._samples[process.pid] = _Sample(now, used)
        return _percentage(used - before.cpu_seconds, now - before.time)


def _percentage(used: float, elapsed: float) -> float:
    return round(100 * used / max(elapsed, 0.01), 1)


def _own_memory(process: psutil.Process) -> int:
    """Bytes of the process's anonymous memory, its share of what several have in common (``proc(5)``, PSS).

    Not psutil's USS or PSS: to those the mapped pages of the disk count, which
    are the kernel's page cache. Where the kernel does not say, what is not shared.
    """
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as account:
            sizes = dict(line.split(b":", 1) for line in account.readlines()[1:])
        return sum(int(sizes[name].split()[0]) << 10 for name in (b"Pss_Anon", b"SwapPss"))
    except (OSError, KeyError):
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
