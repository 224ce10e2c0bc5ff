"""The workers that one program has forked: which of them have a client, and what joins them to the master."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Mapping, Set

from .. import __version__
from ..system.kept import Kept
from ..system.polling import read_pipe
from .worker import REPORT_SIZE, Pipes, parse_report

_PIPE_SIZE = 64 << 10


class Crew:
    """Workers of one program, as the master knows them: ``spares``, and ``clients`` by the workers' process ids."""

    def __init__(self, pipes: Pipes, version: str = __version__) -> None:
        """*version* is that of the program."""
        self.pipes = pipes
        self.version = version
        self.spares: Set[int] = set()
        self.clients: Dict[int, str] = {}
        self.unproven: Set[int] = set()
        """Spares that have not yet said that they can work."""
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

    def close(self) -> None:
        """It has no workers any more, or this process has no use for it."""
        for fd in self.pipes:
            os.close(fd)

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        return {
            "version": self.version,
            "pipes": [kept(fd) for fd in self.pipes],
            "spares": [*self.spares],
            "clients": [*self.clients.items()],
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Crew:
        """The workers of the program before."""
        crew = cls(Pipes(*packed["pipes"]), packed["version"])
        crew.spares.update(packed["spares"])
        crew.clients.update(packed["clients"])
        return crew

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
        reports, proven = read_pipe(self.pipes.reports_master, _PIPE_SIZE), False
        for start in range(0, len(reports), REPORT_SIZE):
            pid, peer = parse_report(reports[start : start + REPORT_SIZE])
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

    def dismiss(self) -> None:
        """End every worker that is spare, now or when its client leaves."""
        os.write(self.pipes.retirements_master, bytes(len(self) - self._retiring))

    def retire(self, most: int) -> None:
        """End spare workers, if there are more than *most*."""
        excess = len(self.spares) - self._retiring - most
        if excess > 0:
            os.write(self.pipes.retirements_master, bytes(excess))
            self._retiring += excess
