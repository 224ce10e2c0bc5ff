"""From the options of xnbd-server to a server that runs."""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Optional, Sequence

from ..errors import ConfigurationError
from ..logs import log, set_subject
from ..scoreboard.layout import count_lines, create_scoreboard
from ..scoreboard.rates import create_rates
from ..scoreboard.scoreboard import Scoreboard
from ..scoreboard.tally import create_tally
from ..server.process_loop import ProcessLoop
from ..server.service import Service
from ..server.session.connection import Connection
from ..server.single import serve_arrival, serve_one
from ..storage.image import Source
from ..storage.target import TargetSource, create_sparse
from ..system.file_locks import do_nothing
from ..system.listen import Listeners, UnixSocket
from ..system.process import (
    Daemon,
    PidFile,
    leave_terminal,
    require_descriptors,
    take_client_socket,
)
from ..system.service_manager import ServiceManager
from .admission import check_access, open_access, open_listeners, open_metrics
from .encrypting import open_tls
from .options import CowOptions, Expected, Introduced, ManyClients, OneClient, ServerOptions, TargetOptions

if TYPE_CHECKING:
    from ..server.configuration import Configuration, Load
    from ..server.premises import Premises, Surroundings
    from ..server.upgrade.program import Program


def serve(options: ServerOptions, client: Optional[int], words: Sequence[str] = ()) -> int:
    """Serve until the end; the exit status. *client* is a super-server's socket, if there is one.

    *words* are the command line, for a program that is to go on with it. Raises
    `ConfigurationError` if the server cannot start.
    """
    clients = options.clients
    if isinstance(clients, ManyClients):
        return _serve_many(options, clients, words)
    if isinstance(clients, Expected):
        return _serve_expected(options, clients)
    if isinstance(clients, OneClient):
        clients = _introduce(clients, client)
    return _serve_one(options, clients)


def _introduce(connected: OneClient, client: Optional[int]) -> Introduced:
    return Introduced(Connection(_client_socket(connected.fd, client), ProcessLoop()), connected.agreement)


def _open_service(options: ServerOptions, processes: int, *, alone: bool) -> Service:
    """The disk, for at most so many *processes*, and how it is offered; *alone* as for `open_proxy`."""
    configuration = secured(options.configuration, options)
    source = _open_source(options, alone=alone)
    service = service_of(options, configuration, source, source.scoreboard_fd or create_scoreboard(processes))
    may_be_limited = service.needs_steward or configuration.rates.is_limited or options.limits_path is not None
    if service.rates_fd is None and may_be_limited:
        service = service._replace(rates_fd=create_rates(1))
    return service


def service_of(
    options: ServerOptions, configuration: Configuration, source: Source[Scoreboard], scoreboard_fd: int
) -> Service:
    """How the disk is offered; from now on it is what lines of the log are about."""
    set_subject(export=options.export_name or source.name)
    return Service(
        source=source,
        scoreboard_fd=scoreboard_fd,
        export_name=options.export_name or source.name,
        oldstyle=options.oldstyle,
        configuration=configuration,
        spin=options.spin,
        control_path=options.control_path,
        tally_fds=tuple(options.tally_fds),
        slow=options.log.slow,
        rates_fd=options.rates_fd,
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


def inherited_source(options: ServerOptions, packed: Mapping[str, Any]) -> Source[Scoreboard]:
    """The disk, which another program or process has *packed*. Raises `ConfigurationError`."""
    disk = options.disk
    if isinstance(disk, TargetOptions):
        return TargetSource.unpack(packed, disk.path, readonly=disk.readonly)
    if isinstance(disk, CowOptions):
        from ..storage.cow import CowSource

        return CowSource.unpack(packed, disk.path, readonly=disk.readonly)
    from .proxying import inherit_proxy

    return inherit_proxy(disk, packed)


def _serve_one(options: ServerOptions, client: Introduced) -> int:
    """A client that is connected already, in this process."""
    service = _open_service(options, processes=_FEW, alone=False)
    require_descriptors(_DESCRIPTORS[service.source.mode])
    _change_of_user(options, service)()
    return serve_one(service, client.connection, client.agreement, client.passage)


def _serve_expected(options: ServerOptions, client: Expected) -> int:
    """A client that another process has, in this process."""
    source = inherited_source(options, client.kit["disk"])
    service = service_of(options, options.configuration, source, client.kit["scoreboard"])
    return serve_arrival(service, client.offer, client.loop, client.passage)


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


def _serve_many(options: ServerOptions, clients: ManyClients, words: Sequence[str]) -> int:
    """Clients that connect, each in a process of its own."""
    from ..server.master import ORDERS
    from ..server.premises import Premises, Surroundings

    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)  # whoever can connect may send them
    program = own_program(words) if options.control_path else None
    manager = ServiceManager()
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if clients.daemonize else None
    premises = Premises(listeners, PidFile(clients.pid_path) if clients.pid_path else None)
    try:
        load = loader(options, clients, listeners)
        service = _open_service(options, max(options.configuration.processes, _ROOM), alone=True)
        open_listeners(clients.listen, listeners)
        premises.metrics = open_metrics(options.metrics)
        if premises.metrics is not None:
            service = service._replace(tally_fds=(create_tally(count_lines(service.scoreboard_fd)),))
        check_access(service.access, listeners, service.tls)
        beginning = _Beginning(daemon, _change_of_user(options, service))
        status = _run_master(service, premises, load, Surroundings(manager, program), beginning)
        service.source.close()  # before the pid file goes: who waits for that may use the image in another way
        return status
    except ConfigurationError as error:
        if daemon:
            daemon.failed(error.exit_status)
        raise
    finally:
        premises.tidy_up()


