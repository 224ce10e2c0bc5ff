"""The view of one server: what it is, how fast it is, which parts are cached, and its clients."""

from __future__ import annotations

from typing import Iterator, List, Optional

from ..cache_map import LEAST_COLUMNS, cells_for, coarser, draw
from ..quantities import percentage, short_duration, short_size
from ..query_report import labelled
from .cells import BOLD, Styled
from .columns import client_lines, table_of_clients
from .figures import WINDOW, Figures
from .servers import Server

_FEWEST_CLIENTS = 3
_MAP_ROWS = 8


class Detail:
    """*encoding* is the terminal's."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self.table = table_of_clients("CLIENT", lambda client: client.name)

    def lines(self, server: Server, columns: int, rows: int) -> List[Styled]:
        """At most *rows* lines, if that is not too few."""
        figures, trouble = server.figures, server.trouble()
        if figures is None:
            return [Styled(f"{server.label}: {trouble}", BOLD)]
        remark = trouble or server.back()
        lines = [Styled(f"{server.label}: {server.title}{f'  ({remark})' if remark else ''}", BOLD)]
        lines += [Styled(line) for line in (*_rates(figures, server), *server.facts)]
        clients = min(len(figures.clients), _FEWEST_CLIENTS) + 2
        lines += self._map(server, columns, min(_MAP_ROWS, rows - len(lines) - clients - 1))
        return [*lines, *client_lines(self.table, figures.clients, columns, rows - len(lines))]

    def _map(self, server: Server, columns: int, rows: int) -> List[Styled]:
        if not server.map or rows < 1 or columns < LEAST_COLUMNS:
            return []
        parts = coarser(server.map, cells_for(columns, rows))
        return [Styled(line) for line in draw(parts, server.disk_size, columns, self._encoding)]


def _rates(figures: Figures, server: Server) -> Iterator[str]:
    parts = [f"read {short_size(figures.read or 0)}/s", f"write {short_size(figures.written or 0)}/s"]
    parts.append(f"{round(figures.requests or 0):,} requests/s")
    if figures.fetched is not None:
        parts.append(f"fetch {short_size(figures.fetched)}/s")
    yield labelled("now", ", ".join(parts))
    took = [f"{name} {_two(*two)}" for name, two in figures.took.items() if None not in two]
    if server.counts_durations:
        yield labelled("p50/p99", ", ".join(took) or f"no requests in the last {WINDOW:.0f} s")
    else:
        yield labelled("p50/p99", "nobody counts that: it needs --metrics")
    if server.held:
        yield labelled("held", server.held)
    if figures.hits is not None:
        yield labelled("hits", f"{percentage(figures.hits, 1)} in the last {WINDOW:.0f} s")


def _two(p50: Optional[float], p99: Optional[float]) -> str:
    return "/".join(short_duration(seconds or 0.0) for seconds in (p50, p99))
