"""From the parsed command line of xnbd-wrapper to a wrapper that runs."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from functools import partial
from typing import Any, Dict, List, Optional

from .. import logs
from ..errors import ConfigurationError
from ..logs import log
from ..making import set_file_mode
from ..process import Daemon, keep_standard_streams, notify_service_manager
from ..server.listen import Listeners
from ..wrapper.children import Body
from ..wrapper.database import Database
from ..wrapper.exports import TargetExport, check_name, check_room
from ..wrapper.jobs import program
from ..wrapper.servers import Servers, is_extended
from ..wrapper.wrapper import Settings, Wrapper
from .inside import load_server, run_bgctl, run_server
from .values import USAGE_ERROR, parse_integer, parse_mode, parse_seconds, parse_size, refuse_same_file

Arguments = Dict[str, Any]

_PATHS = ("--dbpath", "--socket", "--logpath")


def wrap(program: str, arguments: Arguments) -> int:
    """Serve until the end; the exit status. Raises `ConfigurationError` if that cannot begin."""
    keep_standard_streams()
    for option in _PATHS:
        if arguments[option]:
            arguments[option] = os.path.abspath(arguments[option])
    images = [os.path.abspath(path) for path in arguments["--imgfile"]]
    refuse_same_file({**{f"--imgfile {path}": path for path in images}, **{name: arguments[name] for name in _PATHS}})
    if arguments["--file-mode"]:
        set_file_mode(parse_mode(arguments["--file-mode"], "--file-mode"))
    path, syslog = arguments["--logpath"], arguments["--syslog"]
    syslog = syslog or bool(arguments["--daemonize"] and not path)
    logs.set_up(program, path=path, syslog=syslog, stderr=not (path or syslog), level=logging.INFO)
    settings = _settings(arguments, syslog)
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if arguments["--daemonize"] else None
    try:
        return _run(arguments, images, settings, listeners, daemon)
    except ConfigurationError as error:
        if daemon:
            daemon.failed(error.exit_status)
        raise
    finally:
        listeners.close()


def _settings(arguments: Arguments, syslog: bool) -> Settings:
    server = _command(arguments["--xnbd-server"], "--xnbd-server")
    if arguments["--max-queue-size"]:
        parse_integer(arguments["--max-queue-size"], "--max-queue-size", 0, 1 << 30)
    if arguments["--max-buf-size"] not in (None, "0"):
        parse_size(arguments["--max-buf-size"], "--max-buf-size")
    servers = Servers(
        run_here=run_server,
        command=server,
        extended=not server or is_extended(server),
        cow=arguments["--cow"],
        readonly=arguments["--readonly"],
        syslog=syslog,
        log_path=arguments["--logpath"],
        max_queue_size=arguments["--max-queue-size"],
        max_buf_size=arguments["--max-buf-size"],
        file_mode=arguments["--file-mode"],
    )
    bgctl = _command(arguments["--xnbd-bgctl"], "--xnbd-bgctl")
    timeout = parse_seconds(arguments["--handshake-timeout"], "--handshake-timeout")
    clients = parse_integer(arguments["--max-clients"], "--max-clients", 1, 1_000_000)
    return Settings(servers, partial(_bgctl, bgctl), timeout, clients)


def _command(text: Optional[str], option: str) -> List[str]:
    """The words of a command; the program gets its full path, because the wrapper may change its directory."""
    if text is None:
        return []
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}", USAGE_ERROR) from error
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise ConfigurationError(f"{option} {text}: there is no such program")
    return [os.path.abspath(found), *words[1:]]


def _bgctl(command: List[str], words: List[str]) -> Body:
    """xnbd-bgctl with the arguments *words*: *command*, or our own if that is empty."""
    return program([*command, *words]) if command else partial(run_bgctl, words)


def _run(
    arguments: Arguments, images: List[str], settings: Settings, listeners: Listeners, daemon: Optional[Daemon]
) -> int:
    database = Database(arguments["--dbpath"])
    _add_images(database, images)
    if not settings.servers.command:
        load_server(settings.servers)
    if arguments["--laddr"] or not listeners.sockets:
        listeners.listen_tcp(arguments["--laddr"], parse_integer(arguments["--lport"], "--lport", 0, 65535))
    wrapper = Wrapper(listeners, database, arguments["--socket"], settings)
    log.info("serving %d exports of %s on %s", len(database.exports), database.path, listeners)
    if not settings.servers.extended:
        log.info("%s does not know --negotiated: clients are offered simple replies", settings.servers.command[0])
    if daemon:
        daemon.ready()
    notify_service_manager("READY=1")
    return wrapper.run()


def _add_images(database: Database, paths: List[str]) -> None:
    """Add targets named by their files; one that is there already stays. Raises `ConfigurationError`."""
    exports = dict(database.exports)
    for path in paths:
        if not os.path.exists(path):
            raise ConfigurationError(f"--imgfile {path}: there is no such file (truncate -s 1G {path} makes one)")
        name, export = check_name(os.path.basename(path)), TargetExport(path)
        if exports.get(name) == export:
            continue
        check_room(exports, name, export)
        exports[name] = export
    if exports != database.exports:
        database.change(exports)
