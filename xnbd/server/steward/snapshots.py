"""Snapshots for operators, each made by a `Snapshotter` in a child."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Iterator, NamedTuple, Optional

from ...control.requests import Message
from ...control.server import CommandTable, Reply
from ...errors import CommandError, TaskFailed
from ...logs import log
from ...scoreboard.scoreboard import Scoreboard
from ...storage.bitmap import Bitmap
from ...storage.blocks import BLOCK, block_count
from ...storage.snapshot import create_bitmap
from ...storage.target import reopen
from ...system.process import closed_on_error, set_title
from ..process_loop import ProcessLoop
from .child import Child
from .duty import Context, Duty
from .progress import Progress
from .snapshotter import Snapshotter

_NICE = 10  # clients go before the copying of a snapshot


class _Making(NamedTuple):
    """A snapshot that is made: *bitmap* tells which blocks it has, *progress* how many."""

    child: Child
    bitmap_fd: int
    bitmap: Bitmap
    progress: Progress


class Snapshots(Duty):
    """Makes one snapshot after the other; ends what a dead process has begun, of whichever server."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._source = context.source
        self._scoreboard = context.scoreboard
        self._children = context.children
        self._making: Optional[_Making] = None

    def commands(self) -> CommandTable:
        return {"snapshot": self._take}

    def progress(self) -> None:
        self._scoreboard.snapshots.end_dead()

    def _take(self, _request: Message) -> Reply:
        self._refuse_if_impossible()
        while self._making is not None:
            yield None
        yield from self._make()

    def _make(self) -> Reply:
        """Whatever comes in between, it is counted."""
        outcome = "snapshots_failed"
        try:
            making = self._making = self._begin()
            child = making.child
            try:
                yield from self._watch(making)
            finally:
                self._making = None
                self._end(making)
            if child.status or not child.message:
                raise _no_snapshot(child.message or "its process was stopped")
            outcome = "snapshots"
        finally:
            self._context.count(outcome)
        yield {"done": True, **json.loads(child.message)}

    def _refuse_if_impossible(self) -> None:
        if self._context.master is None:
            raise CommandError("a server of --inetd or --connected-fd makes no snapshots")
        if not self._source.is_whole(self._scoreboard):
            raise CommandError("a proxy has no snapshots before it is switched: its disk is not whole here")

    def _begin(self) -> _Making:
        """Raises `TaskFailed`."""
        try:
            bitmap_fd = create_bitmap(self._source.size)
            with closed_on_error(bitmap_fd):
                blocks = block_count(self._source.size)
                bitmap = Bitmap(bitmap_fd, blocks)
                child = self._children.start(partial(_make, self._context, bitmap_fd))
                return _Making(child, bitmap_fd, bitmap, Progress(bitmap, blocks * BLOCK))
        except TaskFailed as failure:
            raise _no_snapshot(str(failure)) from failure
        except OSError as error:
            raise _no_snapshot(error.strerror or str(error)) from error

    def _watch(self, making: _Making) -> Iterator[Optional[Message]]:
        """Progress, until it is made; a client that leaves stops it."""
        progress = making.progress
        self._context.tell("snapshotting", 1)
        try:
            while not making.child.is_done():
                progress.keep_up(self._children.start)
                copied = progress.cached_bytes()
                self._context.tell("snapshot_bytes", copied)
                yield {"progress": {"copied_bytes": copied, "total_bytes": progress.size}}
                yield None
        except GeneratorExit:
            stopping = self._context.loop.stopping
            log.warning("no snapshot: %s", "the server ends" if stopping else "who asked for it has left")
            raise

    def _end(self, making: _Making) -> None:
        self._context.tell("snapshotting", 0)
        self._context.tell("snapshot_bytes", 0)
        for child in (making.child, making.progress.counter):
            if child is not None:
                child.stop()
                child.wait()
        self._scoreboard.snapshots.end_dead()
        self._scoreboard.lines.wake_all()
        making.bitmap.octets.close()
        os.close(making.bitmap_fd)


def _make(context: Context, bitmap_fd: int) -> str:
    """The work of the child. Raises `TaskFailed`, `OSError`, and `Stop`."""
    set_title("making a snapshot of", context.source.name)
    os.nice(_NICE)
    loop = ProcessLoop(context.loop.lifeline)
    scoreboard = Scoreboard(reopen(context.service.scoreboard_fd, readonly=False))
    return Snapshotter(context.source, scoreboard, bitmap_fd, loop).run()


def _no_snapshot(reason: str) -> TaskFailed:
    """What whoever wanted a snapshot is told, after the log."""
    log.warning("no snapshot: %s", reason)
    return TaskFailed(f"no snapshot: {reason}")
