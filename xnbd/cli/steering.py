"""From the options of xnbd-bgctl to a command of the server, and its answer on the terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List

from ..control.client import ControlClient, Message, shown
from ..errors import ConfigurationError
from ..text import counted
from .bgctl_options import SteeringOptions
from .program import INTERRUPTED, print_answer, print_outcome, say, terminal_encoding
from .quantities import duration, limits, percentage, reloaded, size
from .upgrade_report import refusal_by_older, upgraded

if TYPE_CHECKING:
    from .progress_display import Display

_MAP_CELLS_FOR_PROGRAMS = 1024


def steer(options: SteeringOptions) -> None:
    """Do what the command line says. Raises `ConfigurationError`."""
    try:
        _COMMANDS[options.command](options)
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the server's answer makes no sense ({error!r}): is it of another version?"
        ) from error


def _query(options: SteeringOptions) -> None:
    from .cache_map import cells_for, draw
    from .query_report import report

    columns = shutil.get_terminal_size((80, 24)).columns
    cells = None
    if options.map:
        cells = _MAP_CELLS_FOR_PROGRAMS if options.json else cells_for(columns)
    with _connect(options) as server:
        answer = server.ask(command="query", map=cells)
    answer.pop("done", None)
    if options.json:
        _print([json.dumps(answer, indent=2)])
        return
    lines = report(answer)
    if answer.get("map"):
        encoding = sys.stdout.encoding if sys.stdout is not None else "ascii"
        lines += ["", *draw(answer["map"], answer["disk_size"], columns, encoding)]
        if any(answer.get("map_written", ())):
            lines += ["", "Written by clients:", *draw(answer["map_written"], answer["disk_size"], columns, encoding)]
    elif cells:
        lines += ["", "No map: only a proxy has one."]
    _print(lines)


def _switch(options: SteeringOptions) -> None:
    with _interruptible("interrupted; --query tells whether the server has switched"), _connect(options) as server:
        answer = server.ask(command="switch", force=options.force)
    line = "the server is a plain target on its cache file now"
    if "workers" in answer:
        line += f"; {counted(answer['workers'], 'worker')} switched"
    if "longest_pause_ms" in answer:
        line += f", longest pause {answer['longest_pause_ms']:.1f} ms"
    print_outcome(f"{line}\n")


def _copy_request(options: SteeringOptions, *, wait: bool) -> Message:
    return {
        "command": "cache-all",
        "wait": wait,
        "blocks_per_request": options.blocks_per_request,
        "limit_rate": options.limit_rate,
    }


def _cache_all(options: SteeringOptions) -> None:
    request = _copy_request(options, wait=True)
    reached: Message = {}
    answer: Message = {}
    try:
        with _displayed(options) as display, _connect(options) as server:
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
    note = f"; {shown(answer['note'])}" if answer.get("note") else ""
    return f"{percentage(cached, total)} cached, {size(cached)} of {size(total)}; {fetched} fetched{note}"


def _cache_all_in_background(options: SteeringOptions) -> None:
    request = _copy_request(options, wait=False)
    with _connect(options) as server:
        answer = server.ask(**request)
    print_outcome(f"process {answer['pid']} copies; --query shows how far it is\n")


def _scrub(options: SteeringOptions) -> None:
    answer: Message = {}
    interrupted = "stopped; what was found damaged until then is fetched again when it is read"
    with _interruptible(interrupted), _displayed(options) as display, _connect(options) as server:
        for answer in server.follow(command="scrub", limit_rate=options.limit_rate):
            reached = answer.get("progress") or answer
            display.show(reached["position_bytes"], reached["total_bytes"])
    checked, damaged = counted(answer["checked_blocks"], "block"), answer["damaged_blocks"]
    found = f"{damaged:,} damaged, {answer['repaired_blocks']:,} fetched again" if damaged else "none was damaged"
    written = answer.get("written_blocks")  # which an older server does not tell
    unchecked = f"; {counted(written, 'block')} written by clients, without checksums" if written else ""
    print_outcome(f"{checked} checked, {found}{unchecked}\n")


def _reconnect(options: SteeringOptions) -> None:
    with _interruptible("interrupted; --query tells which origin the server uses"), _connect(options) as server:
        answer = server.ask(command="reconnect", exportname=options.export_name, **options.new_origin)
    print_outcome(f"the origin is {shown(answer['address'])} now\n")


def _snapshot(options: SteeringOptions) -> None:
    answer: Message = {}
    given_up = "interrupted; the snapshot is given up"
    with _interruptible(given_up), _displayed(options) as display, _connect(options) as server:
        for answer in server.follow(command="snapshot"):
            if "progress" in answer:
                display.show(answer["progress"]["copied_bytes"], answer["progress"]["total_bytes"])
    if options.progress:
        held = f", clients were held for {answer['held_ms']:.1f} ms" if "held_ms" in answer else ""
        say(f"the snapshot took {duration(answer['seconds'])}{held}")
    _print_path(answer["path"])


def _upgrade(options: SteeringOptions) -> None:
    lost = "interrupted; the log of the server tells whether it was upgraded"
    with _interruptible(lost), _connect(options) as server, refusal_by_older("server"):
        answer = server.ask(command="upgrade", program=options.program, check=options.check)
    print_outcome(upgraded(answer))


def _reload(options: SteeringOptions) -> None:
    interrupted = "interrupted; the server's log tells whether it has read its files"
    with _interruptible(interrupted), _connect(options) as server:
        answer = server.ask(command="reload")
    print_outcome(reloaded(answer["changes"], answer["clients"]))


def _limit(options: SteeringOptions) -> None:
    lost = "interrupted; --query tells which limits hold"
    with _interruptible(lost), _connect(options) as server:
        answer = server.ask(command="limit", **options.rates)
    print_outcome("".join(f"{line}\n" for line in limits(answer["limits"])))


def _top(options: SteeringOptions) -> None:
    from .top.servers import Servers

    encoding = terminal_encoding()
    with closing(Servers(options.control_paths, options.interval, options.timeout)) as servers:
        if encoding is None:
            from .top.lines import print_lines

            print_lines(servers, options.interval)
        else:
            from .top.live import show_live

            show_live(servers, options.interval, encoding)


_COMMANDS: Dict[str, Callable[[SteeringOptions], None]] = {
    "--query": _query,
    "--switch": _switch,
    "--shutdown": _switch,
    "--cache-all": _cache_all,
    "--cache-all2": _cache_all_in_background,
    "--scrub": _scrub,
    "--reconnect": _reconnect,
    "--snapshot": _snapshot,
    "--upgrade": _upgrade,
    "--reload": _reload,
    "--limit": _limit,
    "--top": _top,
}


def _connect(options: SteeringOptions) -> ControlClient:
    return ControlClient(options.control_path, options.timeout)


@contextmanager
def _displayed(options: SteeringOptions) -> Iterator[Display]:
    """What shows how far a copy is, as the command line and standard error want it."""
    from .progress_display import NoProgress, ProgressBar, ProgressLines

    display: Display
    if not options.progress or sys.stderr is None:
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
