"""A caching proxy in ordinary use: what its clients see, what the origin is asked for, and what is refused."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence

import nbd
import pytest
from conftest import MIB, Start
from launch import fails
from origin_programs import is_listening
from proxies import BLOCK, DISK, Proxy, make_disk, query, reads, replies, silent
from rawclient import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FLUSH,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    pack_request,
)
from relay import Relay
from server_process import Server, command, is_alive, run, wait_until

KIB = 1 << 10
BLOCKS = -(-DISK // BLOCK)

Connected = Callable[..., Proxy]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The origin's image."""
    return make_disk(tmp_path)


@pytest.fixture
def origin(start: Start, disk: Path) -> Server:
    return start("--target", "--spare-workers", "2", disk, tcp=True)


@pytest.fixture
def proxy(start: Start, tmp_path: Path, origin: Server) -> Proxy:
    return Proxy(start, tmp_path, origin.uri)


@pytest.fixture
def relay(origin: Server) -> Iterator[Relay]:
    with Relay(origin.port) as relay:
        yield relay


@pytest.fixture
def behind_relay(start: Start, tmp_path: Path, relay: Relay) -> Connected:
    """Starts a proxy that reaches its origin through the relay."""

    def start_one(*options: object, **names: Any) -> Proxy:
        return Proxy(start, tmp_path, relay.uri, *options, **names)

    return start_one


# What clients see


def test_nbdcopy_reads_the_origin_s_disk_and_asks_for_each_byte_once(proxy: Proxy, disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    run("nbdcopy", proxy.uri, copy)
    assert copy.read_bytes() == disk.read_bytes()
    proxy.wait_for_counter("bytes_fetched", DISK)
    run("nbdcopy", proxy.uri, copy)
    assert copy.read_bytes() == disk.read_bytes()
    proxy.wait_for_counter("bytes_fetched", DISK)


def test_nbdcopy_writes_to_the_proxy_only(proxy: Proxy, disk: Path, tmp_path: Path) -> None:
    before, new = disk.read_bytes(), make_disk(tmp_path, name="new.img", seed=5)
    run("nbdcopy", "--flush", new, proxy.uri)
    run("nbdcopy", proxy.uri, tmp_path / "again.img")
    assert (tmp_path / "again.img").read_bytes() == new.read_bytes()
    assert proxy.cache.read_bytes() == new.read_bytes()
    assert disk.read_bytes() == before


def test_nbdinfo_shows_a_disk_of_the_origin_s_size(proxy: Proxy) -> None:
    answer = json.loads(run("nbdinfo", "--json", proxy.uri)[1])
    (export,) = answer["exports"]
    assert answer["structured"]
    assert export["export-size"] == DISK
    assert export["export-name"] == "cache.img"
    for can in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{can}"], can
    assert not export["is_read_only"]


def test_qemu_io_reads_and_writes(proxy: Proxy, origin: Server) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "read -P 7 1M 64k", "-c", "flush", proxy.uri)
    run("qemu-io", "-f", "raw", "-c", "discard 2M 64k", "-c", "write -z 3M 3000", "-c", "read -P 0 3M 3000", proxy.uri)
    assert run("qemu-io", "-f", "raw", "-c", "read -P 7 1M 64k", origin.uri, check=False)[0] == 1


def test_qemu_img_finds_proxy_and_origin_equal(proxy: Proxy, origin: Server) -> None:
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", proxy.uri, origin.uri)


def test_fio_verifies_what_it_writes(proxy: Proxy) -> None:
    job = ["--name=v", "--ioengine=nbd", f"--uri={proxy.uri}", "--rw=randrw", "--bsrange=512-16k", "--bs_unaligned=1"]
    where = [
        "--size=3m",
        "--iodepth=16",
        "--verify=crc32c",
        "--randseed=8520",
        "--output-format=json",
        "--verify_state_save=0",
    ]
    out = run("fio", *job, *where)[1]
    assert json.loads(out[out.index("{") :])["jobs"][0]["error"] == 0


