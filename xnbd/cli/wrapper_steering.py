"""From the parsed command line of xnbd-wrapper-ctl to a request, and from the replies to what is printed."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Dict, List, Tuple

from ..errors import ConfigurationError
from ..sockets import is_listening
from .conversation import Conversation, shown

Arguments = Dict[str, Any]
Message = Dict[str, Any]

_COMMANDS = (
    "list",
    "add-target",
    "add-proxy",
    "remove-by-exportname",
    "remove-by-file",
    "bgctl-query",
    "bgctl-cache-all",
    "bgctl-switch",
    "bgctl-reconnect",
    "save",
    "orphan",
    "shutdown",
)
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
    with Conversation(path, _ANSWER_TIME) as conversation:
        replies = conversation.follow(command=command, **request)
        if command == "list":
            return _show_list([reply["export"] for reply in replies if "export" in reply], arguments["--json"])
        status = 0
        for reply in replies:
            status = _show(reply) or status
    if command in ("orphan", "shutdown"):
        _wait_for_the_end(path)
    return status


def _request(arguments: Arguments) -> Message:
    """The fields of the request; paths are the wrapper's, which has another working directory."""
    request: Message = {}
    for argument, field in _FIELDS.items():
        value = arguments[argument]
        if value is not None:
            request[field] = os.path.abspath(value) if argument in _PATHS else value
    if arguments["REMOTE_URI"] is not None:
        from ..origin.address import parse_origin

        address = parse_origin(arguments["REMOTE_URI"], None, request.pop("remote_export_name", None))
        request["remote_uri"] = str(address)
    return request


def _show(reply: Message) -> int:
    """Print one line of a reply; the exit status of ``xnbd-bgctl`` if it is in there."""
    sys.stdout.write(_without_controls(reply.get("output", "")))
    sys.stdout.flush()
    sys.stderr.write(_without_controls(reply.get("errors", "")))
    if "removed" in reply:
        print(f"removed {shown(reply['removed'])}")
    status = int(reply.get("status", 0))
    return status if status >= 0 else 1


def _without_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _show_list(exports: List[Message], as_json: bool) -> int:
    if as_json:
        print(json.dumps(exports, indent=2))
        return 0
    rows = [("NAME", "MODE", "CLIENTS", "IMAGE", "ORIGIN")]
    rows += [_row(export) for export in exports]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _row(export: Message) -> Tuple[str, str, str, str, str]:
    origin = ""
    if "remote_uri" in export:
        origin = export["remote_uri"]
    elif export["mode"] == "proxy":
        origin = " ".join(filter(None, (export["remote_host"], export["remote_port"], export["remote_export_name"])))
    cells = (export["name"], export["mode"], str(export["clients"]), export["image_path"], origin)
    name, mode, clients, image, origin = map(shown, cells)
    return name, mode, clients, image, origin


def _wait_for_the_end(path: str) -> None:
    """Wait until the wrapper has let go of everything, so that the next one can start."""
    deadline = time.monotonic() + _END_TIME
    while is_listening(path):
        if time.monotonic() > deadline:
            raise ConfigurationError("the wrapper has agreed to end and is still there: see its log")
        time.sleep(0.02)
