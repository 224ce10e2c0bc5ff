"""xnbd-server as the next program of a process that serves already: its check, and its start.

The command line is that of the program before, which is understood by this program's own rules.
What the process has open is left by the program before (`server.upgrade.estate`).
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import List, Optional

from .. import __version__
from ..errors import ConfigurationError
from ..logs import log
from ..scoreboard.layout import OtherVersion, check_header, count_lines
from ..scoreboard.rates import inherited_rates
from ..scoreboard.tally import inherited_tallies
from ..server.configuration import Load, refuse_without_room
from ..server.premises import Premises, Surroundings
from ..server.service import Service
from ..server.upgrade.estate import Estate, read_estate
from ..server.upgrade.program import Program, split_words
from ..system.kept import Kept
from ..system.process import paths_from
from ..system.service_manager import ServiceManager
from ..system.user import User
from .options import LogOptions, ManyClients, ServerOptions
from .program import begin, print_answer
from .server_options import server_options
from .serving import inherited_source, loader, own_program, secured, service_of
from .values import parse_command_line


def take_over(program: str, usage: str, argv: List[str]) -> int:
    """Go on with what the program before has left, or say whether that would do; the exit status.

    Raises `ConfigurationError` if it is not possible.
    """
    order, words = split_words(argv)
    if order is None:
        raise ConfigurationError("--take-over is what one xnbd-server says to the next one, see xnbd-bgctl --upgrade")
    estate = read_estate(order.fd)
    own = own_program(words)._replace(directory=estate.directory)
    line = parse_command_line(program, usage, words, f"{program} {__version__}")
    with paths_from(estate.directory):
        options = server_options(line, partial(begin_check if order.check else begin, program))
    clients = options.clients
    if not isinstance(clients, ManyClients):
        raise ConfigurationError("a server of one client is not upgraded")
    service = _inherited_service(options, estate)
    if order.check:
        return _tell_check()
    os.close(order.fd)
    Kept(estate.descriptors).hold_back()
    premises = Premises.unpack(estate.premises)
    return _serve(service, estate, premises, loader(options, clients, premises.listeners), own)


def begin_check(program: str, to: LogOptions, file_mode: Optional[int], user: Optional[User]) -> None:
    """What `begin` is for a check: the log is tried out; what there is to say goes to the program before."""
    begin(program, to, file_mode, user)
    log.handlers.clear()


def _inherited_service(options: ServerOptions, estate: Estate) -> Service:
    """The disk as the program before had it, and how it is offered. Changes nothing."""
    try:
        check_header(estate.scoreboard)
    except OtherVersion:
        raise ConfigurationError(
            f"the scoreboard of {__version__} is another one than that of {estate.version}, "
            "and clients of both could not share the disk: restart the server when its clients allow it"
        ) from None
    configuration = secured(options.configuration, options)
    refuse_without_room(configuration, estate.scoreboard)
    source = inherited_source(options, estate.disk)
    service = service_of(options, configuration, source, estate.scoreboard)
    service = service._replace(rates_fd=inherited_rates(estate.rates, 1))
    if options.metrics is None:
        return service
    return service._replace(tally_fds=inherited_tallies(estate.tallies, count_lines(estate.scoreboard)))


def _tell_check() -> int:
    """All that the program would need can be imported, too."""
    from ..server import master, worker  # noqa: F401
    from ..server.observer import process as observer  # noqa: F401
    from ..server.observer import service  # noqa: F401
    from ..server.steward import process  # noqa: F401

    print_answer(json.dumps({"version": __version__}) + "\n")
    return 0


def _serve(service: Service, estate: Estate, premises: Premises, load: Load, own: Program) -> int:
    from ..server.master import Master

    manager = ServiceManager()
    try:
        master = Master(service, premises, load, Surroundings(manager, own), estate)
        log.info("%s goes on where %s was", __version__, estate.version)
        manager.ready()
        status = master.run()
        service.source.close()  # before the pid file goes, as after any other start
        return status
    finally:
        premises.tidy_up()