def test_part_of_a_block_is_written_into_what_the_origin_has(proxy: Proxy, disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    with proxy.raw() as client:
        for at, length in [(100, 10), (5 * BLOCK - 7, 14), (DISK - 20, 20), (MIB + 1, 3 * BLOCK)]:
            data = os.urandom(length)
            expected[at : at + length] = data
            assert client.write(at, data) == 0
        assert client.read(0, DISK) == expected


def test_whole_blocks_that_are_written_are_not_fetched(proxy: Proxy) -> None:
    with proxy.raw() as client:
        assert client.write(8 * BLOCK, bytes(4 * BLOCK)) == 0
        assert client.write(DISK - 1234 - (DISK - 1234) % BLOCK, bytes(1234 + (DISK - 1234) % BLOCK)) == 0
        client.request(WRITE_ZEROES, MIB, MIB)
        assert client.simple_reply()[0] == 0
        client.request(TRIM, 3 * MIB, 64 * BLOCK)
        assert client.simple_reply()[0] == 0
        assert client.read(MIB, MIB + 0) == bytes(MIB)
        assert client.read(3 * MIB, 64 * BLOCK) == bytes(64 * BLOCK)
    proxy.wait_for_counter("bytes_fetched", 0)
    proxy.wait_for_cached(4 + 1 + 256 + 64)


@pytest.mark.parametrize("what", [TRIM, WRITE_ZEROES])
def test_zeroes_are_exact_at_both_ends(proxy: Proxy, disk: Path, what: int) -> None:
    expected = bytearray(disk.read_bytes())
    with proxy.raw() as client:
        for at, length in [
            (100, 200),
            (8000, 200),
            (50_000, 9000),
            (DISK - 5000, 5000),
            (MIB, 20_000),
            (170_000, 99_999),
        ]:
            expected[at : at + length] = bytes(length)
            client.request(what, at, length)
            assert client.simple_reply()[0] == 0
        assert client.read(0, DISK) == expected


def test_cache_command_fetches_what_is_read_later_without_the_origin(proxy: Proxy, origin: Server, disk: Path) -> None:
    with proxy.raw() as client:
        client.request(CACHE, 4 * BLOCK + 5, MIB)
        assert client.simple_reply()[0] == 0
        wait_until(lambda: proxy.cached() >= 257, "the figures")
        origin.stop()
        assert client.read(4 * BLOCK, MIB) == disk.read_bytes()[4 * BLOCK : 4 * BLOCK + MIB]


def test_cache_of_the_whole_disk_with_one_command(proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.request(CACHE, 0, DISK)
        assert client.simple_reply()[0] == 0
    proxy.wait_for_cached(BLOCKS)
    proxy.wait_for_counter("bytes_fetched", DISK)


def test_block_status_tells_holes_of_the_cache_and_data_elsewhere(proxy: Proxy) -> None:
    client = proxy.connect(nbd.CONTEXT_BASE_ALLOCATION)
    client.trim(64 * KIB, MIB)
    found: List[int] = []
    client.block_status(2 * MIB, 0, lambda _context, _offset, entries, _error: found.__iadd__(entries) and 0)
    assert found == [MIB, 0, 64 * KIB, nbd.STATE_HOLE | nbd.STATE_ZERO, MIB - 64 * KIB, 0]
    client.shutdown()


def test_block_status_fetches_nothing(proxy: Proxy) -> None:
    with proxy.raw(structured=True, allocation=True) as client:
        client.request(BLOCK_STATUS, 0, DISK)
        (chunk,) = client.chunks()
        assert struct.unpack(">III", chunk.payload)[1:] == (DISK, 0)
    proxy.wait_for_counter("bytes_fetched", 0)


def test_structured_read_skips_holes_and_df_does_not(proxy: Proxy, disk: Path) -> None:
    content = disk.read_bytes()
    with proxy.raw(structured=True) as client:
        client.request(TRIM, 128 * KIB, 128 * KIB)
        assert client.simple_reply()[0] == 0
        client.request(READ, 0, 512 * KIB)
        data, parts = bytearray(512 * KIB), client.chunks()
        assert [chunk.kind for chunk in parts] == [1, 2, 1]
        for chunk in parts:
            at = struct.unpack(">Q", chunk.payload[:8])[0]
            if chunk.kind == 1:
                data[at : at + len(chunk.payload) - 8] = chunk.payload[8:]
        assert data == content[: 128 * KIB] + bytes(128 * KIB) + content[256 * KIB : 512 * KIB]
        client.request(READ, 0, 512 * KIB, flags=DF)
        (whole,) = client.chunks()
        assert whole.payload[8:] == data


def test_requests_beyond_the_end_are_refused_and_the_session_goes_on(proxy: Proxy) -> None:
    with proxy.raw() as client:
        for what, error in [(READ, 22), (TRIM, 22), (CACHE, 22), (WRITE_ZEROES, 28)]:
            client.request(what, DISK - 1, 2)
            assert client.simple_reply()[0] == error
        assert client.write(DISK - 1, b"xx") == 28
        assert client.works()
    proxy.wait_for_counter("bytes_fetched", 0)


def test_clients_see_at_once_what_others_have_written(proxy: Proxy) -> None:
    rng = random.Random(8520)
    clients = [proxy.raw() for _ in range(3)]
    for _ in range(100):
        at, data = rng.randrange(DISK - 6000), rng.randbytes(rng.randrange(1, 6000))
        assert clients[0].write(at, data) == 0
        assert clients[1].read(at, len(data)) == data == clients[2].read(at, len(data))
        rng.shuffle(clients)
    for client in clients:
        client.sock.close()


def test_large_write_and_read_in_one_request(start: Start, tmp_path: Path) -> None:
    big = make_disk(tmp_path, 40 * MIB + 5, "big.img")
    proxy = Proxy(start, tmp_path, start("--target", big).uri)
    data, expected = os.urandom(33 * MIB), bytearray(big.read_bytes())
    with proxy.raw() as client:
        assert client.write(MIB + 3, data) == 0
        expected[MIB + 3 : MIB + 3 + len(data)] = data
        assert client.read(0, len(expected)) == expected


# Where the origin is


@pytest.mark.parametrize("form", ["127.0.0.1 {port}", "localhost {port}", "nbd://127.0.0.1:{port}", "{unix}"])
def test_forms_of_the_origin_s_address(start: Start, tmp_path: Path, origin: Server, disk: Path, form: str) -> None:
    proxy = Proxy(start, tmp_path, form.format(port=origin.port, unix=origin.uri).split())
    with proxy.raw() as client:
        assert client.read(0, DISK) == disk.read_bytes()


@pytest.mark.parametrize("form", ["option", "uri"])
def test_name_of_the_origin_s_export(start: Start, tmp_path: Path, form: str) -> None:
    disk = make_disk(tmp_path)
    origin = ["nbdkit", "--exit-with-parent", "-f", "-U", tmp_path / "kit.sock", "file", f"dir={tmp_path}"]
    process = subprocess.Popen([str(word) for word in origin])
    try:
        wait_until(lambda: is_listening(tmp_path / "kit.sock"), "nbdkit to listen")
        uri = f"nbd+unix:///{{}}?socket={tmp_path / 'kit.sock'}"
        if form == "uri":
            proxy = Proxy(start, tmp_path, uri.format("origin.img"))
        else:
            proxy = Proxy(start, tmp_path, uri.format(""), "--target-exportname", "origin.img")
        with proxy.raw() as client:
            assert client.read(0, DISK) == disk.read_bytes()
        proxy.server.stop()
    finally:
        process.terminate()
        process.wait()


# What is kept


def test_restart_goes_on_with_what_is_cached(start: Start, tmp_path: Path, origin: Server, disk: Path) -> None:
    proxy = Proxy(start, tmp_path, origin.uri, "--readahead", "0")
    expected = bytearray(disk.read_bytes())
    with proxy.raw() as client:
        client.read(0, MIB)
        assert client.write(MIB + 5, b"written") == 0
        expected[MIB + 5 : MIB + 12] = b"written"
    proxy.server.stop()
    again = Proxy(start, tmp_path, origin.uri)
    again.wait_for_cached(257)
    with again.raw() as client:
        assert client.read(0, MIB + BLOCK) == expected[: MIB + BLOCK]
        assert again.counter("bytes_fetched") == 0
        assert client.read(0, DISK) == expected


def test_restart_without_the_origin_serves_what_is_cached(start: Start, tmp_path: Path, origin: Server) -> None:
    proxy = Proxy(start, tmp_path, origin.uri)
    with proxy.raw() as client:
        expected = client.read(0, MIB)
    proxy.server.stop()
    origin.stop()
    again = Proxy(start, tmp_path, origin.uri)
    with again.raw() as client:
        assert client.read(0, MIB) == expected
    assert "cached blocks are served, the others wait" in again.server.log()


def test_clear_bitmap_forgets_everything(start: Start, tmp_path: Path, origin: Server, disk: Path) -> None:
    proxy = Proxy(start, tmp_path, origin.uri)
    with proxy.raw() as client:
        assert client.write(0, b"x" * MIB) == 0
    proxy.server.stop()
    again = Proxy(start, tmp_path, origin.uri, "--clear-bitmap")
    again.wait_for_cached(0)
    with again.raw() as client:
        assert client.read(0, MIB) == disk.read_bytes()[:MIB]


def test_cache_file_is_sparse_and_as_large_as_the_disk(proxy: Proxy) -> None:
    assert proxy.cache.stat().st_size == DISK
    assert proxy.cache.stat().st_blocks == 0
    with proxy.raw() as client:
        client.read(MIB, 100)
    assert proxy.cache.stat().st_blocks * 512 <= 64 * KIB


def test_larger_cache_file_is_kept(start: Start, tmp_path: Path, origin: Server, disk: Path) -> None:
    (tmp_path / "cache.img").write_bytes(b"old" * 2 * MIB)
    proxy = Proxy(start, tmp_path, origin.uri, "--clear-bitmap")
    with proxy.raw() as client:
        assert client.size == DISK
        assert client.read(0, DISK) == disk.read_bytes()
    assert proxy.cache.read_bytes()[DISK:] == (b"old" * 2 * MIB)[DISK:]


def test_readonly_throws_writers_out_and_reads_fill_the_cache(start: Start, tmp_path: Path, origin: Server) -> None:
    proxy = Proxy(start, tmp_path, origin.uri, "--readonly", "--readahead", "0")
    for request in (
        pack_request(WRITE, 0, 5) + b"bytes",
        pack_request(TRIM, 0, BLOCK),
        pack_request(WRITE_ZEROES, 0, BLOCK),
    ):
        with proxy.raw() as writer:
            assert writer.flags & 2
            writer.send(request)
            assert writer.closed()
    proxy.wait_for_cached(0)
    with proxy.raw() as reader:
        reader.read(0, 10 * BLOCK)
    proxy.wait_for_cached(10)
    assert proxy.query()["readonly"]


# How much is asked for


def test_readahead_0_fetches_nothing_ahead(start: Start, tmp_path: Path, origin: Server) -> None:
    proxy = Proxy(start, tmp_path, origin.uri, "--readahead", "0")
    with proxy.raw() as client:
        for at in range(0, MIB, 64 * KIB):
            client.read(at, 64 * KIB)
        proxy.wait_for_counter("bytes_fetched", MIB)


@pytest.mark.parametrize(("size", "most"), [("256K", 256 * KIB), (None, 8 * MIB)])
def test_sequential_reader_is_read_ahead_of(start: Start, tmp_path: Path, size: str, most: int) -> None:
    big = make_disk(tmp_path, 24 * MIB, "big.img")
    options = ["--readahead", size] if size else []
    proxy = Proxy(start, tmp_path, start("--target", big).uri, *options)
    with proxy.raw() as client:
        for at in range(0, 2 * MIB, 64 * KIB):
            client.read(at, 64 * KIB)
        wait_until(lambda: client.read(0, 1) != b"" and proxy.counter("bytes_fetched") > 2 * MIB, "blocks ahead")
        assert proxy.query()["counters"]["misses"] < 32
        assert proxy.counter("bytes_fetched") <= 2 * MIB + most + 256 * KIB


def test_random_reader_is_not_read_ahead_of(proxy: Proxy) -> None:
    places = random.Random(1).sample(range(0, 1024, 8), 40)
    with proxy.raw() as client:
        for block in places:
            client.read(block * BLOCK, BLOCK)
    proxy.wait_for_counter("bytes_fetched", 40 * BLOCK)


# Waiting for the origin


def test_hits_are_answered_while_misses_wait(behind_relay: Connected, relay: Relay, disk: Path) -> None:
    proxy, content = behind_relay("--readahead", "0"), disk.read_bytes()
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (0, 10), (2 * MIB, 10), (20, 10)))
        assert replies(client, 10, 10) == [(2, content[:10]), (4, content[20:30])]
        assert client.write(50, b"hit") == 0
        assert silent(client)
        proxy.wait_for_queue(2)
        relay.resume()
        assert sorted(replies(client, 10, 10)) == [(1, content[MIB : MIB + 10]), (3, content[2 * MIB : 2 * MIB + 10])]
        proxy.wait_for_queue(0)


