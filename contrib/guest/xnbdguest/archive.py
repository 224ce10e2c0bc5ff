"""A root file system in memory: a cpio archive in the format "newc", as the kernel unpacks it (kernel documentation,
"initramfs buffer format"). Written here, because device nodes and owners need no root this way.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import subprocess
from pathlib import Path, PurePosixPath
from typing import Dict, List, NamedTuple, Tuple

from .errors import GuestError


class _Entry(NamedTuple):
    mode: int
    mtime: int
    data: bytes


class Archive:
    """Collects files; names are absolute paths in the guest, directories above them are made."""

    def __init__(self) -> None:
        self._entries: Dict[str, _Entry] = {}

    def add_directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_bytes(self, name: str, data: bytes, permissions: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | permissions, data)

    def add_file(self, path: Path, name: str = "") -> None:
        """A file of this computer, under the same name if none is given, with its time (Python compares it)."""
        status = path.stat()
        self._add(name or str(path), stat.S_IFREG | (status.st_mode & 0o777), path.read_bytes(), int(status.st_mtime))

    def add_program(self, path: Path, name: str = "") -> None:
        """A program or a shared library, and all libraries it needs."""
        self.add_file(path, name)
        for library in libraries_of(path):
            self.add_file(library)

    def write(self, path: Path) -> None:
        with open(path, "wb") as file:
            for number, (name, entry) in enumerate(self._entries.items(), 1):
                file.write(_pack(number, name, entry))
            file.write(_pack(0, "TRAILER!!!", _Entry(0, 0, b"")))

    def _add(self, name: str, mode: int, data: bytes, mtime: int = 0) -> None:
        path = PurePosixPath(name)
        if not path.is_absolute():
            raise ValueError(f"{name} is no absolute path")
        for parent in reversed(path.parents[:-1]):
            self._entries.setdefault(str(parent)[1:], _Entry(stat.S_IFDIR | 0o755, 0, b""))
        self._entries[str(path)[1:]] = _Entry(mode, mtime, data)


def _pack(number: int, name: str, entry: _Entry) -> bytes:
    """One member: inode, mode, user, group, links, time, size, 2 device numbers twice, length of the name, checksum."""
    fields = [number, entry.mode, 0, 0, 1, entry.mtime, len(entry.data), 0, 0, 0, 0, len(name.encode()) + 1, 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(header) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def find_program(name: str) -> Path:
    """A program of this computer, also one that only root has on PATH; GuestError if it is not installed."""
    for directory in [*os.environ.get("PATH", "").split(":"), "/usr/local/sbin", "/usr/sbin", "/sbin"]:
        path = Path(directory) / name
        if directory and path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    raise GuestError(f"{name} is not installed; contrib/setup --tests installs it")


@functools.cache
def libraries_of(path: Path) -> Tuple[Path, ...]:
    """The shared libraries that the dynamic linker would load for *path*, itself included."""
    done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if "not found" in done.stdout:
        raise GuestError(f"a library of {path} is missing:\n{done.stdout}")
    names: List[str] = re.findall(r"(/\S+) \(0x", done.stdout)
    return tuple(map(Path, names))
