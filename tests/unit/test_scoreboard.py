"""What processes of one disk share: their lines, and the gate under load, with real processes that are killed."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import time
import traceback
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List, Optional

import pytest
from server_process import PATIENCE, is_alive, wait_until

from xnbd.proxy.fetch_queue import Fetch
from xnbd.proxy.limited import Intake
from xnbd.proxy.state.use_map import UseMap, use_map_size
from xnbd.scoreboard.counters import BYTES_READ, MISSES, REQUESTS, Counts, new_counts
from xnbd.scoreboard.layout import (
    COMPLETE,
    CONTROL,
    COPYING,
    HEAD,
    LINE_LOCKS,
    ORIGINS,
    PROXY,
    SNAPSHOT,
    TARGET,
    TROUBLE,
    UNREACHABLE,
    create_scoreboard,
)
from xnbd.scoreboard.lines import Line, clock
from xnbd.scoreboard.place import Visit
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.scoreboard.snapshots import SnapshotPlace
from xnbd.storage.target import reopen

Work = Callable[[Scoreboard], None]


class Family:
    """A scoreboard for a few processes, and children that do something with it."""

    def __init__(self, directory: Path, processes: int = 16) -> None:
        self.fd = create_scoreboard(processes)
        self.scoreboard = Scoreboard(reopen(self.fd, readonly=False))
        self.complaints = directory / "complaints"
        self.complaints.touch()
        self._children: List[int] = []

    def spawn(self, work: Work) -> int:
        pid = os.fork()
        if not pid:
            self._run(work)
        self._children.append(pid)
        return pid

    def _run(self, work: Work) -> None:
        try:
            work(Scoreboard(reopen(self.fd, readonly=False)))
        except BaseException:
            with open(self.complaints, "a") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(0)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def wait(self, pid: int) -> None:
        os.waitpid(pid, 0)
        self._children.remove(pid)

    def close(self) -> None:
        for pid in list(self._children):
            self.kill(pid)
        self.scoreboard.close()
        os.close(self.fd)
        assert self.complaints.read_text() == ""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    it = Family(tmp_path)
    yield it
    it.close()


def counted(numbers: Dict[int, int]) -> Counts:
    """These numbers at their places, and nothing else."""
    counts = new_counts()
    for place, number in numbers.items():
        counts[place] = number
    return Counts(counts)


def rest(_scoreboard: Optional[Scoreboard] = None) -> None:
    """Stay until killed."""
    while True:
        signal.pause()


@contextmanager
def process(family: Family, work: Work) -> Iterator[int]:
    """A child that does *work* and then stays; from when the work is done."""
    done, say = os.pipe()

    def work_and_stay(scoreboard: Scoreboard) -> None:
        work(scoreboard)
        os.write(say, b"!")
        rest()

    pid = family.spawn(work_and_stay)
    os.close(say)
    assert os.read(done, 1) == b"!", family.complaints.read_text()
    os.close(done)
    yield pid
    if pid in family._children:
        family.kill(pid)


# Mode, address, checkpoints


def test_new_scoreboard_is_a_proxy_s_without_anything(family: Family) -> None:
    scoreboard = family.scoreboard
    assert scoreboard.mode == PROXY
    assert scoreboard.origin.address == ""
    assert scoreboard.origin.generation == 0
    assert scoreboard.checkpoints() == (0, None)
    assert scoreboard.lines.living() == []
    assert scoreboard.lines.totals() == counted({})


def test_mode_is_seen_by_others(family: Family) -> None:
    for mode in (COMPLETE, TARGET, PROXY):
        with process(family, lambda scoreboard, mode=mode: setattr(scoreboard, "mode", mode)):  # type: ignore[misc]
            assert family.scoreboard.mode == mode


def test_address_is_seen_by_others_and_has_a_new_generation(family: Family) -> None:
    for number, address in enumerate(["nbd://a:1/", "nbd://\u00e9\udcff:2/" + "x" * 4000, "", "nbd://b:3/"], 1):
        with process(family, lambda scoreboard, address=address: setattr(scoreboard.origin, "address", address)):  # type: ignore[misc]
            assert family.scoreboard.origin.address == address
            assert family.scoreboard.origin.generation == number


def test_address_that_is_too_long_is_refused(family: Family) -> None:
    family.scoreboard.origin.address = "nbd://a:1/"
    with pytest.raises(ValueError, match="too long"):
        family.scoreboard.origin.address = "x" * 20_000
    assert family.scoreboard.origin.address == "nbd://a:1/"


def test_address_that_is_half_written_is_none(family: Family) -> None:
    family.scoreboard.origin.address = "nbd://a:1/"
    with mmap.mmap(family.fd, 0) as memory:
        memory[HEAD.at["address_text"]] ^= 1
    assert family.scoreboard.origin.address == ""


def test_checkpoints_are_counted(family: Family) -> None:
    before = clock()
    family.scoreboard.note_checkpoint()
    family.scoreboard.note_checkpoint()
    count, last = family.scoreboard.checkpoints()
    assert count == 2
    assert last is not None
    assert before <= last <= clock()


def test_complete_is_what_was_a_proxy(family: Family) -> None:
    assert family.scoreboard.note_complete(lambda: True)
    assert family.scoreboard.mode == COMPLETE
    assert not family.scoreboard.note_complete(lambda: True)


def test_a_block_found_damaged_just_before_the_disk_is_complete_counts(family: Family) -> None:
    """Its finder has seen no complete disk, so it has told nobody."""
    looks = [False, True]
    assert not family.scoreboard.note_complete(looks.pop)
    assert (family.scoreboard.mode, looks) == (PROXY, [])
    assert family.scoreboard.note_complete(lambda: True)
    family.scoreboard.note_incomplete()
    assert family.scoreboard.mode == PROXY


def test_a_switch_is_not_taken_back_by_another_server_that_finds_the_disk_complete(family: Family) -> None:
    def switch(scoreboard: Scoreboard) -> None:
        with scoreboard.gate.closed(PATIENCE):
            os.write(say, b"!")
            assert os.read(wait, 1) == b"!"
            scoreboard.mode = TARGET

    (wait, go), (told, say) = os.pipe(), os.pipe()
    pid = family.spawn(switch)
    assert os.read(told, 1) == b"!"
    assert not family.scoreboard.note_complete(lambda: True)
    os.write(go, b"!")
    family.wait(pid)
    assert not family.scoreboard.note_complete(lambda: True)
    assert family.scoreboard.mode == TARGET
    for fd in (wait, go, told, say):
        os.close(fd)


# Snapshots


def begin_snapshot(scoreboard: Scoreboard) -> None:
    assert scoreboard.try_lock(SNAPSHOT)
    scoreboard.snapshots.begin(SnapshotPlace(os.getpid(), 5, 6, scoreboard.namespace, (7, 8, 7, 9)))


def test_a_snapshot_is_ended_by_others_only_when_its_process_is_dead(family: Family) -> None:
    with process(family, begin_snapshot) as pid:
        assert not family.scoreboard.snapshots.end_dead()
        assert family.scoreboard.snapshots.current == SnapshotPlace(
            pid, 5, 6, family.scoreboard.namespace, (7, 8, 7, 9)
        )
        family.kill(pid)
        assert family.scoreboard.snapshots.end_dead()
        assert family.scoreboard.snapshots.current is None
        assert not family.scoreboard.snapshots.end_dead()


def test_after_the_end_of_a_dead_snapshot_the_next_one_may_begin(family: Family) -> None:
    for _ in range(2):
        with process(family, begin_snapshot) as pid:
            family.kill(pid)
        assert family.scoreboard.snapshots.end_dead()


# Commands


def begin_command(scoreboard: Scoreboard) -> None:
    assert scoreboard.turn.begin("switch")


def test_commands_are_one_at_a_time_and_one_that_was_cut_short_stays_noted(family: Family) -> None:
    with process(family, begin_command) as pid:
        assert not family.scoreboard.turn.begin("reconnect")
        assert family.scoreboard.turn.command == f"switch by process {pid}"
        family.kill(pid)
        assert family.scoreboard.turn.command == f"switch by process {pid}"
        assert family.scoreboard.turn.begin("reconnect")
        family.scoreboard.turn.end(whole=False)
        assert family.scoreboard.turn.command == f"reconnect by process {os.getpid()}"
        assert family.scoreboard.turn.begin("reconnect")
        family.scoreboard.turn.end(whole=True)
        assert family.scoreboard.turn.command == ""


@pytest.mark.parametrize("who", ["worker", "closer"])
def test_what_a_process_has_changed_before_it_died_in_the_gate_is_told(family: Family, who: str) -> None:
    """It had no time to count the change, by which the others tell that there was one."""

    gates: List[ContextManager[None]] = []

    def change_untold(scoreboard: Scoreboard) -> None:
        gates.append(scoreboard.gate.closed(20))
        gates[0].__enter__()
        scoreboard._map[HEAD.at["mode"]] = TARGET

    place = family.scoreboard.take_place()
    before = place.changes
    with process(family, change_untold) as pid:
        family.kill(pid)
    assert (family.scoreboard.mode, place.changes) == (TARGET, before)
    if who == "closer":
        with family.scoreboard.gate.closed(20):
            pass
    place.enter()
    assert place.changes != before


# Waking


def place_that_counts_signals(scoreboard: Scoreboard) -> None:
    place = scoreboard.take_place()

    def count(_number: int, _frame: object) -> None:
        place.counts[REQUESTS] += 1
        place.tell()

    signal.signal(signal.SIGUSR2, count)


def test_all_processes_of_this_namespace_are_woken(family: Family) -> None:
    with process(family, place_that_counts_signals), process(family, place_that_counts_signals):
        family.scoreboard.lines.wake_all()
        wait_until(
            lambda: [line.counts[REQUESTS] for line in family.scoreboard.lines.living()] == [1, 1], "the signals"
        )


def test_nobody_is_woken_by_an_id_that_is_not_his(family: Family) -> None:
    """What stands in a line is a dead process's id, until the next one in that line has written its own."""
    for _ in range(20):
        with suppress(IdTaken):
            wake_beside_a_stranger(family)
            return
    raise AssertionError("others were always quicker")


