"""The workers that one program has forked: which of them have a client, and what joins them to the master."""

from __future__ import annotations

import os
from typing import Dict, List, Set

from ..system.polling import read_pipe
from . import reports
from .reports import Report, parse_report
from .worker import Pipes

_PIPE_SIZE = 64 << 10


class Crew:
    """Workers of one program, as the master knows them: ``spares``, and ``clients`` by the workers' process ids."""

    def __init__(self, pipes: Pipes) -> None:
        self.pipes = pipes
        self.spares: Set[int] = set()
        self.clients: Dict[int, str] = {}
        self.unproven: Set[int] = set()
        """Spares that have not yet said that they can work."""
        self.moves: List[Report] = []
        """What workers have told of clients that were to be moved; whoever wants to know takes it off."""
        self._retiring = 0

    @classmethod
    def new(cls) -> Crew:
        """Without workers. Raises `OSError`."""
        pipes = Pipes(*os.pipe(), *os.pipe(), *os.pipe())
        os.set_blocking(pipes.reports_master, False)
        os.set_blocking(pipes.retirements, False)
        return cls(pipes)

    def close_masters_ends(self) -> None:
        """In a child of the master: the lifeline has to break with the master."""
        for fd in (self.pipes.lifeline_master, self.pipes.reports_master, self.pipes.retirements_master):
            os.close(fd)

    def __len__(self) -> int:
        return len(self.spares) + len(self.clients)

    def __contains__(self, pid: int) -> bool:
        return pid in self.spares or pid in self.clients

    def pids(self) -> List[int]:
        return [*self.spares, *self.clients]

    def join(self, pid: int) -> None:
        """The worker *pid* was forked."""
        self.spares.add(pid)
        self.unproven.add(pid)

    def read_reports(self) -> bool:
        """Book what the workers have told; whether one of them can work."""
        data, proven = read_pipe(self.pipes.reports_master, _PIPE_SIZE), False
        for start in range(0, len(data), reports.SIZE):
            report = parse_report(data[start : start + reports.SIZE])
            pid, peer = report.pid, report.peer
            if report.is_of_move:
                self.moves.append(report)
            if peer and pid in self.spares:
                self.spares.remove(pid)
                self.clients[pid] = peer
            elif not peer and pid in self.clients:
                del self.clients[pid]
                self.spares.add(pid)
            elif not peer:
                proven = True
            self.unproven.discard(pid)
        return proven

    def bury(self, pid: int, *, failed: bool) -> str:
        """The worker *pid* has ended; its client, or an empty text if it had none."""
        self.spares.discard(pid)
        self.unproven.discard(pid)
        if self._retiring and not failed:
            self._retiring -= 1
        return self.clients.pop(pid, "")

    def retire(self, most: int) -> None:
        """End spare workers, if there are more than *most*."""
        excess = len(self.spares) - self._retiring - most
        if excess > 0:
            os.write(self.pipes.retirements_master, bytes(excess))
            self._retiring += excess
