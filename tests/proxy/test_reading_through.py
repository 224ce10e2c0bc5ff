"""A cache whose file system is full: what is read from the origin is passed on, and kept again once there is room."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List

import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, bgctl, connect, kill_server, query
from conftest import MIB, Start
from model import read_all
from mounts import loop_mount, small_tmpfs
from rawclient import CACHE, READ, WRITE, WRITE_ZEROES, RawClient, pack_request
from relay import Relay
from server_process import Server, wait_until

SIZE = 24 * MIB + 512
BEGIN, END = "no room for the cache image", "there is room for the cache image again"

pytestmark = pytest.mark.root(reason="file systems are mounted by root only")


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Noise, with zeros from 4 MiB to 6 MiB."""
    content = bytearray(random.Random(38).randbytes(SIZE))
    content[4 * MIB : 6 * MIB] = bytes(2 * MIB)
    return bytes(content)


@pytest.fixture
def far(start: Start, tmp_path: Path, disk: bytes) -> Server:
    image = tmp_path / "origin.img"
    image.write_bytes(disk)
    return start("--target", image, tcp=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path / "small", "4m") as directory:
        yield directory


@pytest.fixture
def files(tmp_path: Path, small: Path) -> CacheFiles:
    """All but the cache image have room."""
    files = CacheFiles(tmp_path)
    files.image = small / "cache.img"
    return files


