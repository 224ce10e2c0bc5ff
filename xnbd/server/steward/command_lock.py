"""One command after the other, whichever of the servers on a cache it was given to.

This is about commands that change what the files mean: copy, switch, reconnect. The
scoreboard has the lock and says which command has it. It also says what the servers
do; the state file says what servers of another day will do. Both agree when a command
is whole. If its process dies in the middle, a steward makes the file agree.
"""

from __future__ import annotations

from logging import ERROR
from time import monotonic

from ...control.server import Reply
from ...errors import CommandError
from ...logs import ToldOnce, log
from ...proxy.state.format import Steering
from ...scoreboard.layout import COMMAND, TARGET
from .duty import Cache, Context, Duty

GATE_TIMEOUT = 10.0
"""Seconds that requests may take to come to an end."""

_TURN_TIMEOUT = GATE_TIMEOUT + 5.0


class CommandLock(Duty):
    """The lock of commands on *cache*, and what becomes of a command whose process has died."""

    def __init__(self, context: Context, cache: Cache) -> None:
        self._scoreboard = context.scoreboard
        self._source = cache.source
        self._failure = ToldOnce()

    def acquire(self, name: str) -> Reply:
        """Return when the command *name* has the lock: then it goes on without a `yield` until `release`.

        Raises `CommandError` if that takes too long.
        """
        until = monotonic() + _TURN_TIMEOUT
        while True:
            self._end_dead_command()
            if self._scoreboard.turn.begin(name):
                break
            if monotonic() > until:
                raise CommandError(
                    f"another command is under way: {self._scoreboard.turn.command or 'unknown'}; try again"
                )
            yield None
        try:
            self._make_agree()
        except OSError as error:
            self._scoreboard.turn.end(whole=False)
            raise CommandError(f"the state file cannot be used: {error.strerror}; nothing was changed") from error

    def release(self) -> None:
        """What the command has changed is whole, or somebody will make it so."""
        try:
            whole = self._wanted() == self._source.steering
        except OSError:
            whole = False
        self._scoreboard.turn.end(whole=whole)

    def progress(self) -> None:
        self._end_dead_command()

    def _end_dead_command(self) -> None:
        """Make whole what a process has begun that is no more."""
        scoreboard = self._scoreboard
        if not scoreboard.turn.command or not scoreboard.try_lock(COMMAND):
            return
        try:
            address = scoreboard.origin.whole_address()
            scoreboard.origin.address = self._source.steering.address if address is None else address  # perhaps untold
            self._make_agree()
        except OSError as error:
            self._failure.log(ERROR, f"cannot write to the state file: {error.strerror or error}")
            scoreboard.turn.end(whole=False)
        else:
            self._failure.passed()
            scoreboard.turn.end(whole=True)

    def _make_agree(self) -> None:
        """Have the state file say what the servers do, which the scoreboard tells; this process has the lock."""
        wanted = self._wanted()
        if wanted != self._source.steering:
            self._source.steer(wanted)
            log.warning("a command was cut short: the state file says again what the servers do")

    def _wanted(self) -> Steering:
        return Steering(self._scoreboard.mode == TARGET, self._scoreboard.origin.address)
