"""Snapshots of a running server: asked for, found, and held in the middle of the copying."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

from origin_programs import is_listening
from server_process import PYTHON, ROOT, Server, children_of, run, title_of, wait_until

from xnbd.scoreboard.layout import GATE
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.system.file_locks import RangeLocks


class Taken(NamedTuple):
    """A snapshot, and nanoseconds (monotonic) before it was asked for and after it was there."""

    path: Path
    asked_at: int
    there_at: int


def snapshots_of(image: Path) -> List[Path]:
    """Everything beside *image* that looks like a snapshot of anything."""
    return sorted(image.parent.glob("*.snapshot.*"))


def removed_files_of(server: Server, directory: Path) -> List[str]:
    """What the server's processes hold of files in *directory* without a name: others change the free space, too."""
    found = []
    for pid in [server.pid, *children_of(server.pid)]:
        with suppress(FileNotFoundError):
            targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH208 - read at once
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            targets += [line.split(maxsplit=5)[5] for line in maps if line.endswith("(deleted)")]
            found += [name for name in targets if name.startswith(f"{directory}/") and name.endswith("(deleted)")]
    return found


def take_by_signal(server: Server, image: Path) -> Taken:
    before = set(snapshots_of(image))
    asked_at = time.monotonic_ns()
    os.kill(server.pid, signal.SIGUSR1)
    wait_until(lambda: set(snapshots_of(image)) - before, "a snapshot", 30)
    there_at = time.monotonic_ns()
    (path,) = set(snapshots_of(image)) - before
    return Taken(path, asked_at, there_at)


def take_by_command(control: Path) -> Taken:
    asked_at = time.monotonic_ns()
    _, out, _ = bgctl("--snapshot", control)
    return Taken(Path(out.rstrip("\n")), asked_at, time.monotonic_ns())


def bgctl(*arguments: object, check: bool = True) -> tuple[int, str, str]:
    """Run xnbd-bgctl: status, output, error output. The last argument is a control socket, which is about to come."""
    wait_until(lambda: is_listening(Path(str(arguments[-1]))), "the control socket")
    return run(*bgctl_command(*arguments), check=check)


def bgctl_command(*arguments: object) -> List[str]:
    return [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl"), *map(str, arguments)]


def steward_of(server: Server) -> Optional[int]:
    return next((pid for pid in children_of(server.pid) if "steward" in title_of(pid)), None)


class Held:
    """A snapshot in the middle: all but the last 32 KiB of the disk may be copied already."""

    def __init__(self, steward: int, descriptor: Path, command: Optional[subprocess.Popen[bytes]]) -> None:
        self._steward = steward
        self._command = command
        self._bitmap = os.open(descriptor, os.O_RDWR)
        size = os.fstat(self._bitmap).st_size
        self._locks = RangeLocks(self._bitmap)
        assert self._locks.try_acquire(0, size), "copied before it could be held"

    @property
    def command(self) -> subprocess.Popen[bytes]:
        """The xnbd-bgctl that has asked for it."""
        assert self._command is not None
        return self._command

    @property
    def snapshotter(self) -> int:
        (pid,) = (pid for pid in children_of(self._steward) if "snapshot" in title_of(pid))
        return pid

    def let_workers_keep(self, blocks: int) -> None:
        """Free the locks of the first *blocks* blocks but for the first eight, at which the snapshotter waits."""
        self._locks.release(1, blocks // 8 - 1)

    def go_on(self) -> None:
        os.close(self._bitmap)
        self._bitmap = -1

    def close(self) -> None:
        if self._bitmap >= 0:
            self.go_on()


@contextmanager
def held_snapshot(server: Server, *, by: Optional[Path] = None) -> Iterator[Held]:
    """Ask for a snapshot, with SIGUSR1 or at the control socket *by*, and hold it once clients are not held any more.

    The disk is copied here, not cloned. The gate is kept shut for it until its bitmap
    has been seen: so the copying cannot be over before.
    """
    wait_until(lambda: steward_of(server) is not None, "the steward")
    steward = steward_of(server)
    assert steward is not None
    gate = os.open(_scoreboard_of(server), os.O_RDWR)
    scoreboard = Scoreboard(gate)
    command: Optional[subprocess.Popen[bytes]] = None
    held: Optional[Held] = None
    try:
        locks = RangeLocks(gate)
        wait_until(lambda: locks.try_acquire(GATE, 1), "the gate")
        if by is None:
            os.kill(server.pid, signal.SIGUSR1)
        else:
            wait_until(lambda: is_listening(by), "the control socket")
            command = subprocess.Popen(bgctl_command("--snapshot", by), stdout=-1, stderr=-1)
        wait_until(lambda: _find(steward, "xnbd-snapshot") is not None, "the snapshot's bitmap")
        held = Held(steward, _descriptor(steward, "xnbd-snapshot"), command)
        locks.release(GATE, 1)
        wait_until(lambda: scoreboard.snapshots.current is not None, "the snapshot's beginning")
        yield held
    finally:
        scoreboard.close()
        if held is not None:
            held.close()
        if command is not None:
            command.communicate(timeout=60)


@contextmanager
def shut_gate(server: Server) -> Iterator[None]:
    """Nobody works on requests meanwhile."""
    scoreboard = Scoreboard(os.open(_scoreboard_of(server), os.O_RDWR))
    try:
        with scoreboard.gate.closed(10):
            yield
    finally:
        scoreboard.close()


def _scoreboard_of(server: Server) -> Path:
    """A file of its own, or for a proxy one beside the bitmap."""
    scoreboard = _find(server.pid, ".board") or _find(server.pid, "xnbd-board")
    assert scoreboard is not None
    return scoreboard


def _descriptor(pid: int, name: str) -> Path:
    found = _find(pid, name)
    assert found is not None, f"process {pid} has no {name}"
    return found


def _find(pid: int, name: str) -> Optional[Path]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if name in os.readlink(link):
                return link
        except FileNotFoundError:
            pass
    return None
