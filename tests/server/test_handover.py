"""A client goes from worker to worker, and does not notice."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Tuple

import pytest
from caching import connect
from conftest import MIB, Start
from model import Model
from moving import move, order, pauses, restless, worker_of_only_client
from proxies import BLOCK, Proxy, make_disk, query
from rawclient import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    pack_request,
)
from relay import Relay
from server_process import Server, run, wait_until
from snapshots import snapshots_of
from stamps import LANES, check_cut, noise_disk, writers
from watching import in_threads

from xnbd.scoreboard.counters import REQUESTS
from xnbd.scoreboard.scoreboard import Scoreboard


def raw(server: Server, *, allocation: bool = False) -> RawClient:
    """A client that has negotiated."""
    return RawClient(server.connect()).negotiate(allocation=allocation)


def test_an_idle_client_goes_on_where_it_was(server: Server, image: Path) -> None:
    with raw(server) as client:
        assert client.read(1000, 5000) == image.read_bytes()[1000:6000]
        first = worker_of_only_client(server)
        second = move(server)
        assert second != first
        assert client.read(2000, 5000) == image.read_bytes()[2000:7000]
        assert client.write(77, b"moved") == 0
        assert image.read_bytes()[77:82] == b"moved"
    server.wait_for_log("left")
    assert "goes over to process" in server.log()


def test_the_old_worker_is_a_spare_one_again(server: Server) -> None:
    with raw(server) as client:
        seen = {worker_of_only_client(server)}
        for _ in range(30):
            seen.add(move(server))
        assert client.works()
    assert len(seen) <= 6  # four spare ones and some to spare
    assert "died" not in server.log()


def test_no_worker_stays_ahead_of_others(server: Server) -> None:
    with raw(server) as client:
        for _ in range(3):
            move(server)
        assert client.works()

        def priorities() -> set[int]:
            return {os.getpriority(os.PRIO_PROCESS, pid) for pid in (server.pid, *server.workers())}

        wait_until(lambda: len(priorities()) == 1, "the usual priority of all")


def test_what_was_negotiated_holds(start: Start, image: Path) -> None:
    server = start("--target", image)
    with raw(server, allocation=True) as client:
        move(server)
        client.request(BLOCK_STATUS, 0, 4096, cookie=5)
        assert [chunk.kind for chunk in client.chunks()] == [5]
        client.request(READ, 0, 100, cookie=6)
        assert client.chunks()[0].payload[8:] == image.read_bytes()[:100]


def test_time_and_figures_of_the_client_go_along(start: Start, image: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    server = start("--target", "--control", control, image)
    with raw(server) as client:
        for _ in range(3):
            client.read(0, 1000)
        (before,) = query(control)["workers"]
        move(server)
        client.read(0, 500)

        def figures() -> Tuple[int, int]:
            (worker,) = query(control)["workers"]
            return worker["requests"], worker["bytes_read"]

        wait_until(lambda: figures() == (4, 3500), "the figures of both workers together")
        (after,) = query(control)["workers"]
    assert after["pid"] != before["pid"]
    assert after["client"] == before["client"]
    assert after["connected_seconds"] > before["connected_seconds"]
    wait_until(lambda: query(control)["counters"]["requests"] == 4, "each request is counted once")


def test_totals_never_go_backwards(start: Start, image: Path, tmp_path: Path, seed: int) -> None:
    """Not while clients move and their workers are killed; read by the steward, and from the scoreboard itself."""
    control = tmp_path / "control"
    server = start("--target", "--control", control, image)
    server.expected_errors.append("killed by SIGKILL")
    scoreboard, over, rng = scoreboard_of(server), threading.Event(), random.Random(seed)

    def come_and_go() -> None:
        while not over.is_set():
            with suppress(OSError, EOFError, AssertionError), raw(server) as client:
                while not over.is_set():
                    client.read(0, 512)

    latest, readings, until = 0, 0, time.monotonic() + 6
    with closing(scoreboard), in_threads(over, *[come_and_go] * 4), restless(server, seed):
        while time.monotonic() < until:
            total = query(control)["counters"]["requests"]
            for _ in range(50):
                assert total >= latest
                latest, total, readings = total, scoreboard.lines.totals()[REQUESTS], readings + 1
            workers = server.busy_workers()
            if workers and rng.random() < 0.05:
                os.kill(rng.choice(workers), signal.SIGKILL)
    assert readings > 2000


def scoreboard_of(server: Server) -> Scoreboard:
    """What the server's processes share."""
    links = Path(f"/proc/{server.pid}/fd").iterdir()
    return Scoreboard(os.open(next(link for link in links if "memfd:xnbd-board" in os.readlink(link)), os.O_RDWR))


