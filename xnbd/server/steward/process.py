"""The steward: a process beside the workers that looks after a disk as a whole.

It is a loop over duties, which know little of each other: `_duties` has their list,
`Duty` what they offer to the loop. What takes long runs in a child of its own.
Several servers on one cache have a steward each, and any of them acts for all.
"""

from __future__ import annotations

import os
from contextlib import suppress
from socket import socket
from time import monotonic
from typing import Callable, List, NoReturn, Optional, Union

from ...errors import ConfigurationError
from ...logs import log
from ...proxy.source import ProxySource
from ...system.forking import fork_with_pipe, let_signals_in
from ...system.listen import UnixSocket
from ...system.process import set_title
from ..master_link import MasterLink
from ..process_loop import ProcessLoop, Stop
from ..service import Service
from .command_lock import CommandLock
from .copying import Copying
from .durability import Durability
from .duty import Cache, Context, Duty
from .evicting import Evicting
from .limiting import Limiting
from .moving import Moving
from .news import News
from .orders import ControlOrders, MasterOrders, SignalOrders
from .query import Query
from .scrubbing import Scrubbing
from .snapshots import Snapshots
from .switching import Switching
from .telling import Telling

_LOOK_EVERY = 1.0
"""Seconds after which every duty looks at what other servers have done, of whose signals this one need not hear."""


class Steward:
    """For the master of *service*, which listens at *control* already, with *master* as the link to it.

    Without one it is for the one process of a wrapped client, and a sibling may listen in its place.
    """

    def __init__(
        self, service: Service, control: Union[str, UnixSocket, None], master: Optional[socket] = None
    ) -> None:
        self._service = service
        self._control = control
        self._master = master
        self._verdict_fd = -1

    def spawn(self, lifeline: int, close_first: Callable[[], None]) -> int:
        """Fork; returns the steward's process id when it is at work. Raises `ConfigurationError` if it cannot.

        It ends when *lifeline* breaks; *close_first* lets go of what belongs to the parent.
        """

        def live(report: int) -> int:
            self._verdict_fd = report
            close_first()
            return self._run(lifeline)

        try:
            pid, verdict = fork_with_pipe("steward", live)
        except OSError as error:
            raise ConfigurationError(f"the steward cannot be started: {error.strerror}") from error
        with os.fdopen(verdict, "rb") as answer:
            complaint = answer.read().decode("utf-8", "surrogateescape")
        if complaint:
            os.waitpid(pid, 0)
            raise ConfigurationError(complaint)
        return pid

    def _run(self, lifeline: int) -> int:
        """Life of the child: its exit status."""
        try:
            loop = ProcessLoop(lifeline)
            let_signals_in()
            set_title("steward", self._service.source.name)
            context = Context(self._service, loop, MasterLink(self._master) if self._master else None)
            work = _Stewardship(context, self._control)
            os.close(self._verdict_fd)
            self._verdict_fd = -1
            work.run()
        except Stop:
            return 0
        except ConfigurationError as error:
            self._complain(str(error))
        except OSError as error:
            self._complain(f"the steward cannot work: {error}")
        return 1

    def _complain(self, text: str) -> None:
        if self._verdict_fd >= 0:
            with suppress(BrokenPipeError):  # the parent has ended first
                os.write(self._verdict_fd, text.encode("utf-8", "surrogateescape"))
        else:
            log.error("%s", text)


class _Stewardship:
    """The steward's own process at work: it sleeps until one of its duties has something to do."""

    def __init__(self, context: Context, control: Union[str, UnixSocket, None]) -> None:
        """Raises `ConfigurationError`, `OSError`."""
        self._loop = context.loop
        self._master = context.master
        self._leaving = False
        self._children = context.children
        self._name = context.source.name
        self._duties = _duties(context, control)

    def run(self) -> NoReturn:
        """Raises `Stop` in the end."""
        try:
            while True:
                self._work()
                interests = [interest for duty in self._duties for interest in duty.interests()]
                times = [monotonic() + _LOOK_EVERY, *(duty.deadline() for duty in self._duties)]
                until = min(time for time in times if time is not None)
                self._loop.wait_for([*interests, *self._children.interests()], max(0.0, until - monotonic()))
        finally:
            self._end()

    def _work(self) -> None:
        if self._children.bury():
            for duty in self._duties:
                duty.on_child_end()
        for duty in self._duties:
            duty.progress()
        if self._loop.ordered or (self._master is not None and self._master.take_order("leave")):
            self._loop.ordered = False
            self._leave()
        if self._leaving and not any(duty.is_busy() for duty in self._duties):
            raise Stop("another steward has taken over")

    def _leave(self) -> None:
        """Another steward takes over: as soon as the master knows that it can, or it is there beside another client."""
        self._leaving = True
        for duty in self._duties:
            duty.leave()
        set_title("steward that gives way", self._name)
        if self._master is not None:
            self._master.tell("left")

    def _end(self) -> None:
        for duty in self._duties:
            duty.end()
        self._children.end()


def _duties(context: Context, control: Union[str, UnixSocket, None]) -> List[Duty]:
    """In the order in which they get on: orders first, and last what passes on the changes of all."""
    source = context.source
    cache = Cache(context, source) if isinstance(source, ProxySource) else None
    masters = MasterOrders(context)
    duties: List[Duty] = [
        Query(context, cache),
        Snapshots(context),
        Limiting(context),
        *([] if cache is None else _duties_of_a_proxy(context, cache)),
        News(context),
    ]
    commands = {name: command for duty in [*duties, masters] for name, command in duty.commands().items()}
    orders: List[Duty] = [SignalOrders(commands)]
    if control is not None:
        operators = ControlOrders(context, control, commands)
        orders = [masters, operators, *orders]
        masters.on_answer(operators.hurry)
    return [*orders, *duties]


def _duties_of_a_proxy(context: Context, cache: Cache) -> List[Duty]:
    lock, durability = CommandLock(context, cache), Durability(context, cache)
    copying = Copying(context, cache, lock)
    return [
        copying,
        Scrubbing(context, cache),
        Evicting(context, cache),
        Switching(context, cache, lock, durability, copying),
        Moving(context, cache, lock),
        lock,
        durability,
        Telling(context, cache),
    ]
