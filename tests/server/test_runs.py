"""Many READs or WRITEs in one go: answered as one by one, each for itself, in their order."""

from __future__ import annotations

import random
import resource
import threading
from pathlib import Path
from typing import List, NamedTuple, Tuple

import pytest
from conftest import MIB, Start
from rawclient import FUA, READ, WRITE, RawClient, pack_request
from server_process import Server

EPERM, EINVAL, ENOSPC = 1, 22, 28
LENGTHS = (1, 512, 4096, 4096, 4096, 10_000)


class Request(NamedTuple):
    command: int
    offset: int
    length: int
    data: bytes = b""
    flags: int = 0

    def pack(self, cookie: int) -> bytes:
        return pack_request(self.command, self.offset, self.length, flags=self.flags, cookie=cookie) + self.data


def random_run(rng: random.Random, size: int) -> List[Request]:
    """Requests of one kind and mostly of one length, somewhere or one behind the other; some cannot be done.

    READs are of the first half, WRITEs of the second: which of two in flight sees the other is nobody's promise.
    """
    command, length, adjoining = rng.choice((READ, WRITE)), rng.choice(LENGTHS), rng.random() < 0.3
    half = size // 2
    begin = rng.randrange(half // 2)
    run = []
    for number in range(rng.randrange(1, 80)):
        if rng.random() < 0.02:
            length = rng.choice((0, *LENGTHS) if command == WRITE else LENGTHS)
        offset = begin + number * length if adjoining else rng.randrange(half - max(LENGTHS))
        if rng.random() < 0.01:
            offset = rng.randrange(size - length + 1, size + MIB)
        elif command == WRITE:
            offset += half
        flags = FUA if rng.random() < 0.01 else 0
        run.append(Request(command, offset, length, rng.randbytes(length) if command == WRITE else b"", flags))
    return run


def expected(model: bytearray, request: Request) -> Tuple[int, bytes]:
    """Error and data of the reply; does the request on the *model*."""
    command, offset, length, data, _ = request
    if offset + length > len(model):
        return (ENOSPC if command == WRITE else EINVAL), b""
    if command == WRITE:
        model[offset : offset + length] = data
        return 0, b""
    return 0, bytes(model[offset : offset + length])


def send_in_pieces(client: RawClient, data: bytes, rng: random.Random) -> threading.Thread:
    """What is received at once ends anywhere: in a header, in a payload."""

    def send() -> None:
        position = 0
        while position < len(data):
            step = rng.choice((7, 1000, 5000, 60_000, 300_000))
            client.send(data[position : position + step])
            position += step

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def check_reply(client: RawClient, cookie: int, request: Request, error: int, data: bytes, *, structured: bool) -> None:
    if structured and request.command == READ:
        (chunk,) = client.chunks()
        assert chunk.cookie == cookie
        assert chunk.kind == (0x8001 if error else 1)
        code, offset = int.from_bytes(chunk.payload[:4], "big"), int.from_bytes(chunk.payload[:8], "big")
        assert code == error if error else (offset, chunk.payload[8:]) == (request.offset, data)
    else:
        assert client.simple_reply(len(data)) == (error, cookie, data)


@pytest.mark.parametrize("structured", [False, True])
def test_runs_are_answered_like_single_requests(start: Start, image: Path, structured: bool, seed: int) -> None:
    rng, model = random.Random(seed), bytearray(image.read_bytes())
    requests = [request for _ in range(60) for request in random_run(rng, len(model))]
    stream = b"".join(request.pack(cookie) for cookie, request in enumerate(requests))
    with RawClient(start("--target", image).connect()) as client:
        client.negotiate(structured=structured)
        sender = send_in_pieces(client, stream, rng)
        for cookie, request in enumerate(requests):
            error, data = expected(model, request)
            check_reply(client, cookie, request, error, data, structured=structured)
        sender.join()
    assert image.read_bytes() == model


def limit_file_size(server: Server, size: int) -> None:
    """Nothing can be written beyond *size* by any of its processes: EFBIG."""
    for pid in (server.pid, *server.workers()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("order", ["adjoining", "scattered"])
def test_one_write_of_a_run_that_fails_is_the_one_with_the_error(server: Server, image: Path, order: str) -> None:
    limit, count, bad = image.stat().st_size // 2, 16, 11
    offsets = [limit + (number - bad) * 4096 for number in range(count)]
    if order == "scattered":
        offsets = [limit if number == bad else number * 8192 for number in range(count)]
    failing = [offset >= limit for offset in offsets]
    data = [bytes([number + 1]) * 4096 for number in range(count)]
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.works()
        server.expected_errors.append("WRITE")
        limit_file_size(server, limit)
        client.send(b"".join(Request(WRITE, *one).pack(n) for n, one in enumerate(zip(offsets, [4096] * 16, data))))
        replies = [client.simple_reply() for _ in range(count)]
        assert [cookie for _, cookie, _ in replies] == list(range(count))
        assert [error != 0 for error, _, _ in replies] == failing
        before = image.read_bytes()
        for offset, content, failed in zip(offsets, data, failing):
            assert (before[offset : offset + 4096] == content) is not failed


def test_a_run_of_writes_of_who_may_only_read_is_refused_one_by_one(start: Start, image: Path, tmp_path: Path) -> None:
    before, rules = image.read_bytes(), tmp_path / "rules"
    rules.write_text("uid:* disk.img ro\n")
    with RawClient(start("--target", "--tls-authz", rules, image).connect()) as client:
        client.negotiate("disk.img")
        client.send(b"".join(Request(WRITE, number * 4096, 4096, bytes(4096)).pack(number) for number in range(8)))
        assert [client.simple_reply() for _ in range(8)] == [(EPERM, number, b"") for number in range(8)]
    assert image.read_bytes() == before


def test_overlapping_writes_of_a_run_are_done_in_their_order(server: Server, image: Path) -> None:
    data = [bytes([number]) * 4096 for number in range(32)]
    with RawClient(server.connect()) as client:
        client.negotiate()
        client.send(b"".join(Request(WRITE, MIB + n % 2 * 512, 4096, one).pack(n) for n, one in enumerate(data)))
        assert [client.simple_reply()[:2] for _ in data] == [(0, number) for number in range(32)]
        assert client.read(MIB, 512) == data[-2][:512]
        assert client.read(MIB + 512, 4096) == data[-1]
