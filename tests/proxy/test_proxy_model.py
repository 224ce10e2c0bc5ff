"""The model test through proxies: several clients and servers on one cache, with a copy of everything under way."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import nbd
import pytest
from caching import BLOCK, CacheFiles, ask, bgctl, connect, kill_server, query
from certificates import Certificates
from conftest import MIB, Start
from ledger import Crowd, Ledger
from model import Model, read_all, wait_for_all
from mounts import attach, detach
from relay import Relay
from server_process import Server, command, wait_until

Content = Callable[[random.Random, int], bytes]

MEETING = 5.0

OPTIONS = [
    [],
    ["--oldstyle"],
    ["--readahead", "0"],
    ["--readahead", "64M", "--max-queue-size", "3"],
    ["--max-queue-size", "1", "--max-buf-size", "1"],
    ["--max-queue-size", "0", "--max-buf-size", "0"],
]


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


def noise(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size)


def sparse(rng: random.Random, size: int) -> bytes:
    """Noise with long zeros, which a server may tell as holes."""
    content = bytearray(rng.randbytes(size))
    for _ in range(8):
        start = rng.randrange(size)
        end = min(size, start + rng.choice((100, 5000, 70_000, 2 * MIB)))
        content[start:end] = bytes(end - start)
    return bytes(content)


SIZES = [(1, 20, noise), (511, 40, sparse), (4097, 60, noise), (12 * MIB + 777, 80, sparse)]


def make_image(path: Path, content: bytes) -> None:
    """A file in which whole blocks of zeros are holes."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), BLOCK):
            block = content[at : at + BLOCK]
            if any(block):
                os.pwrite(file.fileno(), block, at)


def clients_of(servers: List[Server], count: int) -> List[nbd.NBD]:
    return [connect(servers[number % len(servers)].uri, structured=number != 0) for number in range(count)]


def disconnect(clients: List[nbd.NBD]) -> None:
    for client in clients:
        client.shutdown()


def copy_all(control: Path) -> None:
    """Begin a copy in the background, or see it begun."""
    answer = ask(control, "cache-all", wait=False)
    assert answer.get("done"), answer


def check_at_rest(start: Start, origin: str, files: CacheFiles, content: bytes) -> None:
    """With no server: the files are closed cleanly; with a new one everything is there."""
    assert files.is_clean()
    server = start(*files.arguments(origin))
    client = connect(server.uri)
    assert read_all(client) == content
    client.shutdown()
    server.stop()
    assert files.is_clean()


def check_switched(start: Start, origin: str, files: CacheFiles, content: bytes) -> None:
    """The cache image is the disk, once all of it is cached."""
    server = start(*files.arguments(origin))
    client = connect(server.uri)
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    assert read_all(client) == content
    client.pwrite(content[:1], 0)
    client.shutdown()
    server.stop()
    target = start("--target", files.image)
    client = connect(target.uri)
    assert read_all(client)[: len(content)] == content
    client.shutdown()
    target.stop()


