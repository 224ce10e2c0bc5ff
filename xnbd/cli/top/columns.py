"""The columns of the tables of servers and of clients."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

from ..quantities import duration, percentage, short_count, short_duration, short_size
from .cells import BOLD, Styled
from .figures import ClientFigures
from .servers import Server
from .table import Column, Table

LONGEST_CLIENT = 40


def share(part: float) -> str:
    """``99.9%``."""
    return percentage(part, 1).replace(" ", "")


def count(number: float) -> str:
    return short_count(round(number))


def _age(seconds: float) -> str:
    """The larger unit only."""
    return "".join(duration(seconds).split(" ")[:2])


def _of(name: str) -> Callable[[Server], Optional[float]]:
    def value(server: Server) -> Optional[float]:
        found: Optional[float] = None if server.figures is None else getattr(server.figures, name)
        return found

    return value


def _clients(server: Server) -> Optional[float]:
    return None if server.figures is None else len(server.figures.clients)


SERVER_COLUMNS = (
    Column("READ/s", 6, 1, _of("read"), short_size),
    Column("WRITE/s", 7, 2, _of("written"), short_size),
    Column("REQS/s", 6, 3, _of("requests"), count),
    Column("P50", 6, 5, _of("p50"), short_duration),
    Column("P99", 6, 4, _of("p99"), short_duration),
    Column("HITS", 6, 7, _of("hits"), share),
    Column("FETCH/s", 7, 9, _of("fetched"), short_size),
    Column("CACHED", 6, 8, _of("cached"), share),
    Column("WAIT", 5, 6, _of("waiting"), count),
    Column("CLIENTS", 7, 10, _clients, count),
)


def table_of_servers() -> Table[Server]:
    return Table("SERVER", lambda server: server.label, SERVER_COLUMNS)


def _both(client: ClientFigures) -> Optional[float]:
    return None if client.read is None or client.written is None else client.read + client.written


def table_of_clients(heading: str, name: Callable[[ClientFigures], str]) -> Table[ClientFigures]:
    """Those that read and write most come first."""
    return Table(
        heading,
        name,
        (
            Column("BOTH/s", 6, 7, _both, short_size),
            Column("READ/s", 6, 1, lambda client: client.read, short_size),
            Column("WRITE/s", 7, 2, lambda client: client.written, short_size),
            Column("REQS/s", 6, 3, lambda client: client.requests, count),
            Column("HITS", 6, 5, lambda client: client.hits, share),
            Column("WAIT", 5, 4, lambda client: client.waiting, count),
            Column("AGE", 5, 6, lambda client: client.seconds, _age),
        ),
        sorted_by="BOTH/s",
    )


def client_lines(
    table: Table[ClientFigures], clients: Sequence[ClientFigures], columns: int, rows: int
) -> List[Styled]:
    """A blank line, a heading, and as many clients as there is room for in *rows*."""
    shown = table.sorted(clients)[: rows - 2] if rows > 2 else []
    if not shown:
        return []
    layout = table.layout(shown, columns, LONGEST_CLIENT)
    return [Styled(""), Styled(layout.heading(), BOLD), *(Styled(layout.line(client)) for client in shown)]
