"""Copying all that is missing: an operator's command, and what a server that has ended has left of one."""

from __future__ import annotations

from functools import partial
from logging import ERROR
from time import monotonic
from typing import Iterator, Optional

from ...control.requests import Message, flag_argument, integer_argument
from ...control.server import CommandTable, Reply
from ...errors import CommandError, TaskFailed
from ...logs import ToldOnce, log
from ...proxy.fetch_queue import PIECE
from ...proxy.image import ProxyImage
from ...scoreboard.counters import BYTES_FETCHED
from ...scoreboard.layout import COPYING, TARGET
from ...scoreboard.place import COPYING_PEER
from ...system.process import set_title
from ...text import counted
from ..process_loop import ProcessLoop
from .child import Child
from .command_lock import CommandLock
from .copier import Copier, CopyOptions
from .duty import Cache, Context, Duty
from .progress import Rate

_PROGRESS_EVERY = 0.2
_FULL = "the limit of the cache (--cache-limit) is reached"


class _CopiedElsewhere(TaskFailed):
    """A server that began at the same moment has come first. What is wanted is its affair."""

    status = 2


class Copying(Duty):
    """One copy of all blocks of *cache*, in a child.

    One that no operator waits for is noted on the scoreboard as wanted. It goes on in
    whichever server is there.
    """

    def __init__(self, context: Context, cache: Cache, lock: CommandLock) -> None:
        self._context = context
        self._scoreboard = context.scoreboard
        self._cache = cache
        self._progress = cache.progress
        self._lock = lock
        self._copy: Optional[Child] = None
        self._rate = Rate()
        self._failure = ToldOnce()
        self._leaving = False

    def commands(self) -> CommandTable:
        return {"cache-all": self._cache_all}

    def progress(self) -> None:
        wanted = self._scoreboard.wanted_copy
        if self._copy is not None and self._copy.is_done():
            self._on_copied(self._copy)
        elif wanted is not None and not self._leaving and not self._context.loop.stopping and not self._is_copying():
            self._resume(wanted)

    def leave(self) -> None:
        """A copy that an operator waits for goes on here, any other one with the other steward."""
        self._leaving = True
        if self._scoreboard.wanted_copy is not None:
            self.stop()

    def stop(self) -> None:
        """Stop what this server copies."""
        if self._copy is not None:
            self._copy.stop()
            self._copy.wait()
            self._copy = None

    def _cache_all(self, request: Message) -> Reply:
        piece = integer_argument(request, "blocks_per_request", 1, 1 << 20)
        rate = integer_argument(request, "limit_rate", 1, 1 << 50)
        wait = flag_argument(request, "wait")
        yield from self._lock.acquire("cache-all")
        try:
            if self._scoreboard.mode == TARGET:
                raise CommandError("this is no proxy any more: nothing is missing")
            if self._is_copying():
                raise CommandError("a copy is under way already (xnbd-bgctl --query shows it)")
            fetched_before = self._scoreboard.lines.totals()[BYTES_FETCHED]
            child = self._start(CopyOptions(min(piece or PIECE, PIECE), rate or 0))
            if not wait:
                self._scoreboard.wanted_copy = rate or 0
        finally:
            self._lock.release()
        if not wait:
            yield {"done": True, "pid": child.pid}
            return
        yield from self._watch(child, fetched_before)

    def _is_copying(self) -> bool:
        """Whether any server on this cache does."""
        if self._copy is not None:
            return not self._copy.is_done()
        return self._scoreboard.is_locked(COPYING)

    def _resume(self, rate: int) -> None:
        """Go on with what a server that has ended has left."""
        try:
            self._start(CopyOptions(rate=rate))
            self._failure.passed()
        except TaskFailed as failure:
            self._failure.log(ERROR, f"cannot go on copying: {failure}")

    def _start(self, options: CopyOptions) -> Child:
        """Raises `TaskFailed`."""
        child = self._context.children.start(partial(_copy, self._context, options))
        self._copy, self._rate = child, Rate()
        log.info("copying all blocks that are missing: process %d", child.pid)
        return child

    def _watch(self, child: Child, fetched_before: int) -> Iterator[Optional[Message]]:
        """Progress, until the copy has ended; a client that leaves stops it."""
        told_at = 0.0
        try:
            yield from self._cache.count()
            while not child.is_done():
                if monotonic() - told_at >= _PROGRESS_EVERY:
                    told_at = monotonic()
                    self._cache.keep_up()
                    yield {"progress": self._copied(fetched_before)}
                else:
                    yield None
        finally:
            child.stop()
        self._on_copied(child)
        if child.status == 0 and child.message:
            yield {"done": True, "note": child.message, **self._copied(fetched_before)}
            return
        if child.status or self._progress.missing():
            raise CommandError(child.message or "the copy was stopped before its end")
        yield {"done": True, **self._copied(fetched_before)}

    def _copied(self, fetched_before: int) -> Message:
        fetched = self._scoreboard.lines.totals()[BYTES_FETCHED] - fetched_before
        return {
            "cached_bytes": self._progress.cached_bytes(),
            "total_bytes": self._progress.size,
            "fetched_bytes": fetched,
            "rate": self._rate.of(fetched),
        }

    def _on_copied(self, child: Child) -> None:
        if child is not self._copy:
            return
        self._copy = None
        if child.status == _CopiedElsewhere.status:
            log.info("the copy has ended: %s", child.message)
            return
        if not self._is_copying():  # or another server's operator wants one by now
            self._scoreboard.wanted_copy = None
        if child.status == 0 and child.message:
            log.info("the copy has ended: %s", child.message)
        elif child.status:
            log.warning("the copy has ended: %s", child.message or f"status {child.status}")
        else:
            missing = self._progress.missing()
            told = counted(missing, "block is", "blocks are") if self._progress.counted else "some blocks are"
            log.info("the copy has ended, %s missing", told)


def _copy(context: Context, options: CopyOptions) -> Optional[str]:
    """The work of the child: why it has ended before all was here. Raises `TaskFailed`, `OSError`, `Stop`."""
    set_title("copying", context.source.name)
    loop = ProcessLoop(context.loop.lifeline)
    disk = loop.companion = context.service.open_disk()
    if not disk.scoreboard.try_lock(COPYING):
        raise _CopiedElsewhere("another server on this cache is copying already")
    if isinstance(disk.image, ProxyImage):
        disk.place.welcome(COPYING_PEER)
        try:
            copier = Copier(disk, disk.image, loop, options)
            copier.run()
            return _FULL if copier.is_full else None
        finally:
            disk.part()
            disk.close()
    return None
