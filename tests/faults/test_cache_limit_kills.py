"""A cache with a limit of 5 % of the disk, and eight clients: no wrong byte, no lost write, and the limit holds.

Whichever process is killed, also the one that lets blocks go, after each of its steps.

XNBD_LIMIT_ROUNDS sets the number of kills, and how long clients are at work; without it there are a few.
"""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from caching import BLOCK, CacheFiles, by_kind, connect, descendants, kill, kill_server, query, wait_until_gone
from conftest import MIB, Start
from injection import injected, listed_calls
from limited_load import LoadClient
from model import read_all
from server_process import Server, wait_until

SIZE = 48 * MIB
LIMIT = SIZE // 20
CLIENTS = 8
ROUNDS = int(os.environ.get("XNBD_LIMIT_ROUNDS", 6))
METADATA = 64 << 10
STEPS = ("fcntl", "fdatasync", "ioctl", "pwrite64", "clock_nanosleep")


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def origin(start: Start, tmp_path: Path, content: bytes) -> Server:
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    return start("--target", "--readonly", image)


class Field:
    """A proxy with a limit, which is started again when it was killed, and its clients."""

    def __init__(self, directory: Path, origin: Server, content: bytes) -> None:
        self.files = CacheFiles(directory)
        self._directory = directory
        self._origin = origin
        self._content = content
        self.server = self.start()
        self.clients: List[LoadClient] = []
        self._ends = threading.Event()

    def start(self) -> Server:
        words = self.files.arguments(self._origin.uri, "--cache-limit", LIMIT)
        self.server = Server(self._directory, "proxy", words)
        self.server.wait_until_ready()
        return self.server

    @contextmanager
    def load(self) -> Iterator[None]:
        """Eight clients at work."""
        self._ends.clear()
        uri = self.server.uri
        self.clients = [LoadClient(n, CLIENTS, self._content, lambda: uri, self._ends) for n in range(CLIENTS)]
        for client in self.clients:
            client.start()
        try:
            yield
            self.check()
        finally:
            self._ends.set()
            for client in self.clients:
                client.join(60)
        self.check()

    def check(self) -> None:
        assert [client.trouble for client in self.clients if client.trouble] == []
        clean = len(self.files.clean(SIZE)) * BLOCK
        assert clean <= 1.01 * LIMIT, clean

    def check_space(self) -> None:
        """What the file takes: what nobody knows of any more is given back soon."""

        def is_small() -> bool:
            return self.files.takes() <= 1.01 * LIMIT + len(self.files.written(SIZE)) * BLOCK + METADATA

        wait_until(is_small, "space that is given back", 60)

    def compare(self) -> None:
        """All of the disk, with what all clients know of it."""
        found = read_all(connect(self.server.uri))
        for client in self.clients:
            client.check(bytes(found), 0)
        self.check()


@pytest.fixture
def field(tmp_path: Path, origin: Server, content: bytes) -> Iterator[Field]:
    field = Field(tmp_path, origin, content)
    try:
        yield field
    finally:
        kill_server(field.server)


def let_go(field: Field) -> int:
    return int(query(field.files.control)["cache_limit"]["let_go_bytes"])


def test_the_limit_holds_while_eight_clients_read_and_write(field: Field) -> None:
    with field.load():
        until = time.monotonic() + 60
        while let_go(field) < 2 * ROUNDS * LIMIT and time.monotonic() < until:
            field.check()
            assert field.files.takes() <= 1.01 * LIMIT + len(field.files.written(SIZE)) * BLOCK + METADATA
    assert let_go(field) > 4 * LIMIT
    field.compare()
    field.server.stop()
    assert field.files.is_clean()


def test_nothing_is_wrong_or_lost_whoever_is_killed(field: Field, seed: int) -> None:
    rng = random.Random(seed)
    with field.load():
        for _ in range(ROUNDS):
            time.sleep(rng.random())
            kinds = by_kind(field.server)
            kind = rng.choice([*kinds, "keeping", "everything"])
            if kind in ("everything", "master"):
                left = descendants(field.server.pid)
                kill([field.server.pid, *(left if kind == "everything" else [])])
                field.server.process.wait()
                wait_until_gone(left, 30)
                field.start()
            else:
                kill(kinds.get(kind, [])[:1])
            field.check()
    field.compare()
    field.check_space()


def keeper(field: Field) -> int:
    """The process that lets blocks go, once there is one."""
    wait_until(lambda: "keeping" in by_kind(field.server), "the process that lets blocks go")
    return by_kind(field.server)["keeping"][0]


def test_the_process_that_lets_blocks_go_may_die_after_each_of_its_steps(field: Field, tmp_path: Path) -> None:
    with field.load():
        with listed_calls(keeper(field), tmp_path / "calls") as calls:
            wait_until(lambda: let_go(field) > 2 * LIMIT, "some that go")
        steps = [(name, number) for name, number in calls if name in STEPS]
        for name, number in random.Random(3).sample(steps, min(len(steps), ROUNDS)):
            pid = keeper(field)
            with injected(pid, f"{name}:signal=SIGKILL:when={number}"):
                wait_until(lambda: pid not in by_kind(field.server).get("keeping", []), f"{name} {number}", 60)  # noqa: B023
            field.check()
    field.compare()
    field.check_space()
