"""Limits that change: what an operator asks for by ``--limit``, and what a reload has found."""

from __future__ import annotations

from contextlib import closing
from typing import Callable, Tuple

from ..control.requests import Message, integer_argument
from ..errors import CommandError
from ..logs import log
from ..scoreboard.rates import LARGEST_LIMIT, LONGEST_BURST, RateBoard, Rates, merged
from ..scoreboard.scoreboard import Scoreboard
from ..storage.target import reopen
from .service import Service


def amended(rates: Rates, request: Message) -> Rates:
    """*rates* as the *request* wants them. Raises `CommandError`."""
    wanted = {}
    for name in Rates._fields[:4]:
        number = integer_argument(request, name, 0, LARGEST_LIMIT)
        if number is not None:
            wanted[name] = number
    rates, burst = rates._replace(**wanted), request.get("burst")
    if burst is None:
        return rates
    if isinstance(burst, bool) or not isinstance(burst, (int, float)) or not 0 < burst <= LONGEST_BURST:
        raise CommandError(f"burst: expected a number of seconds up to {LONGEST_BURST:g}")
    return rates._replace(burst=float(burst))


def obey(board: RateBoard, request: Message, wake: Callable[[], None], what: str = "limits") -> Tuple[Rates, bool]:
    """Have the limits of *board*, *what* in the log, as the *request* wants them; *wake* wakes who is held to them.

    What holds now, and whether it is something else than before. Raises `CommandError`, `OSError`.
    """
    before = board.rates
    rates = amended(before, request)
    if rates != before:
        board.change(rates)
        wake()
        log.info("%s are now: %s", what, rates)
    return rates, rates != before


def adopt_rates(service: Service, rates: Rates) -> None:
    """In place of the former ones, for all that has changed: what an operator has set besides stays.

    Clients that are connected are held to them, too. Raises `OSError`.
    """
    before = service.configuration.rates
    if rates == before or service.rates_fd is None:
        return
    with closing(RateBoard(service.rates_fd, service.export_name, before)) as board:
        board.change(merged(board.rates, before, rates))
    with closing(Scoreboard(reopen(service.scoreboard_fd, readonly=False))) as scoreboard:
        scoreboard.lines.wake_all()
