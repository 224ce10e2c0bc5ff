"""From the parsed command line of xnbd-wrapper to a wrapper that runs."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from functools import partial
from typing import Any, Dict, List, Optional

from .. import logs
from ..errors import ConfigurationError
from ..logs import log
from ..making import set_file_mode
from ..system.listen import DEFAULT_PORT, Listeners
from ..system.process import Daemon, keep_standard_streams, notify_service_manager, require_descriptors, whole_path
from ..wrapper.child_output import program
from ..wrapper.children import Body
from ..wrapper.database import Database
from ..wrapper.exports import TargetExport, check_name, check_room, paths_of
from ..wrapper.servers import Servers, is_extended
from ..wrapper.wrapper import Settings, Wrapper
from .inside import load_server, run_bgctl, run_server
from .values import (
    USAGE_ERROR,
    parse_integer,
    parse_mode,
    parse_seconds,
    parse_size,
    refuse_lost_log,
    refuse_same_file,
    rename_options,
)

Arguments = Dict[str, Any]

_DESCRIPTORS = 48
"""What the wrapper, or a server of one client, opens besides what it has at the start, with some to spare."""

_PATHS = ("--dbpath", "--socket", "--logpath")
_OLD_NAMES = {"--port": "--lport", "--xnbd-binary": "--xnbd-server"}


def wrap(program: str, arguments: Arguments) -> int:
    """Serve until the end; the exit status. Raises `ConfigurationError` if that cannot begin."""
    keep_standard_streams()
    rename_options(arguments, _OLD_NAMES)
    for option in _PATHS:
        if arguments[option]:
            arguments[option] = whole_path(arguments[option], option)
    images = {path: whole_path(path, "--imgfile") for path in arguments["--imgfile"]}
    ours = {name: arguments[name] for name in _PATHS}
    refuse_same_file(ours)
    for image in images.values():
        refuse_same_file({f"--imgfile {image}": image, **ours})
    refuse_lost_log(arguments)
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
        parse_integer(arguments["--max-queue-size"], "--max-queue-size", 0, sys.maxsize)
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
    return [whole_path(found, option), *words[1:]]


def _bgctl(command: List[str], words: List[str]) -> Body:
    """xnbd-bgctl with the arguments *words*: *command*, or our own if that is empty."""
    return program([*command, *words]) if command else partial(run_bgctl, words)


def _run(
    arguments: Arguments, images: Dict[str, str], settings: Settings, listeners: Listeners, daemon: Optional[Daemon]
) -> int:
    database = Database(arguments["--dbpath"])
    for name, export in database.exports.items():
        for path in paths_of(export).values():
            refuse_same_file({f"a file of the export {name!r}": path, **{name: arguments[name] for name in _PATHS}})
    _add_images(database, images)
    if not settings.servers.command:
        load_server(settings.servers)
    if arguments["--laddr"] or not listeners.sockets:
        port = arguments["--lport"]
        number = DEFAULT_PORT if port is None else parse_integer(port, "--lport", 0, 65535)
        listeners.listen_tcp(arguments["--laddr"], number)
    require_descriptors(_DESCRIPTORS)
    wrapper = Wrapper(listeners, database, arguments["--socket"], settings)
    log.info("serving %d exports of %s on %s", len(database.exports), database.path, listeners)
    if not settings.servers.extended:
        log.info("%s does not know --negotiated: clients are offered simple replies", settings.servers.command[0])
    if daemon:
        daemon.ready()
    notify_service_manager("READY=1")
    return wrapper.run()


def _add_images(database: Database, images: Dict[str, str]) -> None:
    """Add targets, by what the command line says the whole paths; one that is there already stays.

    It is named by its file, or, where another disk has that name, by what the command
    line says, which in any case is an alias. Raises `ConfigurationError`.
    """
    exports = dict(database.exports)
    for given, path in images.items():
        if not os.path.exists(path):
            raise ConfigurationError(f"--imgfile {path}: there is no such file (truncate -s 1G {path} makes one)")
        export = TargetExport(path)
        names = [check_name(os.path.basename(path)), check_name(given)]
        database.aliases[given] = export
        if any(exports.get(name) == export for name in names):
            continue
        name = next((name for name in names if name not in exports), names[-1])
        check_room(exports, name, export)
        exports[name] = export
    if exports != database.exports:
        database.change(exports)
