"""Making a snapshot, in a process of its own (`storage.snapshot`)."""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager
from time import monotonic
from typing import Iterator

from ...errors import TaskFailed
from ...logs import log
from ...scoreboard.layout import SNAPSHOT
from ...scoreboard.scoreboard import Scoreboard
from ...storage import snapshot
from ...storage.blocks import BLOCK, steps
from ...storage.image import Image, Source
from ...storage.snapshot import Keeper, SnapshotFiles
from ...storage.target import TargetImage
from ...text import counted
from ..process_loop import ProcessLoop
from ..snapshot_files import place_of

_GATE_TIMEOUT = 10.0
_TURN_EVERY = 0.1
_DATA_STEP, _HOLE_STEP = 256 << 10, 64 << 20


class Snapshotter:
    """Makes one snapshot of a disk, in a process of its own; a bitmap shows how far it is."""

    def __init__(self, source: Source[Scoreboard], scoreboard: Scoreboard, bitmap_fd: int, loop: ProcessLoop) -> None:
        self._source = source
        self._scoreboard = scoreboard
        self._bitmap_fd = bitmap_fd
        self._loop = loop
        self._held = 0.0
        self._name = ""

    def run(self) -> str:
        """The snapshot's name and times, as JSON. Raises `TaskFailed`, and `Stop`."""
        self._wait_for_turn()
        began = monotonic()
        path = self._source.path
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise TaskFailed(f"{path} is no regular file: what makes the device can make snapshots of it")
            image = self._source.open(self._scoreboard)
            output = snapshot.open_output(path, self._source.size)
            _refuse_if_shrunk(image)
            self._fill(image, output)
            image.flush()  # what was read may be what the disk could not keep
            _refuse_if_shrunk(image)
            snapshot.let_in(output, status)
            name = snapshot.publish(output, self._name)
        except TimeoutError as error:
            raise TaskFailed(f"requests did not come to an end in {_GATE_TIMEOUT:g} s: {error}") from error
        except OSError as error:
            raise TaskFailed(error.strerror or str(error)) from error
        seconds, held = monotonic() - began, self._held * 1e3
        log.info("snapshot %s: %d bytes in %.2f s, clients held for %.1f ms", name, self._source.size, seconds, held)
        return json.dumps({"path": name, "seconds": round(seconds, 3), "held_ms": round(held, 1)})

    def _wait_for_turn(self) -> None:
        """Another server of the same cache may be making one."""
        while not self._scoreboard.try_lock(SNAPSHOT):
            self._loop.pause(_TURN_EVERY)
        self._scoreboard.snapshots.end()  # of a dead process

    def _fill(self, image: Image, output: int) -> None:
        image.flush()  # or a clone would write all of that with everybody waiting
        if isinstance(image, TargetImage) and snapshot.can_clone(image.fd, output):
            with self._gate():
                snapshot.clone(image.fd, output)
            if os.fstat(output).st_size > image.size:
                os.ftruncate(output, image.size)  # a proxy's cache file may be larger than its disk
            return
        self._check_space(output)
        files = SnapshotFiles(output, self._bitmap_fd)
        place = place_of(files, self._scoreboard.namespace)
        with self._gate():
            self._refuse_if_shared_afar()
            self._scoreboard.snapshots.begin(place)
        try:
            self._copy(image, snapshot.duplicate(files))
            self._loop.check()  # or nobody would be told of it
            if (
                self._scoreboard.snapshots.current != place
            ):  # all blocks are kept by now: what ends it later does no harm
                raise TaskFailed("somebody could not keep old blocks, or has ended it")
        except BaseException:
            os.ftruncate(output, 0)
            raise
        finally:
            self._scoreboard.snapshots.end()

    def _refuse_if_shared_afar(self) -> None:
        """Who changes a block keeps the old one in a file that it finds through this process's id."""
        afar = [line for line in self._scoreboard.lines.living() if line.namespace != self._scoreboard.namespace]
        if afar:
            processes = counted(len(afar), "process on this disk is", "processes on this disk are")
            raise TaskFailed(
                f"{processes} of another PID namespace (container) and could not keep old "
                "blocks: stop that server first, or have the disk on a file system with clones"
            )

    def _check_space(self, output: int) -> None:
        """Refuse what would take the space from the disk's own writers."""
        needed = min(self._source.size, self._source.allocated())
        volume = os.fstatvfs(output)
        free = volume.f_bavail * volume.f_frsize
        if needed > free:
            raise TaskFailed(f"the copy may need {needed} bytes, and {free} are free")

    @contextmanager
    def _gate(self) -> Iterator[None]:
        began = monotonic()
        with self._scoreboard.gate.closed(_GATE_TIMEOUT, self._loop.check):
            self._name = snapshot.snapshot_name(self._source.path)
            yield
        self._held = monotonic() - began

    def _copy(self, image: Image, files: SnapshotFiles) -> None:
        keeper = Keeper(image, files)
        offset = 0
        for extent in image.extents(0, image.size):
            for at, count in steps(offset, extent.length, _HOLE_STEP if extent.hole else _DATA_STEP):
                self._loop.check()
                keeper.keep_at_once(at - at % BLOCK, count + at % BLOCK, self._loop.check)
                if keeper.failed:
                    raise OSError(keeper.failed, os.strerror(keeper.failed))
            offset += extent.length


def _refuse_if_shrunk(image: Image) -> None:
    """Zeros would be kept where clients have errors. Raises `TaskFailed`."""
    if image.readable() < image.size:
        raise TaskFailed(f"the disk image has shrunk below its {image.size} bytes: what was behind its end is lost")
