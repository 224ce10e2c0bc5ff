"""Fetched blocks are checked against their checksums before a client reads them; damaged ones are fetched again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Tuple

import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, bgctl, connect, hold, kill_server, query, release
from conftest import MIB, Start
from injection import broken, injected, stopped_after
from mounts import attach, detach
from proxies import program
from rawclient import READ, RawClient
from scraping import metrics_port, scrape
from server_process import Server, run, wait_until
from upgrades import upgrade

from xnbd.storage import space

SIZE = 3 * MIB + 700
BLOCKS = -(-SIZE // BLOCK)
FLIPS = int(os.environ.get("XNBD_FLIPS", "600"))
WRITTEN = b"by a client!" * 2000
AT = 700_001
"""Where a client has written. 1 MiB from 2 MiB on the origin has zeros."""

ON_DEVICE, HALF = 2 * MIB, MIB
"""Bytes of a cache that is a device, and of the half that can be read."""

needs_root = pytest.mark.root(reason="loop devices are made by root only")

DAMAGED = "the cache image is damaged: the block at byte "


@pytest.fixture
def content() -> bytes:
    content = bytearray(random.Random(18).randbytes(SIZE))
    content[2 * MIB : 3 * MIB] = bytes(MIB)
    return bytes(content)


@pytest.fixture
def far(start: Start, tmp_path: Path, content: bytes) -> Server:
    path = tmp_path / "origin.img"
    path.write_bytes(content)
    with path.open("r+b") as file:
        space.punch_hole(file.fileno(), 2 * MIB, MIB)
    return start("--target", "--readonly", path)


def written(content: bytes) -> bytes:
    return content[:AT] + WRITTEN + content[AT + len(WRITTEN) :]


def clean_blocks() -> List[int]:
    first, last = AT // BLOCK, (AT + len(WRITTEN) - 1) // BLOCK
    return [block for block in range(BLOCKS) if not first <= block <= last]


@pytest.fixture
def full(start: Start, files: CacheFiles, far: Server) -> CacheFiles:
    """Of a proxy that has ended with every block cached, some of them written."""
    server = start(*files.arguments(far.uri))
    assert bgctl("--cache-all", files.control)[0] == 0
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    client.shutdown()
    server.stop()
    return files


def flip(path: Path, offsets: Iterable[int]) -> None:
    """One bit of each byte, and the file looks as if nobody had touched it."""
    status = path.stat()
    with path.open("r+b", buffering=0) as file:
        for offset in offsets:
            octet = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([octet ^ 1 << offset % 8]), offset)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def read_all(client: nbd.NBD, step: int) -> bytes:
    return b"".join(bytes(client.pread(min(step, SIZE - at), at)) for at in range(0, SIZE, step))


def damaged(files: CacheFiles) -> int:
    return int(query(files.control)["counters"]["damaged"])


@pytest.mark.parametrize("step", [BLOCK, 1000, 100_000, SIZE])
@pytest.mark.parametrize("when", ["first", "always"])
def test_damaged_blocks_are_fetched_again(
    start: Start, full: CacheFiles, far: Server, content: bytes, when: str, step: int
) -> None:
    blocks = [*random.Random(step).sample(clean_blocks(), 40), BLOCKS - 1, 0]
    flip(full.image, [block * BLOCK + block % 600 for block in set(blocks)])
    server = start(*full.arguments(far.uri, "--verify", when))
    client = connect(server.uri)
    assert read_all(client, step) == written(content)
    client.shutdown()
    wait_until(lambda: damaged(full) == len(set(blocks)), "all of them counted")
    assert DAMAGED in server.log()
    server.stop()
    assert full.image.read_bytes() == written(content)


def test_blocks_are_checked_once_after_a_start(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    """And whenever they are read if that is wanted."""
    server = start(*full.arguments(far.uri))
    assert read_all(connect(server.uri), MIB) == written(content)
    flip(full.image, [5])
    assert connect(server.uri).pread(1, 5)[0] == content[5] ^ 1 << 5
    server.stop()
    flip(full.image, [5, 6])
    server = start(*full.arguments(far.uri, "--verify", "always"))
    client = connect(server.uri)
    assert read_all(client, MIB) == written(content)
    flip(full.image, [7])
    assert client.pread(10, 0) == content[:10]


def test_nothing_is_checked_if_so_wanted(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    flip(full.image, [9])
    server = start(*full.arguments(far.uri, "--verify", "never"))
    assert connect(server.uri).pread(1, 9)[0] != content[9]


def test_nothing_is_checked_beside_what_is_missing_if_so_wanted(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    """What operations.rst advises when the sums and the origin are lost: requests cross the edge of the cache."""
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    client = connect(server.uri)
    assert client.pread(64 * BLOCK, 0) == content[: 64 * BLOCK]
    client.shutdown()
    server.stop()
    far.stop()
    files.sums.unlink()
    server = start(*files.arguments(far.uri, "--verify", "never", "--origin-timeout", "1", "--connect-timeout", "1"))
    client = connect(server.uri)
    with pytest.raises(nbd.Error, match="Input/output error"):
        client.pread(64 * BLOCK, 32 * BLOCK)
    with pytest.raises(nbd.Error, match="Input/output error"):
        client.pwrite(b"xyz" * BLOCK, 62 * BLOCK + 1)
    assert client.pread(62 * BLOCK, 0) == content[: 62 * BLOCK]
    assert files.cached() == list(range(64))
    assert damaged(files) == 0


def test_a_hole_where_a_fetched_block_was_is_no_hole_of_the_disk(
    start: Start, full: CacheFiles, far: Server, content: bytes
) -> None:
    """A client that believes in zeros would not read them; what came as zeros is one."""
    status = full.image.stat()
    with full.image.open("r+b") as file:
        space.punch_hole(file.fileno(), 0, 64 * BLOCK)
    os.utime(full.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    server = start(*full.arguments(far.uri))
    assert holes(server) == [(2 * MIB, 3 * MIB)]
    assert read_all(connect(server.uri), MIB) == written(content)
    assert holes(server) == [(2 * MIB, 3 * MIB)]


def holes(server: Server) -> List[Tuple[int, int]]:
    """What a client is told: begin and end of each."""
    out = subprocess.run(["nbdinfo", "--json", "--map", server.uri], stdout=subprocess.PIPE, check=True).stdout
    return [(part["offset"], part["offset"] + part["length"]) for part in json.loads(out) if part["type"]]


def test_a_written_block_is_not_checked(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    """Nobody knows what it was like: this is documented."""
    flip(full.image, [AT])
    server = start(*full.arguments(far.uri))
    assert connect(server.uri).pread(1, AT)[0] == WRITTEN[0] ^ 1 << AT % 8


def test_a_damaged_block_is_fetched_before_a_part_of_it_is_written(
    start: Start, full: CacheFiles, far: Server, content: bytes
) -> None:
    flip(full.image, [3 * BLOCK + 1])
    server = start(*full.arguments(far.uri))
    client = connect(server.uri)
    client.pwrite(b"new", 3 * BLOCK + 100)
    assert client.pread(100, 3 * BLOCK) == content[3 * BLOCK :][:100]
    assert client.pread(3, 3 * BLOCK + 100) == b"new"


def test_a_damaged_block_is_an_error_without_the_origin(
    start: Start, full: CacheFiles, far: Server, content: bytes
) -> None:
    far.stop()
    flip(full.image, [50 * BLOCK])
    server = start(*full.arguments(far.uri, "--origin-timeout", "1", "--connect-timeout", "1"))
    client = connect(server.uri)
    with pytest.raises(nbd.Error, match="Input/output error"):
        client.pread(BLOCK, 50 * BLOCK)
    assert client.pread(50 * BLOCK, 0) == content[: 50 * BLOCK]


@pytest.mark.parametrize("harm", ["gone", "zeros", "short", "long", "flipped", "older", "another's"])
def test_lost_checksums_mean_that_clean_blocks_are_fetched_again(
    start: Start, full: CacheFiles, far: Server, content: bytes, harm: str
) -> None:
    data = full.sums.read_bytes()
    start(*full.arguments(far.uri)).stop()
    newer = bytearray(full.sums.read_bytes())
    newer[40] ^= 1
    changed = {
        "zeros": bytes(len(data)),
        "short": data[: len(data) // 2],
        "long": data + b"12345678",
        "flipped": bytes(newer),
        "older": data,
        "another's": b"x" * len(data),
    }
    if harm == "gone":
        full.sums.unlink()
    else:
        full.sums.write_bytes(changed[harm])
    flip(full.image, [block * BLOCK for block in clean_blocks()[::7]])
    server = start(*full.arguments(far.uri))
    assert f"{full.sums} " in server.log()
    client = connect(server.uri)
    assert read_all(client, 50_000) == written(content)
    client.shutdown()
    wait_until(lambda: damaged(full) == len(clean_blocks()), "all of them counted")


def test_checksums_survive_a_kill(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    server = start(*full.arguments(far.uri, "--clear-bitmap"))
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    assert read_all(client, MIB) == written(content)
    kill_server(server)
    flip(full.image, [0])
    server = start(*full.arguments(far.uri))
    assert read_all(connect(server.uri), MIB) == written(content)
    wait_until(lambda: damaged(full) == 1, "one of them counted")


def test_a_kill_while_damaged_blocks_are_missing(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    """The bits are gone from the live bitmap only: a start understands that."""
    flip(full.image, [block * BLOCK for block in clean_blocks()[::5]])
    server = start(*full.arguments(far.uri))
    held = hold(far.pid)
    reading = Reading(connect(server.uri), 0, SIZE)
    wait_until(lambda: reading.is_done() or DAMAGED in server.log(), "the damage")
    kill_server(server)
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    server = start(*full.arguments(far.uri))
    assert read_all(connect(server.uri), MIB) == written(content)


@pytest.mark.timeout(60 + FLIPS // 4)
def test_flips_while_clients_read(start: Start, full: CacheFiles, far: Server, content: bytes, seed: int) -> None:
    """Two servers that check always, one that is killed: a client never sees what was flipped before it asked."""
    rng = random.Random(seed)
    servers = [
        start(*full.arguments(far.uri, "--verify", "always", control=full.control.with_suffix(f".{n}"))) for n in (1, 2)
    ]
    clients = [connect(server.uri) for server in servers for _ in range(2)]
    want, clean = written(content), clean_blocks()
    table = full.sums.stat().st_size - 8 * BLOCKS
    flips = 0
    while flips < FLIPS:
        some = rng.sample(clean, 20)
        flip(
            full.image, [block * BLOCK + rng.randrange(BLOCK if block < BLOCKS - 1 else SIZE % BLOCK) for block in some]
        )
        flip(full.sums, [rng.randrange(table, table + 8 * BLOCKS) for _ in range(5)])
        flip(full.sums, [65536 + rng.randrange(BLOCKS // 8) for _ in range(2)])
        flips += 27
        for client in clients:
            at = rng.choice(some) * BLOCK
            length = min(rng.choice((1, BLOCK, 70_000)), SIZE - at)
            assert client.pread(length, at) == want[at : at + length]
        if flips % 270 == 0:
            kill_server(servers[1])
            servers[1] = start(*full.arguments(far.uri, "--verify", "always", control=full.control.with_suffix(".2")))
            clients[2:] = [connect(servers[1].uri) for _ in range(2)]
    assert read_all(clients[0], 100_000) == want


def test_a_block_that_comes_while_it_is_looked_at_is_not_damaged(
    start: Start, files: CacheFiles, far: Server, content: bytes, tmp_path: Path
) -> None:
    """One process has read the hole; before it has the lock another one fetches the block, and the origin goes."""
    server = start(*files.arguments(far.uri, "--verify", "always", "--readahead", "0", "--origin-timeout", "10"))
    other = connect(server.uri)
    assert other.pread(BLOCK, 0) == content[:BLOCK]
    others = server.busy_workers()
    client = connect(server.uri)
    client.pread(BLOCK, 0)
    (worker,) = (pid for pid in server.busy_workers() if pid not in others)
    with stopped_after(worker, "preadv,preadv2", tmp_path / "trace") as has_stopped:
        reading = Reading(client, 0, 2 * BLOCK)
        wait_until(has_stopped, "the look")
        assert other.pread(BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]
        far.stop()
    assert reading.content() == content[: 2 * BLOCK]
    assert damaged(files) == 0
    assert files.cached() == [0, 1]


# A disk below the cache that cannot read, or write, some places


@pytest.fixture
def failing(files: CacheFiles, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """The cache image is a device that gives no byte behind `HALF` any more, once this is called; writing mends it."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(ON_DEVICE))
    files.image = attach(backing)

    def fail() -> None:
        run("blockdev", "--flushbufs", files.image)
        os.truncate(backing, HALF)
        run("blockdev", "--flushbufs", files.image)

    try:
        yield fail
    finally:
        detach(files.image)


