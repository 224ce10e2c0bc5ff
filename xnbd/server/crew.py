"""The master's workers: which of them have a client, and what joins them to the master."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Dict, List, Mapping, Set, Tuple

from ..system.kept import Kept
from ..system.polling import read_pipe
from . import reports
from .reports import Report, parse_report
from .worker import Pipes

_PIPE_SIZE = 64 << 10


class Crew:
    """Workers as the master knows them: ``spares``, and ``clients`` by the workers' process ids.

    Those that `set_apart` and `dismiss` are about are no spares any more, and are left alone until they have ended.
    """

    def __init__(self, pipes: Pipes) -> None:
        self.pipes = pipes
        self.spares: Set[int] = set()
        self.dismissed: Set[int] = set()
        """All that were dismissed, or are going to be, with clients or without."""
        self._apart: List[Tuple[int, int]] = []
        """Retirements of those that were set apart, and are not dismissed yet."""
        self.clients: Dict[int, str] = {}
        self.unproven: Set[int] = set()
        """Spares that have not yet said that they can work."""
        self.moves: List[Report] = []
        """What workers have told of clients that were to be moved; whoever wants to know takes it off."""
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
        for _, retirements_master in self._apart:
            os.close(retirements_master)

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        return {
            "pipes": [kept(fd) for fd in self.pipes],
            "workers": list({*self.spares, *self.dismissed}),
            "clients": [*self.clients.items()],
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Crew:
        """The workers of the program before, which are set apart."""
        crew = cls(Pipes(*packed["pipes"]))
        crew.spares.update(packed["workers"])
        crew.clients.update(packed["clients"])
        crew.set_apart()
        return crew

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
        data, proven = read_pipe(self.pipes.reports_master, _PIPE_SIZE), False
        for start in range(0, len(data), reports.SIZE):
            report = parse_report(data[start : start + reports.SIZE])
            pid, peer = report.pid, report.peer
            if report.is_of_move:
                self.moves.append(report)
            if report.moved_from:  # whose own report may come later
                self._part(report.moved_from)
            if peer and pid in self:
                self.spares.discard(pid)
                self.clients[pid] = peer
            elif not peer and pid in self.clients:
                self._part(pid)
            elif not peer:
                proven = True
            self.unproven.discard(pid)
        return proven

    def _part(self, pid: int) -> None:
        """The worker *pid* has no client any more."""
        if self.clients.pop(pid, None) is not None and pid not in self.dismissed:
            self.spares.add(pid)

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
        self.set_apart()
        self.let_go()

    def set_apart(self) -> None:
        """The workers that are there now are going to be dismissed, by `let_go`; until then they serve who comes.

        Raises `OSError`.
        """
        retirements, retirements_master = _retirements()
        self._apart.append((self.pipes.retirements, self.pipes.retirements_master))
        self.pipes = self.pipes._replace(retirements=retirements, retirements_master=retirements_master)
        self.dismissed.update(self.spares, self.clients)
        self.spares.clear()
        self.unproven.clear()
        self._retiring = 0

    def let_go(self) -> None:
        """Dismiss those that were set apart."""
        # The end of the pipe is seen only when the youngest worker has closed its copy of the master's end.
        for retirements, retirements_master in self._apart:
            with suppress(BlockingIOError):
                os.write(retirements_master, bytes(len(self.dismissed)))
            os.close(retirements)
            os.close(retirements_master)
        self._apart.clear()

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
