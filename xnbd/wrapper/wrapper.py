"""The wrapper's one loop: clients, the operator, signals and the ends of children.

It never touches a client's bytes. Signal handlers only wake the loop.
"""

from __future__ import annotations

import gc
import os
import select
import signal
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

from .. import logs
from ..control.server import ControlSocket
from ..errors import ConfigurationError
from ..logs import log
from ..server.configuration import Configuration
from ..server.lobby import Guest, Lobby
from ..server.premises import Surroundings
from ..server.process_loop import GRACE
from ..server.reloads import Reloads
from ..system import forking
from ..system.kept import Kept
from ..system.listen import Listeners
from ..system.polling import poll_patiently
from ..system.process import set_title
from ..text import counted
from .children import SIGNALS, Body, Children
from .client import PROGRAM, Client
from .clients import Clients
from .commands import WrapperCommands, WrapperControls
from .database import Database
from .exchange import Exchange
from .limiting import Limiting
from .metrics import Metrics, MetricsPlace
from .proxy_steering import Bgctl, ProxySteering
from .servers import Servers
from .upgrade.arrival import Arrival
from .upgrade.estate import WrapperEstate
from .upgrade.movers import Mover, Movers
from .upgrade.upgrades import Upgrades

if TYPE_CHECKING:
    from .observed import ObservedWrapper

_STOP_TIME = GRACE + 1.5
_KILL_TIME = 3.0
_ANSWER_TIME = 1.0
_PIPE_SIZE = 64 << 10


class Settings(NamedTuple):
    """*bgctl* is as for `ProxySteering`."""

    servers: Servers
    bgctl: Bgctl
    configuration: Configuration


Load = Callable[[], Settings]
"""Reads again what can change. Raises `ConfigurationError`."""


class _Ending:
    """The wrapper's end under way: until *deadline* in good order, then by force, at last without a hope."""

    def __init__(self, *, orphan: bool) -> None:
        self.orphan = orphan
        self.deadline = monotonic() + _STOP_TIME
        self.killing = False
        self.given_up = False


