"""Checking all that was fetched: an operator's command."""

from __future__ import annotations

from functools import partial
from logging import INFO, WARNING
from time import monotonic
from typing import Iterator, Optional

from ...control.requests import Message, integer_argument
from ...control.server import CommandTable, Reply
from ...errors import CommandError, TaskFailed
from ...logs import log
from ...proxy.image import ProxyImage
from ...scoreboard.layout import SCRUBBING, TARGET
from ...system.process import set_title
from ...text import counted
from ..process_loop import ProcessLoop
from .child import Child
from .duty import Cache, Context, Duty
from .scrubber import Scrubber, ScrubFigures, ScrubMemory

_PROGRESS_EVERY = 0.2


class Scrubbing(Duty):
    """One check of all blocks of *cache*, in a child, while an operator waits for it."""

    def __init__(self, context: Context, cache: Cache) -> None:
        self._context = context
        self._size = cache.source.size
        self._scrub: Optional[Child] = None

    def commands(self) -> CommandTable:
        return {"scrub": self._start}

    def end(self) -> None:
        self.stop()

    def leave(self) -> None:
        self.stop()

    def stop(self) -> None:
        """What is checked stays so."""
        if self._scrub is not None:
            self._scrub.stop()

    def _start(self, request: Message) -> Reply:
        rate = integer_argument(request, "limit_rate", 1, 1 << 50)
        if self._context.scoreboard.mode == TARGET:
            raise CommandError("this is no proxy any more: its blocks have no checksums that would tell anything")
        if self._scrub is not None or self._context.scoreboard.is_locked(SCRUBBING):
            raise CommandError("the cache is being checked already")
        memory = ScrubMemory()
        child = self._scrub = self._context.children.start(partial(_scrub, self._context, memory, rate or 0))
        log.info("checking all blocks that were fetched: process %d", child.pid)
        try:
            yield from self._watch(child, memory)
        finally:
            self._scrub = None

    def _watch(self, child: Child, memory: ScrubMemory) -> Iterator[Optional[Message]]:
        """Progress, until all is checked; a client that leaves stops it."""
        told_at = 0.0
        try:
            while not child.is_done():
                if monotonic() - told_at >= _PROGRESS_EVERY:
                    told_at = monotonic()
                    yield {"progress": self._figures(memory)}
                else:
                    yield None
        finally:
            child.stop()
        told = memory.read()
        failure = (child.message or "the check was stopped before its end") if child.status else ""
        if told.checked or told.written or not failure:
            _log_summary(told)
        if failure:
            log.warning("the check has ended: %s", failure)
            raise CommandError(failure)
        yield {"done": True, **self._figures(memory)}

    def _figures(self, memory: ScrubMemory) -> Message:
        told = memory.read()
        return {
            "position_bytes": min(told.position, self._size),
            "total_bytes": self._size,
            "checked_blocks": told.checked,
            "damaged_blocks": told.damaged,
            "repaired_blocks": told.repaired,
            "written_blocks": told.written,
        }


def _log_summary(told: ScrubFigures) -> None:
    checked, damaged = counted(told.checked, "block was", "blocks were"), counted(told.damaged, "was", "were")
    written = counted(
        told.written, "that clients have written has no checksum", "that clients have written have no checksums"
    )
    level = WARNING if told.damaged > told.repaired else INFO
    log.log(level, "%s checked, %s damaged, %d fetched again; %s", checked, damaged, told.repaired, written)


def _scrub(context: Context, memory: ScrubMemory, rate: int) -> None:
    """The work of the child. Raises `TaskFailed`, `OSError`, and `Stop`."""
    set_title("checking", context.source.name)
    loop = ProcessLoop(context.loop.lifeline)
    disk = loop.companion = context.service.open_disk()
    if not disk.scoreboard.try_lock(SCRUBBING):
        raise TaskFailed("another server on this cache is checking it already")
    if isinstance(disk.image, ProxyImage):
        try:
            Scrubber(disk, disk.image, loop, memory, rate).run()
        finally:
            disk.part()
            disk.close()
