"""From the options of xnbd-wrapper to a wrapper that runs."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from .. import __version__
from ..errors import ConfigurationError
from ..logs import log
from ..scoreboard.rates import create_rates, inherited_rates
from ..scoreboard.tally import create_tally, inherited_tallies
from ..server.configuration import Configuration
from ..server.premises import Surroundings
from ..server.upgrade.program import Program
from ..system.file_locks import do_nothing
from ..system.listen import Listeners
from ..system.process import Daemon, require_descriptors
from ..system.service_manager import ServiceManager
from ..text import counted
from ..wrapper.child_output import program
from ..wrapper.children import Body
from ..wrapper.database import Database
from ..wrapper.exports import TargetExport, check_name, check_room, paths_of
from ..wrapper.limiting import EXPORTS
from ..wrapper.metrics import MetricsPlace
from ..wrapper.servers import JSON, OWN_OPTIONS, SLOW, ForeignServer, Servers, abilities
from ..wrapper.upgrade.estate import WrapperEstate
from ..wrapper.wrapper import Load, Settings, Wrapper
from .admission import check_access, open_access, open_listeners, open_metrics
from .encrypting import open_tls
from .inside import OwnServer, load_ahead, run_bgctl
from .options import LogOptions
from .values import refuse_same_file
from .wrapper_options import AsGiven, WrapperOptions

_LINES = 1 << 16
"""Lines of the tally: for the most clients that each export has ever had at once, all exports together."""

_DESCRIPTORS = 48
"""What the wrapper, or a server of one client, opens besides what it has at the start, with some to spare."""


def wrap(options: WrapperOptions, words: Sequence[str]) -> int:
    """Serve until the end; the exit status. Raises `ConfigurationError` if that cannot begin.

    *words* are the command line, for a program that is to go on with it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))  # until there is a `Wrapper`
    surroundings = Surroundings(ServiceManager(), Program.own(words, "wrapper"))
    tallies = [] if options.metrics is None else [create_tally(_LINES)]
    rates_fd = None if options.server_command else create_rates(EXPORTS)
    read = reader(options, ask_abilities(options), tallies, rates_fd)
    listeners = Listeners()
    listeners.take_passed()
    daemon = Daemon() if options.daemonize else None
    try:
        return _run(options, read, listeners, daemon, surroundings, tallies, rates_fd)
    except ConfigurationError as error:
        if daemon:
            daemon.failed(error.exit_status)
        raise
    finally:
        listeners.close()


def reader(
    options: WrapperOptions, knows: Sequence[str], tallies: Sequence[int] = (), rates_fd: Optional[int] = None
) -> Load:
    """Reads all that may change again; *knows* is as `ask_abilities` has it.

    Clients count in *tallies*, and are held to the limits in the file behind *rates_fd*.
    """
    if options.server_command:
        return partial(_settings, options, partial(_foreign_server, options, tallies, knows=knows))
    load_ahead(cow=options.cow)
    return partial(_settings, options, partial(_own_servers, options, tallies, rates_fd))


def _metrics_left(packed: Mapping[str, Any]) -> MetricsPlace:
    """What the program before has left."""
    listeners = Listeners()
    listeners.unpack(packed["listeners"])
    return MetricsPlace(listeners, inherited_tallies(packed["tallies"], _LINES), packed["observers"])


def go_on(options: WrapperOptions, estate: WrapperEstate, program: Program) -> int:
    """Serve where the program before has left the *estate*, until the end; the exit status."""
    manager, listeners = ServiceManager(), Listeners()
    listeners.unpack(estate.listeners)
    try:
        metrics = None if estate.metrics is None else _metrics_left(estate.metrics)
        rates_fd = None if options.server_command else inherited_rates(estate.rates, EXPORTS)
        read = reader(options, estate.verdict["knows"], () if metrics is None else metrics.tallies, rates_fd)
        database = Database.unpack(estate.database)
        database.aliases.update((given, TargetExport(path)) for given, path in options.images.items())
        reread = partial(_reread, read, listeners)
        surroundings = Surroundings(manager, program)
        wrapper = Wrapper(
            listeners, database, options.control_path, read(), reread, surroundings, estate, metrics, rates_fd
        )
        log.info("%s goes on where %s was", __version__, estate.version)
        manager.ready()
        return wrapper.run()
    finally:
        listeners.close()


MakeServers = Callable[[Configuration, AsGiven], Servers]


