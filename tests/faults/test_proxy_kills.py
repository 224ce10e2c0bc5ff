"""Proxies of which processes are killed at random moments: what was answered stays, and no block is wrong.

After every kill the servers are started again and the cache is compared, all of it,
with what clients were told. Now and then the origin stalls before the kill, and
answers again only when the comparison is done.

XNBD_ROUNDS sets the number of kills; without it the test takes `SECONDS`.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Protocol

import pytest
from caching import BLOCK, CacheFiles, ask, by_kind, connect, descendants, hold, kill, query, release, wait_until_gone
from certificates import Certificates
from conftest import MIB, Start
from ledger import SECTOR, Crowd, Ledger
from model import read_all
from origin_programs import is_listening
from relay import Relay
from server_process import Server, wait_until
from shared_ceph import Line, SharedCeph
from web_server import WebServer

SECONDS = 15.0
SIZE = 24 * MIB + 3 * SECTOR
LIMIT = 24 * MIB // 20
CLIENTS = 5
ROUNDS_PER_CACHE = 10

EXPECTED = [
    r"worker \d+ .*died: killed by SIGKILL",
    r"the steward died: killed by SIGKILL",
    r"cannot make the cache durable: status -9",
    r"nothing is let go of the cache: status -9",
]
"""What kills leave in the log, and no other error may be there."""


class Way(Protocol):
    """A way to the disk, on which nothing moves after `stall`."""

    def stall(self) -> None: ...

    def resume(self) -> None: ...


class Origin(NamedTuple):
    """Where the disk is, by which *way* the proxies get there, and what they need in their environment."""

    uri: str
    way: Way
    env: Dict[str, str] = {}


class Field:
    """Two proxies of one origin, on one cache, and their clients' *ledger*."""

    def __init__(self, directory: Path, origin: Origin, content: bytes, rng: random.Random, limit: int = 0) -> None:
        """With a *limit* of so many bytes clean blocks are let go."""
        self._limit = limit
        self._options = ["--cache-limit", limit] if limit else []
        self.kills: List[str] = []
        self._directory = directory
        self._origin = origin
        self._content = content
        self._rng = rng
        self._files = CacheFiles(directory)
        self._servers: List[Optional[Server]] = [None, None]
        self._started: List[Server] = []
        self._left: List[int] = []
        self.begin()

    def begin(self) -> None:
        """An empty cache."""
        self._files.remove()
        self._ledger = Ledger(self._content)
        self._wait_for_old_processes()
        self._start_missing()

    def _start_missing(self) -> None:
        for number, server in enumerate(self._servers):
            if server is None:
                self._servers[number] = self._start(number)
        for server in self._servers:
            assert server is not None
            server.wait_for_log(f"[{server.pid}] INFO: serving ")  # a worker of its dead predecessor may still accept

    def _start(self, number: int) -> Server:
        control = self._directory / f"control{number}"
        timeout = 0.5 if self._files.state.exists() else 10  # the size is known, and the origin may be stalled
        options = [*self._options, "--connect-timeout", timeout]
        arguments = self._files.arguments(self._origin.uri, *options, control=control)
        taken = (control, self._directory / f"proxy{number}.sock")  # which a start refuses to take from the living
        wait_until(lambda: not any(map(is_listening, taken)), "the predecessor to listen no more")
        server = Server(self._directory, f"proxy{number}", arguments, env=self._origin.env)
        self._started.append(server)
        return server

    def round(self) -> None:
        """Load, a kill in the middle of it, a restart and the comparison."""
        rng, servers = self._rng, [server for server in self._servers if server is not None]
        crowd = Crowd([server.uri for server in servers], CLIENTS, self._ledger, rng)
        if rng.random() < 0.3:
            self._copy_all(rng.randrange(2), rng.choice((2, 20)) * MIB)
        time.sleep(rng.random() * 0.2)
        stalled = rng.random() < 0.5
        if stalled:
            self._origin.way.stall()
            time.sleep(rng.random() * 0.05)
        self._kill_some(servers)
        time.sleep(rng.random() * 0.05)
        if stalled and self._servers != [None, None]:
            self._origin.way.resume()  # or the clients of those who live would wait for ever
        crowd.finish()
        if rng.random() < 0.5:
            self._wait_for_old_processes()
        if None in self._servers and rng.random() < 0.2:
            self._kill_at_start(self._servers.index(None))
        self._start_missing()
        self._wait_for_old_processes()
        self._check_files()
        if stalled:
            self._origin.way.resume()
        self._compare_some()

    def _check_files(self) -> None:
        """While nothing is let go."""
        held = (
            [pid for server in self._servers if server is not None for pid in hold(server.pid)] if self._limit else []
        )
        try:
            self._ledger.check_files(self._files.image, self._files.bitmap)
            if self._limit:
                assert len(self._files.clean(SIZE)) * BLOCK <= 1.01 * self._limit
        finally:
            release(held)

    def _copy_all(self, number: int, rate: int) -> None:
        """Begin a slow copy of everything; one that goes on already is as good."""
        try:
            ask(self._directory / f"control{number}", "cache-all", limit_rate=rate)
        except OSError:
            pass  # its steward was killed a moment ago

    def _kill_some(self, servers: List[Server]) -> None:
        rng = self._rng
        victim = rng.choice(servers)
        kinds = by_kind(victim)
        kind = rng.choice([*kinds, "worker for", "a server", "everything", "SIGTERM"])
        self.kills.append(kind)
        if kind == "SIGTERM":
            victim.stop()
            self._servers[self._servers.index(victim)] = None
            return
        if kind == "everything":
            victims = servers
            pids = [pid for server in servers for pid in [server.pid, *descendants(server.pid)]]
        else:
            victims = [victim] if kind in ("a server", "master") else []
            pids = [victim.pid, *descendants(victim.pid)] if kind == "a server" else [rng.choice(kinds.get(kind, [0]))]
        for server in victims:
            self._left += descendants(server.pid)
            self._servers[self._servers.index(server)] = None
        kill([pid for pid in pids if pid])
        for server in victims:
            server.process.wait()

    def _kill_at_start(self, number: int) -> None:
        """One that does not live to see its clients."""
        server = self._start(number)
        time.sleep(self._rng.random() * 0.7)
        pids = descendants(server.pid)
        self._left += pids
        kill([server.pid, *pids])
        server.process.wait()

    def _wait_for_old_processes(self) -> None:
        """Nobody outlives a master for long."""
        wait_until_gone(self._left, 30)
        self._left = []

    def _compare_some(self) -> None:
        server = self._servers[self._rng.randrange(2)]
        assert server is not None
        client = connect(server.uri)
        for _ in range(10):
            length = SECTOR * self._rng.randint(1, 64)
            offset = SECTOR * self._rng.randint(0, (SIZE - length) // SECTOR)
            assert bytes(client.pread(length, offset)) == self._ledger.base[offset : offset + length]
        client.shutdown()

    def end(self) -> None:
        """The whole disk is as it should be, also after an orderly end and a new start."""
        for server in self._servers:
            assert server is not None
            client = connect(server.uri)
            assert read_all(client) == self._ledger.base
            client.shutdown()
            server.stop()
        assert self._files.is_clean()
        self._servers = [None, None]
        server = self._servers[0] = self._start(0)
        server.wait_until_ready()
        if not self._limit:
            wait_until(
                lambda: query(self._directory / "control0")["blocks"]["cached"] == -(-SIZE // BLOCK), "all blocks"
            )
        assert read_all(connect(server.uri)) == self._ledger.base
        server.stop()
        self._servers = [None, None]

    def stop(self) -> None:
        kill([pid for server in self._started for pid in [*descendants(server.pid), server.pid]])
        for server in self._started:
            server.process.wait()

    def check_logs(self) -> None:
        for path in sorted(self._directory.glob("proxy*.log")):
            for line in path.read_text().splitlines():
                if re.search(r" ERROR: |Traceback|Warning:", line):
                    assert any(re.search(pattern, line) for pattern in EXPECTED), line


@pytest.fixture
def content(seed: int) -> bytes:
    content = bytearray(random.Random(seed).randbytes(SIZE))
    content[MIB : 2 * MIB] = bytes(MIB)
    return bytes(content)


@pytest.fixture
def image(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "origin" / "origin.img"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_nothing_answered_is_lost_whoever_is_killed(
    start: Start, tmp_path: Path, image: Path, content: bytes, seed: int
) -> None:
    origin = start("--target", "--readonly", image, tcp=True)
    with Relay(origin.port) as relay:
        kill_for(SECONDS, tmp_path, Origin(relay.uri, relay), content, seed)
    assert image.read_bytes() == content


def test_nor_if_the_cache_has_a_limit(start: Start, tmp_path: Path, image: Path, content: bytes, seed: int) -> None:
    origin = start("--target", "--readonly", image, tcp=True)
    with Relay(origin.port) as relay:
        kill_for(SECONDS / 2, tmp_path, Origin(relay.uri, relay), content, seed, limit=LIMIT)


def test_nor_with_an_origin_on_a_web_server(
    tmp_path: Path, image: Path, content: bytes, seed: int, certificates: Certificates
) -> None:
    with WebServer(tmp_path, image.parent, certificates.server) as web, Relay(web.tls_port) as relay:
        origin = Origin(f"https://localhost:{relay.port}/origin.img", relay, web.env)
        kill_for(SECONDS / 3, tmp_path, origin, content, seed)


def test_nor_with_an_origin_in_ceph(tmp_path: Path, ceph: SharedCeph, content: bytes, seed: int) -> None:
    kill_for(SECONDS / 3, tmp_path, Origin(ceph.make(content).uri(), Line(ceph)), content, seed)


def kill_for(seconds: float, tmp_path: Path, origin: Origin, content: bytes, seed: int, limit: int = 0) -> None:
    rng = random.Random(seed)
    rounds, until = int(os.environ.get("XNBD_ROUNDS", 0)), time.monotonic() + seconds
    field = Field(tmp_path, origin, content, rng, limit)
    try:
        while len(field.kills) < rounds if rounds else time.monotonic() < until:
            field.round()
            if len(field.kills) % ROUNDS_PER_CACHE == 0:
                field.end()
                field.begin()
        field.end()
    finally:
        origin.way.resume()
        field.stop()
        print(f"{len(field.kills)} kills: {', '.join(field.kills)}")
    field.check_logs()
