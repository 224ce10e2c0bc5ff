"""Blocks that another process has in hand: what it costs to wait for them, and for how long that goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from caching import BLOCK, CacheFiles, bgctl, by_kind, query
from conftest import MIB, Start
from proxies import program
from rawclient import READ, WRITE, RawClient, pack_request
from relay import Relay
from server_process import Server, run_seconds, wait_until

SIZE = 4 * MIB
FAR = 512
"""A block that nobody asks for but to have a connection to the origin."""


@pytest.fixture(scope="module")
def disk() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def relay(start: Start, tmp_path: Path, disk: bytes) -> Iterator[Relay]:
    image = tmp_path / "origin.img"
    image.write_bytes(disk)
    with Relay(start("--target", image, tcp=True).port) as link:
        yield link


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def clients_of(proxy: Server, count: int, stack: ExitStack) -> List[RawClient]:
    """So many, whose workers are all connected to the origin."""
    clients = [stack.enter_context(RawClient(proxy.connect())).negotiate() for _ in range(count)]
    for number, client in enumerate(clients):
        client.read((FAR + 8 * number) * BLOCK, BLOCK)
    return clients


def test_many_clients_that_want_the_same_blocks_of_a_silent_origin_take_no_processor(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    with ExitStack() as stack:
        clients = clients_of(proxy, 12, stack)
        workers = proxy.busy_workers()
        relay.stall()
        for number, client in enumerate(clients):  # no two of them want the blocks in the same order
            order = [(block * 13 + number) % 64 for block in range(64)]
            client.send(b"".join(pack_request(READ, block * BLOCK, BLOCK, cookie=block) for block in order))
        wait_until(lambda: query(files.control)["queue"]["requests"] == 12 * 64, "reads that wait")
        until = time.monotonic() + 1
        wait_until(lambda: time.monotonic() > until, "a second in which pauses have become long")
        before, until = sum(map(run_seconds, workers)), time.monotonic() + 2
        wait_until(lambda: time.monotonic() > until, "two seconds")
        assert sum(map(run_seconds, workers)) - before < 0.3
        relay.resume()
        for client in clients:
            for _ in range(64):
                error, block, data = client.simple_reply(BLOCK)
                assert (error, data) == (0, disk[block * BLOCK : (block + 1) * BLOCK])


def test_what_another_client_fetches_comes_at_once(start: Start, files: CacheFiles, relay: Relay, disk: bytes) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    with ExitStack() as stack:
        one, other = clients_of(proxy, 2, stack)
        took = []
        for offset in range(0, 64 * BLOCK, BLOCK):
            for client in (one, other):
                client.request(READ, offset, BLOCK)
            began = time.monotonic()
            for client in (one, other):
                assert client.simple_reply(BLOCK)[2] == disk[offset : offset + BLOCK]
            took.append(time.monotonic() - began)
        assert sorted(took)[32] < 0.2


def test_with_a_limit_what_a_stopped_process_has_in_hand_is_an_error(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0", "--origin-timeout", "1"))
    with ExitStack() as stack:
        (one,) = clients_of(proxy, 1, stack)
        (holder,) = proxy.busy_workers()
        (other,) = clients_of(proxy, 1, stack)
        relay.stall()
        one.request(READ, 0, 64 * BLOCK)
        wait_until(lambda: query(files.control)["queue"]["requests"] == 1, "a read that waits")
        with stopped(holder):
            relay.resume()
            other.send(pack_request(READ, 8 * BLOCK, BLOCK, cookie=1))
            other.send(pack_request(WRITE, 16 * BLOCK, BLOCK, cookie=2) + bytes(BLOCK))
            other.send(pack_request(WRITE, 24 * BLOCK + 10, 10, cookie=3) + bytes(10))
            other.request(WRITE, 32 * BLOCK, 3 * MIB, cookie=4, data=bytes(3 * MIB))
            answers = {other.simple_reply()[:2] for _ in range(4)}
            assert answers == {(errno.EIO, cookie) for cookie in (1, 2, 3, 4)}
            assert other.read(FAR * BLOCK, BLOCK) == bytes(BLOCK)
            proxy.wait_for_log(" no more for blocks that another process has in hand")
            assert other.read((FAR + 448) * BLOCK, BLOCK) == disk[(FAR + 448) * BLOCK : (FAR + 449) * BLOCK]
        wait_until(lambda: query(files.control)["queue"]["requests"] == 0, "the end of all that waits")
        assert other.read(8 * BLOCK, BLOCK) == disk[8 * BLOCK : 9 * BLOCK]


def test_xnbd_bgctl_gives_up_on_a_stopped_steward(start: Start, files: CacheFiles, relay: Relay) -> None:
    proxy = start(*files.arguments(relay.uri))
    query(files.control)
    (steward,) = by_kind(proxy)["steward"]
    silence = f"the server at {files.control} does not answer: see whether it hangs or is stopped"
    for command in ("--query", "--switch", "--cache-all"):
        with stopped(steward):
            status, out, complaint = bgctl("--timeout", "0.5", command, files.control, check=False)
        assert (status, out, complaint) == (1, "", f"xnbd-bgctl: {silence}\n")
    relay.stall()
    with subprocess.Popen(program("--timeout", "3", "--cache-all", files.control), stderr=subprocess.PIPE) as copying:
        wait_until(lambda: "cache_all" in query(files.control), "a copy")
        with stopped(steward):
            assert copying.wait(30) == 1
            assert copying.stderr is not None
            assert silence in copying.stderr.read().decode()
