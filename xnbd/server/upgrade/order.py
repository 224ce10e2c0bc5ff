"""An operator's order to become another program, in the master or wrapper that gets it.

First the next program's check runs in a child (`upgrade.check`), and only if that is content is it
executed, with signals blocked: what comes meanwhile is the next program's. Whatever
fails before or in the exec changes nothing, and the operator gets one line that says why.
"""

from __future__ import annotations

import os
import signal
from typing import Callable, List, Optional, Protocol

from ... import __version__
from ...control.requests import Message, flag_argument, text_argument
from ...errors import CommandError
from ...logs import log
from ...system.forking import SIGNALS
from ...system.kept import Kept
from .check import Check
from .program import TAKE_OVER, Program


class Leavable(Protocol):
    """What is left to the next program."""

    @property
    def descriptors(self) -> List[int]:
        """All that outlive the exec, that of `write` but for one."""

    @property
    def number_of_clients(self) -> int: ...

    def write(self) -> int:
        """A descriptor of a file that holds it. Raises `OSError`."""


class Order:
    """One order: *request* has the path of the ``program``, perhaps, and ``check`` if nothing is to happen.

    *answer* takes the outcome, for the operator. ``verdict`` is what the check has said.
    """

    def __init__(
        self,
        request: Message,
        program: Program,
        estate: Leavable,
        answer: Callable[[Message], None],
        checked: Kept,
    ) -> None:
        """Begins the check, which gets the descriptors that are to be *checked*. Raises `CommandError`, `OSError`."""
        self._only_check = flag_argument(request, "check")
        self._program = program.at(text_argument(request, "program"))
        self._answer = answer
        self._clients = estate.number_of_clients
        self.verdict: Message = {}
        fd = estate.write()
        try:
            self._check: Optional[Check] = Check(self._program, fd, checked)
        finally:
            os.close(fd)
        self.is_ready = False
        """Whether the program is to be executed now."""

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return None if self._check is None else self._check.deadline

    def progress(self) -> None:
        if self._check is not None:
            self._check.kill_if_late()

    def bury(self, pid: int, exit_code: int) -> None:
        """The process *pid* has ended, which may be the check."""
        if self._check is None or pid != self._check.pid:
            return
        check, self._check = self._check, None
        try:
            self.verdict = check.verdict(exit_code)
        except CommandError as error:
            self.fail(error)
        else:
            self._pass(self.verdict["version"])

    def _pass(self, version: str) -> None:
        if self._only_check:
            self._answer({"done": True, "from": __version__, "to": version, "clients": self._clients})
        self.is_ready = not self._only_check

    @property
    def is_over(self) -> bool:
        return self._check is None and not self.is_ready

    def stop(self) -> None:
        """The server ends."""
        if self._check is not None:
            self._check.kill()

    def fail(self, error: Exception) -> None:
        log.warning("no upgrade: %s", error)
        self.is_ready = False
        self._answer({"done": True, "error": str(error)})

    @property
    def check_pid(self) -> Optional[int]:
        """The process of the check, as long as that runs."""
        return None if self._check is None else self._check.pid

    def execute(self, estate: Leavable) -> None:
        """Become the next program; returns if that is not possible. `SIGNALS` are blocked."""
        kept = Kept(estate.descriptors)
        try:
            with os.fdopen(estate.write()) as file:
                command = self._program.command(TAKE_OVER, kept(file.fileno()))
                kept.let_through()
                os.execv(command[0], command)
        except OSError as error:
            Kept(estate.descriptors).hold_back()
            self.fail(CommandError(f"{self._program.path} cannot be executed: {error.strerror}; nothing has changed"))


def block_signals() -> None:
    """What has come by now has run its handler."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
