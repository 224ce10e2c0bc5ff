"""Proxies that are upgraded, and a process of theirs is killed at a system call: at worst its client is lost.

No byte is wrong, no block stays locked, and what was flushed is there. Requests of the client wait for the origin
meanwhile. A steward that dies costs no client anything, be it the old one or the next one.
The calls are drawn by chance; XNBD_ROUNDS sets how many times each kind of process is killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from caching import CacheFiles, descendants
from conftest import MIB, Start
from injection import injected, listed_calls
from moving import order, worker_of_only_client
from proxies import BLOCK, Proxy
from rawclient import FLUSH, READ, RawClient, pack_request
from relay import Relay
from server_process import is_alive, state_of, title_of, wait_until
from snapshots import bgctl_command
from upgrades import STOPPED_STEWARD, build

ROUNDS = int(os.environ.get("XNBD_ROUNDS", "2"))
WAITING = 8
"""Requests that wait for the origin."""

VICTIMS = ["master", "steward", "next steward", "worker", "spare"]

STOPPING = [
    (
        "server/upgrade/arrival.py",
        "            self._start_steward()\n",
        "            os.environ['XNBD_STOP'] = '1'\n"
        "            self._start_steward()\n"
        "            os.environ.pop('XNBD_STOP')\n",
    ),
    STOPPED_STEWARD,
]
"""The steward that takes over in an upgrade is stopped."""

Move = Callable[[], None]


class Field:
    """A proxy over a line that takes some milliseconds, and what its disk holds."""

    def __init__(self, start: Start, directory: Path, line: Relay, content: bytearray, rng: random.Random) -> None:
        self._start = start
        self._directory = directory
        self._line = line
        self._content = content
        self._rng = rng
        self._next = build(directory / "next", "99.0", *STOPPING)
        self._blocks = iter(rng.sample(range(len(content) // BLOCK), len(content) // BLOCK))
        self.deaths = self.lost = 0
        self.begin()

    def begin(self) -> None:
        """The first server on these files, or the next one."""
        self.proxy = Proxy(self._start, self._directory, self._line.uri)
        self.proxy.server.expected_errors += [r"died: killed by SIGKILL", "does not give way", "cannot make the cache"]

    def draw(self, victim: str, number: int) -> List[str]:
        """So many of the calls that a *victim* makes when all goes well, each with its death."""
        with self._client() as (client, places):
            sufferers, move = self._prepare(victim)
            with listed_calls(sufferers, self._directory / "calls") as calls:
                move()
                assert self._all_come(client, places)
        assert len(calls) > 30, calls
        return [f"{name}:signal=KILL:when={count}" for name, count in self._rng.choices(calls, k=number)]

    def play(self, victim: str, fault: str) -> None:
        """Upgrade, and have the *victim* suffer that."""
        with self._client() as (client, places):
            sufferers, move = self._prepare(victim)
            with injected(sufferers, fault):
                move()
                lost = not self._all_come(client, places)
            died = not all(map(is_alive, sufferers))
            assert (died and "steward" not in victim) or not lost, (victim, fault)
            self.deaths, self.lost = self.deaths + died, self.lost + lost
        if victim == "master" and died:
            self.proxy.server.process.wait()
            self.begin()
        self._check(places)

    @contextmanager
    def _client(self) -> Iterator[Tuple[RawClient, List[int]]]:
        """One that has flushed something, and waits for blocks at these places."""
        with self.proxy.raw() as client:
            self._flush_something(client)
            places = [BLOCK * next(self._blocks) for _ in range(WAITING)]
            client.send(b"".join(pack_request(READ, at, BLOCK, cookie=at) for at in places))
            yield client, places

    def _flush_something(self, client: RawClient) -> None:
        at, data = BLOCK * next(self._blocks) + 7, self._rng.randbytes(100)
        assert client.write(at, data) == 0
        client.request(FLUSH, cookie=1)
        assert client.simple_reply() == (0, 1, b"")
        self._content[at : at + len(data)] = data

    def _prepare(self, victim: str) -> Tuple[List[int], Move]:
        """The processes of which one may die, and what they are to do."""
        if victim == "next steward":
            return self._stop_next_steward()
        sufferers = self._sufferers(victim)
        return sufferers, lambda: self._move(victim, sufferers)

    def _stop_next_steward(self) -> Tuple[List[int], Move]:
        """In the middle of an upgrade."""
        server, words = self.proxy.server, bgctl_command("--upgrade", "--program", self._next, self.proxy.control)
        asking = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def stopped() -> List[int]:
            return [pid for pid in server.workers() if state_of(pid) == "T"]

        def go_on() -> None:
            os.kill(pid, signal.SIGCONT)
            assert "1 client moved" in asking.communicate()[0]

        wait_until(lambda: bool(stopped()), "the next steward")
        (pid,) = stopped()
        return [pid], go_on

    def _sufferers(self, victim: str) -> List[int]:
        server = self.proxy.server
        if victim == "master":
            return [server.pid]
        if victim == "steward":
            wait_until(lambda: sum("steward" in title_of(pid) for pid in server.workers()) == 1, "one steward")
            return [self.proxy.steward()]
        if victim == "worker":
            return [worker_of_only_client(server)]
        wait_until(lambda: any("spare" in title_of(pid) for pid in server.workers()), "a spare worker")
        return [pid for pid in server.workers() if "spare" in title_of(pid)]

    def _move(self, victim: str, sufferers: List[int]) -> None:
        """By the upgrade; there is no next program if a spare worker of this one is to take the client."""
        server = self.proxy.server
        if victim != "spare":
            subprocess.run(bgctl_command("--upgrade", self.proxy.control), capture_output=True, check=False)
            return
        told = self._told()
        order(worker_of_only_client(server))
        wait_until(lambda: self._told() > told or not all(map(is_alive, sufferers)), "the end of the move")

    def _told(self) -> int:
        log = self.proxy.server.log()
        return log.count("goes on as") + log.count("stays with") + log.count(": left")

    def _all_come(self, client: RawClient, places: List[int]) -> bool:
        """Whether all replies come, and the client can go on; those that come are right."""
        missing: Dict[int, bytes] = {at: bytes(self._content[at : at + BLOCK]) for at in places}
        try:
            while missing:
                error, at, data = client.simple_reply(BLOCK)
                assert (error, data) == (0, missing.pop(at))
            return client.works()
        except (EOFError, ConnectionError):
            return False

    def _check(self, places: List[int]) -> None:
        """All blocks that were waited for are right, and nobody has them locked."""
        with self.proxy.raw() as client:
            for at in places:
                data = bytes(self._content[at : at + BLOCK])
                assert client.read(at, BLOCK) == data
                assert client.write(at, data) == 0

    def finish(self) -> None:
        """The whole disk is right, and so is the cache."""
        with self.proxy.raw() as client:
            assert client.read(0, len(self._content)) == self._content
        everybody = descendants(self.proxy.server.pid)
        assert self.proxy.server.stop() == 0
        wait_until(lambda: not any(map(is_alive, everybody)), "the end of all processes")
        files = CacheFiles(self._directory)
        assert files.is_clean()
        cache = files.image.read_bytes()
        for block in files.cached():
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            assert cache[at] == self._content[at]


@pytest.fixture
def field(start: Start, tmp_path: Path, seed: int) -> Iterator[Field]:
    rng = random.Random(seed)
    origin = tmp_path / "origin.img"
    origin.write_bytes(rng.randbytes(16 * MIB))
    with Relay(start("--target", "--readonly", origin, tcp=True).port, delay=0.005) as line:
        yield Field(start, tmp_path, line, bytearray(origin.read_bytes()), rng)


@pytest.mark.timeout(120 + 20 * ROUNDS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_at_worst_the_client_of_a_process_that_dies_is_lost(field: Field, victim: str) -> None:
    for fault in field.draw(victim, ROUNDS):
        field.play(victim, fault)
    field.finish()
    print(f"\n{field.deaths} of {ROUNDS} have died, {field.lost} clients were lost")
