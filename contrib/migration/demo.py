#!/usr/bin/env python3
"""Move a virtual machine with its disk between two servers, both on this computer, and check every block.

Usage:
  demo.py [--disk MIB] [--seconds S] [--dir DIR] [--shared-storage]
  demo.py --help

Options:
  --disk MIB        Size of the machine's disk [default: 64].
  --seconds S       How long the machine works before, and how long after the move [default: 2].
  --dir DIR         Keep images, logs and consoles in DIR (a temporary directory).
  --shared-storage  Let the destination serve the source's image itself, in place of a proxy: the machine
                    moves, its disk stays.
  -h, --help        Show this text.

The machine is small and slow (qemu without KVM), and writes and checks its disk
without a pause. Exit status: 0 nothing was lost, 1 something was, or did not work.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, List, Tuple

import docopt

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "contrib" / "guest"), str(ROOT / "contrib" / "migration")]

from migrate import check_proxy, move_disk, move_machine
from workload import write_first_versions
from xnbdguest.errors import GuestError
from xnbdguest.initramfs import add_python, basic_system
from xnbdguest.machine import Guest
from xnbdguest.packages import fetch_packages

_PYTHON = os.environ.get("XNBD_PYTHON", sys.executable)
_START_TIME = 20.0
_STOP_TIME = 15.0
_STEP_TIME = 120.0


class Host:
    """One of the two: an xnbd-server on a port that is free."""

    def __init__(self, directory: Path, name: str, arguments: List[object]) -> None:
        self.log_path = directory / f"{name}.log"
        command = [_PYTHON, ROOT / "bin" / "xnbd-server", "--laddr", "127.0.0.1", "--lport", 0, *arguments]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)

    @property
    def port(self) -> int:
        """Where it listens, as its log says."""
        line = next(line for line in self.log_path.read_text().splitlines() if " INFO: serving " in line)
        return int(line.rpartition(":")[2])

    @property
    def drive(self) -> str:
        """The disk, as qemu's -drive takes it."""
        return f"file=nbd://127.0.0.1:{self.port},format=raw"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIME
        while "INFO: serving " not in self.log_path.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise GuestError(f"xnbd-server does not start:\n{self.log_path.read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_STOP_TIME)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def serving(directory: Path, name: str, *arguments: object) -> Iterator[Host]:
    host = Host(directory, name, list(arguments))
    try:
        host.wait_until_ready()
        yield host
    finally:
        host.stop()


def demonstrate(directory: Path, size: int, seconds: float, shared_storage: bool) -> None:
    """GuestError if anything is not as it should be. *size* of the disk is in bytes."""
    packages = fetch_packages()
    initramfs = _make_initramfs(directory)
    disk, cache, control = directory / "disk.img", directory / "cache.img", directory / "proxy.ctl"
    with open(disk, "wb") as file:
        write_first_versions(file, size)
    with ExitStack() as stack:
        source = stack.enter_context(serving(directory, "source", "--target", disk))
        here = stack.enter_context(Guest(directory, "A", packages, initramfs, disks=[source.drive]))
        here.run("python3 /workload.py /dev/vda /run/progress /run/result >/dev/console 2>&1 & echo $! >/run/pid")
        _work_for(here, seconds)

        if shared_storage:
            arguments: List[object] = ["--target", disk]
        else:
            arguments = ["--proxy", "127.0.0.1", source.port, cache, directory / "cache.bitmap", control]
        destination = stack.enter_context(serving(directory, "destination", *arguments))
        incoming = f"unix:{directory / 'incoming'}"
        guest = Guest(directory, "B", packages, initramfs, disks=[destination.drive], incoming=incoming)
        there = stack.enter_context(guest)
        there.qmp().close()
        _say(f"machine A has done {_progress(here)[0]} reads and writes on the source")

        bgctl = [_PYTHON, str(ROOT / "bin" / "xnbd-bgctl")]
        if not shared_storage:
            check_proxy(bgctl, str(control))
        began = time.monotonic()
        moved = move_machine(here.qmp_path, there.qmp_path, incoming)
        left_behind = _digest_of(disk)
        at_arrival = _progress(there)[0]
        _say(f"machine moved: it stood still for {moved.downtime:.3f} s, {moved.total:.3f} s in all")
        if not shared_storage:
            move_disk(bgctl, str(control))
            _say(f"disk moved: {time.monotonic() - began:.3f} s since the start of the migration")
            source.stop()
            _say("source stopped")
        _work_for(there, seconds)
        _say(f"machine B has done {_progress(there)[0] - at_arrival} reads and writes since its arrival")
        _compare(there, disk if shared_storage else cache)
        if not shared_storage and _digest_of(disk) != left_behind:
            raise GuestError("the source's image was written after the machine had left")
    _say("every block is right, in the machine and in the destination's image")


def _make_initramfs(directory: Path) -> Path:
    archive = basic_system(fetch_packages())
    add_python(archive)
    archive.add_file(Path(__file__).parent / "workload.py", "/workload.py")
    archive.write(directory / "initramfs")
    return directory / "initramfs"


def _progress(guest: Guest) -> Tuple[int, int]:
    """Operations done so far, and how many had a wrong result."""
    operations, errors = guest.output("cat /run/progress").split()
    return int(operations), int(errors)


def _work_for(guest: Guest, seconds: float) -> None:
    """Let the workload run; GuestError if it finds errors or makes no progress."""
    guest.run("until [ -e /run/progress ]; do kill -0 $(cat /run/pid) || exit 1; sleep 0.1; done", timeout=_STEP_TIME)
    before, errors = _progress(guest)
    operations, began = before, time.monotonic()
    while not errors and (elapsed := time.monotonic() - began) < _STEP_TIME:
        if elapsed >= seconds and operations > before:
            break
        time.sleep(min(0.5, seconds))
        guest.run("kill -0 $(cat /run/pid)")
        operations, errors = _progress(guest)
    if errors or operations == before:
        result = guest.run("kill $(cat /run/pid); sleep 2; cat /run/result", check=False)
        raise GuestError(f"guest {guest.name}: {operations - before} operations, {errors} errors\n{result.output}")


def _compare(guest: Guest, image: Path) -> None:
    """End the workload, which checks the whole disk, and compare the destination's *image* with what it says."""
    guest.run("kill $(cat /run/pid); while kill -0 $(cat /run/pid) 2>/dev/null; do sleep 0.1; done", timeout=_STEP_TIME)
    summary, *errors = guest.output("cat /run/result").splitlines()
    if errors:
        raise GuestError("the machine has read wrong blocks:\n" + "\n".join(errors))
    if _digest_of(image) != summary.split()[2]:
        raise GuestError(f"{image} is not what the machine has written")


def _digest_of(path: Path) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    arguments = docopt.docopt(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments["--dir"] or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        size = int(arguments["--disk"]) << 20
        try:
            demonstrate(directory, size, float(arguments["--seconds"]), arguments["--shared-storage"])
        except GuestError as error:
            print(f"demo.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
