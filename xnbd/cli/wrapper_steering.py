"""From the options of xnbd-wrapper-ctl to a request, and from the replies to what is printed."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Tuple

from ..control.client import ControlClient, shown
from ..errors import ConfigurationError
from ..system.sockets import is_listening
from .program import print_answer, print_outcome, say
from .quantities import limits, reloaded
from .upgrade_report import refusal_by_older, upgraded
from .wrapper_ctl_options import CtlOptions

Message = Dict[str, Any]

_END_TIME = 10.0
_ANSWER_TIME = 60.0
"""Seconds without a word after which a wrapper is thought to hang: longer than ``xnbd-bgctl`` gives its server."""


def steer(options: CtlOptions) -> int:
    """Do what the command line says; the exit status. Raises `ConfigurationError`."""
    try:
        return _steer(options)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the wrapper's answer makes no sense ({error!r}): is it of another version?"
        ) from error


def _steer(options: CtlOptions) -> int:
    older = refusal_by_older("wrapper") if options.command == "upgrade" else nullcontext()
    with ControlClient(options.socket_path, _ANSWER_TIME) as client, older:
        replies = client.follow(**options.request)
        if options.command == "list":
            return _show_list([reply["export"] for reply in replies if "export" in reply], options.json)
        show = print_answer if options.command == "bgctl-query" else print_outcome
        status = 0
        for reply in replies:
            status = _show(reply, show) or status
    if options.command in ("orphan", "shutdown"):
        _wait_for_the_end(options.socket_path)
    return status


def _show(reply: Message, show: Callable[[str], object]) -> int:
    """Print one line of a reply; the exit status of ``xnbd-bgctl`` if it is in there."""
    output, errors = _without_controls(reply.get("output", "")), _without_controls(reply.get("errors", ""))
    if output:
        show(output)
    if errors:
        say(errors.rstrip("\n"))
    if "removed" in reply:
        show(f"removed {shown(reply['removed'])}\n")
    if "to" in reply:
        show(upgraded(reply))
    if "changes" in reply:
        show(reloaded(reply["changes"], reply["clients"]))
    if "limits" in reply:
        show("".join(f"{line}\n" for line in limits(reply["limits"])))
    status = int(reply.get("status", 0))
    return status if status >= 0 else 1


def _without_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _show_list(exports: List[Message], as_json: bool) -> int:
    if as_json:
        print_answer(json.dumps(exports, indent=2) + "\n")
        return 0
    rows: List[Tuple[str, ...]] = [("INDEX", "NAME", "MODE", "CLIENTS", "IMAGE", "ORIGIN")]
    rows += [_row(export) for export in exports]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    print_answer("".join(f"{line}\n" for line in lines))
    return 0


def _row(export: Message) -> Tuple[str, ...]:
    origin = ""
    if "remote_uri" in export:
        origin = export["remote_uri"]
    elif export["mode"] == "proxy":
        origin = " ".join(filter(None, (export["remote_host"], export["remote_port"], export["remote_export_name"])))
    index = export.get("index", "")  # a wrapper that was started before an update does not tell
    cells = (index, export["name"], export["mode"], export["clients"], export["image_path"], origin)
    return tuple(map(shown, cells))


def _wait_for_the_end(path: str) -> None:
    """Wait until the wrapper has let go of everything, so that the next one can start."""
    deadline = time.monotonic() + _END_TIME
    while is_listening(path):
        if time.monotonic() > deadline:
            raise ConfigurationError("the wrapper has agreed to end and is still there: see its log")
        time.sleep(0.02)
