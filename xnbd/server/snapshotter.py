"""Making a snapshot, in a process of its own (`storage.snapshot`)."""

from __future__ import annotations

import json
import os
import stat
from contextlib import contextmanager
from time import monotonic
from typing import Iterator

from ..logs import log
from ..storage import snapshot
from ..storage.blocks import BLOCK, steps
from ..storage.board import Board
from ..storage.image import Image, Source
from ..storage.snapshot import Keeper, SnapshotFiles
from ..storage.target import TargetImage
from .watch import Watch

_GATE_TIMEOUT = 10.0
_DATA_STEP, _HOLE_STEP = 256 << 10, 64 << 20


class Failed(Exception):
    """There is no snapshot; the message says why."""


class Snapshotter:
    """Makes one snapshot of *source*; the bitmap behind *bitmap_fd* shows how far it is."""

    def __init__(self, source: Source, board: Board, bitmap_fd: int, watch: Watch) -> None:
        self._source = source
        self._board = board
        self._bitmap_fd = bitmap_fd
        self._watch = watch
        self._held = 0.0

    def run(self) -> str:
        """The snapshot's name and times, as JSON. Raises `Failed`, and `Stop`."""
        began = monotonic()
        path = self._source.path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Failed(f"{path} is no regular file: what makes the device can make snapshots of it")
            image = self._source.open(self._board)
            output = snapshot.open_output(path, self._source.size)
            self._fill(image, output)
            name = snapshot.publish(output, snapshot.snapshot_name(path))
        except TimeoutError as error:
            raise Failed(f"requests did not come to an end in {_GATE_TIMEOUT:g} s: {error}") from error
        except OSError as error:
            raise Failed(error.strerror or str(error)) from error
        seconds, held = monotonic() - began, self._held * 1e3
        log.info("snapshot %s: %d bytes in %.2f s, clients held for %.1f ms", name, self._source.size, seconds, held)
        return json.dumps({"path": name, "seconds": round(seconds, 3), "held_ms": round(held, 1)})

    def _fill(self, image: Image, output: int) -> None:
        image.flush()  # or a clone would write all of that with everybody waiting
        if isinstance(image, TargetImage) and snapshot.try_clone(image.fd, output):
            with self._gate():
                if not snapshot.try_clone(image.fd, output):
                    raise Failed("the file system does not clone any more")
            return
        with self._gate():
            self._board.begin_snapshot(os.getpid(), output, self._bitmap_fd)
        try:
            self._copy(image, snapshot.duplicate(SnapshotFiles(output, self._bitmap_fd)))
        finally:
            self._board.end_snapshot()

    @contextmanager
    def _gate(self) -> Iterator[None]:
        began = monotonic()
        with self._board.closed(_GATE_TIMEOUT):
            yield
        self._held = monotonic() - began

    def _copy(self, image: Image, files: SnapshotFiles) -> None:
        keeper = Keeper(image, files)
        offset = 0
        for extent in image.extents(0, image.size):
            for at, count in steps(offset, extent.length, _HOLE_STEP if extent.hole else _DATA_STEP):
                self._watch.check()
                keeper.keep_at_once(at - at % BLOCK, count + at % BLOCK)
                if keeper.failed:
                    raise OSError(keeper.failed, os.strerror(keeper.failed))
            offset += extent.length
