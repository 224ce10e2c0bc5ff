"""A worker: one process, one client at a time.

`Worker.__init__` runs in the master, `Worker.run` in the child. A spare worker has
its image open and waits for a client; it accepts and negotiates itself, so that no
client waits for a fork or for another client's handshake. A connection is a client
once it has said something; the others wait in the `Lobby`. When its client has left
it is a spare again, with the image's pages mapped already, unless the master has
enough of them, or spares that know a newer configuration. A worker that is to retire
begins no handshake any more, and leaves its lobby to the others.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
from contextlib import closing
from functools import partial
from logging import ERROR
from time import monotonic
from typing import Callable, List, NamedTuple, Optional, Sequence, Union

from ..logs import Seldom, about, log
from ..system.forking import let_signals_in
from ..system.kept import Kept
from ..system.process import set_title
from .disk import Disk
from .handover.arrival import Arrival, Terms, receive_client, take_offer
from .handover.departure import Departure, Telling
from .lobby import Guest, Lobby
from .process_loop import ProcessLoop, Stop
from .reports import Report
from .service import Came, Service
from .session.connection import Connection

_RETRY_ACCEPT = 1.0
_TELL_OF_SHORTAGE = 30.0
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

GARBAGE_THRESHOLD = 50_000
"""Objects that may pile up before Python looks for cycles: the request loop makes none."""


class Pipes(NamedTuple):
    """Pipes between the master and its workers, as descriptors.

    ``lifeline`` breaks with the master. Through ``reports`` a worker tells of its
    client. Each byte in ``retirements`` ends one worker that has no client, and its end
    ends all of them.
    """

    lifeline: int
    lifeline_master: int
    reports_master: int
    reports: int
    retirements: int
    retirements_master: int


class Pool(NamedTuple):
    """Two pairs of sockets by which workers pass connections to each other: silent ones, and offers of clients."""

    reading: socket.socket
    writing: socket.socket
    offers: socket.socket
    offering: socket.socket

    @classmethod
    def new(cls) -> Pool:
        """Raises `OSError`."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        return cls(*pairs[0], *pairs[1])

    def pack(self, kept: Kept) -> List[int]:
        """For the next program of the master."""
        return [kept(sock.fileno()) for sock in self]

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> Pool:
        """That of the program before."""
        return cls(*(socket.socket(fileno=fd) for fd in packed))