def test_whole_block_written_over_a_waiting_fetch_stays(behind_relay: Connected, relay: Relay, disk: Path) -> None:
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 4 * BLOCK)))
        proxy.wait_for_queue(1)
        assert client.write(MIB + BLOCK, b"w" * BLOCK) == 0
        relay.resume()
        ((_, data),) = replies(client, 4 * BLOCK)
        original = disk.read_bytes()[MIB : MIB + 4 * BLOCK]
        assert data == original[:BLOCK] + b"w" * BLOCK + original[2 * BLOCK :]


def test_partial_write_waits_for_its_block_and_later_ones_to_it_too(
    behind_relay: Connected, relay: Relay, disk: Path
) -> None:
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.request(WRITE, MIB + 10, 5, data=b"first", cookie=1)
        assert silent(client)
        relay.resume()
        assert client.simple_reply()[:2] == (0, 1)
        assert (
            client.read(MIB, 20)
            == disk.read_bytes()[MIB : MIB + 10] + b"first" + disk.read_bytes()[MIB + 15 : MIB + 20]
        )


def fill_pipe(client: RawClient, data: bytes) -> bool:
    """Send *data* again and again; whether the server stops taking it before 64 MiB."""
    client.sock.settimeout(1.0)
    try:
        for _ in range(64 * MIB // len(data)):
            client.sock.sendall(data)
    except socket.timeout:
        return True
    return False


def test_full_queue_stops_receiving_and_all_is_answered_later(
    behind_relay: Connected, relay: Relay, disk: Path
) -> None:
    proxy, content = behind_relay("--max-queue-size", "4", "--readahead", "0"), disk.read_bytes()
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        places = [(MIB + n * 16 * BLOCK, 10) for n in range(10)]
        client.send(reads(*places, (0, 10)))
        proxy.wait_for_queue(4)
        assert proxy.query()["queue"]["requests_limit"] == 4
        assert silent(client)
        relay.resume()
        answers = dict(replies(client, *[10] * 11))
        assert answers == {n: content[at : at + 10] for n, (at, _) in enumerate([*places, (0, 10)], 1)}


def test_client_is_not_listened_to_while_its_queue_is_full(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--max-queue-size", "4", "--readahead", "0")
    with proxy.raw() as client, proxy.raw() as bystander:
        bystander.read(0, BLOCK)
        relay.stall()
        assert fill_pipe(client, reads(*((MIB + n * BLOCK, 1) for n in range(256))))
        proxy.wait_for_queue(4)
        bystander.read(0, BLOCK)
        relay.resume()


def test_full_buffer_stops_receiving_and_all_is_written_later(
    behind_relay: Connected, relay: Relay, disk: Path
) -> None:
    proxy = behind_relay("--max-buf-size", "20K", "--readahead", "0")
    expected = bytearray(disk.read_bytes())
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        for n in range(20):
            at, data = MIB + n * 16 * BLOCK + 7, os.urandom(3000)
            expected[at : at + 3000] = data
            client.request(WRITE, at, 3000, data=data, cookie=n)
        proxy.wait_for_queue(7)
        assert proxy.query()["queue"]["bytes"] == 21000
        assert proxy.query()["queue"]["bytes_limit"] == 20 * KIB
        assert silent(client)
        relay.resume()
        assert sorted(client.simple_reply()[:2] for _ in range(20)) == [(0, n) for n in range(20)]
        assert client.read(0, DISK) == expected


def test_no_limits_take_everything(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--max-queue-size", "0", "--max-buf-size", "0", "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads(*((BLOCK + n % (DISK - BLOCK - 1), 1) for n in range(0, 5000 * 500, 500))))
        proxy.wait_for_queue(5000)
        relay.resume()
        assert sorted(n for n, _ in replies(client, *[1] * 5000)) == list(range(1, 5001))


def test_a_large_write_over_a_stalled_origin_is_bounded_in_memory(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--max-buf-size", "64K", "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.request(WRITE, 100, 3 * MIB, data=b"d" * 3 * MIB)
        client.request(FLUSH, cookie=2)
        proxy.wait_for_queue(1)
        (worker,) = proxy.query()["workers"]
        assert worker["queued_bytes"] <= 2 * MIB
        relay.resume()
        assert sorted(client.simple_reply()[:2] for _ in range(2)) == [(0, 1), (0, 2)]
        assert client.read(100, 3 * MIB) == b"d" * 3 * MIB


# Order of replies


def test_oldstyle_client_is_answered_in_order(behind_relay: Connected, relay: Relay, disk: Path) -> None:
    proxy, content = behind_relay("--oldstyle", "--readahead", "0"), disk.read_bytes()
    client = RawClient(proxy.server.connect())
    with client:
        assert struct.unpack(">8sQQ", client.receive(152)[:24]) == (b"NBDMAGIC", 0x420281861253, DISK)
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (0, 10), (2 * MIB, 10), (20, 10)))
        client.request(WRITE, 0, 3, data=b"hit", cookie=5)
        client.request(FLUSH, cookie=6)
        assert silent(client)
        relay.resume()
        assert [n for n, _ in replies(client, 10, 10, 10, 10, 0, 0)] == [1, 2, 3, 4, 5, 6]
        assert client.read(0, 20) == b"hit" + content[3:20]


def test_replies_in_order_hold_what_was_read_then(behind_relay: Connected, relay: Relay, disk: Path) -> None:
    proxy = behind_relay("--oldstyle", "--readahead", "0")
    with RawClient(proxy.server.connect()) as client:
        client.receive(152)
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10)) + pack_request(99, 0, 0, cookie=2) + pack_request(READ, DISK, 5, cookie=3))
        relay.resume()
        assert replies(client, 10) == [(1, disk.read_bytes()[MIB : MIB + 10])]
        assert client.simple_reply()[:2] == (22, 2)
        assert client.simple_reply()[:2] == (22, 3)


