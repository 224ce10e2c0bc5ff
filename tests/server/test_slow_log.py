"""``--slow-log``: which requests took long, and where the time went."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Dict, List

import pytest
from caching import BLOCK, CacheFiles
from conftest import MIB, Start
from injection import injected
from json_log import Line, with_words
from rawclient import FLUSH, READ, WRITE, RawClient, pack_request
from relay import Relay
from server_process import Server, wait_until

from xnbd.system.file_locks import RangeLocks

SLOW = ("--log-format", "json", "--slow-log")
PARTS = ("origin", "lock", "disk", "client", "rest")


def slow_lines(server: Server, count: int = 1) -> List[Line]:
    wait_until(lambda: len(with_words(server.log(), " took ")) >= count, "slow requests in the log")
    return with_words(server.log(), " took ")


def check_parts(line: Line, most: str, at_least: float) -> None:
    """Most of the time, *at_least* so many ms, is the part *most*; the parts are all of it."""
    parts: Dict[str, float] = {name: line[name] for name in PARTS}
    assert abs(sum(parts.values()) - line["took"]) < 1
    assert max(parts, key=lambda name: parts[name]) == most, line
    assert parts[most] >= at_least, line


@pytest.fixture
def origin(start: Start, image: Path) -> Server:
    return start("--target", "--readonly", image, tcp=True)


def test_waiting_for_the_origin(start: Start, files: CacheFiles, origin: Server) -> None:
    with Relay(origin.port, delay=0.3) as link:
        proxy = start(*files.arguments(link.uri, *SLOW, "500", "--readahead", "0"))
        with RawClient(proxy.connect()).negotiate() as client:
            client.read(5 * BLOCK, BLOCK)
            line = slow_lines(proxy)[0]
            client.read(5 * BLOCK, BLOCK)
    check_parts(line, "origin", 500)
    assert [line[name] for name in ("command", "offset", "length", "level")] == ["READ", 5 * BLOCK, BLOCK, "WARNING"]
    assert line["message"].startswith(f"{line['peer']}: export 'cache.img': READ of 4096 bytes at 20480 took ")
    assert len(with_words(proxy.log(), " took ")) == 1


@pytest.mark.parametrize("command", [READ, WRITE])
def test_waiting_for_a_block_that_another_process_has_locked(
    start: Start, files: CacheFiles, origin: Server, command: int
) -> None:
    proxy = start(*files.arguments(f"nbd://127.0.0.1:{origin.port}", *SLOW, "400", "--readahead", "0"))
    with RawClient(proxy.connect()).negotiate() as client, RawClient(proxy.connect()).negotiate() as other:
        other.read(64 * BLOCK, BLOCK)
        client.read(72 * BLOCK, BLOCK)
        worker = proxy.busy_workers()[0]
        with files.bitmap.open("rb+") as bitmap:
            locks = RangeLocks(bitmap.fileno())
            assert locks.try_acquire(0, 1)
            client.request(command, 0, BLOCK, data=bytes(BLOCK) if command == WRITE else b"")
            until = time.monotonic() + 1
            wait_until(lambda: time.monotonic() > until, "a second")
            locks.release(0, 1)
            assert client.simple_reply(BLOCK if command == READ else 0)[0] == 0
    assert worker
    check_parts(slow_lines(proxy)[0], "lock", 700)


def test_a_client_that_takes_nothing(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "large.img"
    image.write_bytes(os.urandom(32 * MIB))
    server = start("--target", *SLOW, "500", image)
    with RawClient(server.connect()).negotiate() as client:
        client.send(b"".join(pack_request(READ, n * MIB, MIB, cookie=n) for n in range(32)))
        until = time.monotonic() + 1
        wait_until(lambda: time.monotonic() > until, "a second")
        for _ in range(32):
            assert client.simple_reply(MIB)[0] == 0
    line = slow_lines(server)[0]
    check_parts(line, "client", 500)
    assert (line["command"], line["length"], line["offset"] % MIB) == ("READ", MIB, 0)
    assert sum(1 + one.get("more", 0) for one in with_words(server.log(), " took ")) <= 32


def test_a_client_that_does_not_send_the_rest(start: Start, image: Path) -> None:
    server = start("--target", *SLOW, "400", image)
    with RawClient(server.connect()).negotiate() as client:
        client.send(pack_request(WRITE, MIB, MIB) + bytes(MIB // 2 + 100))
        until = time.monotonic() + 1
        wait_until(lambda: time.monotonic() > until, "a second")
        client.send(bytes(MIB - MIB // 2 - 100))
        assert client.simple_reply()[0] == 0
    line = slow_lines(server)[0]
    check_parts(line, "client", 400)
    assert (line["command"], line["offset"], line["length"]) == ("WRITE", MIB, MIB)


@pytest.mark.parametrize(
    ("call", "command"), [("fdatasync", FLUSH), ("pwrite64", WRITE), ("pwrite64,pwritev,pwritev2", -1)]
)
def test_a_slow_disk(start: Start, image: Path, call: str, command: int) -> None:
    """A single request, and WRITEs that come together: as slow as all of them."""
    server = start("--target", *SLOW, "300", image)
    with RawClient(server.connect()).negotiate() as client:
        assert client.works()
        (worker,) = server.busy_workers()
        with injected(worker, f"{call}:delay_enter=600000:when=1"):
            if command == FLUSH:
                client.request(FLUSH)
                assert client.simple_reply()[0] == 0
            elif command == WRITE:
                assert client.write(3 * BLOCK, bytes(BLOCK)) == 0
            else:
                writes = [pack_request(WRITE, n * BLOCK, BLOCK, cookie=n) + bytes(BLOCK) for n in range(3, 8)]
                client.send(b"".join(writes))
                assert [client.simple_reply()[0] for _ in writes] == [0] * 5
        line = slow_lines(server)[0]
    check_parts(line, "disk", 300)
    assert line["command"] == ("FLUSH" if command == FLUSH else "WRITE")
    if command != FLUSH:
        assert (line["offset"], line["length"]) == (3 * BLOCK, BLOCK)


def test_many_slow_requests_are_few_lines_with_their_number(start: Start, files: CacheFiles, origin: Server) -> None:
    """The slowest is named, and none is forgotten, neither when there is silence nor when the client leaves."""
    with Relay(origin.port, delay=0.1) as link:
        proxy = start(*files.arguments(link.uri, *SLOW, "100", "--readahead", "0"))
        began = time.monotonic()
        with RawClient(proxy.connect()).negotiate() as client:
            client.send(b"".join(pack_request(READ, n * BLOCK, BLOCK, cookie=n) for n in range(0, 1000, 2)))
            for _ in range(500):
                assert client.simple_reply(BLOCK)[0] == 0
            wait_until(lambda: told(proxy) == 500, "the rest, while the client is there")
            client.read(1001 * BLOCK, BLOCK)
            client.read(1003 * BLOCK, BLOCK)
        wait_until(lambda: told(proxy) == 502, "the rest, when the client has left")
    assert len(with_words(proxy.log(), " took ")) <= 3 + time.monotonic() - began


def told(server: Server) -> int:
    """How many requests the lines so far are about."""
    return sum(1 + line.get("more", 0) for line in with_words(server.log(), " took "))


def test_text_lines_say_the_same(start: Start, files: CacheFiles, origin: Server) -> None:
    with Relay(origin.port, delay=0.1) as link:
        proxy = start(*files.arguments(link.uri, "--slow-log", "100", "--readahead", "0"))
        with RawClient(proxy.connect()).negotiate() as client:
            client.read(0, BLOCK)
    proxy.wait_for_log(" WARNING: ")
    line = next(line for line in proxy.log().splitlines() if " took " in line)
    assert ": export 'cache.img': READ of 4096 bytes at 0 took " in line
    assert " ms: origin " in line and ", lock 0, disk 0, client 0, rest " in line


def test_nothing_is_told_without_the_option(start: Start, files: CacheFiles, origin: Server) -> None:
    with Relay(origin.port, delay=0.1) as link:
        proxy = start(*files.arguments(link.uri, "--readahead", "0"))
        with RawClient(proxy.connect()).negotiate() as client:
            client.read(0, BLOCK)
        proxy.wait_for_log(": left")
    assert " took " not in proxy.log()
