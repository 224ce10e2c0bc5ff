"""A cache image with its bitmap and state file, opened without a server, in a boot that the test chooses."""

from __future__ import annotations

import os
import shutil
from contextlib import closing, suppress
from pathlib import Path
from typing import List

from power_failure import ORIGIN, content_of

from xnbd.proxy.state.belonging import ATTRIBUTE
from xnbd.proxy.state.checkpoint import ProcessState
from xnbd.proxy.state.opening import open_state
from xnbd.proxy.state.shared import SharedState
from xnbd.storage.blocks import BLOCK, block_count

PAGE_BLOCKS = 32768
"""Blocks of which one page of a bitmap speaks."""

DISK = (128 << 20) + 3 * BLOCK


class Cache:
    """A cache and its bitmap in *directory*, opened in a boot that the test chooses."""

    def __init__(self, directory: Path, disk_size: int = DISK) -> None:
        self.directory = directory
        self.bitmap, self.state = directory / "bitmap", directory / "bitmap.state"
        self.disk_size = disk_size
        self.blocks = block_count(disk_size)
        with (directory / "cache").open("ab") as file:
            file.truncate(disk_size)
        self.fd = os.open(directory / "cache", os.O_RDWR)

    def open(
        self, *, boot: int = 1, clear: bool = False, adopt: bool = False, origin: str = ORIGIN, thorough: bool = True
    ) -> SharedState:
        return open_state(
            str(self.bitmap),
            self.fd,
            disk_size=self.disk_size,
            origin=origin,
            clear=clear,
            adopt=adopt,
            thorough=thorough,
            boot_id_path=str(self.boot_id_file(boot)),
        )

    def boot_id_file(self, boot: int) -> Path:
        path = self.directory / f"boot{boot}"
        if not path.exists():
            new = self.directory / f"boot{boot}.{os.getpid()}"
            new.write_text(f"{boot:08x}-0000-4000-8000-000000000000\n")
            new.rename(path)
        return path

    def fill(self, process: ProcessState, first: int, end: int) -> None:
        for block in range(first, end):
            os.pwrite(self.fd, content_of(block, 1), block * BLOCK)
        process.bitmap.set(first, end)

    def forget(self) -> None:
        """Take away all that shows that this program has used cache image and bitmap, as if a C xNBD had."""
        self.state.unlink(missing_ok=True)
        with suppress(OSError):
            os.removexattr(self.fd, ATTRIBUTE)
        with suppress(FileNotFoundError):
            self.bitmap.chmod(0o644)

    def after_power_failure(self, directory: Path) -> Cache:
        """A copy in which all of bitmap and state has reached the disk, for another boot to open.

        Nobody looks into its cache image, which has the mark, and for `same_inodes` the inode.
        """
        shutil.copytree(self.directory, directory, ignore=shutil.ignore_patterns("cache"))
        copy = Cache(directory, self.disk_size)
        with suppress(OSError):
            os.setxattr(copy.fd, ATTRIBUTE, os.getxattr(self.fd, ATTRIBUTE))
        return copy


def written_blocks(shared: SharedState, blocks: int) -> List[int]:
    with closing(shared.open_process()) as process:
        return [n for n in range(blocks) if n in process.written]


def set_blocks(shared: SharedState, blocks: int) -> List[int]:
    with closing(shared.open_process()) as process:
        return [n for first, end, is_set in process.bitmap.runs(0, blocks) if is_set for n in range(first, end)]