@pytest.fixture
def near(start: Start, tmp_path: Path, content: bytes) -> Server:
    """An origin of the device's size."""
    path = tmp_path / "near.img"
    path.write_bytes(content[:ON_DEVICE])
    return start("--target", "--readonly", path)


@needs_root
@pytest.mark.parametrize("way", ["restart", "read", "scrub"])
def test_clean_blocks_that_cannot_be_read_are_fetched_again(
    start: Start, files: CacheFiles, near: Server, content: bytes, failing: Callable[[], None], way: str
) -> None:
    """Also if they were right before: then one client has an error, and nobody else."""
    server = start(*files.arguments(near.uri))
    assert bgctl("--cache-all", files.control)[0] == 0
    server.wait_for_log("every block is cached")
    if way == "restart":
        server.stop()
        failing()
        server = start(*files.arguments(near.uri))
    else:
        failing()
    if way == "scrub":
        told = f"{ON_DEVICE // BLOCK} blocks checked, {HALF // BLOCK} damaged, {HALF // BLOCK} fetched again\n"
        assert bgctl("--scrub", files.control) == (0, told, "")
    client = connect(server.uri)
    if way == "read":
        with pytest.raises(nbd.Error, match="Input/output error"):
            client.pread(HALF, HALF)
        server.expected_errors.append("EIO")
    assert client.pread(ON_DEVICE, 0) == content[:ON_DEVICE]
    assert "is damaged: the block at byte 1048576 cannot be read, and counts as missing" in server.log()


