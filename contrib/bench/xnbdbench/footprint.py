"""Probes of what a server takes while it has nothing to do: memory and CPU time."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List

import psutil

from .errors import ProbeFailed
from .load import MIB, idle_clients
from .servers import Server, wait_until
from .trial import Probe, Sample, Trial

SETTLE_TIME = 20.0
_LOOK_EVERY = 0.02


@dataclass(frozen=True)
class WorkerMemory:
    """MiB of memory that only it has (USS), of a process that serves an idle client."""

    clients: int = 8

    def __call__(self, trial: Trial) -> Sample:
        with idle_clients(trial, self.clients):
            _settle(trial.target)
            unique = [process.memory_full_info().uss / MIB for process in _serving(trial.target)]
        if not unique:
            raise ProbeFailed("no process has a client")
        return {"value": statistics.median(unique), "processes": len(unique)}


@dataclass(frozen=True)
class BusyMemory:
    """MiB of anonymous memory, without what is mapped of files, of the process that took most while *load* ran."""

    load: Probe

    def __call__(self, trial: Trial) -> Sample:
        most, done = 0.0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(_LOOK_EVERY):
                most = max([most, *(_anonymous(process.pid) for process in trial.target.processes())])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.load(trial)
        finally:
            done.set()
            watcher.join()
        return {"value": most}


def _anonymous(pid: int) -> float:
    """MiB; 0 if the process has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")) / 1024


@dataclass(frozen=True)
class IdleCpu:
    """Per cent of one CPU that a server takes with *clients* idle clients.

    From the scheduler's own account, in nanoseconds: the times that psutil reads
    count hundredths of a second per process, in which 1,000 workers can hide.
    """

    clients: int = 0
    seconds: float = 3.0

    def __call__(self, trial: Trial) -> Sample:
        with idle_clients(trial, self.clients) if self.clients else nullcontext():
            _settle(trial.target)
            before, start = cpu_seconds(trial.target), time.monotonic()
            time.sleep(self.seconds)
            used, elapsed = cpu_seconds(trial.target) - before, time.monotonic() - start
        return {"value": 100 * used / elapsed, "cpu_seconds": used}


def cpu_seconds(server: Server) -> float:
    """CPU time so far of all the server's threads that are still there."""
    return sum(_cpu_nanoseconds(process.pid) for process in server.processes()) / 1e9


def _cpu_nanoseconds(pid: int) -> int:
    total = 0
    for account in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(account.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            pass  # the thread has ended
    return total


def _settle(server: Server) -> None:
    """Wait until the server has done what connecting clients made it do."""

    def is_quiet() -> bool:
        before = cpu_seconds(server)
        time.sleep(0.2)
        return cpu_seconds(server) - before < 0.001

    wait_until(is_quiet, SETTLE_TIME)


def _serving(server: Server) -> List[psutil.Process]:
    """The processes that have a client's connection."""
    return [process for process in server.processes() if _has_client(process, server.port)]


def _has_client(process: psutil.Process, port: int) -> bool:
    connections: Any = getattr(process, "net_connections", None) or process.connections  # psutil before 6
    return any(
        connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in connections("tcp")
    )
