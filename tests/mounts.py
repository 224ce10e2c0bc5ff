"""File systems that a test mounts, as root, and unmounts at its end."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from server_process import run


@contextmanager
def small_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A tmpfs of *size* (as ``mount`` takes it) at the new *directory*."""
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory)
    try:
        yield directory
    finally:
        run("umount", "-l", directory)


@contextmanager
def loop_mount(directory: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """A new file system in a sparse file at the new *directory*: ``ext4``, ``btrfs``, or ``xfs`` with reflinks."""
    directory.mkdir()
    backing = directory.with_name(f"{directory.name}.{kind}")
    with open(backing, "wb") as file:
        file.truncate(megabytes << 20)
    run(*_MAKE[kind], backing)
    run("mount", "-o", "loop", backing, directory)
    try:
        yield directory
    finally:
        run("umount", "-l", directory)
        backing.unlink()


_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