def wake_beside_a_stranger(family: Family) -> None:
    def only_lock(scoreboard: Scoreboard) -> None:
        assert scoreboard.try_lock(LINE_LOCKS + 1)

    with process(family, rest_with_place) as first, process(family, rest_with_place) as second:
        assert [line.pid for line in family.scoreboard.lines.living()] == [first, second]
        family.kill(second)
        with process(family, only_lock):
            assert [line.pid for line in family.scoreboard.lines.living()] == [first, second]
            with stranger(second):
                family.scoreboard.lines.wake_all()


def rest_with_place(scoreboard: Scoreboard) -> None:
    scoreboard.take_place()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class IdTaken(Exception):
    """Another process of this computer has it."""


@contextmanager
def stranger(pid: int) -> Iterator[None]:
    """Another program has the number *pid* by now; a signal would kill it. Raises `IdTaken`."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "100"]) as process:
            if process.pid == pid:
                yield
            process.kill()
        if process.pid == pid:
            assert process.returncode == -signal.SIGKILL
            return
    raise IdTaken(str(pid))


# Lines


def serve_somebody(scoreboard: Scoreboard) -> None:
    place = scoreboard.take_place()
    place.welcome("10.0.0.1:5")
    place.counts[REQUESTS] += 7
    place.counts[BYTES_READ] += 700
    place.tell()
    place.tell_mode(PROXY)
    place.tell_queue(3, 4096)
    place.tell_origin(UNREACHABLE, "origin x: Connection refused")
    place.tell_identity("CN=alice", "TLSv1.3 A kTLS")


def test_line_tells_of_its_process(family: Family) -> None:
    before = clock()
    with process(family, serve_somebody) as pid:
        (line,) = family.scoreboard.lines.living()
        assert before <= line.since <= clock()
        assert line._replace(since=0.0) == Line(
            pid,
            PROXY,
            0.0,
            counted({REQUESTS: 7, BYTES_READ: 700}),
            UNREACHABLE,
            3,
            4096,
            "10.0.0.1:5",
            "origin x: Connection refused",
            os.stat("/proc/self/ns/pid").st_ino,
            "CN=alice",
            "TLSv1.3 A kTLS",
            origins=((0, 0),) * ORIGINS,
        )


def test_counts_begin_anew_with_the_next_client_but_not_in_the_totals(family: Family) -> None:
    def serve_two(scoreboard: Scoreboard) -> None:
        place = scoreboard.take_place()
        for peer, misses in (("first", 5), ("second", 3)):
            place.welcome(peer)
            place.counts[MISSES] += misses
            place.tell()

    with process(family, serve_two):
        (line,) = family.scoreboard.lines.living()
        assert (line.peer, line.counts) == ("second", counted({MISSES: 3}))
        assert (line.queued_requests, line.queued_bytes, line.trouble) == (0, 0, "")
        assert family.scoreboard.lines.totals() == counted({MISSES: 8})


def test_dead_process_has_no_line_and_its_counts_stay_in_the_totals(family: Family) -> None:
    with process(family, serve_somebody) as pid:
        family.kill(pid)
        assert family.scoreboard.lines.living() == []
        assert family.scoreboard.lines.totals() == counted({REQUESTS: 7, BYTES_READ: 700})


def test_successor_in_a_line_goes_on_from_its_totals(tmp_path: Path) -> None:
    family = Family(tmp_path, processes=1)
    for number in range(1, 4):
        with process(family, serve_somebody):
            (line,) = family.scoreboard.lines.living()
            assert line.counts == counted({REQUESTS: 7, BYTES_READ: 700})
            assert family.scoreboard.lines.totals() == counted({REQUESTS: 7 * number, BYTES_READ: 700 * number})
    family.close()


def test_who_reads_meanwhile_sees_no_count_go_backwards(family: Family, seed: int) -> None:
    """Processes that count without a rest, with ever other clients, killed at any moment and followed by others."""

    def serve_many(scoreboard: Scoreboard) -> None:
        place = scoreboard.take_place()
        for number in count():
            visit = Visit(float(number), counted({REQUESTS: 40})) if number % 2 else None
            place.welcome(f"{os.getpid()} {number}", visit)
            for _ in range(60):
                place.counts[REQUESTS] += 1
                place.tell()

    lines, rng, until = family.scoreboard.lines, random.Random(seed), time.monotonic() + 2
    workers, latest, readings = [family.spawn(serve_many) for _ in range(3)], 0, 0
    while time.monotonic() < until:
        for _ in range(rng.randrange(2000)):
            requests = lines.totals()[REQUESTS]
            assert requests >= latest
            latest, readings = requests, readings + 1
            if readings % 8 == 0:
                for line in lines.living():
                    assert not line.peer or line.counts[REQUESTS] <= 100, line
        family.kill(workers.pop(0))
        workers.append(family.spawn(serve_many))
    assert readings > 1000


def test_each_process_has_a_line_of_its_own_until_all_are_taken(tmp_path: Path) -> None:
    family = Family(tmp_path, processes=5)
    pids = []
    for _ in range(5):
        done = process(family, serve_somebody)
        pids.append(done.__enter__())
    assert sorted(line.pid for line in family.scoreboard.lines.living()) == sorted(pids)
    with pytest.raises(OSError, match="more than 5 processes"):
        family.scoreboard.take_place()
    family.kill(pids[0])
    family.scoreboard.take_place()
    family.close()


def test_texts_that_are_too_long_are_cut(family: Family) -> None:
    def talk(scoreboard: Scoreboard) -> None:
        place = scoreboard.take_place()
        place.welcome("\u00e9" * 100)
        place.tell_origin(UNREACHABLE, "y" * 500)

    with process(family, talk):
        (line,) = family.scoreboard.lines.living()
        assert line.peer.startswith("\u00e9" * 30)
        assert len(line.peer) <= 64
        assert line.trouble == "y" * (TROUBLE - 3) + "..."


@pytest.mark.parametrize("what", [CONTROL, COPYING])
def test_lock_is_one_process_s_until_it_ends(family: Family, what: int) -> None:
    def take(scoreboard: Scoreboard) -> None:
        assert scoreboard.try_lock(what)

    with process(family, take) as pid:
        assert not family.scoreboard.try_lock(what)
        family.kill(pid)
        assert family.scoreboard.try_lock(what)
        family.scoreboard.unlock(what)


# The gate


def enter(scoreboard: Scoreboard) -> None:
    scoreboard.take_place().enter()


def enter_and_leave(scoreboard: Scoreboard) -> None:
    place = scoreboard.take_place()
    place.enter()
    place.leave()


def test_gate_closes_at_once_when_nobody_is_inside(family: Family) -> None:
    with process(family, enter_and_leave), family.scoreboard.gate.closed(PATIENCE):
        pass


def test_gate_does_not_close_while_somebody_is_inside(family: Family) -> None:
    with process(family, enter) as pid:
        with pytest.raises(TimeoutError, match=f"process {pid} is busy"), family.scoreboard.gate.closed(0.2):
            pass
        family.kill(pid)
        with family.scoreboard.gate.closed(PATIENCE):
            pass


def test_gate_that_could_not_be_closed_is_open_again(family: Family) -> None:
    with process(family, enter):
        with pytest.raises(TimeoutError), family.scoreboard.gate.closed(0.2):
            pass
        with process(family, enter):
            pass


def test_gate_is_held_by_one_at_a_time(family: Family) -> None:
    def hold(scoreboard: Scoreboard) -> None:
        scoreboard.gate.closed(PATIENCE).__enter__()

    held = []

    def keep(scoreboard: Scoreboard) -> None:
        held.append(scoreboard.gate.closed(PATIENCE))
        held[0].__enter__()

    with process(family, keep) as pid:
        with pytest.raises(TimeoutError, match="somebody else holds the gate"), family.scoreboard.gate.closed(0.2):
            pass
        family.kill(pid)
        with family.scoreboard.gate.closed(PATIENCE):
            pass


def test_who_comes_to_a_closed_gate_waits_and_goes_on(family: Family) -> None:
    with family.scoreboard.gate.closed(PATIENCE):
        pid = family.spawn(enter_and_leave)
        wait_until(lambda: any(line.pid == pid for line in family.scoreboard.lines.living()), "the visitor")
        time.sleep(0.1)
        assert is_alive(pid)
    family.wait(pid)


def test_gate_of_a_holder_that_dies_opens(family: Family) -> None:
    held = []

    def keep(scoreboard: Scoreboard) -> None:
        held.append(scoreboard.gate.closed(PATIENCE))
        held[0].__enter__()

    with process(family, keep) as pid:
        visitor = family.spawn(enter_and_leave)
        family.kill(pid)
        family.wait(visitor)


_PAIR = struct.Struct("=QQ")
_SLOTS = 6
_ROUNDS = 2500
_LOAD_TIME = 90.0


class Pairs:
    """Shared memory: a pair of counters for each worker, and how often the gate was closed."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def work(self, slot: int, seed: int) -> Work:
        def count(scoreboard: Scoreboard) -> None:
            rng = random.Random(seed)
            memory, place, at = self.memory, scoreboard.take_place(), slot * _PAIR.size
            number = _PAIR.unpack_from(memory, at)[0] + 1
            while True:
                place.enter()
                for _ in range(rng.randrange(1, 4)):
                    struct.pack_into("=Q", memory, at, number)
                    if rng.random() < 0.01:
                        time.sleep(rng.random() * 0.002)
                    struct.pack_into("=Q", memory, at + 8, number)
                    number += 1
                place.leave()
                if rng.random() < 0.05:
                    time.sleep(rng.random() * 0.002)

        return count

    def look(self, number: int, pids: Dict[int, int]) -> Work:
        """Close the gate again and again: all pairs are equal then but those of dead workers, and stay as they are."""

        def close(scoreboard: Scoreboard) -> None:
            memory, at = self.memory, 2048 + 8 * number
            rounds = struct.unpack_from("=Q", memory, at)[0]
            while True:
                with scoreboard.gate.closed(PATIENCE):
                    before = memory[: _SLOTS * _PAIR.size]
                    for slot in range(_SLOTS):
                        one, other = _PAIR.unpack_from(before, slot * _PAIR.size)
                        if one != other:
                            (pid,) = struct.unpack_from("=I", memory, 3072 + 4 * slot)
                            wait_until(lambda pid=pid: not is_alive(pid), f"the death of {pid}, who is half done")
                    after = memory[: _SLOTS * _PAIR.size]
                    assert before == after, "somebody works while the gate is closed"
                rounds += 1
                struct.pack_into("=Q", memory, at, rounds)

        return close

    def rounds(self) -> int:
        return sum(struct.unpack_from("=2Q", self.memory, 2048))

    def note(self, slot: int, pid: int) -> None:
        struct.pack_into("=I", self.memory, 3072 + 4 * slot, pid)

    def totals(self) -> List[int]:
        return [_PAIR.unpack_from(self.memory, slot * _PAIR.size)[0] for slot in range(_SLOTS)]


