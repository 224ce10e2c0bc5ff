"""Probes of a point-in-time copy: what clients that write get before it, meanwhile and afterwards."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Literal, Optional

from .errors import ProbeFailed
from .load import nbdload
from .trial import PATIENCE, Sample, Trial, run_for_json

_SLICE = 0.3
"""Seconds of one load, of which there are as many as fit while the copy is made."""

_DEPTH = 16

Take = Callable[[Trial], Sample]
"""Makes a copy of the whole disk and removes it; returns what is known of it."""


@dataclass(frozen=True)
class Writes:
    """Random 4 KiB writes, 16 in flight, at a time relative to the copy that *take* makes.

    *unit* is ``iops``, or ``p99_us`` for the time that 99 of 100 of them take at
    most, in the worst `_SLICE`, or all of it if it has no answer. When it is ``takes``,
    the value is the copy's own time, in seconds.
    """

    take: Take
    when: Literal["before", "during", "after", "takes"]
    unit: str = "iops"

    def __call__(self, trial: Trial) -> Sample:
        if self.when == "before":
            return self._summary(self._slices(trial, 3))
        copy = _Copy(self.take, trial)
        if self.when == "takes":
            during = self._slices(trial, 10_000, copy)
            return {**self._summary(during), **copy.result(), "value": copy.result()["seconds"]}
        if self.when == "during":
            return {**self._summary(self._slices(trial, 10_000, copy)), **copy.result()}
        copy.result()
        return self._summary(self._slices(trial, 3))

    def _slices(self, trial: Trial, most: int, during: Optional[_Copy] = None) -> List[Sample]:
        """At most so many loads one after the other; those that end *during* a copy, or the first if none does."""
        slices: List[Sample] = []
        for number in range(most):
            one = self._slice(trial, 1000 * trial.round + number + 1)
            if during is not None and during.is_done and slices:
                break
            slices.append(one)
        return slices

    def _slice(self, trial: Trial, seed: int) -> Sample:
        """One load; that nothing was answered in it is a result too."""
        options = ["--op", "randwrite", "--depth", _DEPTH, "--seconds", _SLICE, "--seed", seed]
        try:
            sample: Sample = run_for_json(nbdload(trial, *map(str, options)))
        except ProbeFailed as failure:
            if "no request was answered" not in str(failure):
                raise
            return {"iops": 0.0, "p99_us": _SLICE * 1e6}
        return sample

    def _summary(self, slices: List[Sample]) -> Sample:
        iops = sum(one["iops"] for one in slices) / len(slices)
        p99 = max(one["p99_us"] for one in slices)
        return {"value": iops if self.unit == "iops" else p99, "iops": iops, "p99_us": p99, "slices": len(slices)}


class _Copy:
    """A copy that is being made beside the load."""

    def __init__(self, take: Take, trial: Trial) -> None:
        self._take = take
        self._trial = trial
        self._outcome: Sample = {}
        self._failure: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Sample:
        self._thread.join(PATIENCE)
        if self._failure is not None:
            raise ProbeFailed(f"no copy: {self._failure}")
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._take(self._trial)
        except (OSError, ProbeFailed, KeyError) as error:
            self._failure = error


def take_xnbd(trial: Trial) -> Sample:
    """A snapshot, asked for as `xnbd-bgctl` does, without the time that its start takes."""
    for answer in _talk(trial.target.control_socket, {"command": "snapshot"}):
        if answer.get("error"):
            raise ProbeFailed(answer["error"])
        if answer.get("done"):
            os.unlink(answer["path"])
            return {"seconds": answer["seconds"], "held_ms": answer["held_ms"]}
    raise ProbeFailed("the control socket was closed")


def take_qemu(trial: Trial) -> Sample:
    """A full backup job of qemu: it, too, keeps old blocks while clients write."""
    target = trial.target.control_socket.with_name("backup.img")
    target.touch()
    os.truncate(target, trial.settings.image.stat().st_size)
    node = {"driver": "file", "node-name": "target", "filename": str(target)}
    job = {"job-id": "backup", "device": "disk", "target": "target", "sync": "full"}
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-add", "arguments": node},
        {"execute": "blockdev-backup", "arguments": job},
    ]
    began = time.perf_counter()
    for answer in _talk(trial.target.control_socket, *commands):
        error = answer.get("error") or answer.get("data", {}).get("error")
        if error:
            raise ProbeFailed(str(error))
        if answer.get("event") == "BLOCK_JOB_COMPLETED":
            target.unlink()
            return {"seconds": time.perf_counter() - began}
    raise ProbeFailed("the monitor was closed")


def _talk(path: Path, *messages: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Send *messages* to the Unix socket at *path*, a line of JSON each; the answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.sendall("".join(f"{json.dumps(message)}\n" for message in messages).encode())
        with sock.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
