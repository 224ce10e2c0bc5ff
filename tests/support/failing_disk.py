"""A disk that begins to fail under its servers: a loop device whose file lies on a tmpfs that gets full.

What is written to it then cannot be written back; what had space before still can.
Making it takes root.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import nbd
from ledger import SECTOR, Ledger, Writer
from mounts import attach, detach, small_tmpfs
from server_process import run


class FailingDisk:
    """The block device ``path`` of *size* bytes; its file takes space of the tmpfs at *directory*."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._ballast = directory / "ballast"
        backing = directory / "backing"
        with backing.open("wb") as file:
            file.truncate(size)
        self.path = attach(backing)

    def fail(self) -> None:
        """From now on there is no room for anything that is new."""
        with self._ballast.open("wb") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(1 << 20))

    def mend(self) -> None:
        """Give it room, and have what is in memory only forgotten: readers see what the device has kept."""
        run("blockdev", "--flushbufs", self.path, check=False)
        self._ballast.unlink(missing_ok=True)
        run("mount", "-o", "remount,size=256m", self._directory)

    def close(self) -> None:
        detach(self.path)


@contextmanager
def failing_disk(directory: Path, size: int, room: str) -> Iterator[FailingDisk]:
    """With *room* (as ``mount`` takes it) in the new *directory*."""
    with small_tmpfs(directory, room):
        disk = FailingDisk(directory, size)
        try:
            yield disk
        finally:
            disk.close()


class DoubtfulLedger(Ledger):
    """Of a disk that begins to fail: *doubtful* from before it does, *failed* once a FLUSH has got an error.

    What could not be written back may come back from the disk as it was: nothing is
    said of READs then. No FLUSH may succeed that was sent when another had failed.
    """

    doubtful = failed = False

    def check_read(self, first: int, data: bytes, before: Dict[int, int]) -> None:
        if not self.doubtful:
            super().check_read(first, data, before)

    def check_disk(self, data: bytes) -> None:
        """*data* is what a restart has left: of each sector what was flushed, or anything that was sent later."""
        found = (
            self.trouble(n, self._flushed.get(n, 0), data[n * SECTOR : (n + 1) * SECTOR]) for n in range(self.sectors)
        )
        troubles = [trouble for trouble in found if trouble]
        assert not troubles, "; ".join(troubles[:5]) + f" ({len(troubles)} sectors)"


class DoubtfulWriter(Writer):
    """A client of a disk that begins to fail. Nothing but what has to be durable may fail, and then always."""

    _ledger: DoubtfulLedger

    def _judge(self, was_failed: bool, on_success: Callable[[], None], error: Any) -> int:
        """*was_failed*: the request was sent when another one had got its error already."""
        if error.value == errno.EIO:
            self._ledger.failed = True
        elif not error.value and was_failed:
            self.failure = AssertionError("a FLUSH or FUA has succeeded after one that failed")
        return self._completion(on_success, error)

    def _flush(self, client: nbd.NBD) -> None:
        promised = self._ledger.answered()
        on_success = partial(self._ledger.flush, promised)
        client.aio_flush(partial(self._judge, self._ledger.failed, on_success))

    def _write(self, client: nbd.NBD) -> None:
        first, end = self._range()
        if self._ledger.reserve(first, end):
            data = nbd.Buffer.from_bytearray(bytearray(self._ledger.send(first, end)))
            flags, on_success = self._durably(first, end)
            was_failed = bool(flags) and self._ledger.failed
            client.aio_pwrite(data, first * SECTOR, partial(self._judge, was_failed, on_success), flags)

    def _trim(self, client: nbd.NBD) -> None:
        """Of a block device nothing is known of trimmed bytes: they may be as before."""
        self._zero(client)