def fill(directory: Path) -> Path:
    """Leave no room there, but in the returned file."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(BLOCK)) == BLOCK:
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return ballast


def at(disk: bytes, block: int, count: int = 1) -> bytes:
    return disk[block * BLOCK : (block + count) * BLOCK]


def whole(server: Server) -> bytes:
    client = connect(server.uri)
    return b"".join(bytes(client.pread(min(MIB, SIZE - offset), offset)) for offset in range(0, SIZE, MIB))


def told(server: Server, line: str) -> int:
    return server.log().count(line)


def test_a_disk_much_larger_than_the_cache_is_read_whole_and_written_where_there_is_room(
    start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes
) -> None:
    proxy = start(*files.arguments(far.uri))
    clients = [connect(proxy.uri) for _ in range(3)]
    assert all(read_all(client) == disk for client in clients)
    assert told(proxy, BEGIN) == 1
    cached = files.cached()
    assert 0 < len(cached) * BLOCK < 4 * MIB + 2 * MIB
    clients[0].pwrite(b"w" * BLOCK, cached[0] * BLOCK)
    with pytest.raises(nbd.Error) as error:
        clients[1].pwrite(b"w" * 64 * BLOCK, SIZE - 64 * BLOCK)
    assert error.value.errno == "ENOSPC"
    expected = bytearray(disk)
    expected[cached[0] * BLOCK : (cached[0] + 1) * BLOCK] = b"w" * BLOCK
    assert all(read_all(client) == expected for client in clients)
    assert told(proxy, BEGIN) == 1
    assert told(proxy, END) == 0


def test_caching_goes_on_by_itself_when_there_is_room(
    start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes
) -> None:
    proxy = start(*files.arguments(far.uri, "--readahead", "0"))
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(proxy.connect())).negotiate() for _ in range(2)]
        for rounds in (1, 2):
            ballast = fill(small)
            for client in clients:
                for block in range(2048, 2304, 16):
                    assert client.read(block * BLOCK, 16 * BLOCK) == at(disk, block, 16)
            assert (told(proxy, BEGIN), told(proxy, END)) == (rounds, rounds - 1)
            assert not set(range(2048, 2304)) & set(files.cached()[: rounds * 8])
            ballast.unlink()
            block = 3000 + rounds

            def kept() -> bool:
                for client in clients:
                    assert client.read(block * BLOCK, BLOCK) == at(disk, block)  # noqa: B023
                return block in files.cached()  # noqa: B023

            wait_until(kept, "a block that is kept")
            wait_until(lambda: told(proxy, END) == rounds, "the end of reading through")  # noqa: B023


def test_checksums_that_find_no_room_are_as_a_cache_that_finds_none(
    start: Start, tmp_path: Path, small: Path, far: Server, disk: bytes
) -> None:
    """Bitmap and state have theirs from the start on."""
    files = CacheFiles(small)
    files.image = tmp_path / "cache.img"
    proxy = start(*files.arguments(far.uri, "--readahead", "0"))
    ballast = fill(small)
    assert whole(proxy) == disk
    connect(proxy.uri).pwrite(b"w" * BLOCK, 0)
    assert (told(proxy, BEGIN), told(proxy, END), files.cached()) == (1, 0, [0])
    ballast.unlink()
    client = connect(proxy.uri)
    wait_until(lambda: client.pread(BLOCK, BLOCK) == at(disk, 1) and 1 in files.cached(), "a block that is kept")
    kill_server(proxy)
    proxy = start(*files.arguments(far.uri, "--readahead", "0"))
    assert whole(proxy) == b"w" * BLOCK + disk[BLOCK:]
    assert query(files.control)["counters"]["damaged"] == 0


def test_parts_of_blocks_and_commands_without_room_are_enospc_and_change_nothing(
    start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes
) -> None:
    proxy = start(*files.arguments(far.uri, "--readahead", "0"))
    with RawClient(proxy.connect()).negotiate() as client:
        client.read(0, BLOCK)
        ballast = fill(small)
        for command, offset, length in (
            (WRITE, 2000 * BLOCK + 10, 100),
            (WRITE, 2000 * BLOCK - 10, 5 * BLOCK),
            (WRITE, 2500 * BLOCK - 10, 12 * MIB),
            (WRITE_ZEROES, 2000 * BLOCK + 10, 100),
            (CACHE, 2000 * BLOCK, 64 * BLOCK),
            (CACHE, 0, SIZE),
        ):
            data = b"n" * length if command == WRITE else b""
            client.request(command, offset, length, data=data)
            assert client.simple_reply()[0] == errno.ENOSPC, command
        assert client.read(1990 * BLOCK, 40 * BLOCK) == at(disk, 1990, 40)
        assert client.read(2499 * BLOCK, 2 * BLOCK) == at(disk, 2499, 2)
        ballast.unlink()
        assert client.write(2000 * BLOCK + 10, b"n" * 100) == 0
        expected = at(disk, 2000)[:10] + b"n" * 100 + at(disk, 2000)[110:]
        assert client.read(2000 * BLOCK, BLOCK) == expected


def test_what_waits_for_a_stalled_origin_when_the_room_ends_is_answered(
    start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes
) -> None:
    with Relay(far.port) as relay:
        proxy = start(*files.arguments(relay.uri))
        clients = [connect(proxy.uri) for _ in range(2)]
        assert bytes(clients[0].pread(BLOCK, 0)) == at(disk, 0)
        relay.stall()
        offsets = [*range(8 * MIB, 16 * MIB, MIB), 8 * MIB + 100, 9 * MIB - 4096]
        readings = [Reading(client, offset, MIB) for client in clients for offset in offsets]
        fill(small)
        relay.resume()
        for reading, offset in zip(readings, offsets * 2):
            assert reading.content() == disk[offset : offset + MIB]
        relay.cut()
        assert read_all(clients[1]) == disk
        assert told(proxy, BEGIN) == 1


def test_old_clients_and_long_reads_pass_through_and_memory_is_bounded(
    start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes
) -> None:
    proxy = start(*files.arguments(far.uri))
    with RawClient(proxy.connect()).negotiate() as client:
        client.read(0, BLOCK)
        (worker,) = proxy.busy_workers()
        fill(small)
        for _ in range(12):  # half of what is asked for, 288 MiB, would show
            client.send(pack_request(READ, 0, SIZE))
        used = []
        for _ in range(12):
            assert client.simple_reply(SIZE) == (0, 1, disk)
            used.append(own_memory(worker))
        assert max(used) < 128 * MIB


def own_memory(pid: int) -> int:
    """Bytes; mapped pages of the disk do not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def test_copying_stops_with_a_line(start: Start, files: CacheFiles, small: Path, far: Server, disk: bytes) -> None:
    proxy = start(*files.arguments(far.uri))
    proxy.expected_errors.append("cannot write to the cache image: No space left on device")
    client = connect(proxy.uri)
    status, _, complaint = bgctl("--cache-all", files.control, check=False)
    assert status == 1
    assert "blocks could not be copied: No space left on device" in complaint
    assert read_all(client) == disk


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_clients_that_read_and_write_while_room_comes_and_goes_see_right_data(
    start: Start, tmp_path: Path, far: Server, disk: bytes, kind: str
) -> None:
    """Each writes blocks of its own; a write without room is ENOSPC and leaves what was there."""
    directory = tmp_path / "room"
    room = small_tmpfs(directory, "6m") if kind == "tmpfs" else loop_mount(directory, "ext4", 8)
    seed = int(os.environ.get("XNBD_SEED", "3"))
    ends = time.monotonic() + 4
    with room:
        files = CacheFiles(tmp_path)
        files.image = directory / "cache.img"
        proxy = start(*files.arguments(far.uri))
        failures: List[BaseException] = []

        def live(number: int) -> None:
            try:
                Writer(connect(proxy.uri), disk, number, random.Random(seed + number)).run(ends)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=live, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while time.monotonic() < ends:
            ballast = fill(directory)
            wait_until(lambda: not ballast.exists() or told(proxy, BEGIN) > 0, "a full file system")  # noqa: B023
            time.sleep(0.3)
            ballast.unlink()
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        assert not failures, f"seed {seed}: {failures}"
        proxy.stop()


class Writer:
    """Writes every third block of the disk, from *number* on, and knows what it has to find anywhere there."""

    def __init__(self, client: nbd.NBD, disk: bytes, number: int, rng: random.Random) -> None:
        self._client, self._disk, self._number, self._rng = client, disk, number, rng
        self._written: Dict[int, bytes] = {}

    def run(self, ends: float) -> None:
        while time.monotonic() < ends:
            block = 3 * self._rng.randrange(SIZE // BLOCK // 3) + self._number
            if self._rng.random() < 0.3:
                self._write(block)
            else:
                assert bytes(self._client.pread(BLOCK, block * BLOCK)) == self._content(block), block
        for block in self._written:
            assert bytes(self._client.pread(BLOCK, block * BLOCK)) == self._content(block), block
        self._client.shutdown()

    def _content(self, block: int) -> bytes:
        return self._written.get(block) or at(self._disk, block)

    def _write(self, block: int) -> None:
        start = self._rng.choice([0, 0, 100])
        data = self._rng.randbytes(self._rng.choice([BLOCK, BLOCK, 1000]) - start)
        try:
            self._client.pwrite(data, block * BLOCK + start)
        except nbd.Error as error:
            assert error.errno == "ENOSPC", error
            return
        old = self._content(block)
        self._written[block] = old[:start] + data + old[start + len(data) :]
