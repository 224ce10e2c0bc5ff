"""What an operator should know besides the figures, one line each."""

from __future__ import annotations

from typing import Iterator, List, Sequence

from ...control.client import shown
from ..quantities import duration, percentage, rate
from .servers import Server

_NAMED = 3


def notes_of(servers: Sequence[Server], most: int) -> List[str]:
    """At most *most* lines; the worst come first."""
    notes = [f"{server.label}: {note}" for server in servers for note in _notes(server)]
    uncounted = [server.label for server in servers if server.counts_durations is False]
    if uncounted:
        names = ", ".join(uncounted[:_NAMED]) + (f" and {len(uncounted) - _NAMED} more" if uncounted[_NAMED:] else "")
        notes.append(f"no P50 and P99, for want of --metrics: {names}")
    return notes if len(notes) <= most else [*notes[: most - 1], f"... and {len(notes) - most + 1} more"]


def _notes(server: Server) -> Iterator[str]:
    back, answer = server.back(), server.answer
    if back is not None:
        yield back
    if answer is None:
        return
    origin, failure, copy = answer.get("origin"), answer.get("write_back_failure"), answer.get("cache_all")
    if failure:
        ago = duration(failure["seconds_since"])
        yield f"write-back failed {ago} ago, no FLUSH succeeds: {shown(failure['error'])}"
    if origin and origin["state"] == "unreachable":
        yield f"the origin is unreachable: {shown(origin['error'] or '')}"
    yield from map(shown, answer.get("warnings", ()))
    if copy:
        speed = f", {rate(copy['rate'])}" if copy.get("rate") is not None else ""
        yield f"--cache-all: {percentage(copy['copied_bytes'], copy['total_bytes'])}{speed}"
