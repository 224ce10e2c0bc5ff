"""The clients as the wrapper sees them: accepted, given a process, mourned."""

from __future__ import annotations

import errno
import signal
import socket
from collections import Counter
from functools import partial
from time import monotonic
from typing import Any, Callable, Dict, List, Mapping, Optional, Set

from ..logs import about, log
from ..server.endings import reason_of
from ..server.lobby import Guest, Lobby
from ..server.reports import Report
from ..system.kept import Kept
from ..system.listen import Listeners
from ..text import counted
from .children import Body, Children
from .reports import ClientReport, receive_report

_ACCEPTS = 64
"""Clients accepted at one listener before anything else gets its turn."""

_RETRY = 1.0
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Clients:
    """Accepts on *listeners* and forks a process for each client, which runs what *serve* makes of it.

    A connection is a client once it has said something, and waits in the *lobby* until then.
    """

    def __init__(
        self,
        listeners: Listeners,
        lobby: Lobby,
        children: Children,
        serve: Callable[[Guest], Body],
        limit: int,
        on_switched: Callable[[str, str], None],
        on_report: Callable[[Report], None],
        packed: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """At most *limit* clients are connected at once; others wait in the kernel's queue.

        *on_switched* hears of an export, and its image, that a client's process found to be no proxy any more.
        *on_report* hears of all reports. *packed* are those that the program before has left.
        """
        self._on_switched = on_switched
        self._on_report = on_report
        self.on_death: Callable[[str], None] = lambda export: None
        """Hears of the export of a client whose process has died."""
        self.limit = limit
        self._full = False
        self._listeners = listeners
        self._lobby = lobby
        self._children = children
        self._serve = serve
        self._reports: Dict[int, Optional[ClientReport]] = {}
        self._parted: Set[int] = set()
        """Processes whose clients have gone over to others, and that have not ended yet."""
        self._short_of = ""
        self._accept_at: Optional[float] = None
        """When to accept clients again, if there is something short (monotonic seconds)."""
        if packed is None:
            self.inbox, self.outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        else:
            self.inbox, self.outbox = (socket.socket(fileno=fd) for fd in packed["sockets"])
            self._take_over(packed)
        self.inbox.setblocking(False)

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        return {
            "sockets": [kept(sock.fileno()) for sock in (self.inbox, self.outbox)],
            "lobby": self._lobby.pack(kept),
            "reports": [(pid, None if report is None else report.fields()) for pid, report in self._reports.items()],
            "others": [pid for pid in self._children.pids() if pid not in self._reports],
            "parted": [*self._parted],
        }

    def _take_over(self, packed: Mapping[str, Any]) -> None:
        """Clients, and children that are none, of the program before."""
        self._lobby.unpack(packed["lobby"])
        self._parted.update(packed["parted"])
        for pid in packed["others"]:
            self._children.adopt(pid, partial(self._on_end_of_other, pid))
        for pid, report in packed["reports"]:
            self._reports[pid] = None if report is None else ClientReport.of_fields(report)
            self._children.adopt(pid, partial(self.on_end, pid))

    def __len__(self) -> int:
        return len(self._reports)

    def pids(self) -> List[int]:
        """Processes that have clients, negotiate with them, or bring something to its end for operators."""
        return [*self._reports, *self._parted]

    def processes(self) -> List[int]:
        """Those that have clients or negotiate with them."""
        return list(self._reports)

    @property
    def served(self) -> Mapping[int, ClientReport]:
        """Those that have clients."""
        return {pid: report for pid, report in self._reports.items() if report is not None}

    def count(self) -> Mapping[str, int]:
        """How many clients use each export that has any."""
        return Counter(report.export for report in self._reports.values() if report)

    def after_fork(self) -> None:
        self.inbox.close()
        self.stop_listening()

    def stop_listening(self) -> None:
        self._listeners.close()
        self._lobby.close()

    def interests(self) -> List[int]:
        """Descriptors to be polled for input."""
        if not self._listeners.sockets or self._accept_at is not None or self._is_full():
            return [self.inbox.fileno()]
        return [self.inbox.fileno(), self._lobby.fileno(), *(sock.fileno() for sock in self._listeners.sockets)]

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called in any case (monotonic seconds)."""
        if self._accept_at is not None or self._is_full():
            return self._accept_at
        return self._lobby.deadline()

    def _is_full(self) -> bool:
        count = len(self._reports)
        full = count >= self.limit
        if full and not self._full:
            what = "which is the limit" if count == self.limit else f"more than the limit of {self.limit}"
            log.warning("%s connected, %s; others wait", counted(count, "client is", "clients are"), what)
        self._full = full
        return full

    def progress(self, ready: Set[int]) -> None:
        """Hear the reports, and accept where *ready* says so."""
        self.read_reports()
        if self._accept_at is not None and monotonic() >= self._accept_at:
            self._accept_at = None
        if self._listeners.sockets:
            self._admit_speakers()
        for listener in self._listeners.sockets:
            if listener.fileno() in ready:
                self._accept_some(listener)

    def read_reports(self) -> None:
        while True:
            told = receive_report(self.inbox)
            if told is None:
                return
            report = told.report
            if report.moved_from:
                if self._reports.pop(report.moved_from, None) is not None:
                    self._parted.add(report.moved_from)
                self._reports[report.pid] = told
            elif report.pid in self._reports and self._reports[report.pid] is None:
                self._reports[report.pid] = told
                if told.switched_image:
                    self._on_switched(told.export, told.switched_image)
            self._on_report(report)

    def _admit_speakers(self) -> None:
        """As far as there is room; the time of those who wait for it goes on only when there is."""
        while self._accept_at is None and not self._is_full():
            guest = self._lobby.speaker()
            if guest is None:
                self._lobby.expire()
                return
            self._admit(guest)

    def _accept_some(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if self._accept_at is not None or self._is_full():
                return
            try:
                sock = listener.accept()[0]
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._wait_for_better_times("accept a client", error)
                    continue
                if isinstance(error, BlockingIOError):
                    return
                continue  # the client has changed its mind (``accept(2)``)
            self._lobby.greet(sock)

    def _admit(self, guest: Guest) -> None:
        pids: List[int] = []
        try:
            pid = self._children.start(self._serve(guest), lambda status: self.on_end(pids[0], status))
        except OSError as error:
            self._wait_for_better_times("start a process for a client, who is turned away", error)
            return
        finally:
            guest.sock.close()
        pids.append(pid)
        self._reports[pid] = None
        self._short_of = ""

    def _wait_for_better_times(self, what: str, error: OSError) -> None:
        if self._short_of != what:
            log.error("cannot %s, trying again every second: %s", what, error.strerror, extra=about(error=error))
        self._short_of = what
        self._accept_at = monotonic() + _RETRY

    def _on_end_of_other(self, pid: int, _status: int) -> None:
        self._parted.discard(pid)

    def on_end(self, pid: int, status: int) -> None:
        """A process that has, or had, a client has ended."""
        if pid in self._parted:
            self._parted.discard(pid)
            return
        told = self._reports.pop(pid, None)
        stopped = status in (-signal.SIGTERM, -signal.SIGINT)  # by Ctrl-C to all processes, or an operator
        if not status or stopped or not self._listeners.sockets:  # without them the wrapper is ending
            return
        reason = reason_of(status)
        if told is None:
            log.error("process %d died while it negotiated: %s", pid, reason)
        else:
            peer = told.report.peer
            self.on_death(told.export)
            extra = about(export=told.export, peer=peer)
            log.error("server %d of export %r for client %s died: %s", pid, told.export, peer, reason, extra=extra)