def own_program(words: Sequence[str]) -> Program:
    """The program that runs here, with the command line *words*, before the process has a title."""
    from ..server.upgrade.program import Program

    return Program.own(words)


def loader(options: ServerOptions, clients: ManyClients, listeners: Listeners) -> Load:
    """Reads everything that may change again, for a server that listens."""
    return partial(_load, options, clients, listeners)


def _load(options: ServerOptions, clients: ManyClients, listeners: Listeners) -> Configuration:
    configuration = secured(clients.load(), options)
    check_access(configuration.access, listeners, configuration.tls)
    return configuration


def secured(limits: Configuration, options: ServerOptions) -> Configuration:
    """*limits*, and who may come in, by which proof. Raises `ConfigurationError`."""
    return limits._replace(access=open_access(options.rules_path), tls=open_tls(options.tls))


def _listen_for_operators(service: Service) -> Optional[UnixSocket]:
    """Before there is a steward: it may die, and who connects meanwhile waits for the next one."""
    if service.control_path is None:
        return None
    from ..control.server import listen_for_operators

    return listen_for_operators(service.control_path)


_FEW = 6
"""Processes for which there is room in the scoreboard of a single client: the one that has it, the next one, and
those that were to be the next one and came too late.
"""

_ROOM = 1 << 14
"""Processes for which there is room in the scoreboard at least, so that the limit of clients can be raised later."""

_DESCRIPTORS = {"target": 27, "cow": 35, "proxy": 43}
"""What the master, and then a process of it, opens besides disk and sockets, with some to spare, by the mode."""


def _change_of_user(options: ServerOptions, service: Service) -> Callable[[], None]:
    """What does as ``--user`` asks, tried out. Raises `ConfigurationError` if the server would be of no use then."""
    if options.user is None:
        return do_nothing
    from .unprivileged import Change, needs_of_server

    change = Change(options.user)
    change.try_out(needs_of_server(options), lambda: service.open_disk().close())
    return change.make


class _Beginning(NamedTuple):
    """Who waits for the server's start, and as which user it goes on."""

    daemon: Optional[Daemon]
    become_user: Callable[[], None]


def _run_master(
    service: Service, premises: Premises, load: Load, surroundings: Surroundings, beginning: _Beginning
) -> int:
    from ..server.master import Master

    require_descriptors(_DESCRIPTORS[service.source.mode])
    daemon, become_user = beginning
    premises.control = _listen_for_operators(service)
    master = Master(service, premises, load, surroundings)
    try:
        if service.needs_steward:
            master.start_steward(partial(_prepare_steward, become_user, in_background=daemon is not None))
        if premises.pid_file:
            premises.pid_file.write()
        become_user()
    except ConfigurationError:
        master.abandon()
        raise
    log.info("serving %s, %d bytes, on %s", service.source.description, service.source.size, premises.listeners)
    if premises.metrics is not None:
        log.info("metrics on %s", premises.metrics)
    if daemon:
        daemon.ready()
    surroundings.manager.ready()
    return master.run()


def _prepare_steward(become_user: Callable[[], None], *, in_background: bool) -> None:
    """In the steward that the server starts with: later ones have a master that has done this already."""
    become_user()
    if in_background:
        leave_terminal()
