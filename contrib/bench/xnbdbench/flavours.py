"""The servers that are measured: one entry of `FLAVOURS` each.

A peer runs with the best of its ordinary settings. All serve the same image on
127.0.0.1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
"""The checkout under test."""

XNBD_SERVER = [sys.executable, str(ROOT / "bin" / "xnbd-server")]


class Place(NamedTuple):
    """Where a server works: its TCP port, and a directory of its own for what it needs besides the image."""

    image: Path
    port: int
    directory: Path

    @property
    def pid_file(self) -> Path:
        """Written by servers that go into the background."""
        return self.directory / "pid"


class Flavour(NamedTuple):
    """A way to run a server.

    ``command`` makes its command line and writes what that needs into the place's
    directory. ``fresh`` gives every sample a new process in an empty directory, for
    servers that remember what they have done. ``daemon`` is for those that cannot
    stay in the foreground: they write ``Place.pid_file``.
    """

    command: Callable[[Place], List[str]]
    version: List[str]
    package: str = ""
    export: str = ""
    fresh: bool = False
    daemon: bool = False


def _xnbd(place: Place) -> List[str]:
    listening = ["--laddr", "127.0.0.1", "--lport", str(place.port)]
    return [*XNBD_SERVER, "--target", "--quiet", *listening, str(place.image)]


def _nbdkit(place: Place) -> List[str]:
    return ["nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", str(place.port), "file", str(place.image)]


def _qemu_nbd(place: Place) -> List[str]:
    disk = ["--format=raw", "--cache=writeback", "--aio=threads", str(place.image)]
    return ["qemu-nbd", "--persistent", "--shared=64", "--bind=127.0.0.1", f"--port={place.port}", *disk]


def _xnbd_cow(place: Place) -> List[str]:
    listening = ["--laddr", "127.0.0.1", "--lport", str(place.port)]
    return [*XNBD_SERVER, "--cow-target", "--quiet", *listening, "--cow-dir", str(place.directory), str(place.image)]


def _nbdkit_cow(place: Place) -> List[str]:
    listening = ["--ipaddr", "127.0.0.1", "--port", str(place.port)]
    command = ["nbdkit", "--foreground", *listening, "--filter=cow", "file", str(place.image)]
    return ["env", f"TMPDIR={place.directory}", *command]


def _qemu_nbd_snapshot(place: Place) -> List[str]:
    return ["env", f"TMPDIR={place.directory}", *_qemu_nbd(place), "--snapshot"]


def _nbd_server(place: Place) -> List[str]:
    config = place.directory / "config"
    config.write_text(
        f"[generic]\n\tlistenaddr = 127.0.0.1\n\tport = {place.port}\n[bench]\n\texportname = {place.image}\n"
    )
    return ["nbd-server", "-C", str(config), "-p", str(place.pid_file)]


FLAVOURS: Dict[str, Flavour] = {
    "xnbd": Flavour(_xnbd, [*XNBD_SERVER, "--version"]),
    "xnbd-new": Flavour(_xnbd, [*XNBD_SERVER, "--version"], fresh=True),
    "nbdkit": Flavour(_nbdkit, ["nbdkit", "--version"], "nbdkit"),
    "qemu-nbd": Flavour(_qemu_nbd, ["qemu-nbd", "--version"], "qemu-utils"),
    "xnbd-cow": Flavour(_xnbd_cow, [*XNBD_SERVER, "--version"], fresh=True),
    "nbdkit-cow": Flavour(_nbdkit_cow, ["nbdkit", "--version"], "nbdkit", fresh=True),
    "qemu-nbd -s": Flavour(_qemu_nbd_snapshot, ["qemu-nbd", "--version"], "qemu-utils", fresh=True),
    "nbd-server": Flavour(_nbd_server, ["nbd-server", "-V"], "nbd-server", export="bench", daemon=True),
}
