"""A master and its upgrades: the one that is ordered, and the one that it comes from."""

from __future__ import annotations

import select
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

from ...errors import CommandError
from ...system.kept import Kept
from ..master_link import StewardLink
from .arrival import Arrival
from .estate import Estate
from .former import Former
from .order import Order, block_signals, unblock_signals
from .program import Program

Leave = Callable[[int], Tuple[Estate, Kept]]
"""What the master leaves for the request of that number, and the descriptors of the disk among it."""


class Upgrades:
    """What a master running *program* does for upgrades; one at a time is under way."""

    def __init__(self, program: Program, leave: Leave, former: Former, poll: select.poll) -> None:
        self._program = program
        self._leave = leave
        self._former = former
        self._poll = poll
        self._order: Optional[Order] = None
        self._number = 0
        self._arrival: Optional[Arrival] = None
        self.is_proven = False
        """Whether a worker of this program can work."""

    def arrive(self, estate: Estate, start_steward: Callable[[], None]) -> None:
        """This program has been executed by one that has left *estate*."""
        self._arrival = Arrival(estate, self._former, self._poll, start_steward)

    def order(self, request: Dict[str, Any], link: StewardLink) -> None:
        """The steward at *link* asks for an upgrade; it has the answer when the next program is at work, or cannot be.

        Raises `CommandError`, `OSError`.
        """
        if self._order is not None or self._arrival is not None:
            raise CommandError("an upgrade is under way already")
        self._number = link.number
        estate, disk = self._leave(self._number)
        self._order = Order(request, self._program, estate, disk, partial(link.answer, self._number))

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        step = self._order or self._arrival
        return None if step is None else step.deadline()

    def progress(self, may_leave: Callable[[], bool]) -> None:
        """Take the next step. *may_leave* says, with signals blocked, whether this program may come to its end."""
        if self._arrival is not None:
            self._arrival.progress(proven=self.is_proven)
            if self._arrival.is_over:
                self._arrival = None
        if self._order is not None:
            self._order.progress()
            if self._order.is_ready:
                self._execute(self._order, may_leave)
            if self._order.is_over:
                self._order = None

    def _execute(self, order: Order, may_leave: Callable[[], bool]) -> None:
        block_signals()
        try:
            if may_leave():
                order.execute(self._leave(self._number)[0])
        finally:
            unblock_signals()

    def bury(self, pid: int, exit_code: int) -> None:
        """A child of the master has ended."""
        if self._order is not None:
            self._order.bury(pid, exit_code)
        if self._arrival is not None:
            self._arrival.bury(pid)
