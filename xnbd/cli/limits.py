"""The limits of a server or a wrapper: from its command line, and from the file of ``--limits``, which wins.

The file has lines ``NAME VALUE``. A name is that of an option without its dashes, and a
value is what the option takes, so the same checks are made. What the file does not name is
as the command line says. A ``#`` begins a comment.
"""

from __future__ import annotations

import sys
from typing import Dict, Optional, Sequence, Tuple

from ..errors import ConfigurationError
from ..server.configuration import Configuration
from ..system.settings_file import read_settings
from .rate_options import RATES, given_rates
from .values import CommandLine

_LARGEST = 64 << 10

OF_ALL = ("max-clients", "handshake-timeout")
OF_MASTERS = ("spare-workers",)
OF_PROXIES = ("max-queue-size", "max-buf-size")
OF_RATES = tuple(option[2:] for option in RATES)
_NAMES = (*OF_ALL, *OF_MASTERS, *OF_PROXIES, *OF_RATES)

Entries = Dict[str, Tuple[str, int]]
"""Values and line numbers, by names."""


def parse_limits(data: bytes, path: str, names: Sequence[str]) -> Entries:
    """What *data*, the content of the file at *path*, says of *names*. Raises `ConfigurationError` (``FILE:LINE:``)."""
    found: Entries = {}
    for number, line in enumerate(data.decode("utf-8", "backslashreplace").split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        problem = _problem(words, names, found)
        if problem:
            raise ConfigurationError(f"{path}:{number}: {problem}")
        found[words[0]] = words[1], number
    return found


def _problem(words: Sequence[str], names: Sequence[str], found: Entries) -> str:
    """What is wrong with a line of *words*; empty if nothing is."""
    name = words[0]
    if name in _NAMES and name not in names:
        return f"{name} means nothing here, only: {', '.join(names)}"
    if name not in names:
        return f"there is no limit {name!r}, only: {', '.join(names)}"
    if len(words) != 2:
        return f"expected a line {name} VALUE"
    if name in found:
        return f"{name} stands in line {found[name][1]} already"
    return ""


def _with_file(line: CommandLine, path: str, names: Sequence[str]) -> CommandLine:
    """*line*, with what the file at *path* says in place of options. Raises `ConfigurationError`."""
    entries = parse_limits(read_settings(path, "--limits", _LARGEST), path, names)
    return line.amended({f"--{name}": (value, f"{path}:{number}: {name}") for name, (value, number) in entries.items()})


def _configuration(line: CommandLine, *, many: bool) -> Configuration:
    """What *line* says, of which only a server of *many* clients needs all. Raises `ConfigurationError`."""
    requests = line.integer("--max-queue-size", 0, sys.maxsize) if line.has("--max-queue-size") else 0
    buffered = line.size_or_zero("--max-buf-size") if line.has("--max-buf-size") else 0
    found = Configuration(
        handshake_timeout=line.seconds("--handshake-timeout"), max_queue_size=requests, max_buf_size=buffered
    )
    found = found._replace(**{f"limit_{field}": number for field, number in given_rates(line).items()})
    if not many:
        return found
    return found._replace(
        max_clients=line.integer("--max-clients", 1, 1_000_000),
        spare_workers=line.integer("--spare-workers", 1, 1000) if line.knows("--spare-workers") else 0,
    )


def load_limits(
    line: CommandLine, path: Optional[str], names: Sequence[str], *, many: bool = True
) -> Tuple[CommandLine, Configuration]:
    """*line* with what the file at *path* says in place of options, and the configuration that results.

    Raises `ConfigurationError`.
    """
    found = _configuration(line, many=many)
    if path is None:
        return line, found
    try:
        line = _with_file(line, path, names)
        return line, _configuration(line, many=many)
    except ConfigurationError as error:
        raise ConfigurationError(str(error)) from error.__cause__  # the command line makes sense
