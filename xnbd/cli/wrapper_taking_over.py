"""xnbd-wrapper as the next program of a process that serves already: its check, and its start.

The command line is that of the program before, which is understood by this program's own rules.
What the process has open is left by the program before (`wrapper.upgrade.estate`).
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import List

from .. import __version__
from ..errors import ConfigurationError
from ..proxy.state.format import VERSION as STATE_VERSION
from ..scoreboard.layout import TABLE, VERSION
from ..server.upgrade.program import Program, split_words
from ..system.kept import Kept
from ..system.listen import Listeners
from ..system.process import paths_from
from ..wrapper.database import parse_database
from ..wrapper.upgrade.estate import WrapperEstate, read_wrapper_estate
from .program import begin, print_answer
from .taking_over import begin_check
from .values import parse_command_line
from .wrapper_options import WrapperOptions, wrapper_options
from .wrapping import ask_abilities, check_settings, go_on, reader


def take_over(program: str, usage: str, argv: List[str]) -> int:
    """Go on with what the program before has left, or say whether that would do; the exit status.

    Raises `ConfigurationError` if it is not possible.
    """
    order, words = split_words(argv)
    if order is None:
        raise ConfigurationError(
            "--take-over is what one xnbd-wrapper says to the next one, see xnbd-wrapper-ctl --upgrade"
        )
    estate = read_wrapper_estate(order.fd)
    own = Program.own(words, "wrapper")._replace(directory=estate.directory)
    line = parse_command_line(program, usage, words, f"{program} {__version__}")
    with paths_from(estate.directory):
        options = wrapper_options(line, partial(begin_check if order.check else begin, program))
    if order.check:
        return _check(options, estate)
    os.close(order.fd)
    Kept(estate.descriptors).hold_back()
    return go_on(options, estate, own)


def _check(options: WrapperOptions, estate: WrapperEstate) -> int:
    """Changes nothing. Raises `ConfigurationError`."""
    if estate.scoreboard != [VERSION, TABLE]:
        raise ConfigurationError(
            f"the scoreboard of {__version__} is another one than that of {estate.version}, "
            "and clients of both could not share a disk: restart the wrapper when its clients allow it"
        )
    if estate.state not in (None, STATE_VERSION):
        raise ConfigurationError(f"state files of proxies have version {estate.state}, which only a restart can read")
    parse_database(estate.database["content"].encode())
    knows = list(ask_abilities(options))
    listeners = Listeners()
    listeners.unpack(estate.listeners)
    try:
        check_settings(reader(options, knows)(), listeners)
    finally:
        for sock in listeners.sockets:  # and nothing else: their files are the wrapper's
            sock.close()
    print_answer(json.dumps({"version": __version__, "knows": knows}) + "\n")
    return 0
