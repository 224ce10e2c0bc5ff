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
from .order import Order
from .program import Program
from .stages import Leave, Stages


class Upgrades(Stages):
    """Upgrades of a master whose workers are the *crew*."""

    def __init__(
        self,
        program: Program,
        leave: Leave,
        is_calm: Callable[[], bool],
        crew: Crew,
        poll: select.poll,
        manager: ServiceManager,
    ) -> None:
        """*leave* packs what the master has; the check needs the descriptors of the disk."""
        super().__init__(program, manager, is_calm)
        self._masters_part = leave
        self._crew = crew
        self._poll = poll
        self._number = 0
        self._link: Optional[StewardLink] = None
        """To the steward that has asked for the order."""
        self._arrived: Optional[Arrival] = None

    def arrive(self, estate: Estate, start_steward: Callable[[], None]) -> None:
        """This program has been executed by one that has left *estate*."""
        self._arrival = self._arrived = Arrival(estate, self._crew, self._poll, start_steward)

    def order(self, request: Dict[str, Any], link: StewardLink) -> None:
        """The steward at *link* asks for an upgrade; it has the answer when the next program is at work, or cannot be.

        Raises `CommandError`, `OSError`.
        """
        number = link.number
        self._begin(request, partial(link.answer, number))
        self._number, self._link = number, link

    def _leave(self, _verdict: Dict[str, Any]) -> Tuple[Estate, Kept]:
        kept, disk = Kept(), Kept()
        part = self._masters_part(kept, disk)
        return Estate(
            version=__version__,
            directory=self._program.directory,
            number=self._number,
            descriptors=[*kept.fds, *disk.fds],
            **part,
        ), disk

    def _may_end(self, order: Order) -> bool:
        if self._link is None or self._link.fileno() < 0:
            order.fail(CommandError("the steward has died"))
            return False
        return True

    def wanted_spares(self, usually: int) -> int:
        """How many spare workers there should be, where it is *usually* so many: clients move to them."""
        clients = 0 if self._arrived is None else self._arrived.clients
        return max(usually, min(clients, WAITING))

    def bury(self, pid: int, exit_code: int) -> None:
        """A child of the master has ended."""
        if self._order is not None:
            self._order.bury(pid, exit_code)
        if self._arrived is not None and self.is_arriving:
            self._arrived.bury(pid)
