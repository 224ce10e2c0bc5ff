"""A master and its upgrades: the one that is ordered, and the one that it comes from."""

from __future__ import annotations

import select
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

from ... import __version__
from ...errors import CommandError
from ...system.kept import Kept
from ...system.service_manager import ServiceManager
from ..crew import Crew
from ..master_link import StewardLink
from .arrival import Arrival
from .estate import Estate
from .moves import WAITING
from .order import Order, block_signals, unblock_signals
from .program import Program

Leave = Callable[[Kept, Kept], Dict[str, Any]]
"""The master's part of an estate; takes the descriptors of all but the disk, and of the disk."""


class Upgrades:
    """What a master running *program* does for upgrades; one at a time is under way."""

    def __init__(
        self,
        program: Program,
        leave: Leave,
        is_calm: Callable[[], bool],
        crew: Crew,
        poll: select.poll,
        manager: ServiceManager,
    ) -> None:
        """*is_calm* says, with signals blocked, whether this program may come to its end."""
        self._program = program
        self._masters_part = leave
        self._is_calm = is_calm
        self._crew = crew
        self._poll = poll
        self._manager = manager
        self._order: Optional[Order] = None
        self._number = 0
        self._link: Optional[StewardLink] = None
        """To the steward that has asked for the order."""
        self._arrival: Optional[Arrival] = None

    def arrive(self, estate: Estate, start_steward: Callable[[], None]) -> None:
        """This program has been executed by one that has left *estate*."""
        self._arrival = Arrival(estate, self._crew, self._poll, start_steward)

    def order(self, request: Dict[str, Any], link: StewardLink) -> None:
        """The steward at *link* asks for an upgrade; it has the answer when the next program is at work, or cannot be.

        Raises `CommandError`, `OSError`.
        """
        if self._order is not None or self._arrival is not None:
            raise CommandError("an upgrade is under way already")
        self._number, self._link = link.number, link
        estate, disk = self._leave()
        answer = partial(link.answer, self._number)
        self._order = Order(request, self._program, estate, len(self._crew.clients), answer, disk)

    def _leave(self) -> Tuple[Estate, Kept]:
        """What this program leaves to the next one, and the descriptors of the disk among it."""
        kept, disk = Kept(), Kept()
        part = self._masters_part(kept, disk)
        return Estate(
            version=__version__,
            directory=self._program.directory,
            number=self._number,
            descriptors=[*kept.fds, *disk.fds],
            **part,
        ), disk

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        step = self._order or self._arrival
        return None if step is None else step.deadline()

    @property
    def is_arriving(self) -> bool:
        """Whether something of the program before has to move yet."""
        return self._arrival is not None

    def wanted_spares(self, usually: int) -> int:
        """How many spare workers there should be, where it is *usually* so many: clients move to them."""
        clients = 0 if self._arrival is None else self._arrival.clients
        return max(usually, min(clients, WAITING))

    def progress(self) -> None:
        """Take the next step."""
        if self._arrival is not None:
            self._arrival.progress()
            if self._arrival.is_over:
                self._arrival = None
        if self._order is not None:
            self._order.progress()
            if self._order.is_ready:
                self._execute(self._order)
            if self._order.is_over:
                self._order = None

    def _execute(self, order: Order) -> None:
        """Returns if that is not possible, or not yet: a signal that has come is this program's to mind."""
        if self._link is None or self._link.fileno() < 0:
            order.fail(CommandError("the steward has died"))
            return
        block_signals()
        try:
            if self._is_calm():
                self._manager.handing_over()
                try:
                    order.execute(self._leave()[0])
                finally:
                    self._manager.ready()
        finally:
            unblock_signals()

    def bury(self, pid: int, exit_code: int) -> None:
        """A child of the master has ended."""
        if self._order is not None:
            self._order.bury(pid, exit_code)
        if self._arrival is not None:
            self._arrival.bury(pid)

    def stop(self) -> None:
        """The server ends."""
        if self._order is not None:
            self._order.stop()
