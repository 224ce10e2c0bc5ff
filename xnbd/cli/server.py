"""xnbd-server: serve a disk image to NBD clients.

Usage:
  xnbd-server --target [--laddr ADDRESS]... [options] DISK_IMAGE
  xnbd-server --help
  xnbd-server --version

Mode options:
  --target              Serve DISK_IMAGE, a file or a block device; clients' writes go to it.

Listening options:
  --lport PORT          TCP port (default: 8520); 0 picks a free one.
  --laddr ADDRESS       Address to listen on, may be given several times
                        (default: all addresses, IPv4 and IPv6).
  --unix PATH           Listen on a Unix socket; without --lport and --laddr on nothing else.
  --inetd               Serve the one client on standard input, negotiation included.
  --connected-fd NUMBER
                        Serve the one client on this descriptor, with whom a wrapper has
                        negotiated already; begin with its first request.

Disk options:
  --create SIZE         Make DISK_IMAGE as a sparse file if it does not exist: 512M, 1G, ...
  --readonly            Disconnect a client that writes.
  --exportname NAME     Name to answer to besides the empty one (default: file name of the image).
  --oldstyle            Speak the oldstyle negotiation, for old clients and proxies.

Process options:
  --daemonize           Go into the background once the server listens.
  --pidfile FILE        Write the master's process id to FILE, and remove it at the end.
  --max-clients N       Serve N clients at once, let others wait [default: 4096].
  --spare-workers N     Keep N processes ready for new clients [default: 4].
  --handshake-timeout SECONDS
                        Drop a client that has not negotiated by then [default: 10].
  --spin MICROSECONDS   Poll for the next request for so long before sleeping; adapts by
                        itself to a slower client, 0 never polls [default: 50].

Logging options:
  --logpath FILE        Append to FILE. Without it: standard error, or syslog with
                        --daemonize or --inetd.
  --syslog              Log to syslog; also to FILE if --logpath is given.
  --verbose             Log more.
  --quiet               Log warnings and errors only.

Other options:
  -h, --help            Show this text.
  --version             Show the version.

Signals, to the master: TERM or INT stops it in good order, a second one at once.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Dict, List, NoReturn, Optional

from .. import __version__
from ..errors import ConfigurationError
from ..process import close_client_streams
from .values import parse_command_line, parse_integer, parse_seconds, parse_size, refuse_together

PROGRAM = "xnbd-server"

_PATHS = ("DISK_IMAGE", "--unix", "--pidfile", "--logpath")
_LISTENING = ["--lport", "--laddr", "--unix"]


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with status 0, 1 (it failed) or 2 (its command line makes no sense)."""
    client = close_client_streams()
    try:
        arguments = parse_command_line(PROGRAM, __doc__, argv or sys.argv[1:], f"{PROGRAM} {__version__}")
        status = _run(arguments, client)
    except ConfigurationError as error:
        from ..logs import complain

        complain(PROGRAM, str(error), super_server=client is not None)
        status = error.exit_status
    sys.exit(status)


def _run(arguments: Dict[str, Any], client: Optional[int]) -> int:
    refuse_together(arguments, "--inetd", ["--connected-fd", "--daemonize", "--pidfile", *_LISTENING])
    refuse_together(arguments, "--connected-fd", ["--daemonize", "--pidfile", *_LISTENING])
    refuse_together(arguments, "--verbose", ["--quiet"])
    for option in _PATHS:
        if arguments[option]:
            arguments[option] = os.path.abspath(arguments[option])
    _set_up_logs(arguments)
    if arguments["--inetd"] or arguments["--connected-fd"]:
        return _serve_one(arguments, client)
    return _serve_many(arguments)


def _set_up_logs(arguments: Dict[str, Any]) -> None:
    import logging

    from ..logs import set_up

    path = arguments["--logpath"]
    unattended = arguments["--daemonize"] or arguments["--inetd"]
    syslog = arguments["--syslog"] or (unattended and not path)
    level = logging.DEBUG if arguments["--verbose"] else logging.WARNING if arguments["--quiet"] else logging.INFO
    set_up(PROGRAM, path=path, syslog=syslog, stderr=not (path or syslog), level=level)


