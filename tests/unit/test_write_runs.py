"""What is a run of WRITEs and is done in one go, and what is left to the loop, untouched."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from rawclient import FUA, READ, WRITE, pack_request

from xnbd.protocol.reply_format import reply_format
from xnbd.server.process_loop import ProcessLoop
from xnbd.server.session.connection import Connection
from xnbd.server.session.receive_buffer import ReceiveBuffer
from xnbd.server.session.replies import Replies
from xnbd.server.session.write_runs import WriteRuns

SIZE = 64 << 10
BEFORE = b"\xee" * SIZE


class Bench:
    """Runs over a disk in a file, without a session around them."""

    def __init__(self, path: Path, connection: Connection) -> None:
        path.write_bytes(BEFORE)
        self.fd = os.open(path, os.O_RDWR)
        self.buffer = ReceiveBuffer(connection)
        self.replies = Replies(connection, reply_format(structured=False))
        self.runs = WriteRuns(self.buffer, self.replies)

    def do(self, received: bytes, *, start: int = 0, writable: int = SIZE) -> Tuple[int, int]:
        self.buffer.view[start : start + len(received)] = received
        return self.runs.do(start, start + len(received), self.fd, writable)

    @property
    def disk(self) -> bytes:
        return os.pread(self.fd, 2 * SIZE, 0)

    @property
    def answers(self) -> bytes:
        return b"".join(self.replies.pieces)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = Bench(tmp_path / "disk.img", Connection(theirs, ProcessLoop(handle_signals=False)))
        yield made
        os.close(made.fd)


def write(offset: int, length: int = 512, *, flags: int = 0, command: int = WRITE, fill: int = 0) -> bytes:
    data = bytes([fill or offset // 512 + 1]) * length if command == WRITE else b""
    return pack_request(command, offset, length, flags=flags, cookie=offset) + data


ADJOINING = [512 * number for number in range(2, 12)]
BACKWARDS = ADJOINING[::-1]
SCATTERED = [0, 5120, 512, 4096, 20480]
MISLEADING = [512, 1024, 1024, 1536, 2560]  # from the first to the last it is as far as if they adjoined


@pytest.mark.parametrize("offsets", [ADJOINING, BACKWARDS, SCATTERED, MISLEADING, [1024] * 5])
def test_a_run_is_done_and_answered_in_its_order(bench: Bench, offsets: List[int]) -> None:
    expected = bytearray(BEFORE)
    for number, offset in enumerate(offsets):
        expected[offset : offset + 512] = bytes([number + 1]) * 512
    stream = b"".join(write(offset, fill=number + 1) for number, offset in enumerate(offsets))
    assert bench.do(stream, start=100) == (len(offsets), 512 * len(offsets))
    assert bench.disk == expected
    assert bench.answers == b"".join(b"\x67\x44\x66\x98" + bytes(4) + offset.to_bytes(8, "big") for offset in offsets)


def test_what_has_come_only_in_part_is_not_of_the_run(bench: Bench) -> None:
    stream = b"".join(map(write, ADJOINING))
    assert bench.do(stream[:-1]) == (len(ADJOINING) - 1, 512 * (len(ADJOINING) - 1))
    assert bench.disk[ADJOINING[-1] : ADJOINING[-1] + 512] == BEFORE[:512]


STRANGERS = {
    "a longer one": write(8192, 1024),
    "a shorter one": write(8192, 511),
    "an empty one": write(8192, 0),
    "one with FUA": write(8192, flags=FUA),
    "a READ": write(8192, command=READ),
    "another magic": bytes(28 + 512),
    "beyond the end": write(SIZE - 511),
    "far beyond the end": write((1 << 64) - 512, fill=1),
}


@pytest.mark.parametrize("place", [0, 1, 2, 5])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_with_a_stranger_in_it_nothing_is_done(bench: Bench, stranger: str, place: int) -> None:
    requests = [write(512 * number) for number in range(8)]
    requests[place] = STRANGERS[stranger]
    assert bench.do(b"".join(requests)) == (0, 0)
    assert (bench.disk, bench.answers) == (BEFORE, b"")


@pytest.mark.parametrize("length", [0, 1 << 20, 0xFFFFFFFF])
def test_lengths_that_make_no_run_are_left_alone(bench: Bench, length: int) -> None:
    assert bench.do(8 * pack_request(WRITE, 0, length) + bytes(4096)) == (0, 0)


def test_who_may_not_write_does_not(bench: Bench) -> None:
    assert bench.do(b"".join(map(write, ADJOINING)), writable=-1) == (0, 0)
    assert (bench.disk, bench.answers) == (BEFORE, b"")


def test_a_run_that_fails_is_not_answered(bench: Bench) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = b"".join(map(write, ADJOINING))
        bench.buffer.view[: len(stream)] = stream
        assert bench.runs.do(0, len(stream), full.fileno(), SIZE) == (0, 0)
    assert bench.answers == b""