@pytest.mark.parametrize("size, rounds, make", SIZES)
def test_two_servers_on_one_cache_agree_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random, size: int, rounds: int, make: Content
) -> None:
    content, image = make(rng, size), tmp_path / "origin.img"
    make_image(image, content)
    origin = start("--target", "--readonly", image)
    second = tmp_path / "control2"
    proxies = [start(*files.arguments(origin.uri)), start(*files.arguments(origin.uri, control=second))]
    clients = clients_of(proxies, 5)
    model = Model(clients, content, rng)
    model.play(rounds // 2)
    copy_all(second)
    model.run(rounds // 2)
    disconnect(clients)
    for proxy in proxies:
        proxy.stop()
    assert image.read_bytes() == content
    check_at_rest(start, origin.uri, files, bytes(model.content))
    check_switched(start, origin.uri, files, bytes(model.content))


def test_a_proxy_with_tls_on_both_sides_agrees_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random, certificates: Certificates
) -> None:
    content, image = sparse(rng, 6 * MIB + 777), tmp_path / "origin.img"
    make_image(image, content)
    origin = start("--target", "--readonly", image, tls=certificates)
    proxy = start(*files.arguments(origin.uri), tls=certificates)
    clients = clients_of([proxy], 3)
    model = Model(clients, content, rng)
    model.play(25)
    copy_all(files.control)
    model.run(25)
    disconnect(clients)
    proxy.stop()
    assert image.read_bytes() == content
    check_at_rest(start, origin.uri, files, bytes(model.content))


@pytest.mark.parametrize("size", [4097, 8 * MIB + 1])
def test_a_proxy_of_a_proxy_agrees_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random, size: int
) -> None:
    content, image, near = sparse(rng, size), tmp_path / "origin.img", CacheFiles(tmp_path, "near")
    make_image(image, content)
    origin = start("--target", "--readonly", image)
    middle = start(*files.arguments(origin.uri))
    proxy = start(*near.arguments(middle.uri))
    clients = clients_of([proxy], 3)
    model = Model(clients, content, rng)
    model.play(30)
    copy_all(near.control)
    model.run(30)
    client = connect(middle.uri)
    assert read_all(client) == content
    disconnect([*clients, client])
    for server in (proxy, middle):
        server.stop()
    assert image.read_bytes() == content
    check_at_rest(start, middle_of(start, origin.uri, files), near, bytes(model.content))


