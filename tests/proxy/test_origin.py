"""Connections to origins of every kind: nbdkit, qemu-nbd, nbd-server and our own server."""

from __future__ import annotations

import errno
import random
import select
import socket
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple

import pytest
from conftest import MIB, Start
from origin_owner import Own, owners
from origin_programs import OriginProgram
from server_process import Server, free_port, run

from xnbd.origin.address import parse_origin
from xnbd.origin.base import OriginLost
from xnbd.origin.probe import probe

KIB = 1 << 10
SIZE = 8 * MIB + 1536
NOISY = [(0, 64 * KIB), (4 * MIB, 4 * MIB + 128 * KIB), (8 * MIB, SIZE)]


@pytest.fixture(scope="module")
def disk() -> bytes:
    """What is on the disk: noise in three places, zeros between."""
    content = bytearray(SIZE)
    for start, end in NOISY:
        content[start:end] = random.Random(start).randbytes(end - start)
    return bytes(content)


@pytest.fixture
def image(tmp_path: Path, disk: bytes) -> Path:
    """The disk as a sparse file."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start, end in NOISY:
            file.seek(start)
            file.write(disk[start:end])
    return path


# Real origins

Origin = Callable[[str], str]
"""Starts a server of the kind named, and returns its URI."""


OWN = {"xnbd-server": [], "xnbd-server oldstyle": ["--oldstyle"]}


@pytest.fixture
def origin(start: Start, tmp_path: Path, image: Path) -> Iterator[Origin]:
    programs: List[OriginProgram] = []

    def start_one(kind: str) -> str:
        if kind in OWN:
            server = start("--target", "--readonly", "--exportname", "disk", *OWN[kind], image)
            return f"nbd+unix:///disk?socket={server.socket}"
        programs.append(OriginProgram(kind, image, tmp_path))
        if kind == "nbdkit memory":
            run("nbdcopy", image, programs[-1].uri)
        return programs[-1].uri

    try:
        yield start_one
    finally:
        for program in programs:
            program.stop()


@pytest.fixture
def own(origin: Origin) -> Iterator[Own]:
    """Makes owners, who leave before *origin* is stopped."""
    with owners() as make:
        yield make


class Kind(NamedTuple):
    """What a server is known to be able to do."""

    name: str
    structured: bool = False
    block_status: bool = False
    oldstyle: bool = False
    maximum: int = 32 * MIB


KINDS = [
    Kind("nbdkit", structured=True, block_status=True),
    Kind("nbdkit memory", structured=True, block_status=True),
    Kind("nbdkit without structured replies"),
    Kind("nbdkit not fixed"),
    Kind("nbdkit oldstyle", oldstyle=True),
    Kind("nbdkit with 64 KiB requests", structured=True, block_status=True, maximum=64 * KIB),
    Kind("qemu-nbd", structured=True, block_status=True),
    Kind("nbd-server"),
    Kind("xnbd-server", structured=True, block_status=True),
    Kind("xnbd-server oldstyle", oldstyle=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_pipelined_reads_agree_with_the_image(
    own: Own, origin: Origin, disk: bytes, seed: int, kind: Kind
) -> None:
    owner = own(origin(kind.name), expected_size=SIZE).connect()
    connection, rng = owner.connection, random.Random(seed)
    assert connection.size == SIZE
    assert connection.export and connection.export.structured == kind.structured
    assert connection.export.oldstyle == kind.oldstyle
    assert connection.can_tell_zeros == kind.block_status
    assert connection.maximum_read == kind.maximum
    ranges = []
    for token in range(200):
        length = 512 * rng.randint(1, rng.choice([8, 128, 1024]))
        length = min(length, kind.maximum)
        ranges.append((512 * rng.randint(0, (SIZE - length) // 512), length))
        connection.read(token, *ranges[-1])
        owner.run_until(lambda: connection.outstanding <= 32)
    owner.finish()
    for token, (offset, length) in enumerate(ranges):
        assert owner.content(token) == disk[offset : offset + length]
    assert connection.bytes_received > 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k.maximum == 32 * MIB], ids=lambda kind: kind.name)
def test_the_whole_disk_comes_in_one_read(own: Own, origin: Origin, disk: bytes, kind: Kind) -> None:
    owner = own(origin(kind.name)).connect()
    owner.connection.read("all", 0, SIZE)
    assert owner.finish().content("all") == disk


@pytest.mark.parametrize("kind", ["xnbd-server", "qemu-nbd"])
def test_holes_come_as_holes_where_the_origin_tells_them(own: Own, origin: Origin, kind: str) -> None:
    owner = own(origin(kind)).connect()
    owner.connection.read(0, 0, 8 * MIB)
    owner.finish()
    assert sum(length for _, length in owner.holes) == 8 * MIB - 192 * KIB
    assert owner.connection.bytes_received < 256 * KIB


@pytest.mark.parametrize("kind", [k for k in KINDS if k.block_status], ids=lambda kind: kind.name)
def test_block_status_agrees_with_the_image(own: Own, origin: Origin, kind: Kind) -> None:
    owner = own(origin(kind.name)).connect()
    position, found = 0, []
    while position < SIZE:
        owner.connection.query_extents(position, position, SIZE - position)
        owner.finish()
        assert owner.done[position] == 0
        for length, zero in owner.extents[position]:
            if not zero:
                found.append((position, position + length))
            position += length
    assert position == SIZE
    if kind.name == "nbdkit memory":  # it allocates 32 KiB at once
        found[-1] = (found[-1][0], SIZE)
    assert found == NOISY


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbd-server", "xnbd-server"])
def test_an_export_that_does_not_exist_is_named_in_the_message(own: Own, origin: Origin, kind: str) -> None:
    owner = own(origin(kind).replace("disk?", "nothing?"))
    owner.connection.start()
    assert "it has no export named 'nothing'" in owner.lost()


def test_an_origins_error_is_the_end_of_one_request_only(own: Own, origin: Origin, tmp_path: Path) -> None:
    owner = own(origin("nbdkit that fails")).connect()
    (tmp_path / "fail").touch()
    owner.connection.read("bad", 0, 512)
    owner.finish()
    (tmp_path / "fail").unlink()
    owner.connection.read("good", 0, 512)
    owner.finish()
    assert owner.done == {"bad": errno.ENOSPC, "good": 0}


def test_a_killed_origin_leaves_its_requests_to_the_next(own: Own, start: Start, image: Path, disk: bytes) -> None:
    server = start("--target", "--readonly", image)
    owner = own(server.uri).connect()
    owner.connection.read("before", 0, 4096)
    owner.finish()
    server.stop()
    owner.connection.read("after", 4 * MIB, 4096)
    owner.lost()
    assert owner.connection.unfinished() == ["after"]
    again = own(start("--target", "--readonly", image).uri, expected_size=SIZE).connect()
    again.connection.read("after", 4 * MIB, 4096)
    assert again.finish().content("after") == disk[4 * MIB : 4 * MIB + 4096]


def test_another_size_than_before_is_refused(own: Own, origin: Origin) -> None:
    owner = own(origin("nbdkit"), expected_size=SIZE - 512)
    owner.connection.start()
    assert f"its disk has {SIZE} bytes, not {SIZE - 512} as before" in owner.lost()
    assert not owner.connection.ready


# Connecting


def refused_at_start(own: Own, uri: str) -> str:
    owner = own(uri)
    with pytest.raises(OriginLost) as loss:
        owner.connection.start()
        owner.run_until(lambda: False)
    return str(loss.value)


def test_nobody_at_a_tcp_port_is_told(own: Own) -> None:
    port = free_port()
    assert refused_at_start(own, f"nbd://127.0.0.1:{port}/") == f"origin nbd://127.0.0.1:{port}/: Connection refused"


def test_nobody_at_a_unix_socket_is_told(own: Own, tmp_path: Path) -> None:
    assert "No such file or directory" in refused_at_start(own, f"nbd+unix:///?socket={tmp_path}/none")


@pytest.mark.parametrize(
    ("host", "reason"), [("fe80::1%nosuchif", "Name or service not known"), ("a..b", "no host can have this name")]
)
def test_a_host_that_cannot_be_found_is_told(own: Own, host: str, reason: str) -> None:
    uri = str(parse_origin(host, "1"))
    assert refused_at_start(own, uri) == f"origin {uri}: cannot find the host: {reason}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_addresses_of_a_host_are_tried(own: Own, start: Start, image: Path, disk: bytes, host: str) -> None:
    server = start("--target", "--readonly", image, tcp=True)
    owner = own(f"nbd://{host}:{server.port}/").connect()
    owner.connection.read(0, 0, MIB)
    assert owner.finish().content(0) == disk[:MIB]


def test_a_host_that_does_not_answer_is_given_up(own: Own) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        assert select.select([], [first], [], 20)[1]  # the queue is full now, and further clients are not heard
        owner = own(f"nbd://127.0.0.1:{listener.getsockname()[1]}/", connect_timeout=0.5)
        owner.connection.start()
        assert owner.connection.events() == select.POLLOUT
        assert "connecting took too long" in owner.lost()


def test_requests_may_be_queued_before_the_handshake(own: Own, origin: Origin, disk: bytes) -> None:
    owner = own(origin("nbdkit"))
    owner.connection.read("early", 0, 4096)
    owner.connection.start()
    owner.connection.on_events(0)
    assert owner.finish().content("early") == disk[:4096]


def test_probe_tells_the_size(server: Server, image: Path) -> None:
    assert probe(parse_origin(server.uri), timeout=20).size == image.stat().st_size


def test_probe_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OriginLost, match="No such file"):
        probe(parse_origin(f"nbd+unix:///?socket={tmp_path}/nobody"), timeout=20)
