"""A process that a steward forks to do one thing."""

from __future__ import annotations

import os
import signal
from time import sleep
from typing import Callable, Optional

from ..errors import TaskFailed
from ..logs import log
from .watch import Stop
from .worker import read_pipe

_LONGEST = 32 << 10


class Child:
    """A process that does one thing; ``message`` is what it came to, or why it failed."""

    def __init__(self, close_first: Callable[[], None], work: Callable[[], Optional[str]]) -> None:
        reading, writing = os.pipe()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        self.pid = os.fork()
        if not self.pid:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # until it has a `Watch` of its own
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(reading)
            close_first()
            _do_and_exit(work, writing)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(writing)
        os.set_blocking(reading, False)
        self._reading = reading
        self.status: Optional[int] = None
        self.message = ""

    def fileno(self) -> int:
        """A descriptor that becomes readable when it is about to end."""
        return self._reading

    def is_done(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.message = read_pipe(self._reading, _LONGEST).decode("utf-8", "replace")
                os.close(self._reading)
        return self.status is not None

    def stop(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Until it has ended, which takes no long time after `stop`."""
        while not self.is_done():
            sleep(0.005)


def _do_and_exit(work: Callable[[], Optional[str]], writing: int) -> None:
    status = 1
    try:
        os.write(writing, (work() or "").encode())
        status = 0
    except Stop:
        status = 0
    except TaskFailed as failure:
        os.write(writing, str(failure).encode()[:_LONGEST])
    except OSError as error:
        os.write(writing, str(error.strerror or error).encode()[:_LONGEST])
    except BaseException:
        log.exception("a child of the steward failed")
    finally:
        os._exit(status)
