"""Probes of caching proxies: cold reads, the background copy, hits beside misses that wait."""

from __future__ import annotations

import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import List

from .errors import ProbeFailed
from .flavours import SLOW_RATE, XNBD_BGCTL
from .load import KIB, MIB, Load, nbdload
from .trial import PATIENCE, Sample, Trial, run_for_json


@dataclass(frozen=True)
class Cold:
    """Requests per second, or MB per second, of a client that asks for each block once.

    At most *most* bytes are read; 0: the whole disk.
    """

    op: str = "read"
    bytes: int = 256 * KIB
    depth: int = 8
    unit: str = "mb_per_s"
    most: int = 0

    def __call__(self, trial: Trial) -> Sample:
        sample = self.run(trial)
        return {"value": sample[self.unit], **sample}

    def run(self, trial: Trial) -> Sample:
        """What `nbdload` reports."""
        options = ["--once", "--op", self.op, "--bytes", self.bytes, "--depth", self.depth, "--seed", trial.round + 1]
        limit = ["--limit", self.most // self.bytes] if self.most else []
        sample: Sample = run_for_json(nbdload(trial, *map(str, options + limit)))
        return sample


@dataclass(frozen=True)
class ColdLatency:
    """Milliseconds that a random 4 KiB read takes whose block is not in the cache: the median of *count*."""

    count: int = 20

    def __call__(self, trial: Trial) -> Sample:
        sample = Cold("randread", bytes=4 * KIB, depth=1, most=self.count * 4 * KIB).run(trial)
        return {"value": sample["p50_us"] / 1e3, **sample}


@dataclass(frozen=True)
class Warmed:
    """What *load* measures when the whole disk was read before."""

    load: Load

    def __call__(self, trial: Trial) -> Sample:
        Cold().run(trial)
        return self.load(trial)


@dataclass(frozen=True)
class CacheAll:
    """How fast ``xnbd-bgctl --cache-all`` is, from its start to its end.

    *unit* is one of ``mb_per_s``, ``seconds`` and ``link_percent``, of the slow link's
    rate. Afterwards the proxy must be ready to become a target: no block is missing.
    """

    unit: str = "mb_per_s"

    def __call__(self, trial: Trial) -> Sample:
        start = time.perf_counter()
        _bgctl(trial, "--cache-all")
        seconds = time.perf_counter() - start
        fetched, speed = _bytes_fetched(trial), _disk_size(trial) / seconds / 1e6
        _bgctl(trial, "--switch")
        sample = {"seconds": seconds, "mb_per_s": speed, "link_percent": 100 * speed * 8 / SLOW_RATE}
        return {"value": sample[self.unit], **sample, "bytes_fetched": fetched}


@dataclass(frozen=True)
class FetchedShare:
    """How many times the disk's size a proxy fetches while a client reads the whole disk."""

    def __call__(self, trial: Trial) -> Sample:
        Cold().run(trial)
        fetched = _bytes_fetched(trial)
        return {"value": fetched / _disk_size(trial), "bytes_fetched": fetched}


@dataclass(frozen=True)
class HitLatency:
    """Microseconds that 99 of 100 random reads of cached blocks take at most.

    *pending* reads of the same client wait for blocks that are not cached, while the
    link to the origin is stalled.
    """

    depth: int
    pending: int = 0

    def __call__(self, trial: Trial) -> Sample:
        if trial.target.origin is None:
            raise ProbeFailed("this probe needs a proxy behind a relay")
        cached = ["--span", str(_disk_size(trial) // 2)]
        run_for_json(nbdload(trial, "--once", "--op", "read", "--bytes", str(MIB), "--depth", "4", *cached))
        waiting = ["--pending", str(self.pending)] if self.pending else []
        with trial.target.origin.suspended() if self.pending else nullcontext():
            sample: Sample = run_for_json(nbdload(trial, *cached, *waiting, *self._load(trial)))
        return {"value": sample["p99_us"], **sample}

    def _load(self, trial: Trial) -> List[str]:
        settings = trial.settings
        times = ["--seconds", settings.seconds, "--warmup", settings.warmup]
        return list(map(str, ["--depth", self.depth, *times, "--seed", trial.round + 1]))


def _bgctl(trial: Trial, *options: str) -> str:
    """What `xnbd-bgctl` prints."""
    command = [*XNBD_BGCTL, *options, str(trial.target.control_socket)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"xnbd-bgctl {options[0]} was stuck") from None
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise ProbeFailed(f"xnbd-bgctl {options[0]}: {said.splitlines()[-1]}")
    return done.stdout


def _bytes_fetched(trial: Trial) -> int:
    command = [*XNBD_BGCTL, "--query", "--json", str(trial.target.control_socket)]
    return int(run_for_json(command)["counters"]["bytes_fetched"])


def _disk_size(trial: Trial) -> int:
    uri = f"nbd://127.0.0.1:{trial.target.port}/{trial.target.export}"
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise ProbeFailed(f"nbdinfo: {done.stderr.strip()}")
    return int(done.stdout)