@contextmanager
def wrapped(directory: Path, origin: str, *options: object, name: str = "cache") -> Iterator[RawClient]:
    """A client whose server was handed its socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    files = [directory / f"{name}.{ending}" for ending in ("img", "bitmap", "ctl")]
    with open(directory / "wrapped.log", "ab") as log:
        arguments = command("--proxy", "--connected-fd", theirs.fileno(), *options, origin, *files)
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=log, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        with RawClient(ours) as client:
            yield client
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    text = (directory / "wrapped.log").read_text()
    assert " ERROR: " not in text, text
    assert "Traceback" not in text, text


@pytest.mark.parametrize(("options", "order"), [([], [1, 2]), (["--negotiated", "newstyle"], [2, 1])])
def test_order_of_replies_to_a_client_handed_over(
    tmp_path: Path, relay: Relay, options: Sequence[str], order: List[int]
) -> None:
    with wrapped(tmp_path, relay.uri, "--readahead", "0", *options) as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (0, 10)))
        answered = [n for n, _ in replies(client, 10)] if order == [2, 1] else []
        assert silent(client)
        relay.resume()
        assert answered + [n for n, _ in replies(client, *[10] * (2 - len(answered)))] == order
        client.request(DISC)
        assert client.closed()


def test_client_handed_over_without_any_limit_of_order_has_structured_replies(tmp_path: Path, relay: Relay) -> None:
    with wrapped(tmp_path, relay.uri, "--negotiated", "structured,allocation") as client:
        client.request(READ, 0, 100)
        assert [chunk.kind for chunk in client.chunks()] == [1]
        wait_until(lambda: is_listening(tmp_path / "cache.ctl"), "the control socket")
        wait_until(lambda: query(tmp_path / "cache.ctl")["counters"]["bytes_read"] == 100, "the figures")


# Clients that come and go


def test_half_closed_client_gets_its_late_replies(behind_relay: Connected, relay: Relay, disk: Path) -> None:
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (2 * MIB, 10)))
        client.request(WRITE, 3 * MIB + 1, 4, data=b"late", cookie=3)
        client.finish_sending()
        proxy.wait_for_queue(3)
        relay.resume()
        answers = {}
        for _ in range(3):
            error, cookie, _ = client.simple_reply()
            answers[cookie] = b"" if cookie == 3 else client.receive(10)
            assert error == 0
        content = disk.read_bytes()
        assert answers == {1: content[MIB : MIB + 10], 2: content[2 * MIB : 2 * MIB + 10], 3: b""}
        assert client.closed()
    with proxy.raw() as other:
        assert other.read(3 * MIB + 1, 4) == b"late"


def test_half_closed_client_with_nothing_to_wait_for_is_let_go(proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.send(reads((MIB, 10)))
        client.finish_sending()
        client.simple_reply(10)
        assert client.closed()


def test_client_that_reads_no_replies_costs_little_and_harms_nobody(start: Start, tmp_path: Path) -> None:
    big = make_disk(tmp_path, 32 * MIB, "big.img")
    proxy = Proxy(start, tmp_path, start("--target", big).uri)
    with proxy.raw() as deaf, proxy.raw() as other:
        assert fill_pipe(deaf, reads(*((n * 128 * KIB, 128 * KIB) for n in range(256))))
        assert other.read(0, MIB) == big.read_bytes()[:MIB]
        assert other.write(5, b"other") == 0
        assert max(worker["memory_bytes"] for worker in proxy.query()["workers"]) < 64 * MIB
    wait_until(lambda: not proxy.server.busy_workers(), "the end of both")


def test_worker_whose_client_left_with_requests_waiting_serves_the_next_one(
    start: Start, tmp_path: Path, relay: Relay, disk: Path
) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--spare-workers", "1", "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        (worker,) = proxy.server.busy_workers()
        relay.stall()
        client.send(reads((MIB, BLOCK), (2 * MIB, BLOCK)))
        client.request(WRITE, 3 * MIB + 1, 4, data=b"lost", cookie=3)
        proxy.wait_for_queue(3)
    relay.resume()
    wait_until(lambda: not proxy.server.busy_workers(), "the spare worker")
    assert is_alive(worker)
    content = bytearray(disk.read_bytes())
    clients = [proxy.raw() for _ in range(4)]
    for client in clients:
        data = client.read(0, DISK)
        content[3 * MIB + 1 : 3 * MIB + 5] = data[3 * MIB + 1 : 3 * MIB + 5]
        assert data == content
        client.sock.close()


def test_worker_whose_client_left_with_requests_waiting_sleeps_when_their_blocks_have_come(
    behind_relay: Connected, relay: Relay
) -> None:
    proxy = behind_relay("--readahead", "0", "--spare-workers", "1")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        (worker,) = proxy.server.busy_workers()
        relay.stall()
        client.send(reads((MIB, BLOCK)))
        proxy.wait_for_queue(1)
    wait_until(lambda: not proxy.server.busy_workers(), "the spare worker")
    relay.resume()
    proxy.wait_for_cached(2)
    wait_until(lambda: "poll" in Path(f"/proc/{worker}/wchan").read_text(), "the worker to sleep until somebody comes")


def test_disc_with_requests_waiting_ends_the_session(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10)))
        proxy.wait_for_queue(1)
        client.request(DISC)
        client.sock.settimeout(40)
        relay.resume()
        try:
            client.simple_reply(10)
        except EOFError:
            return
        assert client.closed()


@pytest.mark.parametrize("structured", [False, True])
def test_very_long_reads_that_wait_take_no_more_memory_than_is_allowed(
    start: Start, tmp_path: Path, structured: bool
) -> None:
    empty = tmp_path / "empty.img"
    with empty.open("wb") as file:
        file.truncate(64 << 30)
    with Relay(start("--target", empty, tcp=True).port) as link:
        proxy = Proxy(start, tmp_path, link.uri, "--readahead", "0", "--max-buf-size", "16M")
        with proxy.raw(structured=structured) as client:
            client.request(READ, 0, BLOCK)
            assert client.chunk() if structured else client.simple_reply(BLOCK)
            link.stall()
            client.send(reads(*((n << 28, 1 << 28) for n in range(1, 100))))
            wait_until(lambda: proxy.query()["queue"]["bytes"] >= 16 * MIB, "a full queue")
            assert proxy.query()["queue"]["requests"] == 2
            assert max(worker["memory_bytes"] for worker in proxy.query()["workers"]) < 64 * MIB


@pytest.mark.parametrize("goes", [False, True])
def test_writes_that_wait_at_a_disc_are_done(behind_relay: Connected, relay: Relay, goes: bool) -> None:
    """The specification: the server has to handle all outstanding requests."""
    proxy = behind_relay("--readahead", "0")
    places = [MIB + 1, 2 * MIB + 1, 3 * MIB + 1]
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        for place in places:
            client.request(WRITE, place, 4, data=b"last", cookie=place)
        proxy.wait_for_queue(3)
        client.request(DISC)
        if goes:
            client.sock.close()
        relay.resume()
        if not goes:
            assert {client.simple_reply()[:2] for _ in places} == {(0, place) for place in places}
            assert client.closed()
    wait_until(lambda: not proxy.server.busy_workers(), "the spare worker")
    with proxy.raw() as other:
        assert [other.read(place, 4) for place in places] == 3 * [b"last"]


def test_what_waits_at_a_disc_is_done_though_replies_before_it_cannot_leave(
    behind_relay: Connected, relay: Relay
) -> None:
    """Zeroing sends what is ready first; all of this waits for one reply of the origin."""
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 64 * BLOCK)))
        client.request(WRITE_ZEROES, MIB + 1, 10)
        client.request(WRITE, MIB + BLOCK + 1, 4, data=b"last")
        proxy.wait_for_queue(3)
        client.request(DISC)
    relay.resume()
    wait_until(lambda: not proxy.server.busy_workers(), "the spare worker")
    with proxy.raw() as other:
        assert other.read(MIB + 1, 10) == bytes(10)
        assert other.read(MIB + BLOCK + 1, 4) == b"last"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_client_that_leaves_while_its_queue_is_full_gives_its_worker_back(
    start: Start, tmp_path: Path, relay: Relay, how: str
) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--max-queue-size", "2", "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (2 * MIB, 10)))
        proxy.wait_for_queue(2)
        if how == "reset":
            client.send(reads((3 * MIB, 10)))
            client.reset()
    wait_until(lambda: not proxy.server.busy_workers(), "the spare worker", 40)


def test_server_with_requests_waiting_stops_in_time(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10)))
        proxy.wait_for_queue(1)
        assert proxy.server.stop() == 0
        assert client.closed()


# What is refused


@pytest.mark.parametrize(
    "option",
    [
        ["--target-exportname", "x"],
        ["--clear-bitmap"],
        ["--adopt-cache"],
        ["--max-queue-size", "5"],
        ["--max-buf-size", "5M"],
        ["--readahead", "5M"],
        ["--connect-timeout", "5"],
        ["--origin-timeout", "5"],
    ],
)
def test_options_of_a_proxy_are_refused_elsewhere(disk: Path, option: List[str]) -> None:
    status, error = fails("--target", *option, disk)
    assert (status, error) == (2, f"xnbd-server: {option[0]} is for --proxy only\n")


def proxy_fails(directory: Path, *arguments: object, status: int = 1) -> str:
    """What a proxy that cannot start says."""
    files = [directory / name for name in ("cache.img", "cache.bitmap", "control")]
    found, error = fails("--proxy", "--quiet", "--unix", directory / "none.sock", *arguments, *files)
    assert found == status, error
    return error[len("xnbd-server: ") : -1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--create", "1M", "nbd://127.0.0.1:1"], "--create is not for --proxy"),
        (["--cow-dir", "/tmp", "nbd://127.0.0.1:1"], "--cow-dir is for --cow-target only"),
        (["--max-queue-size", "x", "nbd://127.0.0.1:1"], "--max-queue-size"),
        (["--max-buf-size", "x", "nbd://127.0.0.1:1"], "--max-buf-size"),
        (["--readahead", "fast", "nbd://127.0.0.1:1"], "--readahead"),
        (["--fetch-size", "5K", "nbd://127.0.0.1:1"], "--fetch-size: expected 4K, 8K"),
        (["--fetch-size", "512K", "nbd://127.0.0.1:1"], "--fetch-size: expected 4K, 8K"),
        (["--cache-limit", "100K", "nbd://127.0.0.1:1"], "--cache-limit: at least 1M is needed"),
        (["--cache-limit", "much", "nbd://127.0.0.1:1"], "--cache-limit"),
        (["--connect-timeout", "nan", "nbd://127.0.0.1:1"], "--connect-timeout"),
        (["--origin-timeout", "soon", "nbd://127.0.0.1:1"], "--origin-timeout"),
        (["127.0.0.1"], "127.0.0.1 is no URI"),
        (["127.0.0.1", "nbd"], "port nbd: expected a whole number"),
        (["nbds://127.0.0.1?tls-certificate=/x"], "parameter 'tls-certificate' is not known"),
        (["--target-exportname", "a", "nbd://127.0.0.1:1/b"], "name it once"),
    ],
)
def test_senseless_command_line_is_refused(tmp_path: Path, arguments: List[str], complaint: str) -> None:
    assert complaint in proxy_fails(tmp_path, *arguments, status=2)
    assert not (tmp_path / "cache.img").exists()
    assert not (tmp_path / "cache.bitmap").exists()


def test_unknown_origin_is_refused_without_a_trace(tmp_path: Path) -> None:
    error = proxy_fails(tmp_path, "nbd+unix:///?socket=/nowhere")
    assert "a proxy's first start needs its origin" in error
    assert list(tmp_path.iterdir()) == []


def test_unknown_export_of_the_origin_is_refused(tmp_path: Path, origin: Server) -> None:
    assert "no-such-disk" in proxy_fails(tmp_path, "--target-exportname", "no-such-disk", origin.uri)


def test_cache_that_is_gone_while_its_bitmap_is_not(start: Start, tmp_path: Path, origin: Server) -> None:
    proxy = Proxy(start, tmp_path, origin.uri)
    with proxy.raw() as client:
        client.read(0, 100)
    proxy.server.stop()
    proxy.cache.unlink()
    line = proxy_fails(tmp_path, origin.uri)
    assert "cache.img is gone, but its bitmap has cached blocks: put it back (--clear-bitmap starts afresh, and" in line
    assert not proxy.cache.exists()
    Proxy(start, tmp_path, origin.uri, "--clear-bitmap")


def test_cache_that_has_shrunk(start: Start, tmp_path: Path, origin: Server) -> None:
    proxy = Proxy(start, tmp_path, origin.uri)
    with proxy.raw() as client:
        client.read(0, 100)
    proxy.server.stop()
    os.truncate(proxy.cache, MIB)
    assert "but its bitmap has cached blocks" in proxy_fails(tmp_path, origin.uri)
    assert proxy.cache.stat().st_size == MIB


@pytest.mark.parametrize("what", ["directory", "fifo", "no directory"])
def test_cache_that_is_no_disk(tmp_path: Path, origin: Server, what: str) -> None:
    if what == "directory":
        (tmp_path / "cache.img").mkdir()
    elif what == "fifo":
        os.mkfifo(tmp_path / "cache.img")
    else:
        tmp_path = tmp_path / "none"
    assert "cache.img" in proxy_fails(tmp_path, origin.uri)


def test_bitmap_of_another_disk_is_refused(start: Start, tmp_path: Path, origin: Server) -> None:
    Proxy(start, tmp_path, origin.uri).server.stop()
    other = start("--target", make_disk(tmp_path, 5 * MIB, "other.img"))
    assert "--clear-bitmap" in proxy_fails(tmp_path, other.uri)


def test_origin_with_an_empty_disk_is_refused(tmp_path: Path) -> None:
    sock = tmp_path / "empty.sock"
    process = subprocess.Popen(["nbdkit", "--exit-with-parent", "-f", "-U", str(sock), "null", "size=0"])
    try:
        wait_until(lambda: is_listening(sock), "nbdkit to listen")
        assert "empty" in proxy_fails(tmp_path, f"nbd+unix:///?socket={sock}")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("what", ["file", "symlink", "live"])
def test_control_socket_path_that_is_taken(start: Start, tmp_path: Path, origin: Server, what: str) -> None:
    path = tmp_path / "control"
    if what == "file":
        path.write_text("precious")
    elif what == "symlink":
        (tmp_path / "precious").write_text("precious")
        path.symlink_to(tmp_path / "precious")
    else:
        start("--proxy", origin.uri, tmp_path / "b.img", tmp_path / "b.bitmap", path).wait_for_log("serving")
    assert str(path) in proxy_fails(tmp_path, origin.uri)
    if what == "live":
        assert query(path)["mode"] == "proxy"
    else:
        assert path.read_text() == "precious"


def test_control_socket_is_the_owner_s_and_replaces_a_stale_one(start: Start, tmp_path: Path, origin: Server) -> None:
    path = tmp_path / "control"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    server = start("--proxy", origin.uri, tmp_path / "cache.img", tmp_path / "cache.bitmap", path)
    server.wait_for_log("INFO: serving ")
    assert path.stat().st_mode & 0o777 == 0o600
    assert query(path)["mode"] == "proxy"
    server.stop()
    assert not path.exists()


def test_origin_timeout_ends_requests_with_an_error(behind_relay: Connected, relay: Relay) -> None:
    proxy = behind_relay("--origin-timeout", "0.5", "--connect-timeout", "3600", "--readahead", "0")
    with proxy.raw() as client:

        def can_read(offset: int) -> bool:
            client.request(READ, offset, 10)
            return client.simple_reply(10)[0] == 0

        wait_until(lambda: can_read(0), "the origin", 30)  # which may be slower than that by itself
        relay.stall()
        for request in (pack_request(READ, MIB, 10), pack_request(WRITE, 2 * MIB + 5, 4) + b"part"):
            client.send(request)
            assert client.simple_reply()[0] == 5
        client.read(0, BLOCK)
        relay.resume()
        wait_until(lambda: can_read(MIB), "the origin", 30)
