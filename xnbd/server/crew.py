"""The workers that one program has forked: which of them have a client, and what joins them to the master."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Dict, List, Set, Tuple

from ..system.polling import read_pipe
from .worker import REPORT_SIZE, Pipes, parse_report

_PIPE_SIZE = 64 << 10


class Crew:
    """Workers of one program, as the master knows them: ``spares``, and ``clients`` by the workers' process ids.

    Those that `dismiss` is about are no spares any more, and are left alone until they have ended.
    """

    def __init__(self, pipes: Pipes) -> None:
        self.pipes = pipes
        self.spares: Set[int] = set()
        self.dismissed: Set[int] = set()
        """All that were dismissed, with clients or without."""
        self.clients: Dict[int, str] = {}
        self.unproven: Set[int] = set()
        """Spares that have not yet said that they can work."""
        self._retiring = 0

    @classmethod
    def new(cls) -> Crew:
        """Without workers. Raises `OSError`."""
        pipes = Pipes(*os.pipe(), *os.pipe(), *_retirements())
        os.set_blocking(pipes.reports_master, False)
        return cls(pipes)

    def close_masters_ends(self) -> None:
        """In a child of the master: the lifeline has to break with the master."""
        for fd in (self.pipes.lifeline_master, self.pipes.reports_master, self.pipes.retirements_master):
            os.close(fd)

    def __contains__(self, pid: int) -> bool:
        return pid in self.spares or pid in self.clients or pid in self.dismissed

    def pids(self) -> List[int]:
        return list(self.dismissed.union(self.spares, self.clients))

    @property
    def has_proven_spare(self) -> bool:
        """Whether a client that comes now finds a worker."""
        return bool(self.spares - self.unproven)

    def join(self, pid: int) -> None:
        """The worker *pid* was forked."""
        self.spares.add(pid)
        self.unproven.add(pid)

    def read_reports(self) -> bool:
        """Book what the workers have told; whether one of them can work."""
        reports, proven = read_pipe(self.pipes.reports_master, _PIPE_SIZE), False
        for start in range(0, len(reports), REPORT_SIZE):
            pid, peer = parse_report(reports[start : start + REPORT_SIZE])
            if peer and pid in self:
                self.spares.discard(pid)
                self.clients[pid] = peer
            elif not peer and pid in self.clients:
                del self.clients[pid]
                if pid not in self.dismissed:
                    self.spares.add(pid)
            elif not peer:
                proven = True
            self.unproven.discard(pid)
        return proven

    def bury(self, pid: int, *, failed: bool) -> str:
        """The worker *pid* has ended; its client, or an empty text if it had none."""
        self.spares.discard(pid)
        self.unproven.discard(pid)
        if pid in self.dismissed:
            self.dismissed.remove(pid)
        elif self._retiring and not failed:
            self._retiring -= 1
        return self.clients.pop(pid, "")

    def dismiss(self) -> None:
        """Have all workers end that are there now, each as soon as it has no client; from now on none begins to serve.

        Those that are forked from now on have retirements of their own. Raises `OSError`.
        """
        retirements, retirements_master = _retirements()
        self.dismissed.update(self.spares, self.clients)
        # The end of the pipe is seen only when the youngest worker has closed its copy of the master's end.
        with suppress(BlockingIOError):
            os.write(self.pipes.retirements_master, bytes(len(self.dismissed)))
        for fd in (self.pipes.retirements, self.pipes.retirements_master):
            os.close(fd)
        self.pipes = self.pipes._replace(retirements=retirements, retirements_master=retirements_master)
        self.spares.clear()
        self.unproven.clear()
        self._retiring = 0

    def retire(self, most: int) -> None:
        """End spare workers, if there are more than *most*."""
        excess = len(self.spares) - self._retiring - most
        if excess > 0:
            with suppress(BlockingIOError):
                self._retiring += os.write(self.pipes.retirements_master, bytes(excess))


def _retirements() -> Tuple[int, int]:
    """A pipe for them. Raises `OSError`."""
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_blocking(fd, False)
    return reading, writing
