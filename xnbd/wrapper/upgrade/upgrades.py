"""A wrapper and its upgrades: the one that is ordered, and the one that it comes from."""

from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from ... import __version__
from ...errors import CommandError
from ...scoreboard.layout import TABLE, VERSION
from ...server.upgrade.order import Order, block_signals, unblock_signals
from ...server.upgrade.program import Program
from ...system.kept import Kept
from ..children import Children
from .arrival import Arrival
from .estate import WrapperEstate

_PATIENCE = 5.0
"""Seconds for other commands to come to their end, when the next program is checked already."""

_LOOK_AGAIN = 0.05

Message = Dict[str, Any]
Reply = Iterator[Optional[Message]]
Leave = Callable[[Kept, Kept], Message]
"""The wrapper's part of an estate; takes the descriptors of all but the listeners, and of the listeners."""


class Upgrades:
    """What a wrapper running *program* does for upgrades; one at a time is under way."""

    def __init__(
        self,
        program: Program,
        leave: Leave,
        obstacle: Callable[[], str],
        is_calm: Callable[[], bool],
        children: Children,
    ) -> None:
        """*obstacle* names what has to end before this program may; *is_calm* says so with signals blocked."""
        self._program = program
        self._wrappers_part = leave
        self._obstacle = obstacle
        self._is_calm = is_calm
        self._children = children
        self._order: Optional[Order] = None
        self._answer: Message = {}
        self._patience = 0.0
        self._arrival: Optional[Arrival] = None
        self._stopped = False

    def arrive(self, arrival: Arrival) -> None:
        """This program has been executed by the one before."""
        self._arrival = arrival

    # For the operator

    def order(self, request: Message) -> Reply:
        """The command. Raises `CommandError`, `OSError`."""
        if self.is_under_way:
            raise CommandError("an upgrade is under way already")
        estate, listeners = self._leave({})
        self._answer, self._patience = {}, 0.0
        number = len(estate.clients["reports"])
        order = self._order = Order(request, self._program, estate, number, self._answer.update, listeners)
        pid = order.check_pid
        assert pid is not None
        self._children.adopt(pid, lambda status: self._on_checked(order, pid, status))
        while not self._answer:
            self._check_stop()
            yield None
        yield self._answer

    def _on_checked(self, order: Order, pid: int, status: int) -> None:
        if self._order is order:
            order.bury(pid, status)

    def go_on(self) -> Reply:
        """The command, which the program before has begun."""
        arrival = self._arrival
        while arrival is not None and arrival.outcome is None:
            self._check_stop()
            yield None
        yield {"done": True} if arrival is None or arrival.outcome is None else arrival.outcome.message()

    def _check_stop(self) -> None:
        if self._stopped:
            raise CommandError("the wrapper stops")

    # For the wrapper's loop

    @property
    def is_arriving(self) -> bool:
        """Whether clients of the program before move."""
        return self._arrival is not None

    @property
    def is_under_way(self) -> bool:
        return self._order is not None or self._arrival is not None

    def _leave(self, verdict: Message) -> Tuple[WrapperEstate, Kept]:
        """What this program leaves to the next one, and the listeners' descriptors among it."""
        kept, listeners = Kept(), Kept()
        part = self._wrappers_part(kept, listeners)
        return WrapperEstate(
            version=__version__,
            directory=self._program.directory,
            scoreboard=[VERSION, TABLE],
            verdict=verdict,
            descriptors=[*kept.fds, *listeners.fds],
            **part,
        ), listeners

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        if self._arrival is not None:
            return self._arrival.deadline()
        if self._order is None:
            return None
        return monotonic() + _LOOK_AGAIN if self._order.is_ready else self._order.deadline()

    def progress(self) -> None:
        """Take the next step."""
        if self._arrival is not None:
            self._arrival.progress()
            if self._arrival.outcome is not None:
                self._arrival = None
        if self._order is not None:
            self._order.progress()
            if self._order.is_ready:
                self._try_to_execute(self._order)
            if self._order.is_over:
                self._order = None

    def _try_to_execute(self, order: Order) -> None:
        """Returns if that is not possible, or not yet: a command that runs is this program's, and so is a signal."""
        obstacle = self._obstacle()
        if obstacle:
            self._patience = self._patience or monotonic() + _PATIENCE
            if monotonic() > self._patience:
                order.fail(CommandError(f"{obstacle} is under way: upgrade when it has ended"))
            return
        block_signals()
        try:
            if self._is_calm():
                order.execute(self._leave(order.verdict)[0])
        finally:
            unblock_signals()

    def stop(self) -> None:
        """The wrapper ends."""
        self._stopped = True
        if self._order is not None:
            self._order.stop()
            self._order = None
        if self._arrival is not None:
            self._arrival.stop()
            self._arrival = None
