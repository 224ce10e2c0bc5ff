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
