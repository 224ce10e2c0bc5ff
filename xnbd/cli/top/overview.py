"""The view of all servers, and of the clients that read and write most."""

from __future__ import annotations

from typing import Iterable, Iterator, List, Optional, Sequence

from ...text import counted
from ..cache_map import coarser, strip
from ..quantities import short_size
from .cells import BOLD, DIM, PLAIN, SELECTED, Styled, pad
from .columns import client_lines, table_of_clients, table_of_servers
from .figures import Figures
from .servers import Server
from .table import Layout

_LONGEST_LABEL = 24
_SMALLEST_MAP, _LARGEST_MAP = 10, 42
_MAP_EVERY = 5.0
_NOTES, _NAMED = 4, 3
_FEWEST_CLIENTS = 3
"""Of these there are at least so many, unless there is no room for one server."""


class Overview:
    """*encoding* is the terminal's."""

    def __init__(self, servers: Sequence[Server], encoding: str) -> None:
        self._servers = servers
        self._encoding = encoding
        self.table = table_of_servers()
        self._clients = table_of_clients("CLIENT", lambda client: client.name)
        if len(servers) > 1:
            self._clients = table_of_clients("SERVER, CLIENT", lambda client: f"{client.server}, {client.name}")

    def lines(self, selected: Server, columns: int, rows: int) -> List[Styled]:
        """At most *rows* lines, if that is not too few."""
        servers = self.table.sorted(self._servers)
        layout = self.table.layout(servers, columns, _LONGEST_LABEL)
        clients = [client for one in figures_of(servers) for client in one.clients]
        notes = notes_of(servers)
        room = rows - 2 - len(notes)
        shown = min(len(servers), max(1, room - (2 + min(len(clients), _FEWEST_CLIENTS) if clients else 0)))
        first = max(0, min(servers.index(selected) - shown // 2, len(servers) - shown))
        return [
            Styled(totals(servers, f", {first + 1} to {first + shown} shown" if shown < len(servers) else "")),
            *self._table_lines(layout, servers[first : first + shown], selected, columns),
            *client_lines(self._clients, clients, columns, room - shown),
            *(Styled(note, BOLD) for note in notes),
        ]

    def _table_lines(
        self, layout: Layout[Server], servers: Iterable[Server], selected: Server, columns: int
    ) -> Iterator[Styled]:
        cells = min(layout.free - 3, _LARGEST_MAP)
        has_map = cells >= _SMALLEST_MAP
        for server in self._servers:
            server.map_every = _MAP_EVERY if has_map else None
        yield Styled(layout.heading() + (" MAP" if has_map else ""), BOLD)
        for server in servers:
            trouble = server.trouble()
            text = layout.line(server) if trouble is None else layout.remark(server, trouble)
            if has_map and server.map and trouble is None:
                text += f" |{strip(coarser(server.map, cells), self._encoding)}|"
            if server is selected:
                yield Styled(pad(text, columns), SELECTED)
            else:
                yield Styled(text, PLAIN if trouble is None else DIM)


def notes_of(servers: Sequence[Server]) -> List[str]:
    """Of all of them, and what is missing: at most `_NOTES` lines."""
    found = [f"{server.label}: {note}" for server in servers for note in server.notes()]
    uncounted = [server.label for server in servers if server.counts_durations is False]
    if uncounted:
        names = ", ".join(uncounted[:_NAMED]) + (f" and {len(uncounted) - _NAMED} more" if uncounted[_NAMED:] else "")
        found.append(f"no P50 and P99, for want of --metrics: {names}")
    return found if len(found) <= _NOTES else [*found[: _NOTES - 1], f"... and {len(found) - _NOTES + 1} more"]


def figures_of(servers: Sequence[Server]) -> List[Figures]:
    """Of those that are there."""
    return [server.figures for server in servers if server.figures is not None and server.is_there]


def totals(servers: Sequence[Server], which: str) -> str:
    """All of them together; *which* of them are in sight."""
    figures = figures_of(servers)
    away = sum(not server.is_there for server in servers)
    parts = [counted(len(servers), "server") + (f" ({away} away)" if away else "") + which]
    parts.append(f"read {short_size(_sum(one.read for one in figures))}/s")
    parts.append(f"write {short_size(_sum(one.written for one in figures))}/s")
    parts.append(f"{round(_sum(one.requests for one in figures)):,} requests/s")
    parts.append(counted(sum(len(one.clients) for one in figures), "client"))
    return ", ".join(parts)


def _sum(numbers: Iterable[Optional[float]]) -> float:
    return sum(number or 0.0 for number in numbers)
