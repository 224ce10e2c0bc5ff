"""What the virtual machine does while it is moved: writes blocks at random and reads others again, without a cache.

Every block of 4 KiB holds a pattern made of its number and its version. The versions
are in memory, and move with the machine: what is read can be told right or wrong at once.
Runs in a guest as ``python3 workload.py DEVICE PROGRESS_FILE RESULT_FILE``, until SIGTERM.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO, List

BLOCK = 4096
_LONGEST_RUN = 16


def pattern(block: int, version: int) -> bytes:
    return hashlib.md5(b"%d %d" % (block, version)).digest() * (BLOCK // 16)


def write_first_versions(file: BinaryIO, size: int) -> None:
    """What a disk of *size* bytes holds before the first write: version 0 of every block."""
    for block in range(size // BLOCK):
        file.write(pattern(block, 0))


class Workload:
    """On the block device *path*; ``errors`` describes everything that was not as it should be."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.versions = [0] * (os.lseek(self.fd, 0, os.SEEK_END) // BLOCK)
        self.operations = 0
        self.errors: List[str] = []
        self._buffer = memoryview(mmap.mmap(-1, _LONGEST_RUN * BLOCK))  # aligned, as O_DIRECT wants it
        self._random = random.Random(1)

    def step(self) -> None:
        """Write a run of blocks, read another; sometimes flush."""
        self._write(*self._any_run())
        self._check(*self._any_run())
        if self._random.random() < 0.05:
            os.fdatasync(self.fd)
        self.operations += 2

    def check_all(self) -> str:
        """Check every block; returns the MD5 of what the whole disk should hold."""
        digest = hashlib.md5()
        for block in range(0, len(self.versions), _LONGEST_RUN):
            self._check(block, min(_LONGEST_RUN, len(self.versions) - block))
        for block, version in enumerate(self.versions):
            digest.update(pattern(block, version))
        return digest.hexdigest()

    def _any_run(self) -> tuple[int, int]:
        """First block and count. Often the disk's beginning: a qemu that starts looks there for a partition table."""
        block = self._random.randrange(len(self.versions)) if self._random.random() < 0.95 else 0
        return block, self._random.randint(1, min(_LONGEST_RUN, len(self.versions) - block))

    def _write(self, block: int, count: int) -> None:
        for i in range(count):
            self.versions[block + i] += 1
            self._buffer[i * BLOCK : (i + 1) * BLOCK] = pattern(block + i, self.versions[block + i])
        if os.pwrite(self.fd, self._buffer[: count * BLOCK], block * BLOCK) != count * BLOCK:
            self.errors.append(f"short write at block {block}")

    def _check(self, block: int, count: int) -> None:
        if os.preadv(self.fd, [self._buffer[: count * BLOCK]], block * BLOCK) != count * BLOCK:
            self.errors.append(f"short read at block {block}")
        for i in range(count):
            if self._buffer[i * BLOCK : (i + 1) * BLOCK] != pattern(block + i, self.versions[block + i]):
                self.errors.append(f"block {block + i} is not version {self.versions[block + i]}")


def main(device: str, progress: Path, result: Path) -> None:
    """Work until SIGTERM; errors of input or output end it with a traceback, which the console shows."""
    stopped: List[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    workload = Workload(device)
    due = 0.0
    while not stopped:
        workload.step()
        if time.monotonic() >= due:
            due = time.monotonic() + 0.1
            _replace(progress, f"{workload.operations} {len(workload.errors)}\n")
    digest = workload.check_all()
    os.fdatasync(workload.fd)
    _replace(result, "\n".join([f"{workload.operations} {len(workload.errors)} {digest}", *workload.errors[:20]]))


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
