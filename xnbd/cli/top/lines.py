"""``--top`` where there is no terminal: a line for each server and interval, for logs and other programs."""

from __future__ import annotations

import time
from time import monotonic
from typing import Set

from ..program import print_answer, say
from .columns import SERVER_COLUMNS, table_of_clients
from .servers import Server, Servers


def print_lines(servers: Servers, interval: float) -> None:
    """Until nobody reads them any more; the first ones after one interval. Raises `ConfigurationError`."""
    names = max(len(server.label) for server in servers.all)
    told: Set[str] = set()
    due = monotonic() + interval
    while True:
        _wait_for_answers(servers, due, due + interval / 2)
        due = max(due + interval, monotonic())
        _tell_what_is_missing(servers, told)
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        lines = [f"{now} {server.label:<{names}}  {_line(server)}\n" for server in servers.all]
        if not print_answer("".join(lines)):
            return


def _wait_for_answers(servers: Servers, earliest: float, latest: float) -> None:
    while monotonic() < earliest or (monotonic() < latest and not all(one.has_answered for one in servers.all)):
        servers.wait(earliest if monotonic() < earliest else latest, {})


def _tell_what_is_missing(servers: Servers, told: Set[str]) -> None:
    for server in servers.all:
        if server.counts_durations is False and server.label not in told:
            told.add(server.label)
            say(f"{server.label} tells no P50 and P99: it runs without --metrics")


def _line(server: Server) -> str:
    trouble, back = server.trouble(), server.back()
    if trouble is not None or server.figures is None:
        return trouble or ""
    numbers = [(column, column.key(server)) for column in SERVER_COLUMNS]
    cells = [f"{c.heading} {'-' if number is None else c.show(number):<{c.width}}" for c, number in numbers]
    busiest = _BY_USE.sorted(server.figures.clients)[:1]
    return "  ".join([*cells, *(f"busiest {client.name}" for client in busiest), *([back] if back else [])]).rstrip()


_BY_USE = table_of_clients("CLIENT", lambda client: client.name)
