"""A wrapper and its upgrades: the one that is ordered, and the one that it comes from."""

from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from ... import __version__
from ...errors import CommandError
from ...proxy.state.format import VERSION as STATE_VERSION
from ...scoreboard.layout import TABLE, VERSION
from ...server.upgrade.order import Order
from ...server.upgrade.program import Program
from ...server.upgrade.stages import Leave, Stages
from ...system.kept import Kept
from ...system.service_manager import ServiceManager
from ..children import Children
from .arrival import Arrival
from .estate import WrapperEstate

_PATIENCE = 5.0
"""Seconds for other commands to come to their end, when the next program is checked already."""

Message = Dict[str, Any]
Reply = Iterator[Optional[Message]]


class Upgrades(Stages):
    """Upgrades of a wrapper, which are commands of its control socket."""

    def __init__(
        self,
        program: Program,
        leave: Leave,
        obstacle: Callable[[], str],
        is_calm: Callable[[], bool],
        children: Children,
        manager: ServiceManager,
    ) -> None:
        """*leave* packs what the wrapper has; the check needs the listeners.

        *obstacle* names what has to come to its end first.
        """
        super().__init__(program, manager, is_calm)
        self._wrappers_part = leave
        self._obstacle = obstacle
        self._children = children
        self._patience = 0.0
        self._arrived: Optional[Arrival] = None
        self._stopped = False

    def arrive(self, arrival: Arrival) -> None:
        """This program has been executed by the one before."""
        self._arrival = self._arrived = arrival

    # For the operator

    def order(self, request: Message) -> Reply:
        """The command. Raises `CommandError`, `OSError`."""
        answer: Message = {}
        order = self._begin(request, answer.update)
        self._patience = 0.0
        pid = order.check_pid
        assert pid is not None
        self._children.adopt(pid, lambda status: self._on_checked(order, pid, status))
        while not answer:
            self._check_stop()
            yield None
        yield answer

    def _on_checked(self, order: Order, pid: int, status: int) -> None:
        if self._order is order:
            order.bury(pid, status)

    def go_on(self) -> Reply:
        """The command, which the program before has begun."""
        arrival = self._arrived
        while arrival is not None and arrival.outcome is None:
            self._check_stop()
            yield None
        yield {"done": True} if arrival is None or arrival.outcome is None else arrival.outcome.message()

    def _check_stop(self) -> None:
        if self._stopped:
            raise CommandError("the wrapper stops")

    # For the wrapper's loop

    def _leave(self, verdict: Message) -> Tuple[WrapperEstate, Kept]:
        kept, listeners = Kept(), Kept()
        part = self._wrappers_part(kept, listeners)
        return WrapperEstate(
            version=__version__,
            directory=self._program.directory,
            scoreboard=[VERSION, TABLE],
            state=STATE_VERSION,
            verdict=verdict,
            descriptors=[*kept.fds, *listeners.fds],
            **part,
        ), listeners

    def _may_end(self, order: Order) -> bool:
        """A command that runs is this program's."""
        obstacle = self._obstacle()
        if obstacle:
            self._patience = self._patience or monotonic() + _PATIENCE
            if monotonic() > self._patience:
                order.fail(CommandError(f"{obstacle} is under way: upgrade when it has ended"))
        return not obstacle

    def stop(self) -> None:
        super().stop()
        self._stopped = True
        if self._arrived is not None and self.is_arriving:
            self._arrived.stop()
        self._order = self._arrival = None