class Wrapper:
    """Serves the exports of *database* on *listeners*, and the operator at *control_path*."""

    def __init__(
        self,
        listeners: Listeners,
        database: Database,
        control_path: str,
        settings: Settings,
        load: Load,
        surroundings: Surroundings,
        estate: Optional[WrapperEstate] = None,
        metrics: Optional[MetricsPlace] = None,
        rates_fd: Optional[int] = None,
    ) -> None:
        """Raises `ConfigurationError` if the control socket cannot be had. *load* reads *settings* again.

        Limits are in the file behind *rates_fd*.
        The program before has left the *estate*, and the control socket with it.
        """
        self._manager = manager = surroundings.manager
        self._reloads = Reloads(load, self._adopt, manager)
        self._listeners = listeners
        self._database = database
        self._settings = settings
        configuration = settings.configuration
        self._ending: Optional[_Ending] = None
        self._signals: Set[int] = set()
        self._children = Children(self._after_fork)
        assert surroundings.program is not None
        upgrades = self._upgrades = Upgrades(
            surroundings.program, self._leave, self._obstacle, self._is_calm, self._children, manager
        )
        self._limiting = Limiting(rates_fd, database, configuration.rates, self._wake_clients)
        controls = WrapperControls(
            self._end,
            self._has_ended,
            lambda: self._clients.count(),
            self._reloads.reload,
            upgrades.order,
            self._limiting.limit,
        )
        self._steering = ProxySteering(self._children, settings.servers, settings.bgctl, database.name_of)
        self._commands = WrapperCommands(database, self._children, settings.servers, self._steering, controls)
        self._control = self._open_control(control_path, estate)
        self._lobby = Lobby(configuration.handshake_timeout)
        self._exchange = Exchange.new() if estate is None else Exchange.unpack(estate.exchange)
        self._clients = self._open_clients(estate)
        self._movers = Movers(self._clients, self._children, self._move)
        if metrics is not None:
            from . import observed  # noqa: F401

        tallies = () if metrics is None else metrics.tallies
        self._metrics = Metrics(metrics, self._children, partial(self._observed, tallies))
        self._clients.on_death = self._metrics.count_death
        if estate is not None:
            self._signals.add(signal.SIGCHLD)  # whoever has ended meanwhile
            upgrades.arrive(Arrival(estate.version, self._movers))
        self._wake, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handle_signals()

    def run(self) -> int:
        """The exit status: 0 after an orderly end, 1 if it had to be cut short."""
        set_title(f"listening on {self._listeners}", program=PROGRAM)
        gc.collect()
        gc.freeze()
        while not self._is_over():
            ready = self._wait()
            self._on_signals()
            self._clients.progress(ready)
            self._control.progress()
            self._upgrades.progress()
            self._metrics.progress()
            if self._exchange.offers.fileno() in ready:
                self._exchange.refuse_all()
            if self._ending:
                self._press(self._ending)
            self._tell_manager()
        return self._finish()

    def _tell_manager(self) -> None:
        """While this loop turns the wrapper is alive: what it waits for is nobody's fault, or another process's."""
        if self._manager.listens:
            exports = f"exports: {len(self._database.exports)}"
            parts = (f"clients: {len(self._clients)}", exports, self._reloads.failure)
            self._manager.show("; ".join(filter(None, parts)))
            self._manager.progress(lambda: True)

    # At the start

    def _open_control(self, path: str, estate: Optional[WrapperEstate]) -> ControlSocket:
        """Raises `ConfigurationError`."""
        table = self._commands.table()
        if estate is None:
            return ControlSocket(path, table)
        return ControlSocket.unpack(estate.control, table, {"upgrade": self._upgrades.go_on})

    def _open_clients(self, estate: Optional[WrapperEstate]) -> Clients:
        return Clients(
            self._listeners,
            self._lobby,
            self._children,
            self._serve,
            self._settings.configuration.max_clients,
            self._commands.book_switch,
            lambda report: self._movers.on_report(report),
            None if estate is None else estate.clients,
        )

    def _handle_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # they mean something to servers, and would end this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forking.SIGNALS)

    # In the children

    def _after_fork(self) -> None:
        """Close what a child must not keep: others would wait in vain for the other end's closing."""
        self._control.close()
        self._clients.after_fork()
        self._steering.after_fork()
        self._movers.after_fork()
        self._metrics.after_fork()
        os.close(self._wake)
        os.close(self._wake_writer)

    def _serve(self, guest: Guest) -> Body:
        settings = self._settings
        configuration = settings.configuration
        return Client(
            guest,
            self._database,
            settings.servers,
            self._clients.outbox,
            self._exchange,
            configuration.access,
            configuration.tls,
        ).serve

    def _move(self, lifeline: int) -> Body:
        return Mover(self._settings.servers, self._exchange, self._clients.outbox, lifeline).run

    def _observed(self, tallies: Sequence[int]) -> ObservedWrapper:
        from .observed import ObservedWrapper

        return ObservedWrapper(self._database, tallies, self._settings.configuration)

    # The loop

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.add(number)

    def _wait(self) -> Set[int]:
        """Sleep until something happens: the descriptors that can be read."""
        poll = select.poll()
        for fd, events in self._control.interests():
            poll.register(fd, events)
        offers = () if self._upgrades.is_arriving else (self._exchange.offers.fileno(),)
        for fd in (self._wake, *self._clients.interests(), *offers):
            poll.register(fd, select.POLLIN)
        ending = self._ending.deadline if self._ending else None
        times = (
            *(self._control.deadline(), self._clients.deadline(), ending, self._manager.deadline()),
            *(self._upgrades.deadline(), 0.0 if self._signals else None, self._metrics.deadline()),
        )
        deadlines = [time for time in times if time is not None]
        timeout = max(0.0, (min(deadlines) - monotonic()) * 1000) if deadlines else None
        return {fd for fd, _ in poll_patiently(poll, timeout)}

    def _on_signals(self) -> None:
        try:
            os.read(self._wake, _PIPE_SIZE)
        except BlockingIOError:
            pass
        signals, self._signals = self._signals, set()
        if signals & {signal.SIGTERM, signal.SIGINT}:
            self._end(orphan=False)
        if signal.SIGHUP in signals and not self._ending:
            self._reloads.on_hangup()
        if signal.SIGCHLD in signals:
            self._clients.read_reports()  # what a process said before it died is known when it is buried
            self._children.reap()
            self._control.hurry()

    # The configuration

    def _adopt(self, settings: Settings) -> List[str]:
        """Put *settings* into use for clients that come from now on, as `Reloads` wants it."""
        logs.reopen()
        self._limiting.adopt(settings.configuration.rates, self._clients.count())
        before, self._settings = self._settings.configuration, settings
        self._steering.servers = settings.servers
        self._clients.limit = settings.configuration.max_clients
        self._lobby.timeout = settings.configuration.handshake_timeout
        self._metrics.replace()
        return settings.configuration.changes(before)

    def _wake_clients(self, export: str) -> None:
        """Those who serve the clients of *export* look what has changed."""
        pids = [pid for pid, report in self._clients.served.items() if report.export == export]
        self._children.signal(signal.SIGUSR2, pids)

    # Upgrades

    def _obstacle(self) -> str:
        """A command that has to end before this program may: what it does, nobody else would go on with."""
        running = [f"--{name}" for name in self._control.running() if name != "upgrade"]
        return running[0] if running else "a run of xnbd-bgctl" if self._steering.under_way else ""

    def _is_calm(self) -> bool:
        """Signals are blocked; whether none has come that is this program's to mind. Reports are booked."""
        self._clients.read_reports()
        return not self._signals and not self._ending

    def _leave(self, kept: Kept, listeners: Kept) -> Dict[str, Any]:
        """What the wrapper leaves to the next program."""
        return {
            "listeners": self._listeners.pack(listeners),
            "database": self._database.pack(kept),
            "control": self._control.pack(kept),
            "clients": self._clients.pack(kept),
            "exchange": self._exchange.pack(kept),
            "metrics": self._metrics.pack(kept),
            "rates": None if self._limiting.rates_fd is None else kept(self._limiting.rates_fd),
        }

    # The end

    def _end(self, orphan: bool) -> None:
        """Begin to end; asked a second time, hurry."""
        if self._ending:
            self._ending.deadline = monotonic()
            return
        fate = "servers go on until their clients leave" if orphan else "all servers stop"
        log.info("stopping; %s connected, %s", counted(len(self._clients), "client is", "clients are"), fate)
        self._ending = _Ending(orphan=orphan)
        self._manager.stopping()
        self._clients.stop_listening()
        self._upgrades.stop()
        self._steering.interrupt()
        self._metrics.stop()
        if not orphan:
            self._children.signal(signal.SIGTERM, [*self._clients.pids(), *self._movers.spares])

    def _left(self, ending: _Ending) -> List[int]:
        """The children whose end is waited for."""
        kept = self._clients.pids() if ending.orphan else []
        return [pid for pid in self._children.pids() if pid not in kept]

    def _press(self, ending: _Ending) -> None:
        """Use force once the time is over; not even that ends a process whose disk hangs."""
        left = self._left(ending)
        if monotonic() < ending.deadline or not left:
            return
        if ending.killing:
            ending.given_up = True
            return
        log.warning("ending %s still busy", counted(len(left), "process that is", "processes that are"))
        ending.killing = True
        ending.deadline = monotonic() + _KILL_TIME
        self._children.signal(signal.SIGKILL, left)

    def _has_ended(self) -> bool:
        return self._ending is not None and (self._ending.given_up or not self._left(self._ending))

    def _is_over(self) -> bool:
        """Whether all is done, and the operator has his answer."""
        if not self._has_ended():
            return False
        assert self._ending is not None
        answered = self._control.deadline() is None
        return answered or monotonic() > self._ending.deadline + _ANSWER_TIME

    def _finish(self) -> int:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # one more would kill this process while Python finishes
        status = int(self._ending is not None and self._ending.killing)
        try:
            self._database.change(self._database.exports)
        except ConfigurationError as error:
            log.error("%s", error)
            status = 1
        self._database.close()
        self._control.close()
        self._metrics.close()
        log.info("stopped")
        return status
