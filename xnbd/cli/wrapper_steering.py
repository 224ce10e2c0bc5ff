"""From the parsed command line of xnbd-wrapper-ctl to a request, and from the replies to what is printed."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

from ..control.client import ControlClient, shown
from ..errors import ConfigurationError
from ..system.process import whole_path
from ..system.sockets import is_listening
from .program import print_answer, print_outcome, say
from .values import parse_integer

Arguments = Dict[str, Any]
Message = Dict[str, Any]

_COMMANDS = (
    "list",
    "add-target",
    "add",
    "add-proxy",
    "remove-by-exportname",
    "remove-by-file",
    "remove",
    "bgctl-query",
    "bgctl-cache-all",
    "bgctl-switch",
    "bgctl-reconnect",
    "save",
    "orphan",
    "shutdown",
)
_REQUESTS = {"add": "add-target", "remove": "remove-by-index"}
"""What the wrapper calls those that have another name there."""

_FIELDS = {
    "FILE": "image_path",
    "CACHE_IMAGE": "image_path",
    "BITMAP_IMAGE": "bitmap_path",
    "CONTROL_SOCKET_PATH": "control_socket_path",
    "REMOTE_HOST": "remote_host",
    "REMOTE_PORT": "remote_port",
    "NAME": "name",
    "--target-exportname": "remote_export_name",
}
_PATHS = ("FILE", "CACHE_IMAGE", "BITMAP_IMAGE", "CONTROL_SOCKET_PATH")
_END_TIME = 10.0
_ANSWER_TIME = 60.0
"""Seconds without a word after which a wrapper is thought to hang: longer than ``xnbd-bgctl`` gives its server."""


def steer(arguments: Arguments) -> int:
    """Do what the command line says; the exit status. Raises `ConfigurationError`."""
    command = next(name for name in _COMMANDS if arguments[f"--{name}"])
    request = _request(arguments)
    path = arguments["--socket"]
    with ControlClient(path, _ANSWER_TIME) as client:
        replies = client.follow(command=_REQUESTS.get(command, command), **request)
        if command == "list":
            return _show_list([reply["export"] for reply in replies if "export" in reply], arguments["--json"])
        show = print_answer if command == "bgctl-query" else print_outcome
        status = 0
        for reply in replies:
            status = _show(reply, show) or status
    if command in ("orphan", "shutdown"):
        _wait_for_the_end(path)
    return status


def _request(arguments: Arguments) -> Message:
    """The fields of the request; paths are the wrapper's, which has another working directory."""
    request: Message = {}
    for argument, field in _FIELDS.items():
        value = arguments[argument]
        if value is not None:
            request[field] = whole_path(value, argument) if argument in _PATHS else value
    if arguments["--add"]:
        request["name"] = arguments["FILE"]
    if arguments["INDEX"] is not None:
        request["index"] = parse_integer(arguments["INDEX"], "--remove", 1, sys.maxsize)
    if arguments["REMOTE_URI"] is not None:
        from ..origin.address import parse_origin

        address = parse_origin(arguments["REMOTE_URI"], None, request.pop("remote_export_name", None))
        request["remote_uri"] = str(address)
    return request


def _show(reply: Message, show: Callable[[str], None]) -> int:
    """Print one line of a reply; the exit status of ``xnbd-bgctl`` if it is in there."""
    output, errors = _without_controls(reply.get("output", "")), _without_controls(reply.get("errors", ""))
    if output:
        show(output)
    if errors:
        say(errors.rstrip("\n"))
    if "removed" in reply:
        show(f"removed {shown(reply['removed'])}\n")
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
