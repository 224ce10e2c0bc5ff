"""Random requests against a copy in memory: every answer and the image at the end have to agree with it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from caching import connect
from certificates import Certificates
from conftest import MIB, Start
from model import Change, Model, check_mixture
from server_process import Server

CONNECTIONS = 4


@pytest.mark.parametrize("size, rounds", [(1, 60), (511, 150), (4097, 300), (8 * MIB + 1, 250)])
def test_image_agrees_with_the_copy(start: Start, tmp_path: Path, seed: int, size: int, rounds: int) -> None:
    rng = random.Random(seed)
    image = tmp_path / "model.img"
    content = rng.randbytes(size)
    image.write_bytes(content)
    check_target(start("--target", image), image, content, rng, rounds)


def test_image_agrees_with_the_copy_over_tls(
    start: Start, tmp_path: Path, seed: int, certificates: Certificates
) -> None:
    rng = random.Random(seed)
    image = tmp_path / "model.img"
    content = rng.randbytes(8 * MIB + 1)
    image.write_bytes(content)
    check_target(start("--target", image, tls=certificates), image, content, rng, 120)


def check_target(server: Server, image: Path, content: bytes, rng: random.Random, rounds: int) -> None:
    clients = [connect(server.uri, structured=number != 0) for number in range(CONNECTIONS)]
    model = Model(clients, content, rng)
    model.run(rounds)
    for client in clients:
        client.shutdown()
    server.stop()
    assert image.read_bytes() == model.content


def test_sparse_image_agrees_with_the_copy(start: Start, tmp_path: Path, seed: int) -> None:
    image = tmp_path / "sparse.img"
    server = start("--target", "--create", 3 * MIB, image)
    clients = [connect(server.uri, structured=True) for _ in range(2)]
    model = Model(clients, bytes(3 * MIB), random.Random(seed))
    model.run(150)
    assert image.read_bytes() == model.content


def test_changes_that_overlap_go_together_only_if_they_leave_the_same_bytes() -> None:
    change = Change(10, b"abcdef")
    assert change.goes_with(Change(16, b"x"))
    assert change.goes_with(Change(12, b"cd"))
    assert change.goes_with(Change(14, b"efgh"))
    assert not change.goes_with(Change(14, b"eg"))
    assert not change.goes_with(Change(12, b"cd", vague=True))


def test_mixture_takes_old_and_new_bytes_and_nothing_else() -> None:
    check_mixture(b"aXcY", b"abcd", b"WXZY", 0)
    with pytest.raises(AssertionError, match="byte 102 is"):
        check_mixture(b"aX?Y", b"abcd", b"WXZY", 100)