def test_a_proxy_in_the_middle_may_be_killed(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    content, image, near = sparse(rng, 24 * MIB), tmp_path / "origin.img", CacheFiles(tmp_path, "near")
    make_image(image, content)
    arguments = files.arguments(start("--target", "--readonly", image).uri)
    middle = start(*arguments, tcp=True)
    ledger = Ledger(content)
    with Relay(middle.port) as relay:
        proxy = start(*near.arguments(relay.uri))
        crowd = Crowd([proxy.uri], 4, ledger, rng)
        for _ in range(3):
            crowd.wait_for(rng.randrange(30))
            middle.expected_errors += ["died: killed by SIGKILL", "the steward died: killed by SIGKILL"]
            kill_server(middle)
            middle = start(*arguments, tcp=True)
            relay.retarget(middle.port)
        crowd.finish()
        ledger.check_files(near.image, near.bitmap)
        assert read_all(connect(proxy.uri)) == ledger.base
        assert read_all(connect(middle.uri)) == content
        proxy.stop()


def middle_of(start: Start, origin: str, files: CacheFiles) -> str:
    """The proxy in the middle is started again at the same address as before."""
    server = start(*files.arguments(origin))
    link = files.image.parent / "server1.sock"
    os.link(server.socket, link)
    return f"nbd+unix:///?socket={link}"


def test_an_oldstyle_proxy_in_the_middle_agrees_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    size = 6 * MIB
    content, image, near = sparse(rng, size), tmp_path / "origin.img", CacheFiles(tmp_path, "near")
    make_image(image, content)
    origin = start("--target", "--readonly", "--oldstyle", image)
    middle = start(*files.arguments(origin.uri, "--oldstyle"))
    proxy = start(*near.arguments(middle.uri))
    clients = clients_of([proxy], 3)
    model = Model(clients, content, rng)
    model.run(60)
    disconnect(clients)
    assert image.read_bytes() == content


def test_readonly_clients_fill_the_cache_and_see_what_others_write(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    content, image = noise(rng, 4 * MIB + 5), tmp_path / "origin.img"
    image.write_bytes(content)
    origin = start("--target", "--readonly", image)
    writable = start(*files.arguments(origin.uri))
    readonly = start(*files.arguments(origin.uri, "--readonly", control=tmp_path / "control2"))
    clients, reader = clients_of([writable], 2), connect(readonly.uri)
    assert reader.is_read_only()
    model = Model(clients, content, rng)
    for _ in range(10):
        model.play(4)
        assert read_all(reader) == model.content
    with pytest.raises(nbd.Error):
        reader.set_strict_mode(0)
        reader.pwrite(b"x" * 512, 0)
    assert read_all(clients[0]) == model.content
    assert len(files.cached()) == 1025


def test_a_larger_cache_full_of_garbage_is_no_harm(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    content, image = sparse(rng, 3 * MIB + 1000), tmp_path / "origin.img"
    make_image(image, content)
    garbage = rng.randbytes(5 * MIB)
    files.image.write_bytes(garbage)
    origin = start("--target", "--readonly", image)
    proxy = start(*files.arguments(origin.uri, "--clear-bitmap"))
    clients = clients_of([proxy], 3)
    model = Model(clients, content, rng)
    model.play(40)
    copy_all(files.control)
    model.run(40)
    disconnect(clients)
    proxy.stop()
    assert files.image.read_bytes()[len(content) :] == garbage[len(content) :]
    check_at_rest(start, origin.uri, files, bytes(model.content))
    check_switched(start, origin.uri, files, bytes(model.content))


@pytest.fixture
def device(tmp_path: Path, rng: random.Random) -> Iterator[Path]:
    """A loop device full of garbage."""
    backing = tmp_path / "backing.img"
    backing.write_bytes(rng.randbytes(4 * MIB + 512))
    path = attach(backing)
    yield path
    detach(path)


@pytest.mark.root(reason="loop devices are made by root only")
def test_a_block_device_can_be_the_cache(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random, device: Path
) -> None:
    content, image = sparse(rng, 4 * MIB), tmp_path / "origin.img"
    make_image(image, content)
    origin = start("--target", "--readonly", image)
    files.image = device
    proxy = start(*files.arguments(origin.uri, "--clear-bitmap"))
    clients = clients_of([proxy], 3)
    model = Model(clients, content, rng, exact_trim=False)
    model.play(40)
    copy_all(files.control)
    model.run(40)
    disconnect(clients)
    proxy.stop()
    assert image.read_bytes() == content
    check_at_rest(start, origin.uri, files, bytes(model.content))
    check_switched(start, origin.uri, files, bytes(model.content))


def test_clients_who_meet_at_missing_blocks_agree(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    """All work on the same few blocks, which are new to everybody, over a link that is slow and breaks."""
    content, image, second = sparse(rng, 24 * MIB), tmp_path / "origin.img", tmp_path / "control2"
    make_image(image, content)
    origin, ledger = start("--target", "--readonly", image, tcp=True), Ledger(content)
    until = time.monotonic() + MEETING
    with Relay(origin.port, delay=0.002) as relay:
        one, other = rng.sample(OPTIONS, 2)
        proxies = [start(*files.arguments(relay.uri, *one)), start(*files.arguments(relay.uri, *other, control=second))]
        crowd = Crowd([proxy.uri for proxy in proxies], 6, ledger, rng)
        while time.monotonic() < until:
            ledger.hot = rng.randrange(ledger.sectors - 256), rng.choice((8, 64, 256))
            crowd.wait_for(4)
            if rng.random() < 0.1:
                relay.cut()
        crowd.finish()
        ledger.check_files(files.image, files.bitmap)
        assert read_all(connect(proxies[0].uri)) == ledger.base
        for proxy in proxies:
            proxy.stop()
    assert image.read_bytes() == content
    assert files.image.read_bytes() == ledger.base


def test_servers_of_one_client_each_share_a_cache(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    """As a super-server starts them, each with a steward of its own."""
    content, image, log = sparse(rng, 5 * MIB + 9), tmp_path / "origin.img", tmp_path / "inetd.log"
    make_image(image, content)
    origin = start("--target", "--readonly", image)
    clients = []
    for _ in range(3):
        clients.append(nbd.NBD())
        clients[-1].connect_command(command(*files.arguments(origin.uri, "--inetd", "--logpath", log)))
    model = Model(clients, content, rng)
    model.play(40)
    copy_all(files.control)
    model.run(40)
    disconnect(clients)
    wait_until(files.is_clean, "the end of all servers")
    assert "Traceback" not in log.read_text()
    assert " ERROR: " not in log.read_text()
    check_at_rest(start, origin.uri, files, bytes(model.content))


def test_zeroing_more_than_one_lock_takes_meets_readers_and_writers(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    size, image = 300 * MIB + 100, tmp_path / "origin.img"
    spots = [rng.randrange(size - MIB) for _ in range(20)]
    with image.open("wb") as file:
        file.truncate(size)
        for spot in spots:
            os.pwrite(file.fileno(), rng.randbytes(MIB), spot)
    content = image.read_bytes()
    proxy = start(*files.arguments(start("--target", "--readonly", image).uri))
    clients = clients_of([proxy], 4)
    errors: List[int] = []

    def on_completion(error: Any) -> int:
        errors.append(error.value)
        return 1

    first, end = 70 * MIB + 5, 280 * MIB - 5
    buffers = [nbd.Buffer(MIB) for _ in spots]
    for number, (spot, buffer) in enumerate(zip(spots, buffers)):
        clients[number % 3].aio_pread(buffer, spot, on_completion)
    clients[3].aio_zero(end - first, first, on_completion)
    clients[0].aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"w" * MIB)), 10 * MIB + 1, on_completion)
    wait_for_all(clients)
    assert errors == [0] * 22
    expected = bytearray(content)
    expected[first:end] = bytes(end - first)
    expected[10 * MIB + 1 : 11 * MIB + 1] = b"w" * MIB
    for client in clients[:2]:
        assert read_all(client) == expected
    disconnect(clients)
    proxy.stop()
    assert files.image.read_bytes() == expected
    assert image.read_bytes() == content


def test_holes_of_a_large_origin_become_local_without_a_byte(
    start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random
) -> None:
    """More than one question about holes has room for; what was in the cache there is gone."""
    size, image = 5 << 30, tmp_path / "origin.img"
    spots = {offset: rng.randbytes(3 * BLOCK) for offset in (0, (2 << 30) - BLOCK, (4 << 30) + 777, size - 3 * BLOCK)}
    for path in (image, files.image):
        with path.open("wb") as file:
            file.truncate(size)
    with image.open("rb+") as file:
        for offset, data in spots.items():
            os.pwrite(file.fileno(), data, offset)
    garbage = 3 << 30
    with files.image.open("rb+") as file:
        os.pwrite(file.fileno(), rng.randbytes(MIB), garbage)
    proxy = start(*files.arguments(start("--target", "--readonly", image).uri, "--clear-bitmap"))
    client = connect(proxy.uri)
    client.pwrite(b"w" * 100, (1 << 30) + 50)
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    assert query(files.control)["counters"]["bytes_fetched"] < MIB
    spots[(1 << 30) + 50] = b"w" * 100
    for offset, data in spots.items():
        assert bytes(client.pread(len(data), offset)) == data
    assert not any(client.pread(MIB, garbage))
    assert not any(client.pread(50, 1 << 30))
    client.shutdown()
    proxy.stop()
    assert files.image.stat().st_blocks * 512 < 4 * MIB


def test_the_report_counts_what_is_there(start: Start, tmp_path: Path, files: CacheFiles, rng: random.Random) -> None:
    content, image = noise(rng, 2 * MIB + 1), tmp_path / "origin.img"
    image.write_bytes(content)
    proxy = start(*files.arguments(start("--target", "--readonly", image).uri, "--readahead", "0"))
    client = connect(proxy.uri)
    client.pread(1, 5 * BLOCK)
    client.pwrite(bytes(BLOCK), 9 * BLOCK)
    wait_until(lambda: query(files.control)["blocks"] == {"total": 513, "cached": 2, "written": 1}, "two blocks cached")
    assert files.cached() == [5, 9]
    read_all(client)
    wait_until(
        lambda: query(files.control)["blocks"] == {"total": 513, "cached": 513, "written": 1}, "all blocks cached"
    )
