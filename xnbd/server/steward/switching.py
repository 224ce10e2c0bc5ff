"""The switch: a proxy becomes a plain target, while its clients go on."""

from __future__ import annotations

from time import monotonic
from typing import Generator, Optional

from ...control.requests import Message, flag_argument
from ...control.server import CommandTable, Reply
from ...errors import CommandError
from ...logs import about, log
from ...proxy.state.format import Steering
from ...scoreboard.layout import TARGET
from .command_lock import GATE_TIMEOUT, CommandLock
from .copying import Copying
from .durability import Durability
from .duty import Cache, Context, Duty

_FOLLOW_TIMEOUT = 5.0


class Switching(Duty):
    """Switches for operators, and follows the switch of another server."""

    def __init__(
        self, context: Context, cache: Cache, lock: CommandLock, durability: Durability, copying: Copying
    ) -> None:
        self._scoreboard = context.scoreboard
        self._cache = cache
        self._source = cache.source
        self._lock = lock
        self._durability = durability
        self._copying = copying

    def commands(self) -> CommandTable:
        return {"switch": self._switch}

    def progress(self) -> None:
        self._source.follow_switch(self._scoreboard)

    def _switch(self, request: Message) -> Reply:
        force = flag_argument(request, "force")
        self._refuse_if_switched()
        self._refuse_if_limited()
        if not force:
            yield from self._refuse_if_missing()  # before the turn: to count may take long
        yield from self._durability.save_most()
        yield from self._lock.acquire("switch")
        try:
            self._refuse_if_switched()
            pause = self._switch_now()
        finally:
            self._lock.release()
        workers = yield from self._have_followed()
        log.info("switched to a plain target of %s; held for %.1f ms", self._source.name, pause * 1e3)
        yield {"done": True, "workers": workers, "longest_pause_ms": round(pause * 1e3, 1)}

    def _refuse_if_switched(self) -> None:
        if self._scoreboard.mode == TARGET:
            raise CommandError("this is a plain target already")

    def _refuse_if_limited(self) -> None:
        if self._scoreboard.room.limit:
            raise CommandError(
                "the cache has a limit (--cache-limit), and never holds all of the disk: start the server without one"
            )

    def _refuse_if_missing(self) -> Reply:
        progress = self._cache.progress
        yield from self._look_at_bitmap()
        if not progress.complete:
            yield from self._cache.count()
        missing = progress.missing()
        if missing:
            raise CommandError(
                f"{missing} of {progress.blocks} blocks {'is' if missing == 1 else 'are'} missing "
                "(--cache-all brings them; --force switches without them, and they read as zeros)"
            )

    def _look_at_bitmap(self) -> Reply:
        """A plain target does not look any more."""
        try:
            yield from self._cache.state.pages.look_at_all()
        except OSError as error:
            raise CommandError(f"{error.strerror}; nothing was changed") from error
        self._cache.progress.look_again()

    def _switch_now(self) -> float:
        """Returns how long everybody was held, in seconds. Raises `CommandError`, and then nothing was changed."""
        self._copying.stop()
        self._durability.stop_checkpoint()
        try:
            # A bit that is forgotten would be fetched over what the target has written.
            self._durability.make_durable(GATE_TIMEOUT)
            pause = self._become_target()
        except TimeoutError as error:
            raise CommandError(f"requests did not come to an end in {GATE_TIMEOUT:g} s: {error}; try again") from None
        except OSError as error:
            raise CommandError(f"the cache cannot be made durable: {error.strerror}; nothing was changed") from error
        self._scoreboard.wanted_copy = None
        self._source.follow_switch(self._scoreboard)
        return pause

    def _become_target(self) -> float:
        """Returns how long everybody was held, in seconds. Raises `OSError`, `TimeoutError` among them."""
        try:
            self._source.steer(Steering(switched=True, address=self._scoreboard.origin.address))
            began = monotonic()
            with self._scoreboard.gate.closed(GATE_TIMEOUT):
                self._scoreboard.mode = TARGET
                return monotonic() - began
        finally:
            if self._scoreboard.mode != TARGET:
                self._source.steer(Steering(switched=False, address=self._scoreboard.origin.address))

    def _have_followed(self) -> Generator[Optional[Message], None, int]:
        """Wait until every process has changed over; returns how many there are."""
        until = monotonic() + _FOLLOW_TIMEOUT
        self._scoreboard.lines.wake_all()
        while True:
            lines = self._scoreboard.lines.living()
            behind = [line for line in lines if line.mode != TARGET]
            if not behind or monotonic() > until:
                for line in behind:
                    text, extra = "process %d of client %s is busy, and changes over later", about(peer=line.peer)
                    log.warning(text, line.pid, line.peer, extra=extra)
                return len(lines)
            yield None