def _open_service(arguments: Dict[str, Any]):  # type: ignore[no-untyped-def]
    """The disk of the chosen mode and how it is offered."""
    from ..server.service import Service
    from ..storage.target import TargetSource, create_sparse

    timeout = parse_seconds(arguments["--handshake-timeout"], "--handshake-timeout")
    spin = parse_integer(arguments["--spin"], "--spin", 0, 1_000_000)
    path = arguments["DISK_IMAGE"]
    if arguments["--create"]:
        create_sparse(path, parse_size(arguments["--create"], "--create"))
    source = TargetSource(path, readonly=arguments["--readonly"])
    return Service(
        source=source,
        export_name=arguments["--exportname"] or source.name,
        oldstyle=arguments["--oldstyle"],
        handshake_timeout=timeout,
        spin=spin / 1e6,
    )


def _serve_one(arguments: Dict[str, Any], client: Optional[int]) -> int:
    """The client of a super-server, in this process."""
    from ..process import set_title
    from ..protocol.negotiation import Agreement
    from ..server.connection import Connection
    from ..server.watch import Watch

    sock = _client_socket(arguments["--connected-fd"], client)
    service = _open_service(arguments)
    connection = Connection(sock, Watch(), service.spin)
    set_title("serving", connection.peer, service.source.name)
    agreement = Agreement() if arguments["--connected-fd"] else None
    service.serve(connection, service.source.open(), agreement)
    return 0


def _client_socket(number: Optional[str], client: Optional[int]) -> socket.socket:
    """The connected socket of ``--connected-fd NUMBER``, or of ``--inetd`` if that is None."""
    if number is not None:
        fd = parse_integer(number, "--connected-fd", 0, 1 << 20)
        client = client if fd == 0 else fd
    if client is None:
        raise ConfigurationError("standard input is no socket: --inetd is for use under inetd or systemd")
    try:
        sock = socket.socket(fileno=client)
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigurationError("the client's descriptor is no connected stream socket")
    except OSError as error:
        raise ConfigurationError(f"the client's descriptor is no socket: {error.strerror}") from error
    os.set_inheritable(client, False)
    return sock


def _serve_many(arguments: Dict[str, Any]) -> int:
    """Clients that connect, each in a process of its own."""
    from ..process import Daemon, PidFile
    from ..server.listen import Listeners
    from ..server.master import Limits

    limits = Limits(
        max_clients=parse_integer(arguments["--max-clients"], "--max-clients", 1, 1_000_000),
        spare_workers=parse_integer(arguments["--spare-workers"], "--spare-workers", 1, 1000),
    )
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if arguments["--daemonize"] else None
    pid_file = PidFile(arguments["--pidfile"]) if arguments["--pidfile"] else None
    try:
        service = _open_service(arguments)
        _listen(arguments, listeners)
        return _run_master(service, listeners, limits, daemon)
    finally:
        listeners.tidy_up()
        if pid_file:
            pid_file.remove()


def _listen(arguments: Dict[str, Any], listeners) -> None:  # type: ignore[no-untyped-def]
    from ..server.listen import DEFAULT_PORT

    port, addresses, path = (arguments[option] for option in _LISTENING)
    number = DEFAULT_PORT if port is None else parse_integer(port, "--lport", 0, 65535)
    if port is not None or addresses or not (path or listeners.sockets):
        listeners.listen_tcp(addresses, number)
    if path:
        listeners.listen_unix(path)


def _run_master(service, listeners, limits, daemon) -> int:  # type: ignore[no-untyped-def]
    from ..logs import log
    from ..process import notify_service_manager
    from ..server.master import Master

    master = Master(service, listeners.sockets, limits)
    log.info("serving %s, %d bytes, on %s", service.source.description, service.source.size, listeners)
    if daemon:
        daemon.ready()
    notify_service_manager("READY=1")
    return master.run()