def test_requests_that_were_received_in_part_are_finished_by_the_next_worker(server: Server, image: Path) -> None:
    data = random.Random(1).randbytes(200_000)
    message = pack_request(WRITE, 1000, len(data), cookie=9) + data
    with raw(server) as client:
        for end in (1, 27, 28, 29, 100_000, len(message) - 1):
            client.send(message[:end])
            move(server)
            client.send(message[end:])
            assert client.simple_reply() == (0, 9, b"")
            assert image.read_bytes()[1000 : 1000 + len(data)] == data
            image_fd = image.open("r+b")
            image_fd.seek(1000)
            image_fd.write(bytes(len(data)))
            image_fd.close()


def test_a_large_write_is_finished_by_the_worker_that_has_begun_it(server: Server, image: Path) -> None:
    data = random.Random(2).randbytes(3 * MIB)
    with raw(server) as client:
        client.request(WRITE, 4097, len(data), cookie=3, data=data[: 2 * MIB])
        first = worker_of_only_client(server)
        wait_until(lambda: image.read_bytes()[4097:5000] == data[: 5000 - 4097], "the beginning of the payload")
        order(first)
        client.send(data[2 * MIB :])
        assert client.simple_reply() == (0, 3, b"")
        wait_until(lambda: server.busy_workers() not in ([], [first]), "the client's new worker")
        assert client.read(4097, len(data)) == data


@pytest.mark.parametrize("length", [100_000, MIB])
def test_replies_that_a_slow_client_has_not_taken_are_not_lost(server: Server, image: Path, length: int) -> None:
    content = image.read_bytes()
    count = 7 * MIB // length
    with raw(server) as client:
        client.send(b"".join(pack_request(READ, n, length, cookie=n) for n in range(count)))
        for _ in range(3):
            move(server)
        for n in range(count):
            assert client.simple_reply(length) == (0, n, content[n : n + length])
        assert client.works()


def test_a_client_that_takes_no_replies_has_moved_all_the_same(server: Server, image: Path) -> None:
    """What it does not take for a while is no pause of the server's."""
    count = 6
    with raw(server) as client:
        client.send(b"".join(pack_request(READ, 0, MIB, cookie=n) for n in range(count)))
        move(server)
        server.wait_for_log("pause ")
        move(server)
        wait_until(lambda: len(pauses(server.log())) == 2, "the word of the second move")
        for n in range(count):
            assert client.simple_reply(MIB) == (0, n, image.read_bytes()[:MIB])


