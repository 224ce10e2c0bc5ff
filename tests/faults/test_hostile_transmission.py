"""Clients that misbehave once they have a disk: impossible requests, floods, and leaving at any byte.

Every test has a bystander: a client that connected before and must be served after,
by a master that is still there.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest
from conftest import MIB, Start
from rawclient import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    bystander,
    pack_request,
)
from server_process import Server, command, title_of, wait_until

GIB = 1 << 30
LONGEST = 0xFFFFFFFF
EIO, EINVAL, ENOSPC, ENOTSUP = 5, 22, 28, 95


@pytest.fixture
def server(start: Start, image: Path) -> Iterator[Server]:
    """A plain target, with a bystander."""
    server = start("--target", image, tcp=True)
    with bystander(server):
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    """A client of the plain server without structured replies."""
    with RawClient(server.connect(tcp=True)) as client:
        yield client.negotiate()


@pytest.fixture
def structured(server: Server) -> Iterator[RawClient]:
    """A client with structured replies and block status."""
    with RawClient(server.connect(tcp=True)) as client:
        yield client.negotiate(allocation=True)


@pytest.fixture
def large_image(tmp_path: Path) -> Path:
    """A sparse image of 5 GiB."""
    path = tmp_path / "large.img"
    with open(path, "wb") as file:
        file.truncate(5 * GIB)
    return path


@contextmanager
def raw_client(
    server: Server, *, tcp: bool = False, structured: bool = False, allocation: bool = False
) -> Iterator[RawClient]:
    with RawClient(server.connect(tcp=tcp)) as client:
        yield client.negotiate(structured=structured, allocation=allocation)


def error_of(client: RawClient, request: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
    """The error of a request without payload, in a simple reply."""
    client.request(request, offset, length, flags=flags, cookie=99)
    error, cookie, _ = client.simple_reply()
    assert cookie == 99
    return error


def error_chunk(client: RawClient) -> int:
    """The error in a structured reply that is one error chunk."""
    (chunk,) = client.chunks()
    assert chunk.kind == 0x8001
    error, length = struct.unpack(">IH", chunk.payload[:6])
    assert len(chunk.payload) == 6 + length
    return int(error)


def memory_of(pid: int) -> Dict[str, int]:
    """The sizes in ``/proc/PID/status``, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: int(value.split()[0]) << 10 for name, _, value in (x.partition(":") for x in lines) if "kB" in value}


def worker_of(server: Server, client: RawClient) -> int:
    """The worker that serves *client*, who came over TCP: its title says so."""
    host, port = client.sock.getsockname()
    (worker,) = [pid for pid in server.workers() if f"worker for {host}:{port} " in title_of(pid)]
    return worker


def wait_until_idle(pid: int) -> None:
    """Wait until the process has slept for half a second."""
    states: List[List[str]] = []

    def is_idle() -> bool:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        states.append([fields[0], *fields[11:13]])
        return len(states) > 25 and all(state == ["S", *fields[11:13]] for state in states[-25:])

    wait_until(is_idle, "the worker's having nothing to do", 60)


# Broken requests


def test_wrong_request_magic_closes_the_connection(server: Server) -> None:
    for magic in (0, 0x25609514, 0x67446698, LONGEST):
        with raw_client(server) as client:
            client.send(struct.pack(">I", magic) + pack_request(READ, 0, 512)[4:] + pack_request(FLUSH, 0, 0))
            assert client.closed()


def test_write_before_a_wrong_magic_is_answered_before_the_connection_is_closed(client: RawClient, image: Path) -> None:
    client.send(pack_request(WRITE, 100, 5, cookie=7) + b"valid" + b"\xff" * 28)
    assert client.simple_reply() == (0, 7, b"")
    assert client.closed()
    assert image.read_bytes()[100:105] == b"valid"


