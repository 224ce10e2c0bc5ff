"""Where operators' commands come in, the control socket and signals, and where those of the master go on to."""

from __future__ import annotations

import math
import signal
from logging import WARNING
from time import monotonic
from typing import Callable, List, Optional, Set, Tuple, Union

from ...control.requests import Message
from ...control.server import TICK, CommandTable, ControlSocket, Reply, end_reply
from ...errors import CommandError, ConfigurationError, TaskFailed
from ...logs import ToldOnce, log
from ...scoreboard.layout import CONTROL
from ...system.listen import UnixSocket
from .duty import Context, Duty

_TAKE_OVER_EVERY = 1.0
_FIRST_PAUSE = 0.05
"""Seconds until the second look: a sibling whose client moves to this process is about to leave."""

_SIGNALS = {signal.SIGUSR1: "snapshot", signal.SIGUSR2: "switch"}
"""The commands that signals to the master stand for."""

_MASTERS = ("reload", "upgrade")
"""The commands that only the master can do."""


class ControlOrders(Duty):
    """Answers the control socket.

    The master has opened it, and keeps it open when a steward dies. Where there is only a
    path there is no master: then it listens there if no sibling on the same cache does.
    """

    def __init__(self, context: Context, where: Union[str, UnixSocket], commands: CommandTable) -> None:
        self._scoreboard = context.scoreboard
        self._let_go = context.children.let_go
        self._where = where
        self._commands = commands
        self._control: Optional[ControlSocket] = None
        self._next_try = monotonic()
        self._pause = _FIRST_PAUSE
        self._failure = ToldOnce()
        if isinstance(where, UnixSocket):
            self._listen()

    def _listen(self) -> None:
        self._control = ControlSocket(self._where, self._commands)
        self._let_go.append(self._control.close)

    def interests(self) -> List[Tuple[int, int]]:
        return [] if self._control is None else self._control.interests()

    def deadline(self) -> Optional[float]:
        return self._next_try if self._control is None else self._control.deadline()

    def progress(self) -> None:
        if self._control is not None:
            self._control.progress()
        elif monotonic() >= self._next_try:
            self._take_over()

    def _take_over(self) -> None:
        """Listen if the former owner is gone."""
        self._next_try = monotonic() + self._pause
        self._pause = min(2 * self._pause, _TAKE_OVER_EVERY)
        if not self._scoreboard.try_lock(CONTROL):
            return
        try:
            self._listen()
        except ConfigurationError as error:
            self._scoreboard.unlock(CONTROL)
            self._failure.log(WARNING, str(error))

    def on_child_end(self) -> None:
        """Commands wait for children."""
        self.hurry()

    def hurry(self) -> None:
        """Have all commands that wait look at once."""
        if self._control is not None:
            self._control.hurry()

    def leave(self) -> None:
        self._next_try = math.inf
        if self._control is not None:
            self._control.leave()
            if not isinstance(self._where, UnixSocket):
                self._scoreboard.unlock(CONTROL)

    def is_busy(self) -> bool:
        return self._control is not None and self._control.has_connections

    def end(self) -> None:
        """Before children are waited for: a successor may want to listen there already."""
        if self._control is not None:
            self._control.close()


class MasterOrders(Duty):
    """Passes on what is the master's to do."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._link = context.master
        if self._link is not None:
            self._link.on_news = self._on_news

    def _on_news(self, news: Message) -> None:
        context = self._context
        context.configuration = context.configuration._replace(**news["configuration"])
        context.expiries = [(path, when, notice) for path, when, notice in news["expiries"]]

    def commands(self) -> CommandTable:
        return dict.fromkeys(_MASTERS, self._ask)

    def on_answer(self, hurry: Callable[[], None]) -> None:
        """Call *hurry* when the master has answered."""
        if self._link is not None:
            self._link.on_answer = hurry

    def _ask(self, request: Message) -> Reply:
        if self._link is None:
            raise CommandError("this server has its client from xnbd-wrapper: ask that one, with xnbd-wrapper-ctl")
        return self._link.ask(request)

    def interests(self) -> List[Tuple[int, int]]:
        return [] if self._link is None else self._link.interests()

    def progress(self) -> None:
        if self._link is not None:
            self._link.receive()


class SignalOrders(Duty):
    """Carries out the commands that came as signals: their outcome is for the log."""

    def __init__(self, commands: CommandTable) -> None:
        self._commands = commands
        self._came: Set[int] = set()
        self._replies: List[Tuple[str, Reply]] = []
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._came.add(number)

    def deadline(self) -> Optional[float]:
        return monotonic() + TICK if self._replies else None

    def progress(self) -> None:
        came, self._came = self._came, set()
        for number, name in _SIGNALS.items():
            if number in came and name in self._commands:
                self._replies.append((number.name, self._commands[name]({})))
        self._replies = [(name, reply) for name, reply in self._replies if self._goes_on(name, reply)]

    def is_busy(self) -> bool:
        return bool(self._replies)

    def _goes_on(self, signal_name: str, reply: Reply) -> bool:
        try:
            for answer in reply:
                if answer is None:
                    return True
        except TaskFailed:
            pass  # the log has it already
        except (CommandError, ConfigurationError) as error:
            log.warning("%s: %s", signal_name, error)
        return False

    def end(self) -> None:
        for _, reply in self._replies:
            end_reply(reply)