@needs_root
def test_scrub_tells_of_written_blocks_that_cannot_be_read(
    start: Start, files: CacheFiles, near: Server, content: bytes, failing: Callable[[], None]
) -> None:
    server = start(*files.arguments(near.uri))
    assert bgctl("--cache-all", files.control)[0] == 0
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT + HALF)
    client.shutdown()
    failing()
    status, _, err = bgctl("--scrub", files.control, check=False)
    first, end = (AT + HALF) // BLOCK, -(-(AT + HALF + len(WRITTEN)) // BLOCK)
    told = f"{end - first:,} blocks that clients have written cannot be read, the first one at byte {first * BLOCK}\n"
    assert (status, err) == (1, f"xnbd-bgctl: {told}")
    clean = HALF // BLOCK - (end - first)
    assert (
        f"{ON_DEVICE // BLOCK - (end - first):,} blocks were checked, {clean:,} were damaged, {clean} fetched again"
        in server.log()
    )


def test_a_place_that_keeps_nothing_is_passed_by(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    """What is fetched for it cannot be read again: nobody fetches it over and over for one request."""
    server = start(*full.arguments(far.uri, "--verify", "always", "--readahead", "0"))
    client = connect(server.uri)
    (worker,) = server.busy_workers()
    with broken(worker, "preadv,preadv2,pread64:error=EIO", full.image):
        for _ in range(3):
            assert client.pread(3 * BLOCK, 5 * BLOCK) == content[5 * BLOCK : 8 * BLOCK]
    assert client.pread(3 * BLOCK, 5 * BLOCK) == content[5 * BLOCK : 8 * BLOCK]


def test_what_cannot_be_written_to_its_place_reaches_the_client(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    server.expected_errors.append("cannot write to the cache image: Input/output error")
    client = connect(server.uri)
    client.pread(BLOCK, 0)
    (worker,) = server.busy_workers()
    with broken(worker, "pwrite64,pwritev,pwritev2:error=EIO", files.image):
        assert client.pread(300_000, BLOCK) == content[BLOCK : BLOCK + 300_000]
    assert files.cached() == [0]
    assert client.pread(300_000, BLOCK) == content[BLOCK : BLOCK + 300_000]
    assert len(files.cached()) == 1 + -(-300_000 // BLOCK)


def test_sums_go_along_with_upgrades(start: Start, files: CacheFiles, far: Server, content: bytes) -> None:
    """Each program checks what the one before it has fetched, for a client that has moved with it."""
    server = start(*files.arguments(far.uri, "--verify", "always"))
    client = connect(server.uri)
    third = SIZE // 3 // BLOCK * BLOCK
    flipped = 0
    for start_at in (0, third, 2 * third):
        end = start_at + third if start_at < 2 * third else SIZE
        assert client.pread(end - start_at, start_at) == content[start_at:end]
        assert upgrade(files.control).moved == 1
        blocks = range(0, end // BLOCK, 11)
        flip(files.image, [block * BLOCK for block in blocks])
        flipped += len(blocks)
        assert client.pread(end, 0) == content[:end]
    wait_until(lambda: damaged(files) == flipped, "all of them counted, and no others")


def test_scrub_checks_all_and_repairs(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    server = start(*full.arguments(far.uri, "--metrics", "0"))
    assert read_all(connect(server.uri), MIB) == written(content)
    blocks = clean_blocks()[::9]
    flip(full.image, [block * BLOCK for block in blocks])
    status, out, err = bgctl("--scrub", full.control)
    checked, by_clients = len(clean_blocks()), BLOCKS - len(clean_blocks())
    unchecked = f"; {by_clients} blocks written by clients, without checksums\n"
    told = f"{checked} blocks checked, {len(blocks)} damaged, {len(blocks)} fetched again{unchecked}"
    assert (status, out, err) == (0, told, "")
    told = f"{len(blocks):,} were damaged, {len(blocks)} fetched again; {by_clients} that clients have written"
    assert f"INFO: {checked} blocks were checked, {told}" in server.log()
    assert full.image.read_bytes() == written(content)
    assert f"{len(blocks)} blocks of the cache" in bgctl("--query", full.control)[1]
    port = metrics_port(server.log())
    wait_until(lambda: scrape(port).find("xnbd_cache_damaged_blocks_total") == [len(blocks)], "each counted once")
    status, out, _ = bgctl("--scrub", "--progress", full.control)
    assert (status, out) == (0, f"{checked} blocks checked, none was damaged{unchecked}")
    flip(full.image, [0])
    kill_server(server)
    server = start(*full.arguments(far.uri, "--metrics", "0"))
    assert connect(server.uri).pread(1, 0)[0] == content[0]
    port = metrics_port(server.log())
    for name, value in (("xnbd_cache_damaged_blocks_total", 1), ("xnbd_written_bytes", by_clients * BLOCK)):
        wait_until(lambda: scrape(port).find(name) == [value], name)  # noqa: B023


def test_scrub_without_an_origin_says_what_is_left(start: Start, full: CacheFiles, far: Server, content: bytes) -> None:
    far.stop()
    flip(full.image, [7 * BLOCK])
    server = start(*full.arguments(far.uri, "--connect-timeout", "1", "--origin-timeout", "1"))
    status, out, err = bgctl("--scrub", full.control, check=False)
    assert (status, out) == (1, "")
    failure = "1 damaged block could not be fetched again, and counts as missing"
    assert failure in err
    assert f"WARNING: {len(clean_blocks())} blocks were checked, 1 was damaged, 0 fetched again" in server.log()
    assert f"WARNING: the check has ended: {failure}" in server.log()
    assert connect(server.uri).pread(7 * BLOCK, 0) == content[: 7 * BLOCK]


def test_scrub_of_an_image_that_has_shrunk_says_that_and_nothing_else(
    start: Start, full: CacheFiles, far: Server
) -> None:
    server = start(*full.arguments(far.uri))
    os.truncate(full.image, SIZE // 2)
    server.expected_errors += ["the cache image has shrunk"]
    status, _, err = bgctl("--scrub", full.control, check=False)
    failure = "cannot read the cache image at byte 0: the cache image has shrunk"
    assert (status, failure in err) == (1, True)
    assert f"WARNING: the check has ended: {failure}" in server.log()
    assert "blocks were checked" not in server.log()
    (warning,) = query(full.control)["warnings"]
    assert warning.startswith(f"cache.img has shrunk to {SIZE // 2:,} of {SIZE:,} bytes: what lay behind is lost.")


def cached_blocks(files: CacheFiles) -> int:
    return int(query(files.control)["blocks"]["cached"])


@pytest.mark.parametrize("how", ["scrub", "read"])
def test_what_was_found_damaged_shows_until_it_is_there_again(
    start: Start, full: CacheFiles, far: Server, content: bytes, how: str
) -> None:
    """A client that has found all of the disk right before is told, too."""
    far.stop()
    server = start(*full.arguments(far.uri, "--connect-timeout", "1", "--origin-timeout", "1"))
    server.wait_for_log("every block is cached")
    client = connect(server.uri)
    if how == "scrub":
        assert read_all(client, MIB) == written(content)
    assert cached_blocks(full) == BLOCKS
    flip(full.image, [7 * BLOCK])
    if how == "scrub":
        assert bgctl("--scrub", full.control, check=False)[0] == 1
    with pytest.raises(nbd.Error, match="Input/output error"):
        client.pread(BLOCK, 7 * BLOCK)
    wait_until(lambda: cached_blocks(full) == BLOCKS - 1, "one block less")
    bgctl("--reconnect", full.control, start("--target", "--readonly", full.image.with_name("origin.img")).uri)
    assert connect(server.uri).pread(BLOCK, 7 * BLOCK) == content[7 * BLOCK :][:BLOCK]
    wait_until(lambda: cached_blocks(full) == BLOCKS, "all of them")
    wait_until(lambda: server.log().count("every block is cached") == 2, "a second line")


def test_one_scrub_at_a_time_which_ends_with_its_operator(
    start: Start, full: CacheFiles, far: Server, content: bytes
) -> None:
    server = start(*full.arguments(far.uri))
    line = [*program("--scrub", "--limit-rate", "64K"), str(full.control)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as first:
        server.wait_for_log("checking all blocks")
        status, _, err = bgctl("--scrub", full.control, check=False)
        assert (status, "the cache is being checked already" in err) == (1, True)
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
        assert first.stderr is not None
        assert b"stopped; what was found damaged" in first.stderr.read()
    wait_until(lambda: bgctl("--scrub", full.control, check=False)[0] == 0, "another scrub")


def test_scrub_is_refused_after_a_switch(start: Start, full: CacheFiles, far: Server) -> None:
    start(*full.arguments(far.uri))
    bgctl("--switch", full.control)
    status, _, err = bgctl("--scrub", full.control, check=False)
    assert (status, "this is no proxy any more" in err) == (1, True)


def test_a_block_that_is_found_damaged_while_a_reply_is_made_is_in_it_once(
    start: Start, files: CacheFiles, tmp_path: Path
) -> None:
    """The reply is made of three chunks, of which two are there when the block turns out to be missing."""
    length = 64 << 10
    content = random.Random(9).randbytes(length) + bytes(length) + random.Random(10).randbytes(2 * length)
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    with image.open("r+b") as file:
        space.punch_hole(file.fileno(), length, length)
    far = start("--target", "--readonly", image)
    server = start(*files.arguments(far.uri, "--readahead", 0))
    with RawClient(server.connect()) as client:
        client.negotiate(structured=True)
        client.request(READ, 0, 3 * length)
        client.chunks()
        client.request(READ, 0, 3 * length)
        whole = client.chunks()
        flip(files.image, [2 * length + 2 * BLOCK])
        (worker,) = server.busy_workers()
        with injected(worker, "lseek:delay_enter=60000000:when=3"):
            client.request(READ, 0, 3 * length)
            stopped = hold(far.pid)
            scrub = subprocess.Popen([*program("--scrub"), str(files.control)], stdout=subprocess.DEVNULL)
            try:
                wait_until(lambda: 2 * length // BLOCK + 2 not in files.cached(), "the damage to be found")
            except BaseException:
                release(stopped)
                raise
        release(stopped)
        assert client.chunks() == whole
        assert scrub.wait() == 0
        assert client.works()
