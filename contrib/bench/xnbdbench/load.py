"""Probes that drive a server: requests of `nbdload` and of fio, first reads, idle clients beside busy ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, List

from .errors import ProbeFailed
from .servers import wait_until
from .trial import PATIENCE, Sample, Trial, run_for_json

KIB = 1024
MIB = 1024 * KIB

_SPARE_PROCESSES = 8
"""By which the number of an idle server's processes may vary."""


@dataclass(frozen=True)
class Load:
    """Requests per second, or MB per second, that `nbdload` gets answered."""

    op: str = "randread"
    bytes: int = 4 * KIB
    depth: int = 1
    connections: int = 1
    unit: str = "iops"

    def __call__(self, trial: Trial) -> Sample:
        settings = trial.settings
        options = {
            "--op": self.op,
            "--bytes": self.bytes,
            "--depth": self.depth,
            "--connections": self.connections,
            "--seconds": settings.seconds,
            "--warmup": settings.warmup,
            "--seed": trial.round + 1,
        }
        sample: Sample = run_for_json(nbdload(trial, *[str(word) for pair in options.items() for word in pair]))
        return {"value": sample[self.unit], **sample}


@dataclass(frozen=True)
class FirstSecond:
    """What *load* measures in the first second of a new server, beginning with its first request."""

    load: Load

    def __call__(self, trial: Trial) -> Sample:
        return self.load(trial._replace(settings=trial.settings._replace(seconds=1.0, warmup=0.0)))


@dataclass(frozen=True)
class Filled:
    """What *load* measures after the whole disk was written once."""

    load: Load

    def __call__(self, trial: Trial) -> Sample:
        uri = f"nbd://127.0.0.1:{trial.target.port}/{trial.target.export}"
        filled = subprocess.run(["nbdcopy", str(trial.settings.image), uri], timeout=PATIENCE, capture_output=True)
        if filled.returncode:
            raise ProbeFailed(f"nbdcopy: {filled.stderr.decode(errors='replace').strip()}")
        return self.load(trial)


@dataclass(frozen=True)
class Fio:
    """Requests per second of fio's nbd engine, 4 KiB random reads."""

    depth: int

    def __call__(self, trial: Trial) -> Sample:
        settings = trial.settings
        command = [
            "fio",
            "--name=bench",
            "--thread",
            "--ioengine=nbd",
            f"--uri=nbd://127.0.0.1:{trial.target.port}/{trial.target.export}",
            "--rw=randread",
            "--bs=4k",
            f"--iodepth={self.depth}",
            "--norandommap",
            f"--randseed={trial.round + 1}",
            "--time_based",
            f"--runtime={settings.seconds * 1e3:.0f}ms",
            f"--ramp_time={settings.warmup * 1e3:.0f}ms",
            "--output-format=json",
        ]
        job = run_for_json(command)["jobs"][0]
        read = job["read"]
        if job["error"] or not read["total_ios"]:
            raise ProbeFailed(f"fio: error {job['error']}, {read['total_ios']} requests")
        latency = read["clat_ns"]
        return {
            "value": read["iops"],
            "requests": read["total_ios"],
            "p50_us": latency["percentile"]["50.000000"] / 1e3,
            "p99_us": latency["percentile"]["99.000000"] / 1e3,
        }


@dataclass(frozen=True)
class FirstRead:
    """Milliseconds from connect() to the first 4 KiB: the median of *count* clients, one after the other."""

    count: int = 40
    pause: float = 0.005

    def __call__(self, trial: Trial) -> Sample:
        sample: Sample = run_for_json(nbdload(trial, "--first", str(self.count), "--pause", str(self.pause)))
        return {"value": sample["median_ms"], **sample}


@dataclass(frozen=True)
class Crowded:
    """What *load* measures while *idle* more clients are connected and silent."""

    load: Load
    idle: int

    def __call__(self, trial: Trial) -> Sample:
        with idle_clients(trial, self.idle):
            return self.load(trial)


@dataclass(frozen=True)
class Beside:
    """What *load* measures while a loop of low priority (nice 10) runs on each processor."""

    load: Load

    def __call__(self, trial: Trial) -> Sample:
        loop = ["nice", "-n", "10", sys.executable, "-c", "while True: pass"]
        neighbours = [subprocess.Popen(loop, stdin=subprocess.DEVNULL) for _ in range(os.cpu_count() or 1)]
        try:
            return self.load(trial)
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()


def nbdload(trial: Trial, *options: str) -> List[str]:
    """The command line of nbdload against the trial's server."""
    server = trial.target
    tls = ["--tls", str(server.certificates)] if server.certificates else []
    return [str(trial.settings.nbdload), *options, *tls, "--export", server.export, "127.0.0.1", str(server.port)]


@contextmanager
def idle_clients(trial: Trial, count: int) -> Iterator[None]:
    """*count* negotiated connections that say nothing; at the end the server has got rid of their workers."""
    processes_before = len(trial.target.processes())
    holder = subprocess.Popen(
        nbdload(trial, "--idle", str(count)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdin and holder.stdout
        opened = holder.stdout.readline()
        if not opened or json.loads(opened)["idle"] != count:
            raise ProbeFailed(f"could not open {count} idle connections")
        yield
        holder.stdin.close()
        if holder.wait(PATIENCE):
            raise ProbeFailed("an idle connection broke")
    finally:
        holder.kill()
        holder.wait()
        for stream in (holder.stdin, holder.stdout):
            if stream:
                stream.close()
    if not wait_until(lambda: len(trial.target.processes()) <= processes_before + _SPARE_PROCESSES, PATIENCE):
        raise ProbeFailed("workers of clients that left are still there")
