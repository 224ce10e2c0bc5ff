"""The next program's check, in a child of the master: could it go on with what this one leaves?

The child executes the program as the master is going to, with the command line, and the
descriptors of the disk. It changes nothing, says on its standard output which version it is, or
why not on its standard error, and ends.
"""

from __future__ import annotations

import json
import os
import signal
from time import monotonic
from typing import Any, Dict, Optional

from ...errors import CommandError
from ...system.forking import SIGNALS, fork_with_pipe, reset_signals
from ...system.kept import Kept
from ...system.polling import read_pipe
from ...text import one_line
from .program import CHECK, Program

_PATIENCE = 60.0
"""Seconds: Python may have to compile all of the new program first."""

_LONGEST = 64 << 10


class Check:
    """The check of *program*, as a process that runs."""

    def __init__(self, program: Program, estate_fd: int, disk: Kept) -> None:
        """Raises `OSError` if there can be no process."""
        self._program = program
        command = program.command(CHECK, estate_fd)

        def live(writing: int) -> int:
            reset_signals(*SIGNALS)
            for stream, fd in ((0, os.open(os.devnull, os.O_RDONLY)), (1, writing), (2, writing)):
                os.dup2(fd, stream)
            disk.let_through()
            os.set_inheritable(estate_fd, True)
            try:
                os.execv(command[0], command)
            except OSError as error:
                os.write(2, f"{command[0]} cannot be executed: {error.strerror}".encode())
            return 1

        self.pid, self._reading = fork_with_pipe("the check of an upgrade", live)
        os.set_blocking(self._reading, False)
        self._complaint = ""
        self.deadline = monotonic() + _PATIENCE

    def kill_if_late(self) -> None:
        """One that hangs ends."""
        if monotonic() >= self.deadline:
            self._complaint = f"it did not answer within {_PATIENCE:g} s"
            self.kill()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def verdict(self, exit_code: int) -> Dict[str, Any]:
        """What the program says of itself. It has ended. Raises `CommandError` if it cannot go on."""
        output = read_pipe(self._reading, _LONGEST).decode("utf-8", "replace")
        os.close(self._reading)
        lines = [line for line in output.splitlines() if line.strip()]
        answer = _parse(lines[-1]) if lines and not exit_code else None
        if answer is None:
            reason = self._complaint or (one_line(lines[-1]) if lines else f"exit status {exit_code}")
            raise CommandError(
                f"{self._program.path} cannot go on with this {self._program.kind}, which stays as it is: {reason}"
            )
        return answer


def _parse(line: str) -> Optional[Dict[str, Any]]:
    try:
        answer = json.loads(line)
        return answer if isinstance(answer["version"], str) else None
    except (ValueError, TypeError, KeyError):
        return None