def test_nothing_of_a_write_after_a_wrong_magic_is_written(client: RawClient, image: Path) -> None:
    before = image.read_bytes()
    client.send(b"XXXX" + pack_request(READ, 0, 512)[4:] + pack_request(WRITE, 0, 4) + b"evil")
    assert client.closed()
    assert image.read_bytes() == before


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, WRITE_ZEROES])
def test_a_range_beyond_the_end_is_refused(client: RawClient, command: int) -> None:
    expected = ENOSPC if command == WRITE_ZEROES else EINVAL
    size = client.size
    for offset, length in (
        (size, 1),
        (size - 1, 2),
        (size + 1, 0),
        (1 << 63, 512),
        ((1 << 64) - 1, LONGEST),
        (0, LONGEST),
    ):
        assert error_of(client, command, offset, length) == expected, (offset, length)
    assert client.works()


def test_block_status_beyond_the_end_is_refused(structured: RawClient) -> None:
    size = structured.size
    for offset, length in ((size, 1), (size - 1, 2), (1 << 63, 512), ((1 << 64) - 1, LONGEST)):
        structured.request(BLOCK_STATUS, offset, length)
        assert error_chunk(structured) == EINVAL, (offset, length)
    assert structured.works()


def test_payload_of_a_write_beyond_the_end_is_consumed(client: RawClient, image: Path) -> None:
    before = image.read_bytes()
    for length in (1, 4096, MIB):
        for offset in (client.size, client.size - length + 1, 1 << 63, (1 << 64) - 1):
            assert client.write(offset, b"\xee" * length) == ENOSPC
            assert client.works()
    assert image.read_bytes() == before


def test_payload_that_looks_like_a_request_is_not_taken_for_one(client: RawClient, image: Path) -> None:
    before = image.read_bytes()
    assert client.write(client.size, (pack_request(WRITE, 0, 4) + b"evil") * 1000) == ENOSPC
    assert client.works()
    assert image.read_bytes() == before


