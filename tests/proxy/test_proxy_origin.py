"""A proxy and its origin: of every kind, lying, cut, stalled, away, moved; and the faults of the cache's own files."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, List

import lying_origin as lie
import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, bgctl, connect, kill_server, query
from conftest import MIB, Start
from launch import fails
from lying_origin import Asked, LyingOrigin, Visitor
from model import read_all
from mounts import small_tmpfs
from origin_programs import OriginProgram
from rawclient import READ, WRITE, RawClient, pack_request
from relay import Relay
from server_process import Server, command, cpu_seconds, run, wait_until

from xnbd.system.file_locks import RangeLocks

SIZE = 6 * MIB + 512
TROUBLE = r"the origin cannot read|cannot write to the cache image"


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Noise, with zeros from 1 MiB to 2 MiB."""
    content = bytearray(random.Random(32).randbytes(SIZE))
    content[MIB : 2 * MIB] = bytes(MIB)
    return bytes(content)


@pytest.fixture
def image(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    return path


def read(client: nbd.NBD, block: int, count: int = 1) -> bytes:
    return bytes(client.pread(count * BLOCK, block * BLOCK))


def bring(client: nbd.NBD, offset: int, length: int) -> None:
    """Have this cached by a proxy that gives its origin little time: errors are allowed, since it may need longer."""
    wait_until(lambda: Reading(client, offset, length).wait() == 0, "the origin", 60)


def bring_and_read_all(client: nbd.NBD) -> bytes:
    for offset in range(0, SIZE, 64 * BLOCK):
        bring(client, offset, min(64 * BLOCK, SIZE - offset))
    return read_all(client)


def at(disk: bytes, block: int, count: int = 1) -> bytes:
    return disk[block * BLOCK : (block + count) * BLOCK]


# Origins of every kind


OWN = {"xnbd-server": [], "xnbd-server oldstyle": ["--oldstyle"]}
KINDS = [*OWN, "nbdkit", "nbdkit without structured replies", "nbdkit oldstyle", "nbdkit with 64 KiB requests"]
KINDS += ["qemu-nbd", "nbd-server"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_comes_once_and_is_right(
    start: Start, tmp_path: Path, files: CacheFiles, disk: bytes, image: Path, kind: str
) -> None:
    if kind in OWN:
        own = start("--target", "--readonly", "--exportname", "disk", *OWN[kind], image)
        check_full_read(start, files, f"nbd+unix:///disk?socket={own.socket}", disk)
        return
    origin = OriginProgram(kind, image, tmp_path)
    try:
        check_full_read(start, files, origin.uri, disk)
        assert origin.is_alive(), origin.log()
        assert "abort" not in origin.log().lower()
        client = nbd.NBD()
        client.set_export_name("disk")
        client.connect_uri(origin.uri)
        assert client.pread(16 * BLOCK, 0) == at(disk, 0, 16)
        client.shutdown()
    finally:
        origin.stop()


def check_full_read(start: Start, files: CacheFiles, uri: str, disk: bytes) -> None:
    proxy = start(*files.arguments(uri))
    run("nbdcopy", proxy.uri, files.image.parent / "copy.img")
    assert (files.image.parent / "copy.img").read_bytes() == disk
    assert query(files.control)["counters"]["bytes_fetched"] <= 1.01 * SIZE
    assert read_all(connect(proxy.uri)) == disk
    assert query(files.control)["counters"]["bytes_fetched"] <= 1.01 * SIZE
    proxy.stop()
    assert files.image.read_bytes() == disk


def test_an_origin_is_left_in_the_middle_of_requests_without_harm(
    start: Start, tmp_path: Path, files: CacheFiles, disk: bytes, image: Path
) -> None:
    origin = OriginProgram("nbdkit", image, tmp_path)
    try:
        proxy = start(*files.arguments(origin.uri))
        for block in range(0, 1000, 50):
            client = connect(proxy.uri)
            reading = Reading(client, block * BLOCK, 50 * BLOCK)
            client.poll(0)
            del reading, client
        assert read_all(connect(proxy.uri)) == disk
        proxy.stop()
        assert origin.is_alive(), origin.log()
    finally:
        origin.stop()


# Lies

Answer = Callable[[Asked], bytes]


class Liar:
    """What a `LyingOrigin` does: *answer* READs, honestly by default. Its size can change too."""

    def __init__(self, disk: bytes) -> None:
        self.size = len(disk)
        self.answer: Answer = self.honest
        self.close = False
        self._disk = disk

    def honest(self, asked: Asked) -> bytes:
        return lie.simple(asked.cookie, self._data(asked))

    def _data(self, asked: Asked) -> bytes:
        return self._disk[asked.offset : asked.offset + asked.length]

    def __call__(self, visitor: Visitor) -> None:
        visitor.negotiate(self.size, structured=False)
        while True:
            asked = visitor.request()
            last, answer = self.close, self.answer  # the test may change them as soon as it has the answer
            visitor.send(answer(asked))
            if last:
                return


LIES = {
    "wrong magic": lambda asked: b"\x12" + lie.simple(asked.cookie, bytes(asked.length))[1:],
    "wrong cookie": lambda asked: lie.simple(asked.cookie ^ 1 << 60, bytes(asked.length)),
    "structured without a word": lambda asked: lie.data_chunk(asked.cookie, asked.offset, bytes(asked.length)),
}


@pytest.fixture
def liar(tmp_path: Path, disk: bytes) -> Iterator[Liar]:
    """An origin at ``liar.sock`` in *tmp_path*."""
    liar = Liar(disk)
    with LyingOrigin(tmp_path / "liar.sock", liar):
        yield liar


@pytest.fixture
def deceived(start: Start, tmp_path: Path, files: CacheFiles, liar: Liar) -> Server:
    """A proxy of the liar."""
    return start(*files.arguments(f"nbd+unix:///?socket={tmp_path / 'liar.sock'}", "--readahead", "0"))


@pytest.mark.parametrize("name", LIES)
def test_a_lie_caches_nothing_and_is_asked_again(
    deceived: Server, files: CacheFiles, liar: Liar, disk: bytes, name: str
) -> None:
    client = connect(deceived.uri)
    assert read(client, 0) == at(disk, 0)
    liar.answer = LIES[name]
    reading = Reading(client, 8 * BLOCK, 4 * BLOCK)
    deceived.wait_for_log(" for it, trying again")
    assert not reading.is_done()
    assert files.cached() == [0]
    assert read(client, 0) == at(disk, 0)
    liar.answer = liar.honest
    assert reading.content() == at(disk, 8, 4)
    assert "origin nbd+unix:///" in deceived.log()


@pytest.mark.parametrize("missing", [1, 4096, 16390])
def test_a_short_reply_caches_nothing(
    deceived: Server, files: CacheFiles, liar: Liar, disk: bytes, missing: int
) -> None:
    client = connect(deceived.uri)
    liar.answer, liar.close = (lambda asked: lie.simple(asked.cookie, bytes(asked.length))[:-missing]), True
    reading = Reading(client, 8 * BLOCK, 4 * BLOCK)
    client.poll(0)
    deceived.wait_for_log("it closed the connection with 1 request waiting")
    assert not reading.is_done()
    assert files.cached() == []
    liar.answer, liar.close = liar.honest, False
    assert reading.content() == at(disk, 8, 4)


def test_an_error_reply_is_the_clients_error(deceived: Server, files: CacheFiles, liar: Liar, disk: bytes) -> None:
    client = connect(deceived.uri)
    liar.answer = lambda asked: lie.simple(asked.cookie, error=5)
    assert Reading(client, 8 * BLOCK, 4 * BLOCK).wait() == errno.EIO
    with pytest.raises(nbd.Error):  # a part of a block cannot be written without the rest of it
        client.pwrite(b"x", 8 * BLOCK)
    client.pwrite(b"w" * BLOCK, 9 * BLOCK)
    assert files.cached() == [9]
    assert "the origin cannot read" in deceived.log()
    liar.answer = liar.honest
    assert read(client, 8, 3) == at(disk, 8) + b"w" * BLOCK + at(disk, 10)


def test_only_who_needs_a_block_that_the_origin_cannot_read_gets_an_error(
    deceived: Server, files: CacheFiles, liar: Liar, disk: bytes
) -> None:
    def answer(asked: Asked) -> bytes:
        bad = asked.offset <= 10 * BLOCK < asked.offset + asked.length
        return lie.simple(asked.cookie, error=5) if bad else liar.honest(asked)

    liar.answer = answer
    reads = [(8, 1), (9, 1), (10, 1), (11, 1), (8, 2), (9, 2), (11, 5)]
    with RawClient(deceived.connect()).negotiate() as client:
        client.send(b"".join(pack_request(READ, at * BLOCK, n * BLOCK, cookie=at << 8 | n) for at, n in reads))
        for _ in reads:
            error, cookie, _ = client.simple_reply()
            first, count = divmod(cookie, 256)
            assert bool(error) == (first <= 10 < first + count)
            assert error or client.receive(count * BLOCK) == at(disk, first, count)
    assert files.cached() == [8, 9, *range(11, 16)]


def test_a_copy_goes_on_past_what_the_origin_cannot_read_and_tells_of_it(
    deceived: Server, files: CacheFiles, liar: Liar
) -> None:
    def answer(asked: Asked) -> bytes:
        bad = any(asked.offset <= block * BLOCK < asked.offset + asked.length for block in (3, 200))
        return lie.simple(asked.cookie, error=5) if bad else liar.honest(asked)

    liar.answer = answer
    status, _, err = bgctl("--cache-all", files.control, check=False)
    assert (status, err) == (
        1,
        "xnbd-bgctl: 2 blocks could not be copied: Input/output error (the log tells which)\n",
    )
    blocks = range(-(-SIZE // BLOCK))
    assert files.cached() == [block for block in blocks if block not in (3, 200)]
    for block in (3, 200):
        assert f"the origin cannot read 4096 bytes at {block * BLOCK}:" in deceived.log()
    liar.answer = liar.honest
    bgctl("--cache-all", files.control)
    assert files.cached() == list(blocks)


def test_a_long_write_whose_last_block_cannot_be_read_is_an_error_though_others_are_locked(
    start: Start, tmp_path: Path, files: CacheFiles
) -> None:
    size = 12 * MIB

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(size, structured=False)
        while True:
            visitor.send(lie.simple(visitor.request().cookie, error=5))

    with LyingOrigin(tmp_path / "liar.sock", behave) as origin:
        proxy = start(*files.arguments(origin.uri, "--readahead", "0"))
        with RawClient(proxy.connect()).negotiate() as client, files.bitmap.open("rb+") as bitmap:
            locks = RangeLocks(bitmap.fileno())
            assert locks.try_acquire(0, 8 * MIB >> 15)  # more than a session holds in memory
            client.request(WRITE, 0, size - 100, data=bytes(size - 100))
            proxy.wait_for_log("the origin cannot read 4096 bytes")
            locks.release(0, 8 * MIB >> 15)
            assert client.simple_reply()[0] == errno.EIO
            assert client.works()


def test_many_reads_of_blocks_that_another_process_has_in_hand_do_not_spin(
    deceived: Server, files: CacheFiles, disk: bytes
) -> None:
    with RawClient(deceived.connect()).negotiate() as client, files.bitmap.open("rb+") as bitmap:
        client.read(0, BLOCK)
        (worker,) = deceived.busy_workers()
        locks = RangeLocks(bitmap.fileno())
        assert locks.try_acquire(1, SIZE >> 15)
        blocks = random.Random(1).sample(range(8, SIZE // BLOCK), 1200)
        client.send(b"".join(pack_request(READ, block * BLOCK, BLOCK, cookie=block) for block in blocks))
        wait_until(lambda: query(files.control)["queue"]["requests"] == 1200, "reads that wait")
        before, until = cpu_seconds(worker), time.monotonic() + 2
        wait_until(lambda: time.monotonic() > until, "two seconds")
        assert cpu_seconds(worker) - before < 0.5
        locks.release(1, SIZE >> 15)
        for _ in blocks:
            error, block, data = client.simple_reply(BLOCK)
            assert (error, data) == (0, at(disk, block))


def test_another_size_after_a_reconnect_is_refused(
    deceived: Server, files: CacheFiles, liar: Liar, disk: bytes
) -> None:
    client = connect(deceived.uri)
    liar.close = True
    assert read(client, 0) == at(disk, 0)
    liar.size, liar.close = SIZE - 512, False
    reading = Reading(client, 8 * BLOCK, BLOCK)
    client.poll(0)
    deceived.wait_for_log(f"its disk has {SIZE - 512} bytes, not {SIZE} as before")
    assert not reading.is_done()
    assert files.cached() == [0]
    liar.size = SIZE
    assert reading.content() == at(disk, 8)


@pytest.mark.parametrize("size", [0, 1 << 50, (1 << 63) - 4096, 1 << 63, (1 << 64) - 1])
def test_a_size_that_cannot_be_is_refused_at_the_start(tmp_path: Path, files: CacheFiles, size: int) -> None:
    with LyingOrigin(tmp_path / "liar.sock", lambda visitor: visitor.negotiate(size)) as origin:
        fails(*files.arguments(origin.uri), "--unix", tmp_path / "s")
    assert not files.image.exists()
    assert not files.bitmap.exists()
    assert not files.state.exists()


STRUCTURED_LIES = {
    "a chunk twice": lambda asked: (
        lie.data_chunk(asked.cookie, asked.offset, bytes(BLOCK), flags=0)
        + lie.data_chunk(asked.cookie, asked.offset, bytes(asked.length))
    ),
    "a chunk missing": lambda asked: lie.data_chunk(asked.cookie, asked.offset, bytes(BLOCK)),
    "a chunk elsewhere": lambda asked: lie.data_chunk(asked.cookie, 0, bytes(asked.length)),
    "a hole too long": lambda asked: lie.hole_chunk(asked.cookie, asked.offset, asked.length + BLOCK),
    "half of it a hole and then an error": lambda asked: (
        lie.hole_chunk(asked.cookie, asked.offset, asked.length // 2, flags=0) + lie.error_chunk(asked.cookie, 5)
    ),
}


@pytest.mark.parametrize("name", STRUCTURED_LIES)
def test_a_structured_lie_caches_nothing(
    start: Start, tmp_path: Path, files: CacheFiles, disk: bytes, name: str
) -> None:
    honest = threading.Event()

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        while True:
            asked = visitor.request()
            data = disk[asked.offset : asked.offset + asked.length]
            truth = lie.data_chunk(asked.cookie, asked.offset, data)
            visitor.send(truth if honest.is_set() else STRUCTURED_LIES[name](asked))

    with LyingOrigin(tmp_path / "liar.sock", behave) as origin:
        proxy = start(*files.arguments(origin.uri, "--readahead", "0"))
        client = connect(proxy.uri)
        reading = Reading(client, 8 * BLOCK, 4 * BLOCK)
        client.poll(0)
        wait_until(lambda: "trying again" in proxy.log() or "cannot read" in proxy.log(), "a complaint in the log")
        assert files.cached() == []
        honest.set()
        if reading.wait():
            assert "cannot read" in proxy.log()
        else:
            assert reading.content() == at(disk, 8, 4)
        assert read(client, 8, 4) == at(disk, 8, 4)
        client.shutdown()
        proxy.stop()


# Links that break and stall


@pytest.fixture
def far(start: Start, image: Path) -> Server:
    return start("--target", "--readonly", image, tcp=True)


@pytest.fixture
def relay(far: Server) -> Iterator[Relay]:
    """The link to the origin, which ends after the proxies have."""
    with Relay(far.port) as relay:
        yield relay


def test_a_cut_anywhere_in_a_reply_loses_nothing(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes, seed: int
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    client, rng = connect(proxy.uri), random.Random(seed)
    pieces = list(range(0, SIZE // BLOCK - 16, 16))
    rng.shuffle(pieces)
    cuts = [*range(1, 40), *range(65520, 65560, 3), *(rng.randrange(1, 1 << 18) for _ in range(20))]
    for block, cut in zip(pieces, cuts):
        relay.cut_after(cut)
        assert read(client, block, 16) == at(disk, block, 16)
    assert read_all(client) == disk
    client.shutdown()
    proxy.stop()
    assert files.image.read_bytes() == disk


def test_hits_and_writes_of_other_blocks_do_not_wait_for_a_stalled_origin(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    one, other = connect(proxy.uri), connect(proxy.uri)
    read(one, 0, 8)
    read(other, 800)
    relay.stall()
    reading, overwritten = Reading(one, 100 * BLOCK, 20 * BLOCK), Reading(other, 1000 * BLOCK, BLOCK)
    for client in (one, other):
        assert read(client, 0, 8) == at(disk, 0, 8)
        client.pwrite(b"w" * BLOCK, 200 * BLOCK)
        client.zero(BLOCK, 300 * BLOCK)
        client.flush()
        assert read(client, 200) == b"w" * BLOCK
    one.pwrite(b"p" * 100, 10)
    one.pwrite(b"v" * BLOCK, 110 * BLOCK)
    assert read(one, 110) == b"v" * BLOCK
    assert not reading.is_done()
    assert not overwritten.is_done()
    relay.resume()
    reading.wait()
    assert overwritten.content() == at(disk, 1000)
    assert read(other, 100, 20) == at(disk, 100, 10) + b"v" * BLOCK + at(disk, 111, 9)
    assert read(other, 0)[:110] == disk[:10] + b"p" * 100


def test_hits_do_not_wait_behind_writes_to_blocks_that_another_client_waits_for(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    with RawClient(proxy.connect()).negotiate() as one, RawClient(proxy.connect()).negotiate() as other:
        for client in (one, other):
            client.read(0, BLOCK)
        relay.stall()
        one.request(READ, 2 * MIB, 2 * MIB)
        wait_until(lambda: query(files.control)["queue"]["requests"] == 1, "a read that waits")
        for n in range(256):
            other.request(WRITE, 2 * MIB + n * BLOCK, BLOCK, data=b"w" * BLOCK, cookie=n)
        assert other.read(0, BLOCK) == at(disk, 0)
        relay.resume()
        assert {other.simple_reply()[:2] for _ in range(256)} == {(0, n) for n in range(256)}
        assert other.read(2 * MIB, 2 * MIB) == b"w" * MIB + disk[3 * MIB : 4 * MIB]


def test_what_was_asked_for_when_the_server_died_is_not_zeros_but_asked_again(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    """The C xNBD marks a block when it asks for it."""
    proxy = start(*files.arguments(relay.uri))
    client = connect(proxy.uri)
    read(client, 0)
    relay.stall()
    reading = Reading(client, 100 * BLOCK, BLOCK)
    assert not reading.is_done()
    proxy.expected_errors.append("died")
    kill_server(proxy)
    again = start(*files.arguments(relay.uri, "--connect-timeout", "0.3"))
    client = connect(again.uri)
    assert read(client, 0) == at(disk, 0)
    reading = Reading(client, 100 * BLOCK, BLOCK)
    assert not reading.is_done()
    relay.resume()
    assert reading.content() == at(disk, 100)


def test_an_origin_that_refuses_is_tried_again(start: Start, files: CacheFiles, relay: Relay, disk: bytes) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    client = connect(proxy.uri)
    read(client, 0)
    relay.refuse()
    relay.cut()
    reading = Reading(client, 8 * BLOCK, BLOCK)
    client.poll(0)
    proxy.wait_for_log("Connection refused")
    assert read(client, 0) == at(disk, 0)
    assert not reading.is_done()
    wait_until(lambda: query(files.control)["origin"]["state"] == "unreachable", "a report of it")
    relay.accept()
    assert reading.content() == at(disk, 8)
    proxy.wait_for_log("answers again")


def test_what_waits_is_asked_for_at_the_new_address(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes, image: Path
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    one, other = connect(proxy.uri), connect(proxy.uri)
    read(one, 0)
    relay.stall()
    readings = [Reading(one, 8 * BLOCK, BLOCK), Reading(other, 80 * BLOCK, BLOCK)]
    assert not any(reading.is_done() for reading in readings)
    elsewhere = start("--target", "--readonly", image, tcp=True)
    bgctl("--reconnect", files.control, "127.0.0.1", elsewhere.port)
    assert [reading.content() for reading in readings] == [at(disk, 8), at(disk, 80)]
    proxy.stop()
    again = start(*files.arguments(relay.uri, "--connect-timeout", "0.3"))
    assert read_all(connect(again.uri)) == disk


def test_a_new_origin_of_another_size_is_refused(
    start: Start, tmp_path: Path, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    larger = tmp_path / "larger.img"
    larger.write_bytes(disk + b"x")
    proxy, elsewhere = start(*files.arguments(relay.uri)), start("--target", larger, tcp=True)
    status, _, complaint = bgctl("--reconnect", files.control, "127.0.0.1", elsewhere.port, check=False)
    assert status == 1
    assert f"has {SIZE + 1} bytes, not {SIZE}" in complaint
    assert read_all(connect(proxy.uri)) == disk


def test_with_a_limit_a_stalled_origin_is_an_error(start: Start, files: CacheFiles, relay: Relay, disk: bytes) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0", "--origin-timeout", "0.5"))
    client = connect(proxy.uri)
    bring(client, 0, BLOCK)
    relay.stall()
    assert Reading(client, 8 * BLOCK, BLOCK).wait() == errno.EIO
    assert files.cached() == [0]
    assert read(client, 0) == at(disk, 0)
    client.pwrite(b"w" * BLOCK, 9 * BLOCK)
    relay.resume()
    assert bring_and_read_all(client) == at(disk, 0, 9) + b"w" * BLOCK + disk[10 * BLOCK :]


def test_with_a_limit_an_origin_that_is_away_is_an_error(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0", "--origin-timeout", "0.5"))
    client = connect(proxy.uri)
    bring(client, 0, BLOCK)
    relay.refuse()
    relay.cut()
    assert Reading(client, 8 * BLOCK, BLOCK).wait() == errno.EIO
    with pytest.raises(nbd.Error):
        client.pwrite(b"x", 8 * BLOCK)
    assert files.cached() == [0]
    relay.accept()
    assert bring_and_read_all(client) == disk


def test_an_origin_that_is_away_at_the_first_start_is_told(tmp_path: Path, files: CacheFiles) -> None:
    arguments = files.arguments(f"nbd+unix:///?socket={tmp_path / 'none'}")
    _, complaint = fails(*arguments, "--unix", tmp_path / "s")
    assert "first start needs its origin" in complaint
    assert not files.image.exists()
    assert not files.bitmap.exists()


def test_with_its_state_a_proxy_starts_without_its_origin(
    start: Start, files: CacheFiles, relay: Relay, disk: bytes
) -> None:
    proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
    client = connect(proxy.uri)
    assert read(client, 3) == at(disk, 3)
    client.pwrite(b"w" * 100, 50)
    client.shutdown()
    proxy.stop()
    relay.refuse()
    proxy = start(*files.arguments(relay.uri, "--connect-timeout", "0.5"))
    client = connect(proxy.uri)
    assert read(client, 3) == at(disk, 3)
    assert read(client, 0)[50:150] == b"w" * 100
    reading = Reading(client, 100 * BLOCK, BLOCK)
    assert not reading.is_done()
    relay.accept()
    assert reading.content() == at(disk, 100)


# The cache's own files


@pytest.mark.root(reason="file systems are mounted by root only")
@pytest.mark.parametrize("space", [0, 8])  # the scoreboard alone may lie in memory
def test_no_space_for_the_bitmap_is_told_and_another_start_goes_well(
    start: Start, tmp_path: Path, far: Server, disk: bytes, space: int
) -> None:
    with small_tmpfs(tmp_path / "small", "1m") as directory:
        files, ballast = CacheFiles(directory), directory / "ballast"
        files.image = tmp_path / "cache.img"
        ballast.write_bytes(bytes(MIB - space * 1024))
        arguments = files.arguments(far.uri, control=tmp_path / "c")
        status, _, complaint = run(*command(*arguments, "--unix", tmp_path / "s"), check=False)
        assert status == 1
        assert "No space left on device" in complaint.splitlines()[-1]
        ballast.unlink()
        run("mount", "-o", "remount,size=8m", directory)
        proxy = start(*files.arguments(far.uri))
        assert read_all(connect(proxy.uri)) == disk
        proxy.stop()
        assert files.is_clean()


def c_bitmap(size: int, blocks: List[int]) -> bytes:
    """A bitmap as the C xNBD leaves it: 64-bit words, least significant bit first."""
    words = [0] * -(-size // (64 * BLOCK))
    for block in blocks:
        words[block // 64] |= 1 << block % 64
    return b"".join(word.to_bytes(8, "little") for word in words)


def test_the_bitmap_of_a_c_xnbd_is_taken_over(start: Start, files: CacheFiles, far: Server, disk: bytes) -> None:
    blocks = [0, 9, 63, 64, 1000, SIZE // BLOCK]
    with files.image.open("wb") as cache:
        cache.truncate(SIZE)
        for block in blocks:
            cache.seek(block * BLOCK)
            cache.write(bytes([block % 251 + 1]) * min(BLOCK, SIZE - block * BLOCK))
    files.bitmap.write_bytes(c_bitmap(SIZE, blocks))
    proxy = start(*files.arguments(far.uri))
    assert "taken over, it has no state file" in proxy.log()
    client = connect(proxy.uri)
    expected = bytearray(disk)
    for block in blocks:
        stop = min(SIZE, (block + 1) * BLOCK)
        expected[block * BLOCK : stop] = bytes([block % 251 + 1]) * (stop - block * BLOCK)
    assert read_all(client) == expected
    client.shutdown()
    proxy.stop()
    assert files.bitmap.read_bytes()[: SIZE // BLOCK // 8] == b"\xff" * (SIZE // BLOCK // 8)
    assert files.is_clean()


def refused(files: CacheFiles, far: Server) -> str:
    """What a start says that changes none of the files."""
    before = [path.read_bytes() for path in (files.image, files.bitmap, files.state)]
    _, complaint = fails(*files.arguments(far.uri), "--unix", files.image.parent / "s")
    assert [path.read_bytes() for path in (files.image, files.bitmap, files.state)] == before
    assert "--clear-bitmap" in complaint
    return complaint


@pytest.fixture
def used(start: Start, files: CacheFiles, far: Server) -> CacheFiles:
    """The files of a proxy that has ended."""
    proxy = start(*files.arguments(far.uri))
    client = connect(proxy.uri)
    client.pwrite(b"w" * BLOCK, 0)
    client.shutdown()
    proxy.stop()
    return files


@pytest.mark.parametrize("name", ["bitmap", "state"])
@pytest.mark.parametrize("change", [-1, 8])
def test_a_file_of_another_length_is_refused(used: CacheFiles, far: Server, name: str, change: int) -> None:
    path = getattr(used, name)
    os.truncate(path, path.stat().st_size + change)
    assert f"{path.name} has" in refused(used, far)


def test_a_foreign_state_file_is_refused(used: CacheFiles, far: Server) -> None:
    used.state.write_bytes(b"#!/bin/sh\n" * 10000)
    assert "is not the state file of a cache bitmap" in refused(used, far)


def test_the_state_of_another_origin_is_refused(start: Start, used: CacheFiles, far: Server, image: Path) -> None:
    assert "is of the origin" in refused(used, start("--target", "--readonly", image))


def test_the_state_of_another_size_is_refused(start: Start, used: CacheFiles, far: Server, image: Path) -> None:
    far.stop()
    os.truncate(image, SIZE - BLOCK)
    smaller = start("--target", "--readonly", image)
    os.rename(smaller.socket, far.socket)
    assert f"of a disk of {SIZE} bytes" in refused(used, far)


def test_clear_bitmap_starts_afresh(start: Start, used: CacheFiles, far: Server, disk: bytes) -> None:
    used.state.write_bytes(b"nonsense")
    proxy = start(*used.arguments(far.uri, "--clear-bitmap"))
    assert read_all(connect(proxy.uri)) == disk
