"""File systems and loop devices that a test makes, as root, and takes away at its end."""

from __future__ import annotations

import fcntl
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from server_process import run, wait_until


def attach(backing: Path, *options: str) -> Path:
    """The new loop device of the file *backing*.

    Only one at a time: who finds a device that somebody else has just found makes it busy for a moment.
    """
    with open(Path(tempfile.gettempdir()) / "xnbd-tests-loop.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Path(run("losetup", *options, "--find", "--show", backing)[1].strip())


def detach(device: Path) -> None:
    run("losetup", "--detach", device)


@contextmanager
def mounted(backing: Path, directory: Path, *options: str) -> Iterator[Path]:
    """The file system in *backing*, at *directory*; in the end its device is not in use any more."""
    device = attach(backing)
    try:
        run("mount", *options, device, directory)
        try:
            yield directory
        finally:
            unmount(directory, device)
    finally:
        detach(device)


def unmount(directory: Path, device: Path) -> None:
    """Returns when no mount namespace, which another test may have made meanwhile, has it any more."""
    run("umount", directory)
    in_use = [Path("/proc/fs/ext4") / device.name, Path("/sys/fs/xfs") / device.name]
    wait_until(lambda: not any(path.exists() for path in in_use), "the end of the file system")


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
def plain_ramfs(directory: Path) -> Iterator[Path]:
    """A file system without extended attributes at the new *directory*."""
    directory.mkdir()
    run("mount", "-t", "ramfs", "ramfs", directory)
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
    device = attach(backing)
    try:
        run("mount", device, directory)
        yield directory
    finally:
        run("umount", "-l", directory, check=False)
        detach(device)
        backing.unlink()


_MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
