"""Processes of the new program that wait for clients of the old one's processes.

They are forked ahead: a client waits for three wake-ups, and not for a fork or the opening of
its disk. One that has taken a client, or has failed to, takes no other.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress
from time import monotonic
from typing import Callable, Collection, List, Mapping, NamedTuple, Optional, Set

from ...errors import ConfigurationError
from ...logs import about, log
from ...server.endings import reason_of
from ...server.handover.arrival import refuse_offer, take_offer
from ...server.handover.letters import Letter, parse_offer, unfold
from ...server.process_loop import ProcessLoop, Stop
from ...server.reports import Report
from ...system.process import set_title
from ..children import Body, Children
from ..client import PROGRAM
from ..clients import Clients
from ..exchange import Exchange
from ..exports import export_from_fields
from ..reports import ClientReport, send_report
from ..servers import Servers

_RETRY = 1.0


class Mover(NamedTuple):
    """One of them, from the fork on; it ends when nobody has the other end of *lifeline* any more."""

    servers: Servers
    exchange: Exchange
    reports: socket.socket
    lifeline: int

    def run(self) -> int:
        """Life of the process: its exit status."""
        try:
            return self._wait_for_client(ProcessLoop())
        except Stop:
            return 0

    def _wait_for_client(self, loop: ProcessLoop) -> int:
        set_title("waits for a client to move", program=PROGRAM)
        ready = ClientReport(Report(os.getpid()))
        while not (send_report(self.reports, ready) or self._is_over()):
            pass  # the wrapper has a lot to do
        while True:
            loop.wait((self.exchange.offers.fileno(), self.lifeline), select.POLLIN)
            offer = take_offer(self.exchange.offers, with_kit=True)
            if offer is not None:
                return self._receive(offer, loop)
            if self._is_over():
                return 0

    def _is_over(self) -> bool:
        with suppress(BlockingIOError):
            os.read(self.lifeline, 1)
            return True
        return False

    def _receive(self, offer: Letter, loop: ProcessLoop) -> int:
        """Become the server of the client that is offered."""
        receive = self.servers.receive
        try:
            kit = unfold(parse_offer(offer.data)["kit"], offer.fds[1:])
            name, export = kit["name"], export_from_fields(kit["export"])
            if receive is None:
                raise ValueError("there are other servers here")
        except (ValueError, KeyError, TypeError, IndexError, ConfigurationError) as error:
            log.warning("an offer of a client makes no sense, and is left alone: %r", error)
            refuse_offer(offer, str(error))
            return 1
        self.exchange.offers.close()
        channel = Letter(offer.data, offer.fds[:1])
        return receive(export, channel, kit, loop, self.exchange.passage(name, export, self.reports))


class Movers:
    """All of them, and the clients that are to move, as `server.upgrade.moves.Moves` wants to know them."""

    def __init__(self, clients: Clients, children: Children, body: Callable[[int], Body]) -> None:
        """*body* is what each of them runs, with its end of a pipe as a lifeline."""
        self._clients = clients
        self._children = children
        self._body = body
        self._lifeline: Optional[int] = None
        self._lifeline_master: Optional[int] = None
        self._retry_at = 0.0
        self._former: Set[int] = set()
        """Processes of clients of the program before."""
        self.spares: Set[int] = set()
        self.unproven: Set[int] = set()
        self.moves: List[Report] = []
        self.failures = 0
        """How often in a row they failed, and none could start."""

    @property
    def clients(self) -> Mapping[int, ClientReport]:
        return self._clients.served

    @property
    def dismissed(self) -> Collection[int]:
        return self._former.intersection(self._clients.processes())

    def __contains__(self, pid: int) -> bool:
        return pid in self.spares or pid in self._clients.served

    def begin(self) -> None:
        """All that there are now are to move; some of them cannot, as is known already."""
        self._former.update(self._clients.processes())
        self.moves += [told.report for told in self.clients.values() if told.report.stays]

    def after_fork(self) -> None:
        """In a child: the lifeline has to break with the wrapper."""
        if self._lifeline_master is not None:
            os.close(self._lifeline_master)

    def keep(self, number: int) -> None:
        """Have so many wait."""
        while len(self.spares) < number and monotonic() >= self._retry_at:
            try:
                self._start()
            except OSError as error:
                log.error(
                    "cannot start a process for a client that moves, trying again: %s",
                    error.strerror,
                    extra=about(error=error),
                )
                self._fail()

    def _start(self) -> None:
        if self._lifeline is None:
            self._lifeline, self._lifeline_master = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        pids: List[int] = []
        pids.append(self._children.start(self._body(self._lifeline), lambda status: self._on_end(pids[0], status)))
        self.spares.add(pids[0])
        self.unproven.add(pids[0])

    def _fail(self) -> None:
        """Several that fail at once count as one."""
        if monotonic() >= self._retry_at:
            self.failures += 1
        self._retry_at = monotonic() + _RETRY

    def on_report(self, report: Report) -> None:
        """Of any process of the wrapper's."""
        if report.pid in self.unproven:
            self.unproven.discard(report.pid)
            self.failures = 0
        if report.moved_from:
            self.spares.discard(report.pid)
        if report.is_of_move:
            self.moves.append(report)

    def _on_end(self, pid: int, status: int) -> None:
        if pid in self.spares:
            self.spares.discard(pid)
            self.unproven.discard(pid)
            if status not in (0, -signal.SIGTERM):  # one that was just made may be told to stop before it listens
                self._fail()
                log.error("process %d, which waited for a client to move, died: %s", pid, reason_of(status))
        else:
            self._clients.on_end(pid, status)

    def dismiss(self) -> None:
        """No more clients move. Those that wait end."""
        for fd in (self._lifeline, self._lifeline_master):
            if fd is not None:
                os.close(fd)
        self._lifeline = self._lifeline_master = None
        self._former.clear()
        self.moves.clear()