def test_a_client_with_too_many_untaken_replies_goes_when_it_has_taken_them(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "large.img"
    image.write_bytes(b"x" * (48 * MIB))
    server = start("--target", image)
    with raw(server) as client:
        client.request(READ, 0, 48 * MIB, cookie=1)
        first = worker_of_only_client(server)
        client.receive(MIB)
        order(first)
        client.receive(47 * MIB + 16)
        wait_until(lambda: server.busy_workers() not in ([], [first]), "the client's new worker")
        assert client.works()


def test_without_a_worker_that_takes_it_the_client_stays(start: Start, image: Path) -> None:
    server = start("--target", "--max-clients", "1", image)
    with raw(server) as client:
        worker = worker_of_only_client(server)
        order(worker)
        until = threading.Event()
        timer = threading.Timer(1.0, until.set)
        timer.start()
        while not until.is_set():
            assert client.works()
        server.wait_for_log("stays with this process: no other process takes it")
        assert client.works()
        assert server.busy_workers() == [worker]


def test_an_order_to_a_spare_worker_does_nothing(server: Server) -> None:
    wait_until(lambda: len(server.workers()) >= 4, "spare workers")
    for worker in server.workers():
        order(worker)
    with raw(server) as client:
        assert client.works()
        worker = worker_of_only_client(server)
        assert client.works()
        assert server.busy_workers() == [worker]
    assert "goes on" not in server.log()


def test_the_limit_of_clients_holds_after_many_moves(start: Start, image: Path, seed: int) -> None:
    server = start("--target", "--max-clients", "3", image)
    with raw(server) as one, raw(server) as two, restless(server, seed):
        for _ in range(200):
            assert one.works()
            assert two.works()
    assert "which is the limit" not in server.log()
    with raw(server) as one, raw(server) as two, raw(server) as three:
        assert one.works()
        assert two.works()
        assert three.works()
        server.wait_for_log("3 clients are connected, which is the limit")


def test_who_writes_and_who_reads_see_one_disk(start: Start, tmp_path: Path, seed: int) -> None:
    """Six clients write numbered stamps, up to 2,000 of them in one message."""
    image = tmp_path / "disk.img"
    noise_disk(image)
    server = start("--target", image)
    with writers(server.uri, tmp_path) as clients, restless(server, seed):
        wait_until(lambda: len(pauses(server.log())) > 60, "60 moves")
        clients.stop()
    check_cut(image.read_bytes(), clients.histories, 0, 1 << 63)


@pytest.mark.parametrize("mode", ["target", "cow", "proxy"])
def test_the_model_agrees_while_clients_move(start: Start, tmp_path: Path, seed: int, mode: str) -> None:
    content = random.Random(seed).randbytes(4 * MIB + 777)
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    if mode == "proxy":
        origin = start("--target", "--readonly", image, tcp=True)
        server = Proxy(start, tmp_path, f"nbd://127.0.0.1:{origin.port}").server
    else:
        server = start("--target" if mode == "target" else "--cow-target", image)
    clients = [connect(server.uri, structured=number != 0) for number in range(4)]
    with restless(server, seed):
        Model(clients, content, random.Random(seed)).run(120)
    for client in clients:
        client.shutdown()


def test_programs_of_others_do_not_notice(start: Start, tmp_path: Path, seed: int) -> None:
    """nbdcopy writes and reads a disk, fio checks what it has written, qemu-io does both."""
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(seed).randbytes(24 * MIB))
    server = start("--target", "--create", "24M", tmp_path / "disk.img")
    with restless(server, seed):
        for _ in range(3):
            run("nbdcopy", noise, server.uri)
            run("nbdcopy", server.uri, tmp_path / "copy.img")
            assert (tmp_path / "copy.img").read_bytes() == noise.read_bytes()
        run("qemu-io", "-f", "raw", server.uri, "-c", "write -P 7 5k 3M", "-c", "read -P 7 5k 3M")
        words = f"--name=x --ioengine=nbd --uri={server.uri} --rw=randrw --bs=4k --iodepth=64 --size=16M --io_size=64M"
        run("fio", *words.split(), "--verify=crc32c", "--verify_state_save=0", f"--output={tmp_path / 'fio.log'}")


# Requests that wait for the origin


Waiting = Tuple[Relay, Proxy]


def wait_in_vain(relay: Relay) -> None:
    relay.refuse()
    relay.cut()


@pytest.mark.parametrize("structured", [False, True])
def test_requests_that_wait_for_the_origin_wait_at_the_next_worker(
    start: Start, tmp_path: Path, structured: bool
) -> None:
    disk = make_disk(tmp_path)
    content = bytearray(disk.read_bytes())
    origin = start("--target", "--readonly", disk, tcp=True)
    with Relay(origin.port) as relay:
        proxy = Proxy(start, tmp_path, relay.uri)
        wait_in_vain(relay)
        with proxy.raw(structured=structured) as client:
            client.request(READ, 5 * BLOCK + 10, 9000, cookie=1)
            client.request(WRITE, 20 * BLOCK + 1, 3, cookie=2, data=b"abc")
            client.request(WRITE_ZEROES, 30 * BLOCK + 5, 2 * BLOCK, cookie=3, flags=FUA)
            client.request(TRIM, 40 * BLOCK + 5, 2 * BLOCK, cookie=4)
            client.request(CACHE, 50 * BLOCK, BLOCK, cookie=5)
            client.request(WRITE, 60 * BLOCK + 1, MIB, cookie=6, flags=FUA, data=b"l" * MIB)
            proxy.wait_for_queue(6)
            for _ in range(3):
                move(proxy.server)
                proxy.wait_for_queue(6)
            client.request(FLUSH, cookie=7)
            assert client.simple_reply() == (0, 7, b"")
            relay.accept()
            answered = set()
            for _ in range(6):
                if client.sock.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL) == b"\x66\x8e\x33\xef":
                    (chunk,) = client.chunks()
                    answered.add(chunk.cookie)
                    assert chunk.payload[8:] == content[5 * BLOCK + 10 :][:9000]
                    continue
                cookie = int.from_bytes(client.sock.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)[8:], "big")
                assert client.simple_reply(9000 if cookie == 1 else 0)[:2] == (0, cookie)
                answered.add(cookie)
            assert answered == set(range(1, 7))
        with proxy.raw() as client:
            content[20 * BLOCK + 1 : 20 * BLOCK + 4] = b"abc"
            content[60 * BLOCK + 1 : 60 * BLOCK + 1 + MIB] = b"l" * MIB
            for at in (30, 40):
                content[at * BLOCK + 5 : (at + 2) * BLOCK + 5] = bytes(2 * BLOCK)
            assert client.read(0, len(content)) == content


