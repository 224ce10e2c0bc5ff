"""Limits on the clients of a wrapper: the same for each export at first, and then as an operator sets them."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Callable, Collection, Optional

from ..control.requests import Message
from ..control.server import Reply
from ..errors import CommandError
from ..scoreboard.rates import RateBoard, Rates, merged, read_rates
from ..server.limit_order import obey
from .database import Database

EXPORTS = 1 << 13
"""Exports that can be limited: as many as have ever had clients while the wrapper runs, and some to spare."""


class Limiting:
    """The limits in the file behind *rates_fd*; there is none if clients have servers of another kind.

    *rates* hold for exports of which nobody has said anything. *wake* wakes those who serve an export.
    """

    def __init__(self, rates_fd: Optional[int], database: Database, rates: Rates, wake: Callable[[str], None]) -> None:
        self.rates_fd = rates_fd
        self._database = database
        self._rates = rates
        self._wake = wake

    def limit(self, request: Message) -> Reply:
        """The command of an operator."""
        if self.rates_fd is None:
            raise CommandError("only xnbd-wrapper's own servers can be limited, not those of --xnbd-server")
        name = self._database.real_name(str(request.get("name")))
        if name is None:
            raise CommandError(f"there is no export {request.get('name')!r}")
        with closing(RateBoard(self.rates_fd, name, self._rates)) as board:
            rates, _ = obey(board, request, partial(self._wake, name), f"limits of export {name!r}")
        yield {"done": True, "limits": rates._asdict()}

    def adopt(self, rates: Rates, served: Collection[str]) -> None:
        """In place of the former ones, as `server.limit_order.adopt_rates` does; exports that are *served*, too."""
        before, self._rates = self._rates, rates
        if rates == before or self.rates_fd is None:
            return
        for name in {*self._database.exports, *served}:
            if read_rates(self.rates_fd, name) is not None:
                with closing(RateBoard(self.rates_fd, name, before)) as board:
                    board.change(merged(board.rates, before, rates))
                self._wake(name)
