"""What is on the screen: the view that was chosen, and what keys do."""

from __future__ import annotations

from typing import Callable, Dict, List, Protocol, Sequence

from .cells import DIM, Styled
from .detail import Detail
from .overview import Overview
from .servers import Server


class Sorted(Protocol):
    """A table whose order keys change."""

    @property
    def order(self) -> str: ...

    def sort_by_next(self, step: int) -> None: ...

    def reverse(self) -> None: ...


class Views:
    """All *servers*, or the one that is selected; *encoding* is the terminal's."""

    def __init__(self, servers: Sequence[Server], encoding: str) -> None:
        self._servers = servers
        self._overview, self._detail = Overview(servers, encoding), Detail(encoding)
        self._is_detail = False
        self._selected = self._overview.table.sorted(servers)[0]
        self._keys: Dict[str, Callable[[], None]] = {
            "up": lambda: self._move(-1),
            "down": lambda: self._move(1),
            "enter": lambda: self._look(detail=True),
            "back": lambda: self._look(detail=False),
            "<": lambda: self._table.sort_by_next(-1),
            ">": lambda: self._table.sort_by_next(1),
            "r": lambda: self._table.reverse(),
        }

    @property
    def _table(self) -> Sorted:
        return self._detail.table if self._is_detail else self._overview.table

    def press(self, key: str) -> None:
        """Do what *key* stands for, if it stands for anything."""
        action = self._keys.get(key)
        if action is not None:
            action()

    def _move(self, step: int) -> None:
        """Select another server."""
        order = self._overview.table.sorted(self._servers)
        place = order.index(self._selected) + step
        self._selected = order[min(max(place, 0), len(order) - 1)]
        self._look(detail=self._is_detail)

    def _look(self, *, detail: bool) -> None:
        self._is_detail = detail
        if detail:
            for server in self._servers:
                server.map_every = 0.0 if server is self._selected else None
            self._selected.hurry()

    def lines(self, columns: int, rows: int) -> List[Styled]:
        """*rows* lines, which may be too long; the last one tells the keys."""
        view = self._detail if self._is_detail else self._overview
        body = view.lines(self._selected, columns, rows - 1)[: rows - 1]
        return [*body, *[Styled("")] * (rows - 1 - len(body)), Styled(self._help(), DIM)]

    def _help(self) -> str:
        what = "Esc back  Up/Down another server" if self._is_detail else "Up/Down select  Enter look at it"
        return f"{what}  < > by {self._table.order}  r reverse  q quit"