def test_an_old_client_gets_its_replies_in_order_all_the_same(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    content = disk.read_bytes()
    origin = start("--target", "--readonly", disk, tcp=True)
    with Relay(origin.port) as relay:
        proxy = Proxy(start, tmp_path, relay.uri, "--oldstyle", "--readahead", "0")
        sock = proxy.server.connect()
        with RawClient(sock) as client:
            client.receive(152)
            client.read(0, BLOCK)
            wait_in_vain(relay)
            requests = [
                pack_request(READ, 100 * BLOCK, 10, cookie=1),
                pack_request(READ, 10, 100, cookie=2),
                pack_request(WRITE, 7, 3, cookie=3) + b"new",
                pack_request(READ, 200 * BLOCK, 10, cookie=4),
                pack_request(FLUSH, 0, 0, cookie=5),
                pack_request(READ, 1 << 40, 10, cookie=6),
            ]
            client.send(b"".join(requests))
            proxy.wait_for_queue(2)
            for _ in range(2):
                move(proxy.server)
                proxy.wait_for_queue(2)
            relay.accept()
            assert client.simple_reply(10) == (0, 1, content[100 * BLOCK :][:10])
            assert client.simple_reply(100) == (0, 2, content[10:110])
            assert client.simple_reply() == (0, 3, b"")
            assert client.simple_reply(10) == (0, 4, content[200 * BLOCK :][:10])
            assert client.simple_reply() == (0, 5, b"")
            assert client.simple_reply() == (22, 6, b"")
            assert client.read(7, 3) == b"new"
            client.request(DISC)
            assert client.closed()


@pytest.mark.parametrize("used", [True, False])
def test_the_next_worker_is_connected_to_the_origin_if_the_old_one_was(
    start: Start, tmp_path: Path, used: bool
) -> None:
    """Before the client moves, which would have to wait for that."""
    disk = make_disk(tmp_path)
    proxy = Proxy(start, tmp_path, start("--target", "--readonly", disk).uri)
    with proxy.raw() as client:
        if used:
            client.read(0, BLOCK)
        before = proxy.query()["origin"]["connections"]
        assert before == used
        move(proxy.server)
        assert proxy.query()["origin"]["connections"] == 2 * before
        assert client.works()


def test_the_old_worker_leaves_no_block_locked(start: Start, tmp_path: Path) -> None:
    """What it had asked a silent origin for is its own for a while; all else is the next worker's at once."""
    disk = make_disk(tmp_path)
    origin = start("--target", "--readonly", disk, tcp=True)
    with Relay(origin.port) as relay:
        proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
        with proxy.raw() as client:
            client.read(0, BLOCK)
            wait_in_vain(relay)
            client.send(b"".join(pack_request(READ, n * 64 * BLOCK, 1, cookie=n) for n in range(1, 10)))
            proxy.wait_for_queue(9)
            move(proxy.server)
            relay.accept()
            assert {client.simple_reply(1)[1] for _ in range(9)} == set(range(1, 10))


def test_snapshots_and_a_switch_go_on_meanwhile(start: Start, tmp_path: Path, seed: int) -> None:
    disk = tmp_path / "disk.img"
    noise_disk(disk)
    origin = start("--target", "--readonly", disk, tcp=True)
    proxy = Proxy(start, tmp_path, f"nbd://127.0.0.1:{origin.port}")
    names = [name for name in LANES if name != "bursts"]  # which wants its replies in order
    with writers(proxy.uri, tmp_path, names) as clients, restless(proxy.server, seed):
        proxy.bgctl("--cache-all")
        proxy.bgctl("--switch")
        proxy.bgctl("--snapshot")
        clients.stop()
    histories = clients.histories
    check_cut(proxy.cache.read_bytes(), histories, 0, 1 << 63)
    (snapshot,) = snapshots_of(proxy.cache)
    check_cut(snapshot.read_bytes(), histories, 0, 1 << 63)


def test_the_log_says_how_long_a_client_has_waited(server: Server) -> None:
    with raw(server):
        move(server)
        server.wait_for_log("pause ")
    assert re.search(r"goes on as uid:\d+, process \d+ had it before; pause \d+\.\d ms", server.log())
