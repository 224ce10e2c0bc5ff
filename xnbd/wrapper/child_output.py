"""Work beside the wrapper's loop: a child process whose output is collected in memory."""

from __future__ import annotations

import os
import signal
from typing import Callable, List, Optional

from ..errors import CommandError, ConfigurationError
from .children import Body, Children, execute

_MOST_OUTPUT = 1 << 20


class ChildOutput:
    """A child process under way; *on_end* is called with its exit code even if nobody waits for the job any more.

    Raises `ConfigurationError` if there can be no more processes.
    """

    def __init__(self, children: Children, body: Body, on_end: Optional[Callable[[int], None]] = None) -> None:
        self.status: Optional[int] = None
        self._children = children
        self._on_end = on_end
        self._read = [0, 0]
        self._fds: List[int] = []
        try:
            for stream in ("output", "errors"):
                self._fds.append(os.memfd_create(f"xnbd-job-{stream}"))
            self._pid = children.start(lambda: self._run(body), self._ended)
        except OSError as error:
            self.forget()
            raise ConfigurationError(f"the wrapper cannot start a process: {error.strerror}") from error

    def _run(self, body: Body) -> int:
        null = os.open(os.devnull, os.O_RDONLY)
        for stream, fd in enumerate([null, *self._fds]):
            os.dup2(fd, stream)
        return body()

    def _ended(self, status: int) -> None:
        self.status = status
        if self._on_end:
            self._on_end(status)

    def output(self) -> str:
        """What the job has said since the last call."""
        return self._new_text(0)

    def errors(self) -> str:
        return self._new_text(1)

    def _new_text(self, stream: int) -> str:
        data = os.pread(self._fds[stream], _MOST_OUTPUT, self._read[stream])
        if self.status is None:
            data = data[: data.rfind(b"\n") + 1 or len(data)]  # no half character, where there are lines
        self._read[stream] += len(data)
        return data.decode("utf-8", "replace")

    def stop(self) -> None:
        """Tell the process to end, if it has not yet."""
        self._children.signal(signal.SIGTERM, [self._pid])

    def forget(self) -> None:
        """Let go of the output."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def program(words: List[str]) -> Body:
    """For a job that is another program."""
    return lambda: execute(words)


def check(question: Callable[[], None]) -> Body:
    """For a job that asks *question*; why not, if it raises, goes to the errors of the job."""

    def ask() -> int:
        try:
            question()
        except (CommandError, ConfigurationError, OSError) as error:
            os.write(2, str(error).encode("utf-8", "backslashreplace"))
            return 1
        return 0

    return ask
