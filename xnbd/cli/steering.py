"""From the parsed command line of xnbd-bgctl to a command of the server, and its answer on the terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Union

from ..errors import ConfigurationError
from .conversation import PATIENCE, Conversation, Message, shown
from .quantities import counted, duration, percentage, size
from .values import parse_integer, parse_seconds, parse_size

if TYPE_CHECKING:
    from .progress_display import Display

Arguments = Dict[str, Any]

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_MAP_CELLS_FOR_PROGRAMS = 1024
_MOST_BLOCKS = 8192


def steer(arguments: Arguments) -> None:
    """Do what the command line says. Raises `ConfigurationError`."""
    run = next(run for command, run in _COMMANDS.items() if arguments[command])
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
        lines += ["", *draw(answer["map"], answer["disk_size"], columns, sys.stdout.encoding)]
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
    _print([line])


def _copy_request(arguments: Arguments, *, wait: bool) -> Message:
    count, limit = arguments["--blocks-per-request"], arguments["--limit-rate"]
    return {
        "command": "cache-all",
        "wait": wait,
        "blocks_per_request": count and parse_integer(count, "--blocks-per-request", 1, _MOST_BLOCKS),
        "limit_rate": limit and parse_size(limit, "--limit-rate"),
    }


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
    _print([_outcome(answer)])


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
    _print([f"process {answer['pid']} copies; --query shows how far it is"])


def _reconnect(arguments: Arguments) -> None:
    from ..origin.address import parse_origin

    name, port = arguments["--exportname"], arguments["REMOTE_PORT"]
    host_or_uri = arguments["REMOTE_HOST"] or arguments["ORIGIN_URI"]
    address = parse_origin(host_or_uri, port, name)
    request: Message = {"host": address.host, "port": port} if port else {"uri": str(address)}
    with _interruptible("interrupted; --query tells which origin the server uses"), _connect(arguments) as server:
        answer = server.ask(command="reconnect", exportname=name, **request)
    _print([f"the origin is {shown(answer['address'])} now"])


def _snapshot(arguments: Arguments) -> None:
    answer: Message = {}
    given_up = "interrupted; the snapshot is given up"
    with _interruptible(given_up), _displayed(arguments) as display, _connect(arguments) as server:
        for answer in server.follow(command="snapshot"):
            if "progress" in answer:
                display.show(answer["progress"]["copied_bytes"], answer["progress"]["total_bytes"])
    if arguments["--progress"]:
        held = f", clients were held for {answer['held_ms']:.1f} ms" if "held_ms" in answer else ""
        print(f"the snapshot took {duration(answer['seconds'])}{held}", file=sys.stderr)
    _print_path(answer["path"])


_COMMANDS: Dict[str, Callable[[Arguments], None]] = {
    "--query": _query,
    "--switch": _switch,
    "--shutdown": _switch,
    "--cache-all": _cache_all,
    "--cache-all2": _cache_all_in_background,
    "--reconnect": _reconnect,
    "--snapshot": _snapshot,
}


def _connect(arguments: Arguments) -> Conversation:
    timeout = arguments["--timeout"]
    return Conversation(
        arguments["CONTROL_SOCKET"], PATIENCE if timeout is None else parse_seconds(timeout, "--timeout")
    )


@contextmanager
def _displayed(arguments: Arguments) -> Iterator[Display]:
    """What shows how far a copy is, as the command line and standard error want it."""
    from .progress_display import NoProgress, ProgressBar, ProgressLines

    display: Display
    if not arguments["--progress"]:
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
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _write("".join(f"{line}\n" for line in lines))


def _print_path(path: str) -> None:
    """The exact bytes, whatever the terminal can show: scripts use them."""
    _write(os.fsencode(path) + b"\n")


def _write(output: Union[str, bytes]) -> None:
    """Raises `ConfigurationError` if standard output cannot take it; a reader that has seen enough is none."""
    try:
        if isinstance(output, bytes):
            sys.stdout.buffer.write(output)
        else:
            sys.stdout.write(output)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        if not isinstance(error, BrokenPipeError):
            raise ConfigurationError(f"cannot write the answer: {error.strerror}") from error