def test_longest_read_is_refused_without_memory_for_it(start: Start, large_image: Path) -> None:
    server = start("--target", large_image, tcp=True)
    with bystander(server), raw_client(server, tcp=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["VmHWM"]
        assert error_of(client, READ, 0, LONGEST) == EINVAL
        assert client.works()
        assert memory_of(worker)["VmHWM"] - before < 4 * MIB


def test_longest_structured_read_is_refused_without_memory_for_it(start: Start, large_image: Path) -> None:
    server = start("--target", large_image, tcp=True)
    with bystander(server), raw_client(server, tcp=True, structured=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["VmHWM"]
        client.request(READ, 0, LONGEST)
        assert error_chunk(client) == EINVAL
        assert memory_of(worker)["VmHWM"] - before < 4 * MIB


def test_write_of_64_mib_is_served_without_memory_for_it(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 100 * MIB)
    server = start("--target", image, tcp=True)
    pattern = bytes(range(251)) * (64 * MIB // 251 + 1)
    with bystander(server), raw_client(server, tcp=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["VmHWM"]
        assert client.write(12345, pattern[: 64 * MIB]) == 0
        assert memory_of(worker)["VmHWM"] - before < 4 * MIB
        with open(image, "rb") as file:
            file.seek(12345)
            assert file.read(64 * MIB) == pattern[: 64 * MIB]


def test_write_above_the_limit_is_drained_without_memory_for_it(start: Start, large_image: Path) -> None:
    server = start("--target", large_image, tcp=True)
    with bystander(server), raw_client(server, tcp=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["VmHWM"]
        client.request(WRITE, 0, 257 * MIB, cookie=5)
        zeros = bytes(MIB)
        for _ in range(257):
            client.send(zeros)
        assert client.simple_reply() == (EINVAL, 5, b"")
        assert client.works()
        assert memory_of(worker)["VmHWM"] - before < 4 * MIB
    assert large_image.stat().st_blocks == 0


def test_announcing_a_payload_of_4_gib_takes_no_memory(start: Start, large_image: Path) -> None:
    server = start("--target", large_image, tcp=True)
    with bystander(server), raw_client(server, tcp=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["VmHWM"]
        client.request(WRITE, 0, LONGEST)
        client.send(bytes(MIB))
        wait_until_idle(worker)
        assert memory_of(worker)["VmHWM"] - before < 4 * MIB
    server.wait_for_log("in the middle of a message")


# Small print


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, FLUSH])
def test_zero_length_is_no_disconnect(client: RawClient, image: Path, command: int) -> None:
    before = image.read_bytes()
    for offset in (0, 4097, client.size):
        assert error_of(client, command, offset, 0) in (0, EINVAL)
        assert client.works()
    assert image.read_bytes() == before


def test_zero_length_structured_read_is_no_disconnect(structured: RawClient) -> None:
    structured.request(READ, 0, 0)
    assert [chunk.payload for chunk in structured.chunks()] == [b""]
    assert structured.works()


def test_zero_length_block_status_is_no_disconnect(structured: RawClient) -> None:
    structured.request(BLOCK_STATUS, 0, 0)
    assert error_chunk(structured) == EINVAL
    assert structured.works()


def test_unknown_command_is_an_error(client: RawClient) -> None:
    for number in (8, 9, 255, 0x8000, 0xFFFF):
        assert error_of(client, number, 0, 4096) == EINVAL
        assert client.works()


@pytest.mark.parametrize("command", [READ, TRIM, FLUSH, CACHE, WRITE_ZEROES])
def test_unknown_flags_are_an_error(client: RawClient, image: Path, command: int) -> None:
    before = image.read_bytes()
    for flag in range(5, 16):
        assert error_of(client, command, 0, 512 if command != FLUSH else 0, 1 << flag) == EINVAL
    assert client.works()
    assert image.read_bytes() == before


def test_write_with_unknown_flags_is_refused_and_its_payload_consumed(client: RawClient, image: Path) -> None:
    before = image.read_bytes()
    for flag in (1 << 1, 1 << 4, 1 << 9, 1 << 15):
        assert client.write(0, b"evil" * 1024, flags=flag) == EINVAL
    assert client.works()
    assert image.read_bytes() == before


def test_df_without_structured_replies_is_an_error(client: RawClient) -> None:
    assert error_of(client, READ, 0, 512, DF) == EINVAL
    assert client.works()


def test_block_status_without_a_context_is_an_error(client: RawClient, server: Server) -> None:
    assert error_of(client, BLOCK_STATUS, 0, 512) == EINVAL
    assert client.works()
    with raw_client(server, structured=True) as other:
        other.request(BLOCK_STATUS, 0, 512)
        assert error_chunk(other) == EINVAL


def test_errors_of_reads_are_structured_too(structured: RawClient) -> None:
    for offset, length, flags in ((1 << 62, 512, 0), (0, LONGEST, 0), (0, 512, 1 << 9)):
        structured.request(READ, offset, length, flags=flags, cookie=9)
        assert error_chunk(structured) == EINVAL
        assert structured.works()


@pytest.mark.parametrize("flags", [0, DF, FUA])
def test_every_successful_read_is_structured(structured: RawClient, image: Path, flags: int) -> None:
    for length in (1, 512, 32767, 32768, MIB):
        structured.request(READ, 1001, length, flags=flags, cookie=9)
        chunks = structured.chunks()
        assert {(chunk.kind, chunk.cookie) for chunk in chunks} == {(1, 9)}
        assert not flags & DF or len(chunks) == 1
        assert b"".join(chunk.payload[8:] for chunk in chunks) == image.read_bytes()[1001 : 1001 + length]


def test_fua_where_it_means_nothing_is_ignored(client: RawClient) -> None:
    for number in (READ, CACHE, FLUSH):
        client.request(number, 0, 0 if number == FLUSH else 512, flags=FUA)
        assert client.simple_reply(512 if number == READ else 0)[0] == 0
        assert client.works()


def test_fua_on_block_status_and_disc_is_ignored(structured: RawClient) -> None:
    structured.request(BLOCK_STATUS, 0, 512, flags=FUA)
    assert structured.chunks()[-1].kind == 5
    structured.request(DISC, flags=FUA)
    assert structured.closed()


def test_two_requests_with_one_cookie_are_both_answered(client: RawClient, image: Path) -> None:
    data = image.read_bytes()
    client.send(pack_request(READ, 0, 512, cookie=7) + pack_request(READ, 512, 512, cookie=7))
    assert client.simple_reply(512) == (0, 7, data[:512])
    assert client.simple_reply(512) == (0, 7, data[512:1024])


def test_any_cookie_comes_back(client: RawClient) -> None:
    for cookie in (0, LONGEST, (1 << 64) - 1, 0x6744669800000000):
        client.request(FLUSH, cookie=cookie)
        assert client.simple_reply()[:2] == (0, cookie)


# Read-only


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_a_client_that_writes_to_a_read_only_disk_is_disconnected(start: Start, image: Path, command: int) -> None:
    before = image.read_bytes()
    server = start("--target", "--readonly", image)
    for length in (0, 4096, MIB):
        with bystander(server), raw_client(server) as client:
            client.request(command, 0, length)
            assert client.closed()
    assert server.log().count("read-only") == 3
    assert image.read_bytes() == before


# Block status


def test_block_status_is_bounded_and_tells_the_truth(start: Start, tmp_path: Path) -> None:
    image, blocks = tmp_path / "disk.img", 40_000
    with open(image, "wb") as file:
        file.truncate(blocks * 4096)
        for block in range(1, blocks, 2):
            os.pwrite(file.fileno(), b"data", block * 4096)
    server = start("--target", image)
    with bystander(server), raw_client(server, allocation=True) as client:
        client.request(BLOCK_STATUS, 0, blocks * 4096)
        extents = block_status(client)
        assert 1000 < len(extents) <= 1 << 20
        assert extents == [(4096, 0 if block % 2 else 3) for block in range(len(extents))]


def test_block_status_of_one_extent_stays_within_the_request(start: Start, large_image: Path) -> None:
    os.truncate(large_image, 5 * GIB)
    with open(large_image, "r+b") as file:
        os.pwrite(file.fileno(), bytes(8192), MIB)
    server = start("--target", large_image)
    with bystander(server), raw_client(server, allocation=True) as client:
        for offset, length, expected in (
            (0, LONGEST, (MIB, 3)),
            (0, 4096, (4096, 3)),
            (MIB - 1, 2, (1, 3)),
            (MIB + 1, 100, (100, 0)),
            (MIB + 1, LONGEST, (8191, 0)),
            (2 * MIB, LONGEST, (LONGEST, 3)),
        ):
            client.request(BLOCK_STATUS, offset, length, flags=REQ_ONE)
            assert block_status(client) == [expected]


def block_status(client: RawClient) -> List[Tuple[int, int]]:
    (chunk,) = client.chunks()
    assert (chunk.kind, chunk.payload[:4]) == (5, struct.pack(">I", 1))
    return list(struct.iter_unpack(">II", chunk.payload[4:]))


# Durability


@contextmanager
def traced_client(image: Path, trace: Path) -> Iterator[RawClient]:
    """A client of a server for one client, whose syncs and sends are written to *trace* in their order."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    calls = ["strace", "-f", "-o", str(trace), "-e", "trace=fdatasync,fsync,sendmsg,sendto"]
    with theirs:
        process = subprocess.Popen(
            [*calls, *command("--target", "--inetd", image)], stdin=theirs.fileno(), stdout=theirs.fileno()
        )
    with RawClient(ours) as client:
        yield client.negotiate()
        client.request(DISC)
        assert client.closed()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("request_bytes"),
    [
        pack_request(WRITE, 0, 4096, flags=FUA) + bytes(4096),
        pack_request(WRITE, 0, MIB, flags=FUA) + bytes(MIB),
        pack_request(WRITE_ZEROES, 0, 4096, flags=FUA),
        pack_request(WRITE_ZEROES, 0, 4096, flags=FUA | NO_HOLE),
        pack_request(TRIM, 0, 4096, flags=FUA),
        pack_request(FLUSH, 0, 0),
    ],
    ids=["WRITE", "large WRITE", "WRITE_ZEROES", "WRITE_ZEROES NO_HOLE", "TRIM", "FLUSH"],
)
def test_data_is_synchronised_before_the_reply(image: Path, tmp_path: Path, request_bytes: bytes) -> None:
    trace = tmp_path / "trace"
    with traced_client(image, trace) as client:
        client.send(request_bytes)
        assert client.simple_reply()[0] == 0
    # strace tells of a call a moment after its effect: only when all is over it has told of all of them.
    calls = [line.split()[1].partition("(")[0] for line in trace.read_text().splitlines()]
    first = calls.index("fdatasync")
    assert calls[first + 1] in ("sendmsg", "sendto")


# The whole disk at once


def answered_meanwhile(client: RawClient, done: threading.Event) -> int:
    """Ask until *done*; how often there was an answer."""
    answers = 0
    while not done.is_set():
        assert client.works()
        answers += 1
    return answers


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_zeroing_4_gib_is_exact_to_the_byte_and_stalls_nobody(start: Start, large_image: Path, command: int) -> None:
    begin, end = 1001, 1001 + LONGEST
    with open(large_image, "r+b") as file:
        os.pwrite(file.fileno(), b"\xaa" * 8192, 0)
        os.pwrite(file.fileno(), b"\xbb" * 3 * MIB, 2 * GIB - MIB)
        os.pwrite(file.fileno(), b"\xcc" * 8192, end - 4096)
    server = start("--target", large_image)
    done = threading.Event()
    with bystander(server) as other, raw_client(server) as client:
        client.request(command, begin, LONGEST, cookie=3)

        def wait_for_the_reply() -> None:
            try:
                assert client.simple_reply() == (0, 3, b"")
            finally:
                done.set()

        waiter = threading.Thread(target=wait_for_the_reply)
        waiter.start()
        answered_meanwhile(other, done)
        waiter.join()
        assert client.read(0, 8192) == b"\xaa" * begin + bytes(8192 - begin)
        assert client.read(end - 4096, 8192) == bytes(4096) + b"\xcc" * 4096
        assert client.read(2 * GIB - MIB, 3 * MIB) == bytes(3 * MIB)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory in a tmpfs, which can give space back but knows no other way to zero than writing."""
    with tempfile.TemporaryDirectory(prefix="xnbd-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def test_fast_zeroing_that_would_be_slow_is_refused_before_anything_is_touched(tmpfs: Path, start: Start) -> None:
    image = tmpfs / "disk.img"
    image.write_bytes(b"\xdd" * MIB)
    server = start("--target", image)
    with bystander(server), raw_client(server) as client:
        assert error_of(client, WRITE_ZEROES, 100, 500_000, FAST_ZERO | NO_HOLE) == ENOTSUP
        assert image.read_bytes() == b"\xdd" * MIB
        assert error_of(client, WRITE_ZEROES, 100, 500_000, NO_HOLE) == 0
        assert image.read_bytes() == b"\xdd" * 100 + bytes(500_000) + b"\xdd" * (MIB - 500_100)
        assert error_of(client, WRITE_ZEROES, 0, MIB, FAST_ZERO) == 0
        assert image.read_bytes() == bytes(MIB)


# Floods


def test_client_that_never_reads_its_replies_costs_no_memory(server: Server, client: RawClient) -> None:
    worker = worker_of(server, client)
    before = memory_of(worker)["RssAnon"]
    send_until_stuck(client, pack_request(READ, 0, 4096) * 1000)
    assert memory_of(worker)["RssAnon"] - before < 32 * MIB


def test_client_that_never_reads_long_structured_replies_costs_no_memory(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
        for offset in range(0, 64 * MIB, 64 << 10):
            os.pwrite(file.fileno(), bytes(32 << 10), offset)
    server = start("--target", image, tcp=True)
    with bystander(server), raw_client(server, tcp=True, structured=True) as client:
        worker = worker_of(server, client)
        before = memory_of(worker)["RssAnon"]
        send_until_stuck(client, pack_request(READ, 0, 64 * MIB) * 500, times=1)
        wait_until_idle(worker)
        assert memory_of(worker)["RssAnon"] - before < 32 * MIB


@pytest.mark.parametrize("structured", [False, True])
def test_reads_of_a_much_divided_overlay_that_nobody_takes_cost_no_memory(
    start: Start, tmp_path: Path, structured: bool
) -> None:
    image = tmp_path / "base.img"
    image.write_bytes(b"\xba" * 16 * MIB)
    server = start("--cow-target", image, tcp=True)
    with bystander(server), raw_client(server, tcp=True) as writer:
        divide_overlay(writer, 16 * MIB)
        with raw_client(server, tcp=True, structured=structured) as deaf:
            worker = worker_of(server, deaf)
            before = memory_of(worker)["RssAnon"]
            send_until_stuck(deaf, pack_request(READ, 0, 16 * MIB) * 300, times=1)
            wait_until_idle(worker)
            assert memory_of(worker)["RssAnon"] - before < 32 * MIB
        assert writer.read(0, 16 * MIB) == (b"\xba" * 4096 + b"\xcc" * 4096) * (16 * MIB // 8192)


def divide_overlay(client: RawClient, size: int) -> None:
    """Write every other block of a disk of *size* bytes."""
    for offset in range(4096, size, 8192):
        client.request(WRITE, offset, 4096, data=b"\xcc" * 4096)
    for _ in range(4096, size, 8192):
        assert client.simple_reply()[0] == 0


def test_client_that_never_reads_block_status_costs_no_memory(server: Server, structured: RawClient) -> None:
    worker = worker_of(server, structured)
    before = memory_of(worker)["RssAnon"]
    send_until_stuck(structured, pack_request(BLOCK_STATUS, 0, MIB) * 1000)
    assert memory_of(worker)["RssAnon"] - before < 32 * MIB


def send_until_stuck(client: RawClient, data: bytes, times: int = 1000) -> None:
    """Send *data* over and over until the server takes no more for a second, or *times* times."""
    client.sock.settimeout(1)
    try:
        for _ in range(times):
            client.send(data)
    except socket.timeout:
        pass
    finally:
        client.sock.settimeout(60)


def test_many_small_requests_in_one_piece_are_all_answered(client: RawClient, image: Path) -> None:
    data, count = image.read_bytes(), 5000
    requests = b"".join(pack_request(READ, 3 * n, 7, cookie=n) for n in range(count))
    sender = threading.Thread(target=client.send, args=(requests,))
    sender.start()
    for n in range(count):
        assert client.simple_reply(7) == (0, n, data[3 * n : 3 * n + 7])
    sender.join()


def test_requests_in_any_pieces_are_understood(client: RawClient, image: Path) -> None:
    data = image.read_bytes()
    stream = pack_request(READ, 0, 5) + pack_request(WRITE, 5, 6) + b"abcdef" + pack_request(READ, 11, 8)
    for size in (1, 3, 27, 29):
        for start in range(0, len(stream), size):
            client.send(stream[start : start + size])
        assert client.simple_reply(5) == (0, 1, data[:5])
        assert client.simple_reply() == (0, 1, b"")
        assert client.simple_reply(8) == (0, 1, data[11:19])
    assert image.read_bytes() == data[:5] + b"abcdef" + data[11:]


# Leaving


def all_have_left(server: Server) -> bool:
    return len(server.busy_workers()) <= 1


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp reset"])
def test_disconnect_at_every_byte_of_a_write_writes_nothing(start: Start, image: Path, tcp: bool) -> None:
    before = image.read_bytes()
    server = start("--target", image, tcp=tcp)
    said = pack_request(WRITE, 0, 40) + b"\xee" * 40
    with bystander(server):
        for length in range(len(said)):
            with raw_client(server, tcp=tcp) as client:
                client.send(said[:length])
                if tcp:
                    client.reset()
        wait_until(lambda: all_have_left(server), "the workers' end")
        assert image.read_bytes() == before


def test_disconnect_in_a_large_payload_writes_nothing_else_than_a_part_of_it(server: Server, image: Path) -> None:
    before = image.read_bytes()
    for length in (1, 4095, 4096, 128 << 10, 512 << 10, 700_000, MIB - 1):
        with raw_client(server) as client:
            client.request(WRITE, 5000, MIB)
            client.send(b"\xee" * length)
        wait_until(lambda: all_have_left(server), "the worker's end")
        after = image.read_bytes()
        assert after[:5000] == before[:5000]
        assert after[5000 + length :] == before[5000 + length :]


def test_disconnect_after_every_byte_of_a_reply(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with bystander(server):
        for length in range(17 + 32):
            with raw_client(server, tcp=True) as client:
                client.request(READ, 0, 32)
                client.receive(min(length, 16 + 32))
                client.reset()
        wait_until(lambda: all_have_left(server), "the workers' end")


def test_reset_in_the_middle_of_a_large_reply(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with bystander(server):
        for _ in range(20):
            with raw_client(server, tcp=True) as client:
                client.send(pack_request(READ, 0, 8 * MIB) * 4)
                client.receive(100_000)
                client.reset()
        wait_until(lambda: all_have_left(server), "the workers' end")


def test_half_close_after_requests_gets_all_replies(client: RawClient, image: Path) -> None:
    data = image.read_bytes()
    requests = [pack_request(READ, n * MIB, MIB, cookie=n) for n in range(8)]
    client.send(b"".join(requests) + pack_request(WRITE, 8 * MIB, 5, cookie=8) + b"hello")
    client.finish_sending()
    for n in range(8):
        assert client.simple_reply(MIB) == (0, n, data[n * MIB : (n + 1) * MIB])
    assert client.simple_reply() == (0, 8, b"")
    assert client.closed()


def test_disc_after_requests_gets_all_replies_and_no_more(client: RawClient, image: Path) -> None:
    client.send(pack_request(READ, 0, MIB) + pack_request(DISC, 0, 0) + pack_request(READ, 0, 512))
    assert client.simple_reply(MIB) == (0, 1, image.read_bytes()[:MIB])
    assert client.closed()


def test_1000_connections_as_fast_as_possible(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with bystander(server) as other:
        for n in range(1000):
            with RawClient(server.connect(tcp=n % 2 == 0)) as client:
                if n % 4 == 0:
                    client.reset()
            if n % 100 == 0:
                assert other.works()
        with raw_client(server) as newcomer:
            assert newcomer.works()
        wait_until(lambda: all_have_left(server), "the workers' end")


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_structured_read_sees_the_hole_that_this_client_has_just_made(
    structured: RawClient, image: Path, command: int
) -> None:
    """What the server remembers of where no holes are must not outlive a change."""
    whole = image.read_bytes()
    structured.request(READ, 0, MIB)
    assert [chunk.payload[8:] for chunk in structured.chunks()] == [whole[:MIB]]
    assert error_of(structured, command, 256 << 10, 128 << 10) == 0
    structured.request(READ, 0, MIB)
    before, hole, after = structured.chunks()
    assert before.payload[8:] == whole[: 256 << 10]
    assert (hole.kind, struct.unpack(">QI", hole.payload)) == (2, (256 << 10, 128 << 10))
    assert after.payload[8:] == whole[384 << 10 : MIB]
