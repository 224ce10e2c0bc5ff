"""The steward: a process beside the workers that looks after a disk as a whole.

It answers the control socket, makes checkpoints while there is something new, notes
when no block is missing any more, and carries out what operators ask for. What
takes long runs in a child of its own. Several servers on one cache have a steward
each, and any of them acts for all.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Callable, Dict, Generator, Iterator, List, Optional, Tuple

from ...control.server import ControlSocket, Message, Reply, end_reply, flag_argument, integer_argument, text_argument
from ...errors import CommandError, ConfigurationError, TaskFailed
from ...logs import log
from ...origin.address import parse_origin
from ...origin.base import OriginAddress, OriginLost
from ...origin.probe import probe
from ...proxy.fetch_queue import PIECE
from ...proxy.image import ProxyImage, ProxySource
from ...proxy.state.format import Steering
from ...scoreboard.scoreboard import COMMAND, CONTROL, COPYING, PROXY, TARGET, Scoreboard
from ...storage.bitmap import Bitmap
from ...storage.blocks import BLOCK, block_count
from ...storage.snapshot import create_bitmap
from ...storage.target import reopen
from ...system.forking import fork_with_pipe, let_signals_in
from ...system.process import closed_on_error, set_title
from ..process_loop import ProcessLoop, Stop
from ..service import Service
from .child import Child
from .copier import Copier, CopyOptions
from .progress import Progress, Rate
from .report import COPYING_PEER, QueryAnswers
from .snapshotter import Snapshotter

_CHECKPOINT_EVERY = 1.0
_TAKE_OVER_EVERY = 1.0
_GATE_TIMEOUT = 10.0
_FOLLOW_TIMEOUT = 5.0
_TURN_TIMEOUT = _GATE_TIMEOUT + 5.0
_PROGRESS_EVERY = 0.2
_NICE = 10  # clients go before the copying of a snapshot
_MAXIMUM_CELLS = 1 << 16


class Steward:
    """For the master of *service*, or for the one process of a wrapped client; *must_listen* unless a sibling may."""

    def __init__(self, service: Service, control_path: Optional[str], *, must_listen: bool) -> None:
        self._service = service
        self._path = control_path
        self._must_listen = must_listen
        self._verdict_fd = -1

    def spawn(self, lifeline: int, close_first: Callable[[], None]) -> int:
        """Fork; returns the steward's process id when it listens. Raises `ConfigurationError` if it cannot.

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
            work = _Stewardship(self._service, self._path, loop, must_listen=self._must_listen)
            os.close(self._verdict_fd)
            self._verdict_fd = -1
            return work.run()
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
    """The steward's own process at work."""

    def __init__(self, service: Service, path: Optional[str], loop: ProcessLoop, *, must_listen: bool) -> None:
        source = service.source
        self._service = service
        self._source = source
        self._proxy = source if isinstance(source, ProxySource) else None
        self._path = path
        self._loop = loop
        self._scoreboard = Scoreboard(reopen(service.scoreboard_fd, readonly=False))
        self._state = self._proxy.open_state() if self._proxy is not None else None
        self._blocks = block_count(source.size)
        self._known = Progress(self._state.bitmap, source.size) if self._state is not None else None
        self._control: Optional[ControlSocket] = None
        self._checkpoint: Optional[Child] = None
        self._copy: Optional[Child] = None
        self._copy_rate = Rate()
        self._next_checkpoint = monotonic()
        self._next_try = monotonic()
        self._failing = ""
        self._pending: List[Tuple[str, Reply]] = []
        self._snapshot: Optional[Child] = None
        self._question: Optional[Child] = None
        self._made: Optional[Progress] = None  # of a snapshot
        self._snapshot_wanted = False
        self._seen: Tuple[object, ...] = (None,)
        self._has_master = must_listen
        signal.signal(signal.SIGUSR1, self._on_snapshot_signal)
        self._answers = QueryAnswers(service, self._scoreboard)
        if must_listen and path is not None:
            self._listen()

    def _listen(self) -> None:
        assert self._path is not None
        commands: Dict[str, Callable[[Message], Reply]] = {"query": self._query, "snapshot": self._take_snapshot}
        if self._proxy is not None:
            commands.update({"cache-all": self._cache_all, "switch": self._switch, "reconnect": self._reconnect})
        self._control = ControlSocket(self._path, commands)

    # The loop

    def run(self) -> int:
        try:
            while True:
                self._work()
                control = self._control
                interests = control.interests() if control is not None else []
                interests += [(child.fileno(), select.POLLIN) for child in self._at_work()]
                times = [monotonic() + _CHECKPOINT_EVERY]
                if control is not None and control.deadline() is not None:
                    times.append(control.deadline())  # type: ignore[arg-type]
                if self._pending or self._checkpoint is not None:
                    times.append(monotonic() + 0.1)
                self._loop.wait_for(interests, max(0.0, min(times) - monotonic()))
        finally:
            self._end()

    def _at_work(self) -> List[Child]:
        """The children for whose end somebody may wait."""
        counters = (progress.counter for progress in (self._known, self._made) if progress is not None)
        children = (self._copy, self._snapshot, self._question, *counters)
        return [child for child in children if child is not None and child.status is None]

    def _work(self) -> None:
        if self._control is not None:
            if any(child.is_done() for child in self._at_work()):
                self._control.hurry()
            self._control.progress()
        elif self._path is not None and monotonic() >= self._next_try:
            self._take_over()
        if self._loop.woken() and self._proxy is not None:
            self._pending.append(("SIGUSR2", self._switch({})))
        if self._snapshot_wanted:
            self._snapshot_wanted = False
            self._pending.append(("SIGUSR1", self._take_snapshot({})))
        for signal_name, reply in list(self._pending):
            self._go_on(signal_name, reply)
        if self._copy is not None and self._copy.is_done():
            self._on_copied(self._copy)
        elif self._scoreboard.wanted_copy is not None and not self._loop.stopping and not self._is_copying():
            self._resume_copy(self._scoreboard.wanted_copy)
        self._scoreboard.end_dead_snapshot()
        self._pass_on_news()
        if self._proxy is not None:
            self._proxy.follow_switch(self._scoreboard)
            self._end_dead_command()
            self._keep_durable()

    def _pass_on_news(self) -> None:
        """Wake this server's processes if somebody has changed the disk, maybe a server whose signals do not get here.

        Nobody needs to wake up because a snapshot has begun.
        """
        scoreboard, seen = self._scoreboard, self._seen
        changes = scoreboard.changes if scoreboard.snapshot is None else seen[-1]
        self._seen = scoreboard.mode == TARGET, scoreboard.generation, changes
        if self._seen != seen:
            scoreboard.wake_all()

    def _go_on(self, signal_name: str, reply: Reply) -> None:
        """A command that came as a signal: its outcome is for the log."""
        try:
            for answer in reply:
                if answer is None:
                    return
        except TaskFailed:
            pass  # the log has it already
        except (CommandError, ConfigurationError) as error:
            log.warning("%s: %s", signal_name, error)
        self._pending.remove((signal_name, reply))

    def _on_snapshot_signal(self, _number: int, _frame: object) -> None:
        self._snapshot_wanted = True

    def _take_over(self) -> None:
        """Answer the control socket if its former owner is gone; a sibling on the same cache has it otherwise."""
        self._next_try = monotonic() + _TAKE_OVER_EVERY
        if not self._scoreboard.try_lock(CONTROL):
            return
        try:
            self._listen()
        except ConfigurationError as error:
            self._scoreboard.unlock(CONTROL)
            if str(error) != self._failing:
                log.warning("%s", error)
            self._failing = str(error)

    def _keep_durable(self) -> None:
        assert self._state is not None
        if self._checkpoint is not None:
            if not self._checkpoint.is_done():
                return
            self._on_checkpoint(self._checkpoint)
            self._checkpoint = None
        if monotonic() < self._next_checkpoint:
            return
        self._next_checkpoint = monotonic() + _CHECKPOINT_EVERY
        if self._scoreboard.mode == PROXY and self._progress.complete and self._scoreboard.note_complete():
            log.info("every block is cached")
        if self._state.write_back.failure() is not None:
            self._state.write_back.keep()
        elif self._state.changed:
            try:
                self._checkpoint = self._start(self._make_durable)
            except TaskFailed as failure:
                self._tell_once("cannot make the cache durable", str(failure))

    def _make_durable(self, timeout: float = math.inf) -> None:
        """Through a description of its own and the witness: a child before may have died of what it was told."""
        assert self._proxy is not None and self._state is not None
        self._state.write_back.witness = self._proxy.witness
        image = reopen(self._proxy.witness, readonly=False)
        try:
            self._state.checkpoint(image, timeout=timeout)
        finally:
            os.close(image)
        self._state.sync_live()

    def _on_checkpoint(self, child: Child) -> None:
        assert self._state is not None
        if child.status == 0:
            self._scoreboard.note_checkpoint()
            self._failing = ""
        else:
            if not child.was_stopped and self._state.write_back.failure() is None:  # else the log has it
                self._tell_once("cannot make the cache durable", child.message or f"status {child.status}")
            self._state.abandon_checkpoint()

    def _tell_once(self, what: str, failure: str) -> None:
        """What is tried again and again; a *failure* that has several of them fail is told of one."""
        if failure != self._failing:
            log.error("%s: %s", what, failure)
        self._failing = failure

    def _start(self, work: Callable[[], Optional[str]]) -> Child:
        """Raises `TaskFailed` if there can be no more processes."""
        return Child(self._close_in_child, work)

    def _close_in_child(self) -> None:
        """Let go of what has to end with the steward: its clients' connections, and its locks on the scoreboard."""
        self._scoreboard.close()
        if self._control is not None:
            self._control.close()

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # before children are waited for: a successor may want to listen there already
        for _, reply in self._pending:
            end_reply(reply)
        counter = self._known.counter if self._known is not None else None
        for child in (self._copy, self._checkpoint, self._snapshot, counter):
            if child is not None:
                child.stop()
                child.wait()

    @property
    def _progress(self) -> Progress:
        """Of a proxy."""
        assert self._known is not None
        return self._known

    def _query(self, request: Message) -> Reply:
        cells = integer_argument(request, "map", 1, _MAXIMUM_CELLS)
        yield from self._count()
        yield {"done": True, **self._answers.answer(self._state, self._known, cells)}

    def _count(self) -> Reply:
        """Wait until there is a figure of what is cached: of a large disk a child counts it."""
        while self._known is not None and self._scoreboard.mode == PROXY and not self._known.keep_up(self._start):
            yield None

    # Copying

    def _cache_all(self, request: Message) -> Reply:
        piece = integer_argument(request, "blocks_per_request", 1, 1 << 20)
        rate = integer_argument(request, "limit_rate", 1, 1 << 50)
        wait = flag_argument(request, "wait")
        yield from self._wait_for_turn("cache-all")
        try:
            if self._scoreboard.mode == TARGET:
                raise CommandError("this is no proxy any more: nothing is missing")
            if self._is_copying():
                raise CommandError("a copy is under way already (xnbd-bgctl --query shows it)")
            fetched_before = self._scoreboard.totals().bytes_fetched
            self._start_copy(CopyOptions(min(piece or PIECE, PIECE), rate or 0))
            assert self._copy is not None
            if not wait:
                self._scoreboard.wanted_copy = rate or 0
        finally:
            self._end_turn()
        if not wait:
            yield {"done": True, "pid": self._copy.pid}
            return
        yield from self._watch_copy(self._copy, fetched_before)

    def _is_copying(self) -> bool:
        if self._copy is not None:
            return not self._copy.is_done()
        return self._scoreboard.is_locked(COPYING)

    def _resume_copy(self, rate: int) -> None:
        """Go on with what a server that has ended has left."""
        try:
            self._start_copy(CopyOptions(rate=rate))
        except TaskFailed as failure:
            self._tell_once("cannot go on copying", str(failure))

    def _start_copy(self, options: CopyOptions) -> None:
        """Raises `TaskFailed`."""

        def work() -> None:
            set_title("copying", self._source.name)
            loop = ProcessLoop(self._loop.lifeline)
            disk = loop.disk = self._service.open_disk()
            if not disk.scoreboard.try_lock(COPYING):
                raise TaskFailed("another server on this cache is copying already")
            if isinstance(disk.image, ProxyImage):
                disk.place.welcome(COPYING_PEER)
                try:
                    Copier(disk, disk.image, loop, options).run()
                finally:
                    disk.part()
                    disk.close()

        self._copy_rate = Rate()
        self._copy = self._start(work)
        log.info("copying all blocks that are missing: process %d", self._copy.pid)

    def _watch_copy(self, child: Child, fetched_before: int) -> Iterator[Optional[Message]]:
        """Progress, until the copy has ended; a client that leaves stops it."""
        told_at = 0.0
        try:
            yield from self._count()
            while not child.is_done():
                if monotonic() - told_at >= _PROGRESS_EVERY:
                    told_at = monotonic()
                    self._progress.keep_up(self._start)
                    yield {"progress": self._copied(fetched_before)}
                else:
                    yield None
        finally:
            child.stop()
        self._on_copied(child)
        if child.status or self._progress.missing():
            raise CommandError(child.message or "the copy was stopped before its end")
        yield {"done": True, **self._copied(fetched_before)}

    def _copied(self, fetched_before: int) -> Message:
        fetched = self._scoreboard.totals().bytes_fetched - fetched_before
        return {
            "cached_bytes": self._progress.cached_bytes(),
            "total_bytes": self._source.size,
            "fetched_bytes": fetched,
            "rate": self._copy_rate.of(fetched),
        }

    def _on_copied(self, child: Child) -> None:
        if child is not self._copy:
            return
        self._copy = None
        if not self._is_copying():  # or another server's operator wants one by now
            self._scoreboard.wanted_copy = None
        if child.status:
            log.warning("the copy has ended: %s", child.message or f"status {child.status}")
        else:
            missing = self._progress.missing() if self._progress.counted else "some"
            log.info("the copy has ended, %s blocks are missing", missing)

    # Snapshots

    def _take_snapshot(self, _request: Message) -> Reply:
        if not self._has_master:
            raise CommandError("a server of --inetd or --connected-fd makes no snapshots")
        if not self._source.is_whole(self._scoreboard):
            raise CommandError("a proxy has no snapshots before it is switched: its disk is not whole here")
        while self._snapshot is not None:
            yield None
        try:
            bitmap_fd = create_bitmap(self._source.size)
            with closed_on_error(bitmap_fd):
                bitmap = Bitmap(bitmap_fd, self._blocks)
                made = self._made = Progress(bitmap, self._blocks * BLOCK)
                child = self._snapshot = self._start(partial(self._make_snapshot, bitmap_fd))
        except TaskFailed as failure:
            raise _no_snapshot(str(failure)) from failure
        except OSError as error:
            raise _no_snapshot(error.strerror or str(error)) from error
        try:
            while not child.is_done():
                made.keep_up(self._start)
                yield {"progress": {"copied_bytes": made.cached_bytes(), "total_bytes": made.size}}
                yield None
        except GeneratorExit:
            log.warning("no snapshot: %s", "the server ends" if self._loop.stopping else "who asked for it has left")
            raise
        finally:
            child.stop()
            child.wait()
            self._scoreboard.end_dead_snapshot()
            self._scoreboard.wake_all()
            self._snapshot = None
            self._forget_counter(made)
            bitmap.octets.close()
            os.close(bitmap_fd)
        if child.status or not child.message:
            raise _no_snapshot(child.message or "its process was stopped")
        yield {"done": True, **json.loads(child.message)}

    def _forget_counter(self, made: Progress) -> None:
        if made.counter is not None:
            made.counter.stop()
            made.counter.wait()
        self._made = None

    def _make_snapshot(self, bitmap_fd: int) -> str:
        set_title("making a snapshot of", self._source.name)
        os.nice(_NICE)
        loop = ProcessLoop(self._loop.lifeline)
        scoreboard = Scoreboard(reopen(self._service.scoreboard_fd, readonly=False))
        return Snapshotter(self._source, scoreboard, bitmap_fd, loop).run()

    # One command after the other, whichever of the servers on a cache it was given to

    def _wait_for_turn(self, name: str) -> Generator[Optional[Message], None, None]:
        """Return when no other process changes what the files mean: then do so without a `yield`, and `_end_turn`.

        Raises `CommandError` if that takes too long.
        """
        until = monotonic() + _TURN_TIMEOUT
        while True:
            self._end_dead_command()
            if self._scoreboard.begin_command(name):
                break
            if monotonic() > until:
                raise CommandError(f"another command is under way: {self._scoreboard.command or 'unknown'}; try again")
            yield None
        try:
            self._make_agree()
        except OSError as error:
            self._scoreboard.end_command(whole=False)
            raise CommandError(f"the state file cannot be used: {error.strerror}; nothing was changed") from error

    def _end_turn(self) -> None:
        """What the command has changed is whole, or somebody will make it so."""
        try:
            whole = self._wanted_steering() == self._known_steering()
        except OSError:
            whole = False
        self._scoreboard.end_command(whole=whole)

    def _end_dead_command(self) -> None:
        """Make whole what a process has begun that is no more."""
        if not self._scoreboard.command or not self._scoreboard.try_lock(COMMAND):
            return
        try:
            address = self._scoreboard.whole_address()
            self._scoreboard.address = self._known_steering().address if address is None else address  # perhaps untold
            self._make_agree()
        except OSError as error:
            self._tell_once("cannot write to the state file", error.strerror or str(error))
            self._scoreboard.end_command(whole=False)
        else:
            self._scoreboard.end_command(whole=True)

    def _make_agree(self) -> None:
        """Have the state file say what the servers do, which the scoreboard tells; this process has the turn."""
        assert self._proxy is not None
        wanted = self._wanted_steering()
        if wanted != self._known_steering():
            self._proxy.steer(wanted)
            log.warning("a command was cut short: the state file says again what the servers do")

    def _wanted_steering(self) -> Steering:
        return Steering(self._scoreboard.mode == TARGET, self._scoreboard.address)

    def _known_steering(self) -> Steering:
        assert self._proxy is not None
        return self._proxy.steering

    # Switching

    def _switch(self, request: Message) -> Reply:
        force = flag_argument(request, "force")
        yield from self._save_most()
        yield from self._wait_for_turn("switch")
        try:
            if self._scoreboard.mode == TARGET:
                raise CommandError("this is a plain target already")
            if not force:
                yield from self._refuse_if_missing()
            pause = self._switch_now()
        finally:
            self._end_turn()
        workers = yield from self._have_followed()
        log.info("switched to a plain target of %s; held for %.1f ms", self._source.name, pause * 1e3)
        yield {"done": True, "workers": workers, "longest_pause_ms": round(pause * 1e3, 1)}

    def _switch_now(self) -> float:
        """Returns how long everybody was held, in seconds. Raises `CommandError`, and then nothing was changed."""
        assert self._proxy is not None
        self._stop_copy()
        self._stop_checkpoint()
        try:
            self._make_durable(
                _GATE_TIMEOUT
            )  # a bit that is forgotten would be fetched over what the target has written
            pause = self._become_target()
        except TimeoutError as error:
            raise CommandError(f"requests did not come to an end in {_GATE_TIMEOUT:g} s: {error}; try again") from None
        except OSError as error:
            raise CommandError(f"the cache cannot be made durable: {error.strerror}; nothing was changed") from error
        self._scoreboard.wanted_copy = None
        self._proxy.follow_switch(self._scoreboard)
        return pause

    def _save_most(self) -> Iterator[None]:
        """Wait for two checkpoints: what they leave is little, so that the next one takes no long time."""
        for _ in range(2):
            under_way = self._checkpoint
            if under_way is None:
                self._next_checkpoint = monotonic()
                yield None
                under_way = self._checkpoint
            while under_way is not None and self._checkpoint is under_way:
                yield None

    def _become_target(self) -> float:
        """Returns how long everybody was held, in seconds. Raises `OSError`, `TimeoutError` among them."""
        assert self._proxy is not None
        try:
            self._proxy.steer(Steering(switched=True, address=self._scoreboard.address))
            began = monotonic()
            with self._scoreboard.closed(_GATE_TIMEOUT):
                self._scoreboard.mode = TARGET
                return monotonic() - began
        finally:
            if self._scoreboard.mode != TARGET:
                self._proxy.steer(Steering(switched=False, address=self._scoreboard.address))

    def _refuse_if_missing(self) -> Reply:
        if not self._progress.complete:
            yield from self._count()
        missing = self._progress.missing()
        if missing:
            raise CommandError(
                f"{missing} of {self._blocks} blocks are missing "
                "(--cache-all brings them; --force switches without them, and they read as zeros)"
            )

    def _stop_copy(self) -> None:
        if self._copy is not None:
            self._copy.stop()
            self._copy.wait()
            self._copy = None

    def _stop_checkpoint(self) -> None:
        """The one in a child, which holds its lock in this process's name."""
        if self._checkpoint is not None and self._state is not None:
            self._checkpoint.stop()
            self._checkpoint.wait()
            self._state.abandon_checkpoint()
            self._checkpoint = None

    def _have_followed(self) -> Generator[Optional[Message], None, int]:
        """Wait until every process has changed over; returns how many there are."""
        until = monotonic() + _FOLLOW_TIMEOUT
        self._scoreboard.wake_all()
        while True:
            lines = self._scoreboard.lines()
            behind = [line for line in lines if line.mode != TARGET]
            if not behind or monotonic() > until:
                for line in behind:
                    log.warning("process %d of client %s is busy, and changes over later", line.pid, line.peer)
                return len(lines)
            yield None

    # Another origin

    def _reconnect(self, request: Message) -> Reply:
        assert self._proxy is not None
        name = text_argument(request, "exportname")
        uri = text_argument(request, "uri")
        if self._scoreboard.mode == TARGET:
            raise CommandError("this is a plain target: it has no origin any more")
        if uri is not None:
            address = parse_origin(uri, None, name)
        else:
            address = parse_origin(text_argument(request, "host") or "", text_argument(request, "port"), name)
        size = yield from self._ask_size(address)
        if size != self._source.size:
            raise CommandError(f"the disk at {address} has {size} bytes, not {self._source.size}; nothing was changed")
        yield from self._wait_for_turn("reconnect")
        try:
            self._reconnect_now(str(address))
        finally:
            self._end_turn()
        self._scoreboard.wake_all()
        log.info("the origin is %s now", address)
        yield {"done": True, "address": str(address)}

    def _reconnect_now(self, address: str) -> None:
        """Raises `CommandError`, and then nothing was changed."""
        assert self._proxy is not None
        if self._scoreboard.mode == TARGET:
            raise CommandError("this is a plain target by now: it has no origin any more")
        try:
            self._proxy.steer(Steering(switched=False, address=address))
        except ValueError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"the address cannot be noted: {error.strerror}; nothing was changed") from error
        self._scoreboard.address = address

    def _ask_size(self, address: OriginAddress) -> Generator[Optional[Message], None, int]:
        """Bytes of the disk at *address*, asked by a child: an origin or a name server may take its time."""
        child = self._question = self._start(partial(self._probe, address))
        try:
            while not child.is_done():
                yield None
        finally:
            child.stop()
            child.wait()
        if child.status:
            raise CommandError(f"{child.message or 'the process that asked it was stopped'}; nothing was changed")
        return int(child.message)

    def _probe(self, address: OriginAddress) -> str:
        assert self._proxy is not None
        set_title("asking", str(address))
        try:
            return str(probe(address, timeout=self._proxy.patience.connect))
        except OriginLost as lost:
            raise TaskFailed(str(lost)) from lost


def _no_snapshot(reason: str) -> TaskFailed:
    """What whoever wanted a snapshot is told, after the log."""
    log.warning("no snapshot: %s", reason)
    return TaskFailed(f"no snapshot: {reason}")
