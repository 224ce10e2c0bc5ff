"""Requests on the control socket: what each has to be, and its arguments."""

from __future__ import annotations

import json
from typing import Any, Dict, Optional

from ..errors import CommandError
from ..text import is_writable

Message = Dict[str, Any]


def parse_request(line: bytes) -> Message:
    """A request, whose ``"command"`` is a string. Raises `CommandError`."""
    try:
        request = json.loads(line.decode(), parse_constant=_refuse_constant)
        has_bytes = is_writable(json.dumps(request, ensure_ascii=False))
    except (ValueError, RecursionError):
        raise CommandError('not JSON: expected a line like {"command": "query"}') from None
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise CommandError('expected an object with a command, like {"command": "query"}')
    if not has_bytes:
        raise CommandError("half of a UTF-16 pair stands alone in it: such a text has no bytes")
    return request


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def integer_argument(request: Message, name: str, lowest: int, highest: int) -> Optional[int]:
    """A whole number between the bounds, None if it is missing or null. Raises `CommandError`."""
    value = request.get(name)
    if value is None or (type(value) is int and lowest <= value <= highest):
        return value
    raise CommandError(f"{name}: expected a whole number from {lowest} to {highest}")


def text_argument(request: Message, name: str) -> Optional[str]:
    """A text, None if it is missing or null. Raises `CommandError`."""
    value = request.get(name)
    if value is None or isinstance(value, str):
        return value
    raise CommandError(f"{name}: expected a text")


def flag_argument(request: Message, name: str, *, default: bool = False) -> bool:
    """True or false; the *default* if it is missing. Raises `CommandError`."""
    value = request.get(name, default)
    if isinstance(value, bool):
        return value
    raise CommandError(f"{name}: expected true or false")
