"""What a probe is given and what it returns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from .errors import ProbeFailed
from .servers import Server

PATIENCE = 120.0
"""Seconds after which a load generator is taken for stuck."""

Sample = Dict[str, Any]
"""``value``, in the unit of the measurement, and whatever else is worth keeping."""


class Settings(NamedTuple):
    """What all probes of a run share; times in seconds."""

    image: Path
    nbdload: Path
    rounds: int
    seconds: float
    warmup: float


class Trial(NamedTuple):
    """One sample to take; ``server`` is None for probes that start their own process."""

    settings: Settings
    server: Optional[Server]
    round: int

    @property
    def target(self) -> Server:
        if self.server is None:
            raise ProbeFailed("this probe needs a server")
        return self.server


Probe = Callable[[Trial], Sample]


def run_for_json(command: List[str]) -> Any:
    """Run a load generator and parse what it prints from the first brace on; raises ProbeFailed if it complains."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"{command[0]} was stuck") from None
    if done.returncode:
        message = done.stderr.strip() or f"status {done.returncode}"
        raise ProbeFailed(message.splitlines()[-1])
    try:
        return json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise ProbeFailed(f"{command[0]} printed no JSON: {done.stdout[:200]!r}") from None
