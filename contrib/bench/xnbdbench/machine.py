"""What the numbers depend on: the machine and the versions of all programs."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterable, List

import psutil

from .flavours import FLAVOURS

_TOOLS = [["fio", "--version"], ["cc", "--version"]]


def describe_machine() -> Dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def describe_versions(flavours: Iterable[str]) -> Dict[str, str]:
    """By program, whose name is the last word of the command before the option."""
    versions = [FLAVOURS[name].version for name in flavours if FLAVOURS[name].version]
    commands = {Path(command[-2]).name: command for command in [*versions, *_TOOLS]}
    return {name: _first_line(command) for name, command in commands.items()}


def foreign_load(seconds: float = 1.0) -> float:
    """Per cent of all CPUs that other work takes just now, other machines' on the same host (steal) included."""
    return float(psutil.cpu_percent(seconds))


class StealClock:
    """How much of the CPU time the host gives to others."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def percent(self) -> float:
        """Of all CPU time since the clock was made."""
        passed = [now - before for now, before in zip(psutil.cpu_times(), self._before)]
        stolen = psutil.cpu_times().steal - self._before.steal
        return float(100 * stolen / max(sum(passed), 0.01))


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _first_line(command: List[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30
        )
    except OSError:
        return "not installed"
    return next(iter(done.stdout.splitlines()), "unknown").strip()
