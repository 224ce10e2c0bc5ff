"""From the parsed command line of xnbd-server to a server that runs."""

from __future__ import annotations

import logging
import os
import signal
import socket
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

from .. import logs
from ..errors import ConfigurationError
from ..logs import log
from ..making import set_file_mode
from ..protocol.constants import MAXIMUM_STRING
from ..protocol.server_handshake import Agreement
from ..scoreboard.layout import create_scoreboard
from ..scoreboard.scoreboard import Scoreboard
from ..server.master import ORDERS, Limits, Master
from ..server.process_loop import ProcessLoop
from ..server.service import Service
from ..server.session.connection import LONGEST_SPIN, Connection
from ..server.session.parking import QueueLimits
from ..storage.image import Source
from ..storage.target import TargetSource, create_sparse
from ..system.file_locks import do_nothing
from ..system.listen import DEFAULT_PORT, Listeners
from ..system.process import (
    Daemon,
    PidFile,
    keep_standard_streams,
    leave_terminal,
    notify_service_manager,
    require_descriptors,
    set_title,
    take_client_socket,
    whole_path,
)
from .values import (
    USAGE_ERROR,
    parse_integer,
    parse_mode,
    parse_seconds,
    parse_size,
    refuse_lost_log,
    refuse_same_file,
    refuse_together,
)

Arguments = Dict[str, Any]

_FILES = ("DISK_IMAGE", "BASE_DISK_IMAGE", "CACHE_DISK_IMAGE", "CACHE_BITMAP_IMAGE", "CONTROL_SOCKET_PATH")
_PATHS = (*_FILES, "--cow-dir", "--control", "--unix", "--pidfile", "--logpath")
PROXY_OPTIONS = (
    "--target-exportname",
    "--clear-bitmap",
    "--adopt-cache",
    "--max-queue-size",
    "--max-buf-size",
    "--readahead",
    "--connect-timeout",
    "--origin-timeout",
)
_LISTENING = ["--lport", "--laddr", "--unix"]


def serve(program: str, arguments: Arguments, client: Optional[int]) -> int:
    """Serve until the end; the exit status. *client* is a super-server's socket, if there is one.

    Raises `ConfigurationError` if the server cannot start.
    """
    keep_standard_streams()
    refuse_together(arguments, "--inetd", ["--connected-fd", "--daemonize", "--pidfile", *_LISTENING])
    refuse_together(arguments, "--connected-fd", ["--daemonize", "--pidfile", *_LISTENING])
    refuse_together(arguments, "--verbose", ["--quiet"])
    refuse_together(arguments, "--clear-bitmap", ["--adopt-cache"])
    refuse_together(arguments, "--control", ["--proxy", "--inetd", "--connected-fd"])
    if arguments["--negotiated"] and not arguments["--connected-fd"]:
        raise ConfigurationError("--negotiated is for --connected-fd only", USAGE_ERROR)
    if arguments["--cow-dir"] and not arguments["--cow-target"]:
        raise ConfigurationError("--cow-dir is for --cow-target only", USAGE_ERROR)
    if not arguments["--proxy"]:
        for option in PROXY_OPTIONS:
            if arguments[option]:
                raise ConfigurationError(f"{option} is for --proxy only", USAGE_ERROR)
    elif arguments["--create"]:
        raise ConfigurationError("--create is not for --proxy: the cache is made as large as the disk", USAGE_ERROR)
    for option in _PATHS:
        if arguments[option]:
            arguments[option] = whole_path(arguments[option], option)
    if arguments["REMOTE_URI"]:
        from .proxying import origin_of

        arguments["REMOTE_URI"] = str(origin_of(arguments))  # with the socket's whole path
    refuse_same_file({**{name: arguments[name] for name in _PATHS}, **_files_of_bitmap(arguments)})
    if arguments["--file-mode"]:
        set_file_mode(parse_mode(arguments["--file-mode"], "--file-mode"))
    _set_up_logs(program, arguments)
    if arguments["--inetd"] or arguments["--connected-fd"]:
        return _serve_one(arguments, client)
    return _serve_many(arguments)


def _files_of_bitmap(arguments: Arguments) -> Dict[str, str]:
    """What is made beside a proxy's bitmap."""
    path = arguments["CACHE_BITMAP_IMAGE"]
    if not path:
        return {}
    from ..proxy.state.opening import SCOREBOARD_SUFFIX, SUFFIX

    return {f"CACHE_BITMAP_IMAGE{suffix}": path + suffix for suffix in (SUFFIX, SCOREBOARD_SUFFIX)}


def _set_up_logs(program: str, arguments: Arguments) -> None:
    path = arguments["--logpath"]
    refuse_lost_log(arguments)
    unattended = arguments["--daemonize"] or arguments["--inetd"]
    syslog = arguments["--syslog"] or (unattended and not path)
    level = logging.DEBUG if arguments["--verbose"] else logging.WARNING if arguments["--quiet"] else logging.INFO
    logs.set_up(program, path=path, syslog=syslog, stderr=not (path or syslog), level=level)


