"""Checkpoints of a cache, while there is something new."""

from __future__ import annotations

import math
import os
from logging import ERROR
from time import monotonic
from typing import Dict, Iterator, Optional

from ...errors import TaskFailed
from ...logs import ToldOnce, log
from ...scoreboard.layout import PROXY
from ...storage.target import reopen
from .child import Child
from .duty import Cache, Context, Duty

_CHECKPOINT_EVERY = 1.0
_COVER_EVERY = 60.0
_FAILURE = "cannot make the cache durable"


class Durability(Duty):
    """Makes the cache durable about every second, and notes when no block is missing any more.

    A checkpoint is the work of a child, since it may take long. A write-back that has
    failed makes an end of them: it is only kept where a restart finds it.
    """

    def __init__(self, context: Context, cache: Cache) -> None:
        self._context = context
        self._scoreboard = context.scoreboard
        self._children = context.children
        self._source = cache.source
        self._state = cache.state
        self._progress = cache.progress
        self._checkpoint: Optional[Child] = None
        self._next_checkpoint = monotonic()
        self._began = 0.0
        self._cover_at = monotonic() + _COVER_EVERY
        self._exposed: Dict[int, bytes] = {}
        self._failure = ToldOnce()

    def deadline(self) -> Optional[float]:
        return self._next_checkpoint if self._checkpoint is None else None

    def progress(self) -> None:
        if self._checkpoint is not None:
            if not self._checkpoint.is_done():
                return
            self._on_checkpoint(self._checkpoint)
            self._checkpoint = None
        if monotonic() < self._next_checkpoint:
            return
        self._next_checkpoint = monotonic() + _CHECKPOINT_EVERY
        if self._scoreboard.mode == PROXY and self._progress.complete and self._note_complete():
            log.info("every block is cached")
        self._begin()
        if monotonic() > self._cover_at:
            self._cover_at = monotonic() + _COVER_EVERY
            self._cover()

    def _cover(self) -> None:
        """What was exposed the last time, and has not changed, need not be any more."""
        exposed = self._state.written.exposed()
        self._state.cover(page for page, checksum in exposed.items() if self._exposed.get(page) == checksum)
        self._exposed = exposed

    def _note_complete(self) -> bool:
        """Never of a cache with a limit, whose blocks come and go."""
        return not self._scoreboard.room.limit and self._scoreboard.note_complete(self._progress.look_again)

    def leave(self) -> None:
        """The other steward makes the checkpoints from now on."""
        self.stop_checkpoint()
        self._context.tell("checkpoint_nanoseconds", 0)
        self._next_checkpoint = math.inf

    def _begin(self) -> None:
        if self._state.write_back.failure() is not None:
            self._state.write_back.keep()
        elif self._state.changed:
            self._began = monotonic()
            try:
                self._checkpoint = self._children.start(self.make_durable)
            except TaskFailed as failure:
                self._failure.log(ERROR, f"{_FAILURE}: {failure}")

    def _on_checkpoint(self, child: Child) -> None:
        if child.status == 0:
            self._scoreboard.note_checkpoint()
            self._context.tell("checkpoint_nanoseconds", int((monotonic() - self._began) * 1e9))
            self._failure.passed()
            return
        if not child.was_stopped and self._state.write_back.failure() is None:  # else the log has it
            self._failure.log(ERROR, f"{_FAILURE}: {child.message or f'status {child.status}'}")
        self._state.abandon_checkpoint()

    # For the switch

    def make_durable(self, timeout: float = math.inf) -> None:
        """Make a checkpoint in this process. Raises `OSError`, `TimeoutError` among them.

        It goes through a description of its own and the witness: a child before may have
        died of what it was told.
        """
        self._state.write_back.witness = self._source.witness
        image = reopen(self._source.witness, readonly=False)
        try:
            self._state.checkpoint(image, timeout=timeout)
        finally:
            os.close(image)
        self._state.sync_live()

    def save_most(self) -> Iterator[None]:
        """Wait for two checkpoints: what they leave is little, so that the next one takes no long time."""
        for _ in range(2):
            under_way = self._checkpoint
            if under_way is None:
                self._next_checkpoint = monotonic()
                yield None
                under_way = self._checkpoint
            while under_way is not None and self._checkpoint is under_way:
                yield None

    def stop_checkpoint(self) -> None:
        """The one in a child, which holds its lock in this process's name."""
        if self._checkpoint is not None:
            self._checkpoint.stop()
            self._checkpoint.wait()
            self._state.abandon_checkpoint()
            self._checkpoint = None