def _settings(options: WrapperOptions, make: MakeServers) -> Settings:
    """What the wrapper works with, read now. Raises `ConfigurationError`."""
    limits, given = options.load()
    configuration = limits._replace(access=open_access(options.rules_path), tls=open_tls(options.tls))
    return Settings(make(configuration, given), partial(_bgctl, options.bgctl_command), configuration)


def _reread(read: Load, listeners: Listeners) -> Settings:
    """The same while the wrapper runs."""
    settings = read()
    check_settings(settings, listeners)
    return settings


def check_settings(settings: Settings, listeners: Listeners) -> None:
    """Raises `ConfigurationError` if nobody could open anything."""
    check_access(settings.configuration.access, listeners, settings.configuration.tls)


def ask_abilities(options: WrapperOptions) -> Sequence[str]:
    """Which options the servers know that ours do. Raises `ConfigurationError`."""
    return abilities(options.server_command) if options.server_command else OWN_OPTIONS


def _own_servers(
    options: WrapperOptions,
    tallies: Sequence[int],
    rates_fd: Optional[int],
    configuration: Configuration,
    _: AsGiven,
) -> Servers:
    limits, rates = configuration.queue_limits, configuration.rates
    own = OwnServer(options.cow, options.readonly, options.log, limits, tallies, rates, rates_fd, options.cache_limit)
    return Servers(own.take_over, own.receive, cow=options.cow, readonly=options.readonly)


def _foreign_server(
    options: WrapperOptions, tallies: Sequence[int], _: Configuration, given: AsGiven, *, knows: Sequence[str]
) -> Servers:
    command = options.server_command
    foreign = ForeignServer(
        command=command,
        knows=knows,
        cow=options.cow,
        readonly=options.readonly,
        syslog=options.log.syslog,
        log_path=options.log.path,
        max_queue_size=given.max_queue_size,
        max_buf_size=given.max_buf_size,
        file_mode=given.file_mode,
        tally_fd=tallies[0] if tallies else None,
        own_words=_own_words(options.log),
    )
    return Servers(foreign.take_over, None, command[0], knows, options.cow, options.readonly)


def _own_words(to: LogOptions) -> List[Tuple[str, str]]:
    """What the servers are told of the log."""
    form = [(JSON, "json")] if to.as_json else []
    return form if to.slow is None else [*form, (SLOW, f"{to.slow * 1e3:.0f}")]


def _bgctl(command: List[str], words: List[str]) -> Body:
    """xnbd-bgctl with the arguments *words*: *command*, or our own if that is empty."""
    return program([*command, *words]) if command else partial(run_bgctl, words)


def _run(
    options: WrapperOptions,
    read: Load,
    listeners: Listeners,
    daemon: Optional[Daemon],
    surroundings: Surroundings,
    tallies: Sequence[int],
    rates_fd: Optional[int],
) -> int:
    settings = read()
    database = Database(options.database_path)
    for name, export in database.exports.items():
        for path in paths_of(export).values():
            refuse_same_file({f"a file of the export {name!r}": path, **options.own_files})
    _add_images(database, options.images)
    open_listeners(options.listen, listeners)
    check_settings(settings, listeners)
    require_descriptors(_DESCRIPTORS)
    become_user = _change_of_user(options, database)
    reread = partial(_reread, read, listeners)
    asked = open_metrics(options.metrics)
    metrics = None if asked is None else MetricsPlace(asked, tallies)
    wrapper = Wrapper(
        listeners, database, options.control_path, settings, reread, surroundings, metrics=metrics, rates_fd=rates_fd
    )
    become_user()
    log.info("serving %s of %s on %s", counted(len(database.exports), "export"), database.path, listeners)
    if asked is not None:
        log.info("metrics on %s", asked)
    _tell_of_program(settings.servers, options.log)
    if daemon:
        daemon.ready()
    surroundings.manager.ready()
    return wrapper.run()


def _tell_of_program(servers: Servers, to: LogOptions) -> None:
    """What another program than ours cannot do."""
    if not servers.extended:
        log.info("%s does not know --negotiated: clients are offered simple replies", servers.program)
    for option, _ in _own_words(to):
        if option not in servers.knows:
            log.warning("%s does not know %s: its lines in the log are as they are without", servers.program, option)


def _change_of_user(options: WrapperOptions, database: Database) -> Callable[[], None]:
    """What does as ``--user`` asks, tried out. Raises `ConfigurationError` if the wrapper would be of no use then."""
    if options.user is None:
        return do_nothing
    from .unprivileged import Change, needs_of_wrapper

    change = Change(options.user)
    change.try_out(needs_of_wrapper(options, database.exports), do_nothing)
    return change.make


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
