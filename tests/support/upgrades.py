"""Servers that become other programs: builds of this tree with other versions, and how often tests upgrade."""

from __future__ import annotations

import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from proxies import program as bgctl
from server_process import PYTHON, ROOT, run

UPGRADES = int(os.environ.get("XNBD_UPGRADES", "3"))
"""In a row, under clients that work."""

IDLE = int(os.environ.get("XNBD_IDLE", "100"))
"""Clients that do nothing meanwhile."""

LONGEST = 60 + IDLE / 5
"""Seconds that an upgrade may take on a computer that is busy with other work."""


class Outcome(NamedTuple):
    """What xnbd-bgctl says of an upgrade; *pause* in milliseconds."""

    old: str
    new: str
    moved: int
    pause: Optional[int]
    rest: str


_LINE = re.compile(r"(\S+) -> (\S+): (\d+) clients? moved(?:, longest pause (\d+) ms)?(.*)\n")


def upgrade(control: object, *options: object) -> Outcome:
    """Have the server at *control* become the next program; it has to work."""
    _, out, err = run(*bgctl("--upgrade", *options, control), timeout=LONGEST)
    assert err == ""
    return parse(out)


def parse(line: str) -> Outcome:
    """What a steering program prints of an upgrade."""
    found = _LINE.fullmatch(line)
    assert found is not None, line
    old, new, moved, pause, rest = found.groups()
    return Outcome(old, new, int(moved), None if pause is None else int(pause), rest)


def build(directory: Path, version: str, *changes: tuple[str, str, str], name: str = "xnbd-server") -> Path:
    """The program *name* of a copy of this tree that calls itself *version*.

    Each of *changes* is a file below xnbd/, a text that stands there once, and another one.
    """
    for part in ("bin", "xnbd"):
        shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    own = re.search(r'__version__ = "[^"]+"', (ROOT / "xnbd/__init__.py").read_text())
    assert own is not None
    edits = [("__init__.py", own[0], f'__version__ = "{version}"'), *changes]
    for path, before, after in edits:
        file = directory / "xnbd" / path
        assert file.read_text().count(before) == 1, (path, before)
        file.write_text(file.read_text().replace(before, after))
    for script in (directory / "bin").iterdir():
        script.write_text(script.read_text().replace("#!/usr/bin/env python3", f"#!{PYTHON}", 1))
    return directory / "bin" / name


STOPPED_STEWARD = (
    "server/steward/process.py",
    "        try:\n            loop = ProcessLoop(lifeline)\n",
    "        if os.environ.pop('XNBD_STOP', ''):\n"
    "            os.kill(os.getpid(), 19)\n"
    "        try:\n            loop = ProcessLoop(lifeline)\n",
)
"""For `build`: where XNBD_STOP is set a steward stops when it was forked, to be traced from the beginning."""


class Figures(NamedTuple):
    """What all processes of a server take: memory in MiB (shared memory counts once); descriptors of the first one."""

    memory: float
    descriptors: int

    @classmethod
    def of(cls, pid: int, others: List[int]) -> Figures:
        return cls(sum(map(memory_of, [pid, *others])) / 1024, descriptors_of(pid))


def descriptors_of(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def memory_of(pid: int) -> int:
    """KiB, the process's share of what it has with others."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1])
    return 0


def pauses(outcomes: List[Outcome]) -> str:
    """For the report of a long run."""
    return ", ".join(f"{outcome.moved} in {outcome.pause} ms" for outcome in outcomes)


@contextmanager
def upgrading(upgrade_once: Callable[[], Outcome]) -> Iterator[List[Outcome]]:
    """Upgrades follow each other all the while, `UPGRADES` at least; the outcomes, which are there at the end."""
    outcomes: List[Outcome] = []
    over = threading.Event()

    def work() -> None:
        while len(outcomes) < UPGRADES or not over.is_set():
            outcomes.append(upgrade_once())

    with ThreadPoolExecutor(1) as executor:
        worker = executor.submit(work)
        try:
            yield outcomes
        finally:
            over.set()
            worker.result()
    assert {outcome.rest for outcome in outcomes} == {""}, outcomes
    print(pauses(outcomes))
