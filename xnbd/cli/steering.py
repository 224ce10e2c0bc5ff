"""From the parsed command line of xnbd-bgctl to a command of the server, and its answer on the terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple

from ..control.client import PATIENCE, ControlClient, Message, shown
from ..errors import ConfigurationError
from .bgctl import PROGRAM
from .program import INTERRUPTED, print_answer, print_outcome, say
from .quantities import counted, duration, percentage, size
from .values import parse_integer, parse_seconds, parse_size

if TYPE_CHECKING:
    from .progress_display import Display

Arguments = Dict[str, Any]

_MAP_CELLS_FOR_PROGRAMS = 1024
_MOST_BLOCKS = 8192


def steer(arguments: Arguments) -> None:
    """Do what the command line says, or query. Raises `ConfigurationError`."""
    command = next((command for command in _COMMANDS if arguments[command]), "--query")
    run, of_use = _COMMANDS[command]
    for option in _OPTIONS:
        if arguments[option] and option not in of_use:
            _warn(f"{option} is ignored: {command} has no use for it")
    try:
        run(arguments)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the server's answer makes no sense ({error!r}): is it of another version?"
        ) from error


def _query(arguments: Arguments) -> None:
    from .cache_map import cells_for, draw
    from .query_report import report

    columns = shutil.get_terminal_size((80, 24)).columns
    cells = None
    if arguments["--map"]:
        cells = _MAP_CELLS_FOR_PROGRAMS if arguments["--json"] else cells_for(columns)
    with _connect(arguments) as server:
        answer = server.ask(command="query", map=cells)
    answer.pop("done", None)
    if arguments["--json"]:
        _print([json.dumps(answer, indent=2)])
        return
    lines = report(answer)
    if answer.get("map"):
        encoding = sys.stdout.encoding if sys.stdout is not None else "ascii"
        lines += ["", *draw(answer["map"], answer["disk_size"], columns, encoding)]
    elif cells:
        lines += ["", "No map: only a proxy has one."]
    _print(lines)


def _switch(arguments: Arguments) -> None:
    with _interruptible("interrupted; --query tells whether the server has switched"), _connect(arguments) as server:
        answer = server.ask(command="switch", force=bool(arguments["--force"]))
    line = "the server is a plain target on its cache file now"
    if "workers" in answer:
        line += f"; {counted(answer['workers'], 'worker')} switched"
    if "longest_pause_ms" in answer:
        line += f", longest pause {answer['longest_pause_ms']:.1f} ms"
    print_outcome(f"{line}\n")


def _copy_request(arguments: Arguments, *, wait: bool) -> Message:
    limit = arguments["--limit-rate"]
    return {
        "command": "cache-all",
        "wait": wait,
        "blocks_per_request": _blocks_per_request(arguments["--blocks-per-request"]),
        "limit_rate": limit and parse_size(limit, "--limit-rate"),
    }


def _blocks_per_request(text: Optional[str]) -> Optional[int]:
    """What the server takes of that number."""
    if text is None:
        return None
    count = parse_integer(text, "--blocks-per-request", 1, sys.maxsize)
    if count > _MOST_BLOCKS:
        _warn(f"--blocks-per-request {count} is cut to {_MOST_BLOCKS}, the most that a server asks for at once")
    return min(count, _MOST_BLOCKS)


def _cache_all(arguments: Arguments) -> None:
    request = _copy_request(arguments, wait=True)
    reached: Message = {}
    answer: Message = {}
    try:
        with _displayed(arguments) as display, _connect(arguments) as server:
            for answer in server.follow(**request):
                reached = answer.get("progress") or answer
                display.show(reached["cached_bytes"], reached["total_bytes"])
    except KeyboardInterrupt:
        raise _interrupted(f"stopped{_reached(reached)}; run again, it goes on from there") from None
    print_outcome(f"{_outcome(answer)}\n")


def _reached(progress: Message) -> str:
    if not progress:
        return ""
    cached, total = progress["cached_bytes"], progress["total_bytes"]
    return f" at {percentage(cached, total)}, {size(cached)} of {size(total)}"


def _outcome(answer: Message) -> str:
    cached, total, fetched = answer["cached_bytes"], answer["total_bytes"], size(answer["fetched_bytes"])
    return f"{percentage(cached, total)} cached, {size(cached)} of {size(total)}; {fetched} fetched"


def _cache_all_in_background(arguments: Arguments) -> None:
    request = _copy_request(arguments, wait=False)
    with _connect(arguments) as server:
        answer = server.ask(**request)
    print_outcome(f"process {answer['pid']} copies; --query shows how far it is\n")


def _reconnect(arguments: Arguments) -> None:
    from ..origin.address import parse_origin

    name, port = arguments["--exportname"], arguments["REMOTE_PORT"]
    host_or_uri = arguments["REMOTE_HOST"] or arguments["ORIGIN_URI"]
    address = parse_origin(host_or_uri, port, name)
    request: Message = {"host": host_or_uri, "port": port} if port else {"uri": str(address)}
    with _interruptible("interrupted; --query tells which origin the server uses"), _connect(arguments) as server:
        answer = server.ask(command="reconnect", exportname=name, **request)
    print_outcome(f"the origin is {shown(answer['address'])} now\n")


def _snapshot(arguments: Arguments) -> None:
    answer: Message = {}
    given_up = "interrupted; the snapshot is given up"
    with _interruptible(given_up), _displayed(arguments) as display, _connect(arguments) as server:
        for answer in server.follow(command="snapshot"):
            if "progress" in answer:
                display.show(answer["progress"]["copied_bytes"], answer["progress"]["total_bytes"])
    if arguments["--progress"]:
        held = f", clients were held for {answer['held_ms']:.1f} ms" if "held_ms" in answer else ""
        say(f"the snapshot took {duration(answer['seconds'])}{held}")
    _print_path(answer["path"])


_COPY_OPTIONS = ("--blocks-per-request", "--limit-rate")
_COMMANDS: Dict[str, Tuple[Callable[[Arguments], None], Tuple[str, ...]]] = {
    "--query": (_query, ("--json", "--map")),
    "--switch": (_switch, ("--force",)),
    "--shutdown": (_switch, ("--force",)),
    "--cache-all": (_cache_all, (*_COPY_OPTIONS, "--progress")),
    "--cache-all2": (_cache_all_in_background, _COPY_OPTIONS),
    "--reconnect": (_reconnect, ("--exportname",)),
    "--snapshot": (_snapshot, ("--progress",)),
}
"""What each command does, and the options that are of use for it."""

_OPTIONS = tuple(dict.fromkeys(option for _, options in _COMMANDS.values() for option in options))


def _warn(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr)


def _connect(arguments: Arguments) -> ControlClient:
    timeout = arguments["--timeout"]
    return ControlClient(
        arguments["CONTROL_SOCKET"], PATIENCE if timeout is None else parse_seconds(timeout, "--timeout")
    )


@contextmanager
def _displayed(arguments: Arguments) -> Iterator[Display]:
    """What shows how far a copy is, as the command line and standard error want it."""
    from .progress_display import NoProgress, ProgressBar, ProgressLines

    display: Display
    if not arguments["--progress"] or sys.stderr is None:
        display = NoProgress()
    else:
        display = ProgressBar() if sys.stderr.isatty() else ProgressLines()
    try:
        yield display
    finally:
        display.close()


@contextmanager
def _interruptible(what: str) -> Iterator[None]:
    """Ctrl-C in the middle says *what* that means."""
    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted(what) from None


def _interrupted(what: str) -> ConfigurationError:
    return ConfigurationError(what, INTERRUPTED)


def _print(lines: List[str]) -> None:
    print_answer("".join(f"{line}\n" for line in lines))


def _print_path(path: str) -> None:
    """The exact bytes, whatever the terminal can show: scripts use them."""
    try:
        print_answer(os.fsencode(path) + b"\n")
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; the snapshot is {shown(path)}") from None
