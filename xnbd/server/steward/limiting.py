"""Limits that an operator sets while clients are held to them."""

from __future__ import annotations

from contextlib import closing

from ...control.requests import Message
from ...control.server import CommandTable, Reply
from ...errors import CommandError
from ..limit_order import obey
from .duty import Context, Duty


class Limiting(Duty):
    """Shows and changes the limits of the server's clients, those that sleep because of them included."""

    def __init__(self, context: Context) -> None:
        self._service = context.service
        self._scoreboard = context.scoreboard

    def commands(self) -> CommandTable:
        return {"limit": self._limit}

    def _limit(self, request: Message) -> Reply:
        board = self._service.open_rates()
        if board is None:
            raise CommandError("this server cannot limit its clients: its log says why")
        with closing(board):
            rates, changed = obey(board, request, self._scoreboard.lines.wake_all)
        yield {"done": True, "limits": rates._asdict(), "changed": changed}
