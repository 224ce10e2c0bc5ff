"""Scattered reads over a disk that is much larger than what is mapped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Dict

import pytest
from conftest import Start
from rawclient import READ, WRITE, RawClient, pack_request
from server_process import Server

from xnbd.server.session.first_touch import how_not_to_wait

SIZE = 64 << 30
PAGE = 4096


def faults_of_workers(server: Server) -> int:
    """Minor and major ones (``proc(5)``)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in server.workers()]
    return sum(int(one[7]) + int(one[9]) for one in fields)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("structured", [False, True])
def test_scattered_reads_see_what_was_written_and_seldom_fault(
    start: Start, large: Path, structured: bool, seed: int
) -> None:
    rng, batches, depth = random.Random(seed), 400, 32
    model: Dict[int, bytes] = {}
    server = start("--target", large)
    with RawClient(server.connect()) as client:
        client.negotiate(structured=structured)
        before = faults_of_workers(server)
        for _ in range(batches):
            where, data = rng.randrange(SIZE // PAGE) * PAGE, rng.randbytes(PAGE)
            client.send(pack_request(WRITE, where, PAGE, cookie=0) + data)
            assert client.simple_reply() == (0, 0, b"")
            model[where] = data
            offsets = [rng.randrange(SIZE // PAGE) * PAGE for _ in range(depth - 2)]
            offsets += [where, rng.choice(list(model))]
            client.send(b"".join(pack_request(READ, at, PAGE, cookie=at) for at in offsets))
            for at in offsets:
                expected = model.get(at, bytes(PAGE))
                if structured:
                    (chunk,) = client.chunks()
                    assert (chunk.cookie, chunk.payload) == (at, at.to_bytes(8, "big") + expected)
                else:
                    assert client.simple_reply(PAGE) == (0, at, expected)
        faults = faults_of_workers(server) - before
    with large.open("rb") as file:
        if how_not_to_wait(file.fileno()) is None:
            pytest.skip("this file system cannot say what is in memory")
    assert faults < batches * depth * 0.6
