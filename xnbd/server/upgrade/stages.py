"""The stages of an upgrade: an order, at whose end the next program is executed; and there the arrival.

That is what a master and a wrapper have in common. Each of them knows what it leaves, and what has to
end before its program may.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import monotonic
from typing import Any, Callable, Dict, Optional, Protocol, Tuple

from ...control.requests import Message
from ...errors import CommandError
from ...system.kept import Kept
from ...system.service_manager import ServiceManager
from .order import Leavable, Order, block_signals, unblock_signals
from .program import Program

_LOOK_AGAIN = 0.05

Leave = Callable[[Kept, Kept], Dict[str, Any]]
"""A part of an estate; takes the descriptors that the check does not need, and those that it needs."""


class Arriving(Protocol):
    """What has to be done once in the next program, step by step."""

    @property
    def is_over(self) -> bool: ...

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""

    def progress(self) -> None:
        """Take the next step."""


class Stages(ABC):
    """What a process running *program* does for upgrades; one at a time is under way. The *manager* hears of it."""

    def __init__(self, program: Program, manager: ServiceManager, is_calm: Callable[[], bool]) -> None:
        """*is_calm* says, with signals blocked, whether this program may come to its end."""
        self._program = program
        self._manager = manager
        self._is_calm = is_calm
        self._order: Optional[Order] = None
        self._arrival: Optional[Arriving] = None

    @abstractmethod
    def _leave(self, verdict: Message) -> Tuple[Leavable, Kept]:
        """What this program leaves to the next one, of which the check has said *verdict*; what the check needs."""

    @abstractmethod
    def _may_end(self, order: Order) -> bool:
        """Whether nothing keeps this program any more from its end. What does so for good fails the *order*."""

    @property
    def is_arriving(self) -> bool:
        """Whether something of the program before has to move yet."""
        return self._arrival is not None

    def _begin(self, request: Message, answer: Callable[[Message], None]) -> Order:
        """An operator asks for an upgrade, and hears of it by *answer*. Raises `CommandError`, `OSError`."""
        if self._order is not None or self._arrival is not None:
            raise CommandError("an upgrade is under way already")
        estate, checked = self._leave({})
        order = self._order = Order(request, self._program, estate, answer, checked)
        return order

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        if self._arrival is not None:
            return self._arrival.deadline()
        if self._order is None:
            return None
        return monotonic() + _LOOK_AGAIN if self._order.is_ready else self._order.deadline()

    def progress(self) -> None:
        """Take the next step."""
        arrival, order = self._arrival, self._order
        if arrival is not None:
            arrival.progress()
            if arrival.is_over:
                self._arrival = None
        if order is not None:
            order.progress()
            if order.is_ready and self._may_end(order):
                self._execute(order)
            if order.is_over:
                self._order = None

    def _execute(self, order: Order) -> None:
        """Returns if that is not possible, or not yet: a signal that has come is this program's to mind."""
        block_signals()
        try:
            if self._is_calm():
                self._manager.handing_over()
                try:
                    order.execute(self._leave(order.verdict)[0])
                finally:
                    self._manager.ready()
        finally:
            unblock_signals()

    def stop(self) -> None:
        """The program ends."""
        if self._order is not None:
            self._order.stop()
