"""Errors that clients get, in the log: all of them are counted, and few lines tell of them."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import lying_origin as lie
import pytest
from caching import BLOCK, CacheFiles
from conftest import MIB, Start
from json_log import with_words
from lying_origin import LyingOrigin, Visitor
from mounts import small_tmpfs
from rawclient import READ, WRITE, RawClient, pack_request
from server_process import Server, wait_until

CLIENTS, WRITES = 6, 300


@pytest.fixture
def full(start: Start, tmp_path: Path) -> Iterator[Server]:
    """A server whose disk has room for nothing."""
    with small_tmpfs(tmp_path / "small", "1m"):
        image = tmp_path / "small" / "disk.img"
        image.touch()
        os.truncate(image, 64 * MIB)
        with (tmp_path / "small" / "ballast").open("wb") as ballast, pytest.raises(OSError):
            while True:
                os.write(ballast.fileno(), bytes(1 << 16))
        server = start("--target", "--log-format", "json", image)
        yield server
        server.stop()


def told(server: Server) -> int:
    """How many failures the lines so far are about."""
    return sum(1 + line.get("more", 0) for line in with_words(server.log(), " failed: "))


@pytest.mark.root(reason="mounts a tmpfs")
def test_clients_of_a_full_disk_share_one_line_a_second_and_none_is_forgotten(full: Server) -> None:
    requests = b"".join(
        pack_request(WRITE, MIB + n * BLOCK, BLOCK, cookie=n) + bytes(BLOCK) for n in range(WRITES // 3)
    )
    began = time.monotonic()
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(full.connect())).negotiate() for _ in range(CLIENTS)]
        for _ in range(3):
            for client in clients:
                client.send(requests)
            for client in clients:
                assert [client.simple_reply()[0] for _ in range(WRITES // 3)] == [28] * (WRITES // 3)
        lines = len(with_words(full.log(), " failed: "))
        assert lines <= 2 + time.monotonic() - began
        wait_until(lambda: told(full) == CLIENTS * WRITES, "all failures, while the clients are there")
        assert clients[0].write(0, bytes(BLOCK)) == clients[0].write(BLOCK, bytes(BLOCK)) == 28
    wait_until(lambda: told(full) == CLIENTS * WRITES + 2, "the rest, when the client has left")
    line = with_words(full.log(), " failed: ")[0]
    about = [line[name] for name in ("level", "export", "command", "length", "errno")]
    assert about == ["WARNING", "disk.img", "WRITE", BLOCK, "ENOSPC"]
    assert line["offset"] >= MIB
    assert f"WRITE of 4096 bytes at {line['offset']} failed: No space left on device (ENOSPC)" in line["message"]
    assert any(" more in the last " in line["message"] for line in with_words(full.log(), " failed: "))


@pytest.mark.parametrize("error", [5, 28])
def test_what_an_origin_cannot_read_is_told_with_the_request(
    start: Start, tmp_path: Path, files: CacheFiles, error: int
) -> None:
    def behave(visitor: Visitor) -> None:
        visitor.negotiate(4 * MIB, structured=False)
        while True:
            visitor.send(lie.simple(visitor.request().cookie, error=error))

    with LyingOrigin(tmp_path / "liar.sock", behave) as origin:
        proxy = start(*files.arguments(origin.uri, "--log-format", "json", "--readahead", "0"))
        with RawClient(proxy.connect()).negotiate() as client:
            client.request(READ, 3 * BLOCK, BLOCK)
            assert client.simple_reply()[0] != 0
        proxy.wait_for_log(" failed: ")
        (line,) = with_words(proxy.log(), " failed: ")
        proxy.stop()
    assert [line[name] for name in ("export", "command", "offset", "length")] == ["cache.img", "READ", 3 * BLOCK, BLOCK]
    assert "a block could not be fetched" in line["message"]


def test_what_only_the_client_has_done_wrong_is_for_verbose(start: Start, image: Path) -> None:
    quiet, verbose = start("--target", image), start("--target", "--verbose", image)
    for server in (quiet, verbose):
        with RawClient(server.connect()).negotiate() as client:
            assert client.write(1 << 40, b"x") == 28
            client.request(READ, 1 << 40, BLOCK)
            assert client.simple_reply()[0] == 22
        server.wait_for_log(": left")
    assert " failed: " not in quiet.log() + verbose.log()
    assert " refused: " not in quiet.log()
    assert "READ of 4096 bytes at 1099511627776 refused: beyond the end of the disk" in verbose.log()