def _open_service(arguments: Arguments, processes: int) -> Service:
    """The disk of the chosen mode, for at most so many *processes*, and how it is offered."""
    timeout = parse_seconds(arguments["--handshake-timeout"], "--handshake-timeout")
    spin = parse_integer(arguments["--spin"], "--spin", 0, 1_000_000)
    limits = _limits(arguments)
    source = _open_source(arguments, alone=processes > 1)
    name = arguments["--exportname"] or source.name
    if len(os.fsencode(name)) > MAXIMUM_STRING:
        raise ConfigurationError(f"--exportname: clients cannot ask for more than {MAXIMUM_STRING} bytes", USAGE_ERROR)
    return Service(
        source=source,
        scoreboard_fd=source.scoreboard_fd or create_scoreboard(processes),
        export_name=name,
        oldstyle=arguments["--oldstyle"],
        handshake_timeout=timeout,
        spin=min(spin / 1e6, LONGEST_SPIN),
        limits=limits,
        control_path=arguments["CONTROL_SOCKET_PATH"] or arguments["--control"],
    )


def _limits(arguments: Arguments) -> QueueLimits:
    if not arguments["--proxy"]:
        return QueueLimits()
    from .proxying import queue_limits

    return queue_limits(arguments)


def _open_source(arguments: Arguments, *, alone: bool) -> Source[Scoreboard]:
    """The disk, as the chosen mode makes it; *alone* as for `open_proxy`."""
    if arguments["--proxy"]:
        from .proxying import open_proxy

        return open_proxy(arguments, alone=alone)
    path, readonly = arguments["DISK_IMAGE"] or arguments["BASE_DISK_IMAGE"], arguments["--readonly"]
    if arguments["--create"]:
        create_sparse(path, parse_size(arguments["--create"], "--create"))
    if arguments["--cow-target"]:
        from ..storage.cow import CowSource

        return CowSource(path, readonly=readonly, directory=arguments["--cow-dir"])
    return TargetSource(path, readonly=readonly)


def _serve_one(arguments: Arguments, client: Optional[int]) -> int:
    """The client of a super-server, in this process."""
    agreement = _parse_agreement(arguments["--negotiated"] or "") if arguments["--connected-fd"] else None
    sock = _client_socket(arguments["--connected-fd"], client)
    service = _open_service(arguments, processes=1)
    require_descriptors(_DESCRIPTORS[service.source.mode])
    with _steward_for_one(service, sock):
        loop = ProcessLoop()
        disk = loop.disk = service.open_disk()
        connection = Connection(sock, loop, service.spin)
        set_title("serving", connection.peer, service.source.name)
        service.serve(connection, disk, agreement)
        disk.close()
    return 0 if service.flush() else 1


@contextmanager
def _steward_for_one(service: Service, client: socket.socket) -> Iterator[None]:
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


def _parse_agreement(features: str) -> Agreement:
    """What ``--negotiated FEATURES`` says. Raises `ConfigurationError`."""
    words = set(features.split(",")) if features else set()
    if not words <= {"newstyle", "structured", "allocation"}:
        raise ConfigurationError(
            f"--negotiated {features}: expected some of newstyle, structured, allocation", USAGE_ERROR
        )
    if "allocation" in words and "structured" not in words:
        raise ConfigurationError("--negotiated: allocation comes with structured only", USAGE_ERROR)
    return Agreement(structured="structured" in words, allocation="allocation" in words, ordered=not words)


def _client_socket(number: Optional[str], client: Optional[int]) -> socket.socket:
    """The connected socket of ``--connected-fd NUMBER``, or of ``--inetd`` if that is None."""
    if number is not None:
        fd = parse_integer(number, "--connected-fd", 0, 1 << 20)
        client = take_client_socket(fd) or client if fd <= 2 else fd
    if client is None:
        what = "standard input" if number is None else f"descriptor {number}"
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


def _serve_many(arguments: Arguments) -> int:
    """Clients that connect, each in a process of its own."""
    limits = Limits(
        max_clients=parse_integer(arguments["--max-clients"], "--max-clients", 1, 1_000_000),
        spare_workers=parse_integer(arguments["--spare-workers"], "--spare-workers", 1, 1000),
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)  # whoever can connect may send them
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if arguments["--daemonize"] else None
    pid_file = PidFile(arguments["--pidfile"]) if arguments["--pidfile"] else None
    try:
        service = _open_service(arguments, processes=limits.processes)
        _listen(arguments, listeners)
        status = _run_master(service, listeners, limits, daemon, pid_file)
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


def _listen(arguments: Arguments, listeners: Listeners) -> None:
    port, addresses, path = (arguments[option] for option in _LISTENING)
    number = DEFAULT_PORT if port is None else parse_integer(port, "--lport", 0, 65535)
    if port is not None or addresses or not (path or listeners.sockets):
        listeners.listen_tcp(addresses, number)
    if path:
        listeners.listen_unix(path)


_DESCRIPTORS = {"target": 26, "cow": 34, "proxy": 42}
"""What the master, and then a process of it, opens besides disk and sockets, with some to spare, by the mode."""


def _run_master(
    service: Service, listeners: Listeners, limits: Limits, daemon: Optional[Daemon], pid_file: Optional[PidFile]
) -> int:
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
