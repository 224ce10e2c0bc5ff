"""Upgrades between builds of this tree, of which some have a made-up next scoreboard, or a next state file.

Two of one kind become each other and back. Between kinds an upgrade is refused before anything has happened,
whichever of them runs, and a restart does it.
"""

from __future__ import annotations

import random
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple

import pytest
from caching import CacheFiles, connect
from conftest import MIB, Start
from proxies import program as bgctl
from server_process import children_of, run, title_of, wait_until
from upgrades import build, parse
from wrapper_process import program

from xnbd import __version__
from xnbd.proxy.state.format import VERSION

NEXT = (
    "scoreboard/layout.py",
    '    Counter("bytes_fetched", "bytes fetched from the origin"),\n',
    '    Counter("bytes_fetched", "bytes fetched from the origin"),\n    Counter("made_up", "nothing", 2),\n',
)
"""The scoreboard of the next builds: each process counts something more."""

KINDS = ["target", "cow-target", "proxy", "wrapper"]


NEXT_STATE = [
    ("proxy/state/format.py", f"\nVERSION = {VERSION}\n", f"\nVERSION = {VERSION + 1}\n"),
    (
        "proxy/state/format.py",
        "    if parse is None:\n",
        "    parse = parse or _PARSERS[max(_PARSERS)]\n    if parse is None:\n",
    ),
]
"""A program that reads the state files of this one, and writes others."""


class Running(NamedTuple):
    """A server or wrapper of some build, and the command line that steers it with some options."""

    process: subprocess.Popen[bytes]
    uri: str
    steering: Callable[..., List[str]]

    def upgrade(self, path: Path) -> tuple[str, str, int, str]:
        """Versions, how many clients moved, and what is said of others."""
        outcome = parse(run(*self.steering("--upgrade", "--program", path))[1])
        return outcome.old, outcome.new, outcome.moved, outcome.rest

    def refuses(self, path: Path, *options: str) -> str:
        status, out, err = run(*self.steering("--upgrade", *options, "--program", path), check=False)
        assert (status, out) == (1, "")
        return err

    def settled(self) -> List[int]:
        """All its processes, when no more come and go."""
        found: List[int] = []

        def is_settled() -> bool:
            pids = sorted(children_of(self.process.pid))
            same = pids == found and not any("gives way" in title_of(pid) for pid in pids)
            found[:] = pids
            return same

        wait_until(is_settled, "an end of changes")
        return found


class Builds(NamedTuple):
    """Directories: of two with the next scoreboard, and of one with this tree's."""

    first: Path
    second: Path
    own: Path


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    directory = tmp_path_factory.mktemp("builds")
    made = [
        build(directory / "1", "99.0", NEXT),
        build(directory / "2", "99.1", NEXT),
        build(directory / "3", __version__),
    ]
    return Builds(*(path.parent for path in made))


class Place:
    """Where the builds are run; disks and files are in *directory*, and *origin* is for proxies."""

    def __init__(self, directory: Path, origin: str, kind: str) -> None:
        self._directory = directory
        self._image = directory / "disk.img"
        self._origin = origin
        self._kind = kind
        self.name = "xnbd-wrapper" if kind == "wrapper" else "xnbd-server"

    @contextmanager
    def running(self, path: Path) -> Iterator[Running]:
        sock, files, name = self._directory / "sock", CacheFiles(self._directory), ""
        words: List[object] = ["--unix", sock]
        steering = partial(self._steer_server, files.control)
        if self._kind == "wrapper":
            name, steering = "disk.img", partial(self._steer_wrapper, files.control)
            words += ["--socket", files.control, "--dbpath", self._directory / "db", "--imgfile", self._image]
        elif self._kind == "proxy":
            words += files.arguments(self._origin)
        else:
            words += ["--control", files.control, f"--{self._kind}", self._image]
        with subprocess.Popen([path, *map(str, words)], stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(files.control.exists, "the control socket")
                yield Running(process, f"nbd+unix:///{name}?socket={sock}", steering)
            finally:
                process.terminate()
                process.wait()

    def _steer_server(self, control: Path, *options: object) -> List[str]:
        return bgctl(*options, control)

    def _steer_wrapper(self, control: Path, *options: object) -> List[str]:
        return [*program("xnbd-wrapper-ctl"), "--socket", str(control), *map(str, options)]


@pytest.fixture
def place(start: Start, tmp_path: Path, kind: str) -> Place:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(5).randbytes(MIB))
    origin = start("--target", "--readonly", image).uri if kind == "proxy" else ""
    return Place(tmp_path, origin, kind)


@contextmanager
def unharmed(running: Running) -> Iterator[None]:
    """A client goes on, and sees what it has written."""
    client = connect(running.uri)
    client.pwrite(b"mine", 0)
    yield
    assert client.pread(4, 0) == b"mine"
    client.shutdown()


def check_refusals(running: Running, path: Path, reason: str) -> None:
    before = running.settled()
    for options in ([], ["--check"]):
        line = running.refuses(path, *options)
        assert f"{path} cannot go on with this " in line
        assert reason in line
        assert line.count("\n") == 1
    assert sorted(children_of(running.process.pid)) == before


@pytest.mark.parametrize("kind", ["target", "proxy", "wrapper"])
def test_builds_with_one_scoreboard_become_each_other_and_others_need_a_restart(place: Place, builds: Builds) -> None:
    first, second, own = (directory / place.name for directory in builds)
    with place.running(first) as running, unharmed(running):
        assert running.upgrade(second) == ("99.0", "99.1", 1, "")
        assert running.upgrade(first) == ("99.1", "99.0", 1, "")
        check_refusals(running, own, f": the scoreboard of {__version__} is another one than that of 99.0, ")
    with place.running(own) as running, unharmed(running):
        check_refusals(running, first, f": the scoreboard of 99.0 is another one than that of {__version__}, ")


@pytest.mark.parametrize("kind", ["proxy", "wrapper"])
def test_state_files_that_a_program_does_not_know_need_a_restart(place: Place, builds: Builds, tmp_path: Path) -> None:
    later = build(tmp_path / "later", "99.2", *NEXT_STATE, name=place.name)
    own = builds.own / place.name
    with place.running(later) as running, unharmed(running):
        check_refusals(running, own, f" version {VERSION + 1}, which ")
    if place.name == "xnbd-wrapper":  # which does not know its proxies' files
        with place.running(own) as running, unharmed(running):
            check_refusals(running, later, f" version {VERSION}, which only a restart can read")
