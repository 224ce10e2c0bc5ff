"""From the options of xnbd-wrapper to a wrapper that runs."""

from __future__ import annotations

import os
from functools import partial
from typing import Dict, List, Optional

from ..errors import ConfigurationError
from ..logs import log
from ..system.listen import Listeners
from ..system.process import Daemon, notify_service_manager, require_descriptors
from ..wrapper.child_output import program
from ..wrapper.children import Body
from ..wrapper.database import Database
from ..wrapper.exports import TargetExport, check_name, check_room, paths_of
from ..wrapper.servers import ForeignServer, Servers, is_extended
from ..wrapper.wrapper import Settings, Wrapper
from .admission import check_access, open_access, open_listeners
from .encrypting import open_tls
from .inside import OwnServer, run_bgctl
from .values import refuse_same_file
from .wrapper_options import WrapperOptions

_DESCRIPTORS = 48
"""What the wrapper, or a server of one client, opens besides what it has at the start, with some to spare."""


def wrap(options: WrapperOptions) -> int:
    """Serve until the end; the exit status. Raises `ConfigurationError` if that cannot begin."""
    servers = _foreign_servers(options) if options.server_command else _own_servers(options)
    bgctl = partial(_bgctl, options.bgctl_command)
    access, tls = open_access(options.rules_path), open_tls(options.tls)
    settings = Settings(servers, bgctl, options.handshake_timeout, options.max_clients, access, tls)
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if options.daemonize else None
    try:
        return _run(options, settings, listeners, daemon)
    except ConfigurationError as error:
        if daemon:
            daemon.failed(error.exit_status)
        raise
    finally:
        listeners.close()


def _own_servers(options: WrapperOptions) -> Servers:
    own = OwnServer(options.cow, options.readonly, options.log, options.queue_limits)
    own.load()
    return Servers(own.take_over, cow=options.cow, readonly=options.readonly)


def _foreign_servers(options: WrapperOptions) -> Servers:
    command = options.server_command
    given = options.as_given
    foreign = ForeignServer(
        command=command,
        extended=is_extended(command),
        cow=options.cow,
        readonly=options.readonly,
        syslog=options.log.syslog,
        log_path=options.log.path,
        max_queue_size=given.max_queue_size,
        max_buf_size=given.max_buf_size,
        file_mode=given.file_mode,
    )
    return Servers(foreign.take_over, command[0], foreign.extended, options.cow, options.readonly)


def _bgctl(command: List[str], words: List[str]) -> Body:
    """xnbd-bgctl with the arguments *words*: *command*, or our own if that is empty."""
    return program([*command, *words]) if command else partial(run_bgctl, words)


def _run(options: WrapperOptions, settings: Settings, listeners: Listeners, daemon: Optional[Daemon]) -> int:
    database = Database(options.database_path)
    for name, export in database.exports.items():
        for path in paths_of(export).values():
            refuse_same_file({f"a file of the export {name!r}": path, **options.own_files})
    _add_images(database, options.images)
    open_listeners(options.listen, listeners)
    check_access(settings.access, listeners, settings.tls)
    require_descriptors(_DESCRIPTORS)
    wrapper = Wrapper(listeners, database, options.control_path, settings)
    log.info("serving %d exports of %s on %s", len(database.exports), database.path, listeners)
    if not settings.servers.extended:
        log.info("%s does not know --negotiated: clients are offered simple replies", settings.servers.program)
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