class Worker:
    """A process that serves one client after the other: prepared by the master, run in the child."""

    def __init__(
        self,
        service: Service,
        listeners: Sequence[socket.socket],
        pipes: Pipes,
        pool: Pool,
        close_first: Callable[[], None],
        *,
        expects_moves: bool = False,
    ) -> None:
        """In the child *close_first* lets go of what is the master's alone. It *expects_moves* of clients to it."""
        self._service = service
        self._close_first = close_first
        self._pool = pool
        self._listeners = listeners
        self._pipes = pipes
        self._shortages = Seldom(_TELL_OF_SHORTAGE)
        self._expects_moves = expects_moves
        self._is_warm = False

    def run(self) -> int:
        """Life of the child: its exit status. Signals are blocked when it begins."""
        try:
            return self._work(self._init_process())
        except Stop:
            return 0
        except OSError as error:
            log.error("worker cannot work: %s", error)
            return 1

    def _init_process(self) -> ProcessLoop:
        self._close_first()
        gc.set_threshold(GARBAGE_THRESHOLD)
        loop = ProcessLoop(self._pipes.lifeline)
        let_signals_in()
        return loop

    def _work(self, loop: ProcessLoop) -> int:
        service = self._service
        disk = loop.companion = service.open_disk()
        loop.farewell = self._close_listeners  # a successor may listen there already
        with closing(Lobby(service.configuration.handshake_timeout, oldstyle=service.oldstyle)) as lobby:
            if self._expects_moves:
                self._warm_up(loop, disk)
            self._report(Report(os.getpid()))  # it can work
            try:
                return self._serve_clients(loop, disk, lobby)
            except Stop:
                disk.take_leave()
                raise

    def _serve_clients(self, loop: ProcessLoop, disk: Disk, lobby: Lobby) -> int:
        service = self._service
        while True:
            set_title("spare worker", service.source.name)
            guest = self._next_client(loop, disk, lobby)
            if guest is None:
                self._leave_lobby(loop, lobby)
                disk.close()
                return 0
            lobby.hand_over(self._pool.writing)
            self._serve(guest, loop, disk)
            self._is_warm = True
            del guest
            gc.collect()
            self._report(Report(os.getpid()))
            loop.check()

    def _serve(self, guest: Union[Guest, Arrival], loop: ProcessLoop, disk: Disk) -> None:
        """Serve a client that has spoken, or that another worker has served before."""
        service, pid = self._service, os.getpid()
        connection = Connection(guest.sock, loop, service.spin, guest.peer)
        peer = connection.peer
        telling = Telling.by_reports(self._report, peer)
        departure = Departure(loop, self._pool.offering, service.source.identity(), telling)
        if isinstance(guest, Arrival):
            before = guest.pid
            came = Came(guest, lambda pause: self._report(Report(pid, peer, moved_from=before, pause=pause)))
            service.serve(connection, disk, came=came, departure=departure)
        else:
            self._report(Report(pid, peer))
            service.serve(connection, disk, deadline=guest.deadline, departure=departure)

    def _next_client(self, loop: ProcessLoop, disk: Disk, lobby: Lobby) -> Union[Guest, Arrival, None]:
        """The next client, or None if this worker is to retire."""
        retirements, pool, offers = self._pipes.retirements, self._pool.reading, self._pool.offers
        listening = [listener.fileno() for listener in self._listeners]
        descriptors = (*listening, pool.fileno(), offers.fileno(), lobby.fileno(), retirements)
        while True:
            deadline = lobby.deadline()
            timeout = None if deadline is None else max(0.0, deadline - monotonic())
            loop.wait(descriptors, select.POLLIN, timeout, results=True)
            loop.ordered = loop.called = False  # there is no client to hand over
            disk.forget_results()
            disk.catch_up()
            guest = lobby.speaker()
            if self._is_to_retire():  # not before: who speaks from now on is not served by this worker
                if guest is not None:
                    lobby.take_in(guest)
                return None
            if guest is not None:
                return guest
            lobby.expire()
            for listener in self._listeners:
                sock = self._try_accept(listener, loop)
                if sock is not None:
                    lobby.greet(sock)
            lobby.take_over(pool)
            arrival = self._receive_client(loop, disk, lobby)
            if arrival is not None:
                return arrival

    def _receive_client(self, loop: ProcessLoop, disk: Disk, lobby: Lobby) -> Optional[Arrival]:
        """The client of another worker, if one is offered."""
        source = self._service.source
        offered = take_offer(self._pool.offers)
        if offered is None:
            return None
        lobby.hand_over(self._pool.writing)  # whoever speaks meanwhile need not wait
        self._warm_up(loop, disk)
        approach = partial(disk.approach_origin, loop)
        return receive_client(offered, loop, Terms(source.identity(), source.size, disk.image.readonly, approach))

    def _warm_up(self, loop: ProcessLoop, disk: Disk) -> None:
        """A client that moves here should not wait for what a process does for the first time."""
        if not self._is_warm:
            self._service.rehearse(disk, loop)
            self._is_warm = True

    def _is_to_retire(self) -> bool:
        try:
            os.read(self._pipes.retirements, 1)
        except BlockingIOError:
            return False
        return True

    def _leave_lobby(self, loop: ProcessLoop, lobby: Lobby) -> None:
        """The connections there are for others, who may have to make room for them first."""
        pool = self._pool.writing
        while not lobby.hand_over(pool, patient=True):
            deadline = lobby.deadline() or 0.0
            loop.wait((pool.fileno(),), select.POLLOUT, max(0.0, deadline - monotonic()))
            lobby.expire()

    def _try_accept(self, listener: socket.socket, loop: ProcessLoop) -> Optional[socket.socket]:
        try:
            return listener.accept()[0]
        except OSError as error:
            if error.errno not in _SHORTAGES:
                return None  # another worker was faster, or the client has changed its mind (``accept(2)``)
            self._shortages.log(
                ERROR, "cannot accept a client, trying again every second: %s", error.strerror, extra=about(error=error)
            )
            loop.pause(_RETRY_ACCEPT)
            return None

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()

    def _report(self, report: Report) -> None:
        try:
            os.write(self._pipes.reports, report.pack())
        except BrokenPipeError:
            raise Stop("the master is gone") from None
