"""From the command line of xnbd-wrapper-ctl to its options; whatever of it makes no sense is refused here."""

from __future__ import annotations

import sys
from typing import Dict, NamedTuple, Union

from ..system.process import whole_path
from .rate_options import given_rates
from .values import CommandLine, parse_integer

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
    "reload",
    "upgrade",
    "limit",
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
    "--program": "program",
}
_PATHS = ("FILE", "CACHE_IMAGE", "BITMAP_IMAGE", "CONTROL_SOCKET_PATH", "--program")


class CtlOptions(NamedTuple):
    """*command* is the option's name without dashes, *request* is what the wrapper gets."""

    socket_path: str
    command: str
    request: Dict[str, Union[str, float]]
    json: bool


def ctl_options(line: CommandLine) -> CtlOptions:
    """What *line* asks for. Raises `ConfigurationError`."""
    command = next(name for name in _COMMANDS if line.has(f"--{name}"))
    request = {"command": _REQUESTS.get(command, command), **_fields(line), **given_rates(line)}
    return CtlOptions(line.needed("--socket"), command, request, line.has("--json"))


def _fields(line: CommandLine) -> Dict[str, Union[str, int]]:
    """The fields of the request; paths are the wrapper's, which has another working directory."""
    fields: Dict[str, Union[str, int]] = {}
    for argument, field in _FIELDS.items():
        value = line.text(argument)
        if value is not None:
            fields[field] = whole_path(value, argument) if argument in _PATHS else value
    if line.has("--add"):
        fields["name"] = line.needed("FILE")
    if line.has("INDEX"):
        fields["index"] = parse_integer(line.needed("INDEX"), "--remove", 1, sys.maxsize)
    if line.has("--upgrade"):
        fields["check"] = line.has("--check")
    uri, others = line.text("REMOTE_URI"), line.texts("--origin")
    if uri is not None or others:
        from ..origin.address import parse_origin, with_others

        for field in ("remote_export_name", "remote_host", "remote_port"):
            fields.pop(field, None)
        first = parse_origin(
            uri or line.needed("REMOTE_HOST"), line.text("REMOTE_PORT"), line.text("--target-exportname")
        )
        fields["remote_uri"] = str(with_others(first, others))
    return fields
