"""The master: keeps spare workers ahead of the clients, and buries the dead.

It never touches a client's bytes. Signal handlers only wake its one loop, which
waits for signals and for workers that report a client.
"""

from __future__ import annotations

import gc
import os
import select
import signal
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Set

from .. import logs
from ..errors import CommandError
from ..logs import about, log
from ..system.file_locks import do_nothing
from ..system.forking import SIGNALS, fork
from ..system.kept import Kept
from ..system.polling import poll_patiently, read_pipe
from ..system.process import set_title
from ..text import counted
from .configuration import Configuration, Load, refuse_without_room
from .crew import Crew
from .endings import reason_of
from .limit_order import adopt_rates
from .observers import Observers
from .premises import Premises, Surroundings
from .process_loop import GRACE
from .reloads import Reloads
from .retries import Pauses
from .service import Service
from .stewards import Stewards
from .vitals import Vitals
from .worker import Pool, Worker

if TYPE_CHECKING:
    from ..control.requests import Message
    from .observer.service import ObservedService
    from .upgrade.estate import Estate
    from .upgrade.program import Program
    from .upgrade.upgrades import Upgrades

_PIPE_SIZE = 64 << 10
_STOP_TIME = GRACE + 1.5
_KILL_TIME = 3.0
ORDERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that must not end the process when they come before there is a `Master`: blocked until then."""


class Master:
    """The first process of a server: it forks workers and the steward, and takes signals, until it is told to stop."""

    def __init__(
        self,
        service: Service,
        premises: Premises,
        load: Load,
        surroundings: Surroundings,
        estate: Optional[Estate] = None,
    ) -> None:
        """*load* reads again what the service's configuration comes from; *estate* is left by the program before."""
        self._manager = manager = surroundings.manager
        self._vitals = Vitals(manager, needs_steward=service.needs_steward)
        self._reloads = Reloads(load, self._adopt, manager)
        self._service = service
        self._premises = premises
        self._crew = Crew.new() if estate is None else Crew.unpack(estate.crew)
        self._signals: Set[int] = set()
        self._retry_at: Optional[float] = None
        self._pauses = Pauses()
        self._full = False
        self._killing = self._stopping = False
        self._pool = Pool.new() if estate is None else Pool.unpack(estate.pool)
        self._wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._crew.pipes.reports_master, select.POLLIN)
        commands = {"reload": self._on_reload, "upgrade": self._on_upgrade}
        self._stewards = Stewards(premises, self._poll, self._close_in_steward, commands)
        if premises.metrics is not None:
            from .observer import service as _service  # noqa: F401

        former = () if estate is None else estate.observers
        self._observers = Observers(premises.metrics, self._fork_observer, self._observed, service.source.name, former)
        self._upgrades: Optional[Upgrades] = None
        if surroundings.program is not None:
            self._prepare_upgrades(surroundings.program, estate)

    def abandon(self) -> None:
        """Instead of `run`: the start has failed. A steward ends by itself."""
        for sock in self._pool:
            sock.close()
        self._premises.close_control()

    def run(self) -> int:
        """The exit status: 0 after an orderly stop, 1 if it had to be cut short, or not all is durable."""
        set_title("master", self._service.source.name)
        gc.collect()
        gc.freeze()
        while True:
            self._balance()
            self._stewards.progress(self._service, self._lifeline)
            self._observers.progress(self._lifeline)
            if self._upgrades is not None:
                self._upgrades.progress()
            self._vitals.progress(self._crew, self._stewards.link, self._reloads.failure)
            signals = self._wait(min(self._deadlines(), default=None))
            if signals & {signal.SIGTERM, signal.SIGINT}:
                return self._stop()
            if signal.SIGHUP in signals:
                self._reloads.on_hangup()
            if signal.SIGUSR1 in signals:
                self._stewards.ask_for_snapshot(self._service, self._lifeline)
            if signal.SIGUSR2 in signals:
                self._stewards.ask_for_switch(self._service)

    def _deadlines(self) -> List[float]:
        """When something has to be done, whatever happens (monotonic seconds)."""
        upgrade = None if self._upgrades is None else self._upgrades.deadline()
        times = (self._retry_at, self._stewards.deadline(), self._vitals.deadline(), upgrade)
        observers = self._observers.deadline()
        return [*(time for time in times if time), *([] if observers is None else [observers])]

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.add(number)

    def _wait(self, until: Optional[float]) -> Set[int]:
        """Sleep until something happens; book it, and return the signals that came."""
        timeout = None if until is None else max(0.0, (until - monotonic()) * 1000)
        if not self._signals:
            poll_patiently(self._poll, timeout)
        read_pipe(self._wake, _PIPE_SIZE)
        signals, self._signals = self._signals, set()
        self._stewards.hear()
        self._read_reports()  # after that: what a worker said before it died is known when it is buried
        if signal.SIGCHLD in signals:
            self._reap()
        return signals

    # The steward

    def start_steward(self, prepare: Callable[[], None] = do_nothing) -> None:
        """The steward does *prepare* first. Raises `ConfigurationError` if it cannot work."""
        self._stewards.start(self._service, self._lifeline, prepare)

    def _start_steward_again(self) -> None:
        self._stewards.start_again(self._service, self._lifeline)

    @property
    def _lifeline(self) -> int:
        return self._crew.pipes.lifeline

    def _close_in_steward(self) -> None:
        self._crew.close_masters_ends()
        for sock in (*self._premises.sockets, *self._pool):
            sock.close()
        self._premises.close_metrics()

    def _close_in_worker(self) -> None:
        self._crew.close_masters_ends()
        self._premises.close_control()
        self._premises.close_metrics()
        self._stewards.close()

    # The observer

    def _fork_observer(self, live: Callable[[], int]) -> int:
        def close_and_live() -> int:
            self._crew.close_masters_ends()
            self._premises.close_control()
            self._stewards.close()
            for sock in (*self._premises.sockets, *self._pool):
                sock.close()
            return live()

        return fork("the process for metrics", close_and_live)

    def _observed(self) -> ObservedService:
        from .observer.service import ObservedService

        return ObservedService(self._service)

    # The configuration

    def _adopt(self, configuration: Configuration) -> List[str]:
        """Put *configuration* into use, as `Reloads` wants it: workers that know the former one begin nothing more."""
        service = self._service
        refuse_without_room(configuration, service.scoreboard_fd)
        logs.reopen()
        changes = configuration.changes(service.configuration)
        if changes:
            adopt_rates(service, configuration.rates)
            self._crew.dismiss()
            self._service = service._replace(configuration=configuration)
            self._observers.replace()
            if self._stewards.link is not None:
                self._stewards.link.tell(
                    {"configuration": configuration.figures(), "expiries": configuration.expiries()}
                )
        return changes

    def _on_reload(self, _request: Message) -> Message:
        if self._stopping:
            raise CommandError("the server stops")
        return {"done": True, "changes": self._reloads.reload(), "clients": len(self._crew.clients)}

    # Upgrades

    def _prepare_upgrades(self, program: Program, estate: Optional[Estate]) -> None:
        """Imported now: the files of the next program may stand where those of this one were, when it is ordered."""
        from .upgrade.upgrades import Upgrades

        self._upgrades = Upgrades(program, self._leave, self._is_calm, self._crew, self._poll, self._manager)
        if estate is not None:
            self._signals.add(signal.SIGCHLD)  # whoever has ended meanwhile
            self._stewards.former.update([*estate.former_stewards, estate.steward["pid"]])
            self._upgrades.arrive(estate, self._start_steward_again)

    def _on_upgrade(self, request: Message) -> None:
        if self._upgrades is None or self._stewards.link is None:
            raise CommandError("this server cannot be upgraded: it has no control socket")
        if self._stopping:
            raise CommandError("the server stops")
        self._upgrades.order(request, self._stewards.link)

    def _is_calm(self) -> bool:
        """Signals are blocked; whether none has come that is this program's to mind. Workers' reports are booked."""
        self._read_reports()
        return not self._signals

    def _leave(self, kept: Kept, disk: Kept) -> Dict[str, Any]:
        """What the master leaves: *disk* takes the descriptors of the disk, *kept* the other ones."""
        stewards = self._stewards
        assert stewards.link is not None
        return {
            "mode": self._service.source.mode,
            "disk": self._service.source.pack(disk),
            "scoreboard": disk(self._service.scoreboard_fd),
            "tallies": [disk(fd) for fd in self._service.tally_fds],
            "rates": None if self._service.rates_fd is None else disk(self._service.rates_fd),
            "observers": self._observers.pids(),
            "premises": self._premises.pack(kept),
            "crew": self._crew.pack(kept),
            "pool": self._pool.pack(kept),
            "steward": {"pid": stewards.pid, "link": kept(stewards.link.fileno())},
            "former_stewards": [*stewards.former],
        }

    # Workers

    def _balance(self) -> None:
        """Keep spare workers waiting, not too few and not too many, as far as the limit of clients allows."""
        crew, (most, wanted, *_) = self._crew, self._service.configuration
        room = most - len(crew.clients)
        if self._upgrades is not None and self._upgrades.is_arriving:
            wanted = self._upgrades.wanted_spares(wanted)
            room = max(room, wanted)  # clients that move are counted already
        crew.retire(2 * wanted)
        if room <= 0 and not self._full:
            what = "which is the limit" if not room else f"more than the limit of {most}"
            log.warning("%s connected, %s; others wait", counted(len(crew.clients), "client is", "clients are"), what)
        self._full = room <= 0
        if self._retry_at is not None and monotonic() >= self._retry_at:
            self._retry_at = None
        while len(crew.spares) < min(room, wanted) and self._retry_at is None:
            if self._pauses.failures and crew.unproven:
                break  # one at a time, until one of them can work
            self._spawn()

    def _spawn(self) -> None:
        pipes, pool, sockets = self._crew.pipes, self._pool, self._premises.sockets
        arriving = self._upgrades is not None and self._upgrades.is_arriving
        worker = Worker(self._service, sockets, pipes, pool, self._close_in_worker, expects_moves=arriving)
        try:
            pid = fork("worker", worker.run)
        except OSError as error:
            log.error(
                "cannot start a worker, trying again in %g s: %s",
                self._back_off(),
                error.strerror,
                extra=about(error=error),
            )
            return
        self._crew.join(pid)

    def _back_off(self) -> float:
        """No worker is started for so many seconds."""
        pause = self._pauses.next()
        self._retry_at = monotonic() + pause
        return pause

    def _read_reports(self) -> None:
        if self._crew.read_reports():
            self._pauses.failures = 0

    def _reap(self) -> None:
        """Whoever is not known here is a dead steward's child, of process 1 of a container, or of another program's."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self._bury(pid, os.waitstatus_to_exitcode(status))

    def _bury(self, pid: int, exit_code: int) -> None:
        if self._upgrades is not None:
            self._upgrades.bury(pid, exit_code)
        self._stewards.bury(pid, exit_code, stopping=self._stopping)
        self._observers.bury(pid, exit_code, stopping=self._stopping)
        if pid in self._crew:
            self._read_reports()  # what it has said before it died
            peer = self._crew.bury(pid, failed=bool(exit_code))
            if exit_code and not self._killing:
                self._on_failure(pid, peer, exit_code)

    def _on_failure(self, pid: int, peer: str, exit_code: int) -> None:
        if peer:
            self._count_death()
            log.error("worker %d of client %s died: %s", pid, peer, reason_of(exit_code), extra=about(peer=peer))
        elif self._retry_at is None:  # of several that fail at once one is told of
            pause = self._back_off()
            log.error("spare worker %d died: %s; the next one starts in %g s", pid, reason_of(exit_code), pause)

    def _count_death(self) -> None:
        """In a line of the tally that is the master's for a moment: what is counted there stays."""
        tally = self._service.open_tally()
        if tally is not None:
            tally.count("deaths")
            tally.close()

    # The end

    def _stop(self) -> int:
        """Let the workers finish what they have in hand; a second signal or `_STOP_TIME` ends that."""
        log.info("stopping; clients connected: %d", len(self._crew.clients))
        self._stopping = True
        self._manager.stopping()
        for sock in (*self._premises.sockets, *self._pool):
            sock.close()
        self._premises.close_control()
        if self._upgrades is not None:
            self._upgrades.stop()
        _signal(self._children(), signal.SIGTERM)
        deadline = monotonic() + _STOP_TIME
        hurry = False
        while self._children():
            hurry = bool(self._wait(deadline) & {signal.SIGTERM, signal.SIGINT}) or hurry
            if not self._children() or (not hurry and monotonic() < deadline):
                continue
            if self._killing:
                break  # not even SIGKILL ends a process whose disk hangs
            log.warning("ending %s still busy", counted(len(self._children()), "process that is", "processes that are"))
            self._killing = True
            _signal(self._children(), signal.SIGKILL)
            deadline = monotonic() + _KILL_TIME
        flushed = self._service.flush(hurry=hurry)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # one more would kill this process while Python finishes
        return int(self._killing or not flushed)

    def _children(self) -> List[int]:
        return [*self._crew.pids(), *self._stewards.pids(), *self._observers.pids()]


def _signal(pids: List[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)
