"""What an operator should know besides the figures, one line each. Pure."""

from __future__ import annotations

from typing import Any, Dict, Iterator

from ...control.client import shown
from ...text import counted
from ..quantities import duration, percentage, rate

Message = Dict[str, Any]


def held_by_limits(answer: Message) -> str:
    """Who has to wait now because of limits, if anybody."""
    held = answer.get("limited_clients")
    return f"limits hold {counted(held, 'client')} now (--limit)" if held else ""


def notes(answer: Message) -> Iterator[str]:
    """Of one server, the worst first."""
    origin, failure, copy = answer.get("origin"), answer.get("write_back_failure"), answer.get("cache_all")
    if failure:
        ago = duration(failure["seconds_since"])
        yield f"write-back failed {ago} ago, no FLUSH succeeds: {shown(failure['error'])}"
    if origin and origin["state"] == "unreachable":
        yield f"the origin is unreachable: {shown(origin['error'] or '')}"
    yield from map(shown, answer.get("warnings", ()))
    held = held_by_limits(answer)
    if held:
        yield held
    if copy:
        speed = f", {rate(copy['rate'])}" if copy.get("rate") is not None else ""
        yield f"--cache-all: {percentage(copy['copied_bytes'], copy['total_bytes'])}{speed}"
