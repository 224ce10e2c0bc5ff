"""From the command line of xnbd-bgctl to its options; what is of no use for the command is ignored with a warning."""

from __future__ import annotations

import sys
from typing import Any, Dict, NamedTuple, Optional, Sequence

from ..control.client import PATIENCE
from ..errors import ConfigurationError
from ..system.process import whole_path
from .program import say
from .rate_options import RATES, given_rates
from .values import USAGE_ERROR, CommandLine

_MOST_BLOCKS = 8192
_COPY_OPTIONS = ("--blocks-per-request", "--limit-rate")
_OF_USE = {
    "--query": ("--json", "--map"),
    "--switch": ("--force",),
    "--shutdown": ("--force",),
    "--cache-all": (*_COPY_OPTIONS, "--progress"),
    "--cache-all2": _COPY_OPTIONS,
    "--scrub": ("--limit-rate", "--progress"),
    "--reconnect": ("--exportname", "--origin"),
    "--snapshot": ("--progress",),
    "--upgrade": ("--program", "--check"),
    "--reload": (),
    "--limit": tuple(RATES),
    "--top": ("--interval",),
}
"""The commands, and the options that are of use for each."""

_INTERVAL, _SHORTEST_INTERVAL = 1.0, 0.1


class SteeringOptions(NamedTuple):
    """*command* is the option's name; *timeout* and *interval* in seconds, *limit_rate* in bytes a second.

    *new_origin* has fields of the request that tell where it is, *rates* those of `scoreboard.rates.Rates`.
    """

    control_paths: Sequence[str]
    command: str
    timeout: float
    interval: float
    json: bool
    map: bool
    force: bool
    progress: bool
    blocks_per_request: Optional[int]
    limit_rate: Optional[int]
    rates: Dict[str, Any]
    export_name: Optional[str]
    new_origin: Dict[str, str]
    program: Optional[str]
    check: bool

    @property
    def control_path(self) -> str:
        """Of the one server of most commands."""
        return self.control_paths[0]


def steering_options(program: str, line: CommandLine) -> SteeringOptions:
    """What *line* asks for. Raises `ConfigurationError`."""
    command = next((command for command in _OF_USE if line.has(command)), "--query")
    given = {option for options in _OF_USE.values() for option in options if line.has(option)}
    for option in dict.fromkeys(option for options in _OF_USE.values() for option in options):
        if option in given and option not in _OF_USE[command]:
            _warn(program, f"{option} is ignored: {command} has no use for it")
    used = given.intersection(_OF_USE[command])
    return SteeringOptions(
        control_paths=list(dict.fromkeys(line.texts("CONTROL"))) or [line.needed("CONTROL_SOCKET")],
        command=command,
        blocks_per_request=_blocks_per_request(program, line) if "--blocks-per-request" in used else None,
        limit_rate=line.size("--limit-rate") if "--limit-rate" in used and command != "--limit" else None,
        rates=given_rates(line) if command == "--limit" else {},
        new_origin=_new_origin(line) if command == "--reconnect" else {},
        timeout=line.seconds("--timeout") if line.has("--timeout") else PATIENCE,
        interval=_interval(line) if "--interval" in used else _INTERVAL,
        json="--json" in used,
        map="--map" in used,
        force="--force" in used,
        progress="--progress" in used,
        export_name=line.text("--exportname") if "--exportname" in used else None,
        program=whole_path(line.needed("--program"), "--program") if "--program" in used else None,
        check="--check" in used,
    )


def _warn(program: str, text: str) -> None:
    say(f"{program}: {text}")


def _interval(line: CommandLine) -> float:
    interval = line.seconds("--interval")
    if interval < _SHORTEST_INTERVAL:
        text = line.needed("--interval")
        raise ConfigurationError(f"--interval {text}: expected at least {_SHORTEST_INTERVAL} seconds", USAGE_ERROR)
    return interval


def _blocks_per_request(program: str, line: CommandLine) -> int:
    """What the server takes of that number."""
    count = line.integer("--blocks-per-request", 1, sys.maxsize)
    if count > _MOST_BLOCKS:
        _warn(
            program,
            f"--blocks-per-request {count} is cut to {_MOST_BLOCKS}, the most that a server asks for at once",
        )
    return min(count, _MOST_BLOCKS)


def _new_origin(line: CommandLine) -> Dict[str, str]:
    from ..origin.address import parse_origin, with_others

    name, port = line.text("--exportname"), line.text("REMOTE_PORT")
    host_or_uri = line.text("REMOTE_HOST") or line.needed("ORIGIN_URI")
    others = line.texts("--origin")
    address = with_others(parse_origin(host_or_uri, port, name), others)
    return {"host": host_or_uri, "port": port} if port and not others else {"uri": str(address)}
