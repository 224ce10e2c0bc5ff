"""--cache-limit: what was fetched is let go again, what was used the longest time ago first; nothing else is."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from caching import BLOCK, CacheFiles, ask, bgctl, connect, descendants, hold, kill_server, query, release
from conftest import MIB, Start
from launch import fails
from lru import PIECE, ideal_hits, trace
from model import Model, read_all
from mounts import plain_ramfs
from proxies import program
from rawclient import READ, RawClient, pack_request
from server_process import Server, title_of, wait_until

SIZE = 32 * MIB + 512
LIMIT = 4 * MIB
ALMOST = 1.01


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(18).randbytes(SIZE)


@pytest.fixture
def origin(start: Start, tmp_path: Path, content: bytes) -> Server:
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    return start("--target", "--readonly", image)


@pytest.fixture
def files(tmp_path: Path) -> CacheFiles:
    return CacheFiles(tmp_path)


@pytest.fixture
def proxy(start: Start, files: CacheFiles, origin: Server) -> Server:
    server = start(*limited(files, origin))
    wait_until_counted(files)
    return server


def limited(files: CacheFiles, origin: Server, *options: object, limit: object = LIMIT) -> List[str]:
    return files.arguments(origin.uri, "--cache-limit", limit, *options)


def wait_until_counted(files: CacheFiles) -> None:
    wait_until(lambda: room(files)["used_bytes"] < LIMIT, "the count of what is there")


def room(files: CacheFiles, control: object = None) -> Dict[str, Any]:
    told = query(Path(str(control or files.control)))["cache_limit"]
    assert isinstance(told, dict)
    return told


def test_the_disk_is_read_right_and_the_limit_holds(proxy: Server, files: CacheFiles, content: bytes) -> None:
    client = connect(proxy.uri)
    for at in range(0, SIZE - MIB, MIB):
        assert client.pread(MIB, at) == content[at : at + MIB]
        assert len(files.cached()) * BLOCK <= ALMOST * LIMIT
        assert files.takes() <= ALMOST * LIMIT
    wait_until(lambda: bool(read_all(client)) and room(files)["let_go_bytes"] >= SIZE, "that most of it was let go")
    assert room(files)["used_bytes"] <= room(files)["limit_bytes"] == LIMIT
    _, report, _ = bgctl("--query", files.control)
    assert "of 4 MiB for what was fetched" in report


def test_what_clients_write_stays_and_is_not_limited(
    start: Start, proxy: Server, files: CacheFiles, origin: Server, content: bytes
) -> None:
    expected = bytearray(content)
    expected[: 8 * MIB] = random.Random(3).randbytes(8 * MIB)
    expected[9 * MIB + 100 : 9 * MIB + 5000] = bytes(4900)
    client = connect(proxy.uri)
    for at in range(0, 8 * MIB, MIB):
        client.pwrite(bytes(expected[at : at + MIB]), at)
    client.pwrite(bytes(4900), 9 * MIB + 100)
    for _ in range(2):
        assert read_all(client) == expected
    assert len(files.cached()) * BLOCK <= 8 * MIB + 2 * BLOCK + ALMOST * LIMIT
    assert set(files.written(SIZE)) <= set(files.cached())
    proxy.stop()
    assert files.is_clean()
    assert read_all(connect(start(*limited(files, origin)).uri)) == expected


def test_a_block_that_is_written_counts_no_more(proxy: Server, files: CacheFiles, content: bytes) -> None:
    client = connect(proxy.uri)
    client.pread(2 * MIB, 0)
    client.pwrite(content[: 2 * MIB], 0)
    wait_until(lambda: bool(read_all(client)) and len(files.cached()) * BLOCK > LIMIT, "use of the room", 60)


def test_the_figure_follows_what_clients_write_over_though_nothing_comes(
    start: Start, files: CacheFiles, origin: Server, content: bytes
) -> None:
    server = start(*limited(files, origin, "--readahead", "0", limit=16 * MIB))
    wait_until(lambda: room(files)["used_bytes"] == 0, "the count of what is there")
    client = connect(server.uri)
    client.pread(12 * MIB, 0)
    wait_until(lambda: room(files)["used_bytes"] == 12 * MIB, "what has come")
    for end in (6, 12):
        client.pwrite(content[: end * MIB], 0)
        wait_until(lambda: room(files)["used_bytes"] == (12 - end) * MIB, "what is left of it")  # noqa: B023


def test_a_cache_above_the_limit_is_brought_below(
    start: Start, files: CacheFiles, origin: Server, content: bytes
) -> None:
    proxy = start(*files.arguments(origin.uri))
    client = connect(proxy.uri)
    client.pwrite(b"w" * BLOCK, 5 * BLOCK)
    assert len(read_all(client)) == SIZE
    client.shutdown()
    proxy.stop()
    again = start(*limited(files, origin))
    wait_until(lambda: len(files.cached()) * BLOCK <= LIMIT, "a cache below its limit", 60)
    wait_until(lambda: files.takes() <= LIMIT, "its space", 60)
    expected = content[: 5 * BLOCK] + b"w" * BLOCK + content[6 * BLOCK :]
    assert read_all(connect(again.uri)) == expected


def test_copying_ends_at_the_limit_and_there_is_no_switch(proxy: Server, files: CacheFiles) -> None:
    _, told, _ = bgctl("--cache-all", files.control)
    assert "the limit of the cache (--cache-limit) is reached" in told
    cached = len(files.cached())
    assert LIMIT * 3 // 4 < cached * BLOCK <= LIMIT
    ask(files.control, "cache-all", wait=False)
    wait_until(lambda: proxy.log().count("the copy has ended: the limit of the cache") == 2, "the end of the copy")
    for options in ((), ("--force",)):
        status, _, told = bgctl("--switch", *options, files.control, check=False)
        assert status == 1
        assert "the cache has a limit (--cache-limit)" in told
    assert room(files)["let_go_bytes"] == 0


def test_copying_long_holes_ends_at_the_limit(start: Start, files: CacheFiles, tmp_path: Path) -> None:
    image = tmp_path / "holes.img"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    proxy = start(*limited(files, start("--target", "--readonly", image)))
    ask(files.control, "cache-all", wait=False)
    proxy.wait_for_log("the copy has ended: the limit of the cache (--cache-limit) is reached")
    assert LIMIT // 4 < len(files.cached()) * BLOCK <= LIMIT  # some may have been let go already


def test_a_limit_above_the_size_of_the_disk_is_none(start: Start, files: CacheFiles, origin: Server) -> None:
    proxy = start(*limited(files, origin, limit="1G"))
    assert query(files.control)["cache_limit"] is None
    assert "--cache-limit limits nothing: the disk has 33554944 bytes" in proxy.log()


def test_servers_on_one_cache_have_one_limit(start: Start, files: CacheFiles, origin: Server, tmp_path: Path) -> None:
    second, third = tmp_path / "second", tmp_path / "third"
    plain = start(*files.arguments(origin.uri))
    status, line = fails(*limited(files, origin, "--quiet", "--unix", tmp_path / "none.sock"))
    assert (status, "in use by servers without --cache-limit" in line) == (1, True)
    plain.stop()
    start(*limited(files, origin))
    follower = start(*files.arguments(origin.uri, control=second))
    assert room(files, second)["limit_bytes"] == LIMIT
    assert len(read_all(connect(follower.uri))) == SIZE
    assert len(files.cached()) * BLOCK <= ALMOST * LIMIT
    last = start(*files.arguments(origin.uri, "--cache-limit", "2M", control=third))
    assert "the limit of the cache is another one from now on: 2M, not 4M" in last.log()
    assert room(files)["limit_bytes"] == 2 * MIB
    wait_until(lambda: len(files.cached()) * BLOCK <= 2 * MIB, "a cache below the new limit")


def test_a_bitmap_of_others_counts_as_written(start: Start, files: CacheFiles, origin: Server, content: bytes) -> None:
    """That of a C xNBD, which knows nothing of what was written."""
    proxy = start(*files.arguments(origin.uri))
    assert len(read_all(connect(proxy.uri))) == SIZE
    kill_server(proxy)
    for suffix in ("state", "board", "sums", "checked"):
        files.bitmap.with_suffix(f".bitmap.{suffix}").unlink()
    start(*limited(files, origin, "--adopt-cache"))
    wait_until_counted(files)
    assert len(files.cached()) * BLOCK >= SIZE
    assert room(files)["used_bytes"] == 0


def test_what_was_not_used_for_the_longest_time_goes_first(start: Start, files: CacheFiles, tmp_path: Path) -> None:
    """Of a trace as many reads are hits as an ideal cache of that size would have, but for 2 points."""
    pieces, limit = 1024, 48 * MIB
    image = tmp_path / "sparse.img"
    image.touch()
    os.truncate(image, pieces * PIECE * BLOCK)
    origin = start("--target", "--readonly", image)
    proxy = start(*limited(files, origin, "--readahead", "0", limit=limit))
    wait_until(lambda: room(files)["used_bytes"] == 0, "the count of what is there")
    reads = trace(random.Random(1), pieces, 8000)
    client = connect(proxy.uri)
    for first, count in reads:
        client.pread(count * BLOCK, first * BLOCK)
    hits = len(reads) - query(files.control)["counters"]["misses"]
    assert abs(hits - ideal_hits(reads, limit // BLOCK)) <= 0.02 * len(reads)


def test_what_came_for_nobody_goes_before_what_clients_use(
    start: Start, files: CacheFiles, origin: Server, content: bytes
) -> None:
    """Eight pieces are used, much more is copied and read ahead: none of the eight goes for that."""
    proxy = start(*limited(files, origin, limit=8 * MIB))
    wait_until(lambda: room(files)["used_bytes"] == 0, "the count of what is there")
    client = connect(proxy.uri)
    used = [piece * PIECE for piece in random.Random(4).sample(range(64, 128), 8)]
    for _ in range(3):
        assert all(len(client.pread(PIECE * BLOCK, block * BLOCK)) == PIECE * BLOCK for block in used)
        time.sleep(0.2)
    bgctl("--cache-all", files.control)
    reader = connect(proxy.uri)
    for at in range(0, 10 * MIB, 64 << 10):  # one who reads in order, with the most read-ahead there is
        assert reader.pread(64 << 10, at) == content[at : at + (64 << 10)]
        if at % (256 << 10) == 0:
            assert all(len(client.pread(BLOCK, block * BLOCK)) == BLOCK for block in used)
    wait_until(lambda: room(files)["let_go_bytes"] > 0, "something to go")
    assert {block + number for block in used for number in range(PIECE)} <= {*files.cached()}


def test_a_client_that_takes_nothing_keeps_what_it_waits_for_and_the_others_do_not_notice(
    proxy: Server, files: CacheFiles, content: bytes
) -> None:
    """However much it has asked for: of that is gathered what can be copied."""
    with RawClient(proxy.connect()) as stuck:
        stuck.negotiate()
        assert stuck.read(0, MIB) == content[:MIB]
        stuck.send(b"".join(pack_request(READ, 0, MIB, cookie=number) for number in range(400)))
        client = connect(proxy.uri)
        before = room(files)["let_go_bytes"]
        wait_until(
            lambda: read_all(client) == content and room(files)["let_go_bytes"] > before + 4 * LIMIT, "a turnover", 60
        )
        assert len(files.cached()) * BLOCK <= ALMOST * LIMIT
        for number in range(400):
            assert stuck.simple_reply(MIB) == (0, number, content[:MIB])
    assert "nothing can be let go" not in proxy.log()


def test_a_client_that_takes_nothing_of_one_read_that_is_too_large_to_be_copied_harms_nobody(
    start: Start, files: CacheFiles, tmp_path: Path
) -> None:
    """Nothing is let go, reads are passed on, and the limit holds."""
    content = random.Random(4).randbytes(128 * MIB)
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    proxy = start(*limited(files, start("--target", "--readonly", image)))
    wait_until_counted(files)
    with RawClient(proxy.connect()) as stuck:
        stuck.negotiate()
        stuck.send(pack_request(READ, 0, len(content), cookie=7))
        assert struct.unpack(">IIQ", stuck.receive(16))[1:] == (0, 7)  # the reply is made
        client = connect(proxy.uri)

        def is_told() -> bool:
            assert client.pread(16 * MIB, 32 * MIB) == content[32 * MIB : 48 * MIB]
            assert len(files.cached()) * BLOCK <= ALMOST * LIMIT
            return "nothing can be let go of the cache at present: a client does not take replies" in proxy.log()

        wait_until(is_told, "the line in the log", 60)
        assert stuck.receive(len(content)) == content
        before = room(files)["let_go_bytes"]
        wait_until(
            lambda: bool(client.pread(16 * MIB, 32 * MIB)) and room(files)["let_go_bytes"] > before, "some to go", 60
        )


@pytest.mark.root("mounts a file system")
def test_the_limit_holds_for_what_is_cached_where_no_space_can_be_given_back(
    start: Start, files: CacheFiles, origin: Server, content: bytes, tmp_path: Path
) -> None:
    with plain_ramfs(tmp_path / "ramfs") as directory:
        files.image = directory / "cache.img"
        proxy = start(*limited(files, origin))
        wait_until_counted(files)
        client = connect(proxy.uri)
        wait_until(
            lambda: read_all(client) == content and room(files)["let_go_bytes"] > 4 * LIMIT, "several turnovers", 60
        )
        assert len(files.cached()) * BLOCK <= ALMOST * LIMIT
        wait_until(lambda: bool(read_all(client)) and len(files.cached()) * BLOCK > LIMIT // 2, "use of the room")
        assert proxy.log().count("space of the cache image cannot be given back there") == 1
        assert "nothing can be let go" not in proxy.log()
        proxy.stop()


def test_the_next_program_goes_on_with_the_limit(proxy: Server, files: CacheFiles, content: bytes) -> None:
    client = connect(proxy.uri)
    assert read_all(client) == content
    bgctl("--upgrade", files.control)
    assert room(files)["limit_bytes"] == LIMIT
    before = room(files)["let_go_bytes"]
    wait_until(lambda: read_all(client) == content and room(files)["let_go_bytes"] > before, "that some goes again", 60)
    assert len(files.cached()) * BLOCK <= ALMOST * LIMIT


def test_two_servers_agree_with_the_copy(
    start: Start, files: CacheFiles, origin: Server, content: bytes, tmp_path: Path, seed: int
) -> None:
    rng, second = random.Random(seed), tmp_path / "second"
    servers = [
        start(*limited(files, origin)),
        start(*files.arguments(origin.uri, "--verify", "always", control=second)),
    ]
    clients = [connect(server.uri, structured=structured) for server in servers for structured in (False, True)]
    model = Model(clients, content, rng)
    for _ in range(3):
        model.run(20)
        assert len(files.clean(SIZE)) * BLOCK <= ALMOST * LIMIT
        assert set(files.written(SIZE)) <= set(files.cached())
    for server in servers:
        server.stop()
    assert files.is_clean()
    assert read_all(connect(start(*files.arguments(origin.uri)).uri)) == model.content


def fill_with_evictor_held(proxy: Server, files: CacheFiles, content: bytes) -> List[int]:
    """Who keeps the cache below its limit is stopped, and there is no room for one more block; returns its process."""
    (evictor,) = (pid for pid in descendants(proxy.pid) if "keeping below its limit" in title_of(pid))
    held = hold(evictor)
    client = connect(proxy.uri)
    for at in range(0, LIMIT + 100 * BLOCK, BLOCK):
        assert client.pread(BLOCK, at) == content[at : at + BLOCK]
    client.shutdown()
    assert room(files)["used_bytes"] == LIMIT
    return held


def damage(files: CacheFiles) -> int:
    """Some of the blocks that are cached: their number."""
    blocks = files.cached()[::50]
    with files.image.open("r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            file.write(b"damage")
    return len(blocks)


def test_scrub_waits_for_room(start: Start, files: CacheFiles, origin: Server, content: bytes) -> None:
    proxy = start(*limited(files, origin, "--readahead", "0"))
    wait_until_counted(files)
    held = fill_with_evictor_held(proxy, files, content)
    count, fetched = damage(files), query(files.control)["counters"]["bytes_fetched"]
    line = [*program("--scrub"), str(files.control)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as scrub:
        again = fetched + 2 * count * BLOCK
        wait_until(
            lambda: scrub.poll() is not None or query(files.control)["counters"]["bytes_fetched"] > again,
            "two attempts in vain",
        )
        release(held)
        out, err = scrub.communicate()
    assert (scrub.returncode, err) == (0, "")
    assert out.endswith(f" blocks checked, {count} damaged, {count} fetched again\n")


def test_scrub_that_finds_no_room_names_the_limit(
    start: Start, files: CacheFiles, origin: Server, content: bytes
) -> None:
    proxy = start(*limited(files, origin, "--readahead", "0"))
    wait_until_counted(files)
    held = fill_with_evictor_held(proxy, files, content)
    count = damage(files)
    status, _, err = bgctl("--scrub", files.control, check=False)
    reason = f"No space left on device; the cache has a limit of {LIMIT} bytes (--cache-limit)"
    told = f"{count:,} damaged blocks could not be fetched again, and count as missing: {reason}"
    assert (status, err) == (1, f"xnbd-bgctl: {told}\n")
    release(held)
