"""Operators' commands to two servers of one cache at once, stopped or ended at any system call.

Whatever becomes of them, the state file and the running servers agree a moment later,
and what a client was told to be durable is there after a restart. ``XNBD_PAIRS`` says
how many random pairs there are.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import nbd
import pytest
from caching import BLOCK, CacheFiles, ask, by_kind, connect, kill_server, query
from conftest import MIB, Start
from injection import injected
from server_process import children_of, command, is_alive, run, wait_until

from xnbd.proxy.state.files import read_steering
from xnbd.proxy.state.format import Steering
from xnbd.scoreboard.layout import TARGET
from xnbd.scoreboard.scoreboard import Scoreboard

SIZE = 8 * MIB
OLD = b"o" * BLOCK
COMMANDS = ("switch", "force", "reconnect", "cache-all", "snapshot")
CALLS = ("fcntl", "fdatasync", "pwrite64", "pread64", "openat", "clone,clone3", "clock_nanosleep", "close", "poll")
EXPECTED = ["the steward died", "a child of the steward failed"]


class Shared:
    """Two proxies on one cache, and two servers of the disk that they are proxies of."""

    def __init__(self, start: Start, files: CacheFiles, directory: Path) -> None:
        self._start = start
        self.files = files
        origin = directory / "origin.img"
        origin.write_bytes(b"o" * SIZE)
        self.origins = [start("--target", "--readonly", origin) for _ in range(2)]
        self.controls = [files.control, directory / "second.control"]
        self.proxies = [start(*self.arguments(control)) for control in self.controls]
        for proxy in self.proxies:
            proxy.expected_errors += EXPECTED
            proxy.wait_for_log("INFO: serving ")
        self.written: List[int] = []

    def arguments(self, control: Path) -> List[str]:
        return self.files.arguments(self.origins[0].uri, "--readahead", "0", control=control)

    def steward(self, number: int) -> int:
        found: List[int] = []

        def look() -> bool:
            found[:] = by_kind(self.proxies[number]).get("steward", [])
            return bool(found)

        wait_until(look, "the steward")
        return found[0]

    def command(self, number: int, name: str) -> Dict[str, Any]:
        """The answer, empty if there is none."""
        arguments: Dict[str, object] = {"force": {"force": True}, "cache-all": {"wait": True}}.get(name, {})  # type: ignore[assignment]
        if name == "reconnect":
            arguments = {"uri": self.origins[1].uri}
        try:
            return ask(self.controls[number], "switch" if name == "force" else name, **arguments)
        except (AssertionError, OSError):
            return {}

    def write(self, client: nbd.NBD, block: int) -> None:
        """Durably, at a block that is missing but for a copy."""
        client.pwrite(new(block), block * BLOCK, nbd.CMD_FLAG_FUA)
        self.written.append(block)

    def steering(self) -> Steering:
        with self.files.state.open("rb") as file:
            return read_steering(file.fileno())

    def agreement(self) -> Optional[Steering]:
        """What the state file and the scoreboard say, if nobody is about to change it and they say the same."""
        scoreboard_path = self.files.bitmap.with_name(f"{self.files.bitmap.name}.board")
        with closing(Scoreboard(os.open(scoreboard_path, os.O_RDWR))) as scoreboard:
            told = Steering(scoreboard.mode == TARGET, scoreboard.origin.address)
            return told if not scoreboard.turn.command and told == self.steering() else None

    def wait_for_agreement(self) -> Steering:
        wait_until(lambda: self.agreement() is not None, "state file and board to agree")
        found = self.agreement()
        assert found is not None
        return found

    def check_after_death(self) -> None:
        """Nothing that was durable is lost, whatever the servers have become."""
        found = self.steering()
        for proxy in self.proxies:
            kill_server(proxy)
        if found.switched and len(self.files.cached()) < SIZE // BLOCK:
            again = [*self.arguments(self.controls[0]), "--unix", self.files.image.parent / "last.sock"]
            status, _, said = run(*command(*again), check=False)  # that the origin was moved, perhaps, and then why not
            assert (status, "was switched to a plain target by force" in said) == (1, True)
            data = self.files.image.read_bytes()
            assert [block for block in self.written if data[block * BLOCK :][:BLOCK] != new(block)] == []
            return
        last = connect(self._start(*self.arguments(self.controls[0])).uri)
        for block in range(0, SIZE // BLOCK, 17):
            if block not in self.written:
                assert bytes(last.pread(BLOCK, block * BLOCK)) == OLD
        assert [block for block in self.written if bytes(last.pread(BLOCK, block * BLOCK)) != new(block)] == []


def new(block: int) -> bytes:
    return block.to_bytes(8, "little") * (BLOCK // 8)


@pytest.fixture
def shared(start: Start, files: CacheFiles, tmp_path: Path) -> Shared:
    return Shared(start, files, tmp_path)


def test_a_switch_whose_steward_dies_with_the_gate_shut_has_not_been(shared: Shared) -> None:
    """The state file says "switched" by then, which nobody but the next steward takes back."""
    client = connect(shared.proxies[0].uri)
    shared.write(client, 1)
    steward = shared.steward(0)
    with injected(steward, "clock_nanosleep:signal=KILL:when=1"):
        assert shared.command(0, "force") == {}
    shared.write(client, 2)
    assert shared.wait_for_agreement() == Steering()
    assert query(shared.controls[1])["mode"] == "proxy"
    assert shared.command(1, "reconnect").get("done")
    assert shared.wait_for_agreement() == Steering(switched=False, address=shared.origins[1].uri)
    shared.check_after_death()


def test_a_reconnect_that_was_cut_short_is_whole_or_has_not_been(shared: Shared) -> None:
    steward = shared.steward(0)
    with injected(steward, "fdatasync:signal=KILL:when=1"):
        assert shared.command(0, "reconnect") == {}
    wait_until(lambda: not is_alive(steward), "the steward's death")
    shared.wait_for_agreement()
    assert shared.command(1, "force").get("done")
    shared.write(connect(shared.proxies[0].uri), 5)
    assert shared.wait_for_agreement().switched
    shared.check_after_death()


def test_a_reconnect_waits_for_a_switch_and_then_sees_that_it_was(shared: Shared) -> None:
    """Both look at the mode while it is a proxy; the one is stopped for longer than the other takes."""
    client = connect(shared.proxies[0].uri)
    with ThreadPoolExecutor() as pool, injected(shared.steward(1), "fdatasync:delay_exit=3000000:when=1"):
        switch = pool.submit(shared.command, 1, "force")
        scoreboard_path = shared.files.bitmap.with_name(f"{shared.files.bitmap.name}.board")
        with closing(Scoreboard(os.open(scoreboard_path, os.O_RDWR))) as scoreboard:
            wait_until(lambda: scoreboard.turn.command.startswith("switch by"), "the switch to be under way")
        assert "plain target by now" in shared.command(0, "reconnect")["error"]
        assert switch.result().get("done")
    shared.write(client, 3)
    assert shared.wait_for_agreement().switched
    shared.check_after_death()


def test_who_has_the_turn_for_too_long_is_named(shared: Shared) -> None:
    scoreboard_path = shared.files.bitmap.with_name(f"{shared.files.bitmap.name}.board")
    with closing(Scoreboard(os.open(scoreboard_path, os.O_RDWR))) as scoreboard:
        assert scoreboard.turn.begin("switch")
        complaint = shared.command(0, "reconnect")["error"]
        assert f"another command is under way: switch by process {os.getpid()}" in complaint
        scoreboard.turn.end(whole=True)
    assert shared.command(0, "reconnect").get("done")


def test_a_switch_that_counts_blocks_first_keeps_the_turn(start: Start, files: CacheFiles, tmp_path: Path) -> None:
    """On a large disk a child counts them; until it has, the steward goes on with other things."""
    size = 129 << 30
    origin = tmp_path / "origin.img"
    origin.touch()
    os.truncate(origin, size)
    proxy = start(*files.arguments(start("--target", "--readonly", origin).uri))
    steward = by_kind(proxy)["steward"][0]
    client = connect(proxy.uri)
    for offset in range(0, size - BLOCK, 1 << 30):
        client.zero(min(1 << 30, size - BLOCK - offset), offset)
    client.flush()  # so that there is no checkpoint to wait for
    scoreboard_path = files.bitmap.with_name(f"{files.bitmap.name}.board")
    with closing(Scoreboard(os.open(scoreboard_path, os.O_RDWR))) as scoreboard, ThreadPoolExecutor() as pool:
        with injected(steward, "exit_group:delay_enter=2000000", children=True):
            switch = pool.submit(ask, files.control, "switch")
            wait_until(lambda: bool(children_of(steward)), "a child that counts")
            wait_until(lambda: scoreboard.turn.begin("reconnect"), "the turn, which a switch does not need yet")
            client.zero(BLOCK, size - BLOCK)
            wait_until(lambda: not children_of(steward), "the end of the count")
        for _ in range(5):  # each answered by the steward between two steps of the switch
            query(files.control)
        assert scoreboard.mode != TARGET
        scoreboard.turn.end(whole=True)
        assert switch.result().get("done")


@pytest.mark.parametrize("number", range(int(os.environ.get("XNBD_PAIRS", "2"))))
def test_two_commands_at_once_whatever_happens_to_them(shared: Shared, seed: int, number: int) -> None:
    rng = random.Random(seed + number)
    names = (rng.choice(COMMANDS), rng.choice(COMMANDS))
    faults = [_random_fault(rng) for _ in names]
    print(f"{names}, {faults}")
    blocks = rng.sample(range(SIZE // BLOCK), 60)
    if rng.random() < 0.4:
        shared.command(0, "cache-all")
    clients = [connect(proxy.uri) for proxy in shared.proxies]
    with ExitStack() as stack:
        for which, fault in enumerate(faults):
            if fault:
                stack.enter_context(injected(shared.steward(which), fault))
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(shared.command, which, name) for which, name in enumerate(names)]
            while not all(answer.done() for answer in answers) or len(shared.written) < 20:
                if len(shared.written) == len(blocks) - 10:
                    break
                shared.write(rng.choice(clients), blocks[len(shared.written)])
            results = [answer.result() for answer in answers]
    _check_answers(shared, list(zip(names, results)))
    for block in blocks[len(shared.written) :]:
        shared.write(rng.choice(clients), block)
    shared.check_after_death()


def _random_fault(rng: random.Random) -> str:
    """Nothing, a pause, or death, at some system call of a steward."""
    call, when = rng.choice(CALLS), rng.randint(1, 12)
    return rng.choice(
        ["", f"{call}:delay_enter={rng.randint(10, 1500)}000:when={when}", f"{call}:signal=KILL:when={when}"]
    )


def _check_answers(shared: Shared, outcomes: List[Tuple[str, Dict[str, Any]]]) -> None:
    found = shared.wait_for_agreement()
    done = [name for name, result in outcomes if result.get("done") and "error" not in result]
    if "switch" in done or "force" in done:
        assert found.switched
    if "reconnect" in done:
        assert found.address == shared.origins[1].uri
    wait_until(lambda: {query(at)["mode"] == "target" for at in shared.controls} == {found.switched}, "one mode")
