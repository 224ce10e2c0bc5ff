"""Debian's kernel and a static busybox, unpacked in a cache directory; nothing is installed.

The cache is ``$XDG_CACHE_HOME/xnbd-guest`` (``~/.cache/xnbd-guest``), with one
directory for each release of Debian. Remove it to get newer packages.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, NamedTuple

from .errors import GuestError

_KERNEL_CHOICE = "linux-image-cloud-amd64"
"""The package that depends on the newest kernel."""

_DOWNLOAD_TIME = 300.0


class Packages(NamedTuple):
    """Paths in the unpacked packages."""

    kernel: Path
    modules: Path
    busybox: Path


def fetch_packages() -> Packages:
    """The packages from the cache, downloaded if they are not there; GuestError if that fails."""
    if platform.machine() != "x86_64":
        raise GuestError("guests are made for x86_64 computers only")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xnbd-guest"
    cache.mkdir(parents=True, exist_ok=True)
    unpacked = cache / _release()
    with _locked(cache / "lock"):
        if not unpacked.exists():
            _unpack_into(unpacked)
    return _find(unpacked)


def _release() -> str:
    match = re.search(r'^VERSION_CODENAME="?([\w.-]+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


def _find(unpacked: Path) -> Packages:
    kernels = sorted(unpacked.glob("boot/vmlinuz-*"))
    busyboxes = [path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists()]
    if not kernels or not busyboxes:
        raise GuestError(f"{unpacked} is not complete; remove it")
    version = kernels[-1].name[len("vmlinuz-") :]
    modules = next(path for path in (unpacked / "lib/modules", unpacked / "usr/lib/modules") if path.exists())
    return Packages(kernels[-1], modules / version, busyboxes[0])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack_into(unpacked: Path) -> None:
    """Make the directory *unpacked*, complete or not at all."""
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as work:
        tree = Path(work) / "tree"
        for package in _download(Path(work)):
            subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True)
        for unwanted in ("usr/share", "boot/System.map*"):
            for path in tree.glob(unwanted):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _find(tree)
        tree.rename(unpacked)


def _download(directory: Path) -> List[Path]:
    """The package files, in *directory*. Where the system's package lists are old or missing, with fresh ones."""
    lists = directory / "lists"
    (lists / "partial").mkdir(parents=True)
    (directory / "archives").mkdir()
    private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={directory}", "-o", "APT::Sandbox::User="]
    message = _try_download(directory, ["-o", "APT::Sandbox::User="])
    if message:
        _apt(directory, "apt-get", *private, "-qq", "update")
        message = _try_download(directory, private)
    if message:
        raise GuestError(f"cannot download {_KERNEL_CHOICE} and busybox-static: {message}")
    return sorted(directory.glob("*.deb"))


def _try_download(directory: Path, options: List[str]) -> str:
    """The last line of the error; empty if all went well."""
    depends = _apt(directory, "apt-cache", *options, "depends", _KERNEL_CHOICE)
    kernel = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
    if not kernel:
        return depends.stderr.strip().rpartition("\n")[2] or "no such package"
    done = _apt(directory, "apt-get", *options, "-qq", "download", kernel[1], "busybox-static")
    return done.stderr.strip().rpartition("\n")[2] or "apt-get failed" if done.returncode else ""


def _apt(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_TIME,
    )
