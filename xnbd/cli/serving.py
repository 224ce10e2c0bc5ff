"""From the options of xnbd-server to a server that runs."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator, Optional

from ..errors import ConfigurationError
from ..logs import log
from ..scoreboard.layout import create_scoreboard
from ..scoreboard.scoreboard import Scoreboard
from ..server.process_loop import ProcessLoop
from ..server.service import Service
from ..server.session.connection import Connection
from ..storage.image import Source
from ..storage.target import TargetSource, create_sparse
from ..system.file_locks import do_nothing
from ..system.listen import Listeners
from ..system.process import (
    Daemon,
    PidFile,
    leave_terminal,
    notify_service_manager,
    require_descriptors,
    take_client_socket,
)
from .admission import check_access, open_access, open_listeners
from .encrypting import open_tls
from .options import CowOptions, Introduced, ManyClients, OneClient, ServerOptions, TargetOptions

if TYPE_CHECKING:
    from ..server.master import Limits


def serve(options: ServerOptions, client: Optional[int]) -> int:
    """Serve until the end; the exit status. *client* is a super-server's socket, if there is one.

    Raises `ConfigurationError` if the server cannot start.
    """
    clients = options.clients
    if isinstance(clients, ManyClients):
        return _serve_many(options, clients)
    if isinstance(clients, OneClient):
        clients = _introduce(clients, client)
    return _serve_one(options, clients)


def _introduce(connected: OneClient, client: Optional[int]) -> Introduced:
    return Introduced(Connection(_client_socket(connected.fd, client), ProcessLoop()), connected.agreement)


def _open_service(options: ServerOptions, processes: int) -> Service:
    """The disk, for at most so many *processes*, and how it is offered."""
    access = open_access(options.rules_path)
    tls = open_tls(options.tls)
    source = _open_source(options, alone=processes > 1)
    return Service(
        source=source,
        scoreboard_fd=source.scoreboard_fd or create_scoreboard(processes),
        export_name=options.export_name or source.name,
        oldstyle=options.oldstyle,
        handshake_timeout=options.handshake_timeout,
        spin=options.spin,
        limits=options.queue_limits,
        control_path=options.control_path,
        access=access,
        tls=tls,
    )


def _open_source(options: ServerOptions, *, alone: bool) -> Source[Scoreboard]:
    """The disk, as its mode makes it; *alone* as for `open_proxy`."""
    disk = options.disk
    if not isinstance(disk, (TargetOptions, CowOptions)):
        from .proxying import open_proxy

        return open_proxy(disk, alone=alone)
    if disk.create is not None:
        create_sparse(disk.path, disk.create)
    if isinstance(disk, TargetOptions):
        return TargetSource(disk.path, readonly=disk.readonly)
    from ..storage.cow import CowSource

    return CowSource(disk.path, readonly=disk.readonly, directory=disk.directory)


def _serve_one(options: ServerOptions, client: Introduced) -> int:
    """A client that is connected already, in this process."""
    connection = client.connection
    service = _open_service(options, processes=1)
    require_descriptors(_DESCRIPTORS[service.source.mode])
    with _steward_for_one(service, connection):
        loop = ProcessLoop()
        disk = loop.companion = service.open_disk()
        connection.move_to(loop, service.spin)
        service.serve(connection, disk, client.agreement, role="serving")
        disk.close()
    return 0 if service.flush() else 1


@contextmanager
def _steward_for_one(service: Service, client: Connection) -> Iterator[None]:
    """A steward beside the one process that serves, if the disk needs one."""
    if not service.needs_steward:
        yield
        return
    from ..server.steward.process import Steward

    lifeline, holder = os.pipe()

    def close_first() -> None:
        os.close(holder)
        client.close()

    pid = Steward(service, service.control_path, must_listen=False).spawn(lifeline, close_first)
    os.close(lifeline)
    try:
        yield
    finally:
        os.close(holder)
        os.waitpid(pid, 0)


def _client_socket(fd: Optional[int], client: Optional[int]) -> socket.socket:
    """The connected socket *fd*, or, if that is None, the one that a super-server has as *client*."""
    if fd is not None:
        client = take_client_socket(fd) or client if fd <= 2 else fd
    if client is None:
        what = "standard input" if fd is None else f"descriptor {fd}"
        raise ConfigurationError(f"{what} is no socket: this is for use by a super-server")
    try:
        sock = socket.socket(fileno=client)
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            raise ConfigurationError("the client's descriptor is no connected stream socket")
    except OSError as error:
        raise ConfigurationError(f"the client's descriptor is no socket: {error.strerror}") from error
    os.set_inheritable(client, False)
    return sock


def _serve_many(options: ServerOptions, clients: ManyClients) -> int:
    """Clients that connect, each in a process of its own."""
    from ..server.master import ORDERS

    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)  # whoever can connect may send them
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if clients.daemonize else None
    pid_file = PidFile(clients.pid_path) if clients.pid_path else None
    try:
        service = _open_service(options, clients.limits.processes)
        open_listeners(clients.listen, listeners)
        check_access(service.access, listeners, service.tls)
        status = _run_master(service, listeners, clients.limits, daemon, pid_file)
        service.source.close()  # before the pid file goes: who waits for that may use the image in another way
        return status
    except ConfigurationError as error:
        if daemon:
            daemon.failed(error.exit_status)
        raise
    finally:
        listeners.tidy_up()
        if pid_file:
            pid_file.remove()


_DESCRIPTORS = {"target": 27, "cow": 35, "proxy": 43}
"""What the master, and then a process of it, opens besides disk and sockets, with some to spare, by the mode."""


def _run_master(
    service: Service, listeners: Listeners, limits: Limits, daemon: Optional[Daemon], pid_file: Optional[PidFile]
) -> int:
    from ..server.master import Master

    require_descriptors(_DESCRIPTORS[service.source.mode])
    master = Master(service, listeners.sockets, limits)
    try:
        if service.needs_steward:
            master.start_steward(leave_terminal if daemon else do_nothing)
        if pid_file:
            pid_file.write()
    except ConfigurationError:
        master.abandon()
        raise
    log.info("serving %s, %d bytes, on %s", service.source.description, service.source.size, listeners)
    if daemon:
        daemon.ready()
    notify_service_manager("READY=1")
    return master.run()