def test_nobody_is_half_done_behind_a_closed_gate_whoever_is_killed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    family, pairs = Family(tmp_path, processes=_SLOTS + 2), Pairs()
    workers: Dict[int, int] = {}
    requesters: Dict[int, int] = {}

    def start_worker(slot: int) -> None:
        gate, opener = os.pipe()
        work = pairs.work(slot, rng.randrange(1 << 32))
        workers[slot] = family.spawn(lambda scoreboard: (os.read(gate, 1), work(scoreboard))[1])
        pairs.note(slot, workers[slot])  # before it may be found half done
        os.write(opener, b"!")
        os.close(gate)
        os.close(opener)

    for slot in range(_SLOTS):
        start_worker(slot)
    for number in range(2):
        requesters[number] = family.spawn(pairs.look(number, workers))
    until, killed = time.monotonic() + _LOAD_TIME, 0
    while (pairs.rounds() < _ROUNDS or not all(pairs.totals())) and family.complaints.read_text() == "":
        assert time.monotonic() < until, f"{pairs.rounds()} rounds only, {killed} killed"
        time.sleep(rng.random() * 0.02)
        if rng.random() < 0.7:
            slot = rng.randrange(_SLOTS)
            family.kill(workers[slot])
            start_worker(slot)
        else:
            number = rng.randrange(2)
            family.kill(requesters[number])
            requesters[number] = family.spawn(pairs.look(number, workers))
        killed += 1
    family.close()
    print(f"{pairs.rounds()} rounds, {killed} killed, worked: {pairs.totals()}")
    assert min(pairs.totals()) > 0


def test_a_count_between_the_steps_of_who_keeps_nothing_finds_no_less_than_nothing(family: Family) -> None:
    """Else the figure would be as large as a figure can be, and all of the cache would be let go."""
    room, place = family.scoreboard.room, family.scoreboard.take_place()
    room.limit = 1000
    evictors = Scoreboard(reopen(family.fd, readonly=False)).room
    coming: List[int] = []

    def count() -> None:
        evictors.correct(evictors.expected(), 0)

    def tell(blocks: int) -> None:
        coming.append(blocks)
        count()
        place.tell_coming(blocks)
        count()

    fd = os.memfd_create("use map")
    os.ftruncate(fd, use_map_size(1 << 30))
    intake = Intake(room, UseMap(fd, 1 << 30))
    os.close(fd)
    intake.tell_coming = tell
    fetch = Fetch(0, 64, ahead=False)
    assert intake.admit(fetch)
    assert room.used >= 64
    count()
    assert room.used == 64
    intake.settle(fetch, 0)
    assert coming == [64, 0]
    assert room.used <= 64
    count()
    assert room.used == 0
    room.let_go(5)
    assert room.used == 0
