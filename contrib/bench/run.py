#!/usr/bin/env python3
"""Measure xnbd-server against nbdkit, qemu-nbd and nbd-server on this machine.

Usage:
  run.py [--quick] [--only NAME]... [--rounds N] [--seconds S] [--size MIB] [--dir DIR] [--json FILE] [--plot FILE]
  run.py --show FILE [--plot FILE]
  run.py --list
  run.py --help

Options:
  --quick        Less exact, a third of the time: 3 rounds of 0.3 s, a 256 MiB image.
  --only NAME    Measure this only; may be a pattern (fio-*) and be given several times.
  --rounds N     Samples of each server in each measurement (7).
  --seconds S    Time per sample of load (0.6).
  --size MIB     Size of the image, random data (1024).
  --dir DIR      Where to make the image (/dev/shm if it has room).
  --json FILE    Write samples, medians, machine and versions to FILE.
  --plot FILE    Draw a picture into FILE (needs matplotlib).
  --show FILE    Do not measure; show (and plot) what --json has written to FILE.
  --list         List the measurements.
  -h, --help     Show this text.

Exit status: 0 all was measured, whether targets are reached or not; 1 something
could not be measured; 2 wrong usage.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Tuple

import docopt
from xnbdbench import machine, plot, setting_up
from xnbdbench.certificates import make_certificates
from xnbdbench.errors import BenchmarkError, UsageError
from xnbdbench.flavours import use_tls
from xnbdbench.load import Fio
from xnbdbench.measurements import MEASUREMENTS, Measurement, flavours_of
from xnbdbench.report import format_report
from xnbdbench.results import Result
from xnbdbench.rounds import measure
from xnbdbench.servers import Fleet
from xnbdbench.trial import Settings

_NOISY = 10.0
_QUICK = {"--rounds": "3", "--seconds": "0.3", "--size": "256"}
_FULL = {"--rounds": "7", "--seconds": "0.6", "--size": "1024"}
_WARMUP_SHARE = 0.25


class Plan(NamedTuple):
    """What the command line asks for; ``size`` is in bytes."""

    measurements: List[Measurement]
    rounds: int
    seconds: float
    size: int
    directory: Optional[str]


def main() -> int:
    try:
        arguments = docopt.docopt(__doc__)
    except docopt.DocoptExit as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if arguments["--list"]:
            print("\n".join(f"{one.name:15} {one.title}" for one in MEASUREMENTS))
            return 0
        results, about = _load(arguments["--show"]) if arguments["--show"] else _run(_plan(arguments))
        if arguments["--json"]:
            _save(Path(arguments["--json"]), results, about)
        print(format_report(results, about))
        if arguments["--plot"]:
            plot.draw(results, about, Path(arguments["--plot"]))
    except BenchmarkError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 1 if any(result.failures for result in results) else 0


def _plan(arguments: Dict[str, Any]) -> Plan:
    defaults = _QUICK if arguments["--quick"] else _FULL
    chosen = {option: arguments[option] or default for option, default in defaults.items()}
    try:
        rounds, seconds, mebibytes = int(chosen["--rounds"]), float(chosen["--seconds"]), int(chosen["--size"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    if rounds < 1 or not 0 < seconds <= 60 or mebibytes < 8:
        raise UsageError("--rounds must be 1 or more, --seconds at most 60, --size 8 or more")
    return Plan(_select(arguments["--only"]), rounds, seconds, mebibytes << 20, arguments["--dir"])


def _select(patterns: List[str]) -> List[Measurement]:
    for pattern in patterns:
        if not fnmatch.filter([one.name for one in MEASUREMENTS], pattern):
            raise UsageError(f"no measurement is called {pattern}: see --list")
    return [one for one in MEASUREMENTS if not patterns or any(fnmatch.fnmatch(one.name, p) for p in patterns)]


def _run(plan: Plan) -> Tuple[List[Result], Dict[str, Any]]:
    flavours = flavours_of(plan.measurements)
    setting_up.require_programs(flavours, fio=_uses_fio(plan.measurements))
    nbdload = setting_up.compile_programs(flavours)
    parent = setting_up.choose_directory(plan.directory, plan.size + setting_up.room_besides(flavours, plan.size))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    about = _describe(plan, parent)
    clock = machine.StealClock()
    with tempfile.TemporaryDirectory(prefix="xnbd-bench-", dir=parent) as name:
        directory = Path(name)
        image = directory / "disk.img"
        setting_up.make_image(image, plan.size)
        if use_tls(flavours):
            make_certificates(directory / "certificates")
        settings = Settings(image, nbdload, plan.rounds, plan.seconds, plan.seconds * _WARMUP_SHARE)
        with Fleet(image, directory) as fleet:
            results = measure(plan.measurements, fleet, settings)
    about["stolen_percent"] = clock.percent()
    return results, about


def _describe(plan: Plan, directory: Path) -> Dict[str, Any]:
    """What a reader of the numbers has to know."""
    foreign_load = machine.foreign_load()
    if foreign_load > _NOISY:
        print(f"run.py: other work takes {foreign_load:.0f} % of this machine: expect noise", file=sys.stderr)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(flavours_of(plan.measurements)),
        "settings": {
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "image_bytes": plan.size,
            "directory": str(directory),
        },
        "foreign_load_percent": foreign_load,
    }


def _uses_fio(measurements: List[Measurement]) -> bool:
    return any(isinstance(contender.probe, Fio) for one in measurements for contender in one.contenders.values())


def _leave(number: int, _frame: Optional[FrameType]) -> NoReturn:
    """So that a run that is told to end stops its servers and removes its image, as with Ctrl-C."""
    sys.exit(128 + number)


def _save(path: Path, results: List[Result], about: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {**about, "results": [result.to_json() for result in results]}
    path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(name: str) -> Tuple[List[Result], Dict[str, Any]]:
    try:
        stored = json.loads(Path(name).read_text(encoding="utf-8"))
        results = [Result.from_json(one) for one in stored.pop("results")]
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"cannot use {name}: {error}") from error
    return results, stored


if __name__ == "__main__":
    sys.exit(main())
