"""From a proxy to a plain target under its clients: no error, no wrong byte, whatever was in flight."""

from __future__ import annotations

import random
import select
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, List

import nbd
import pytest
from caching import BLOCK, CacheFiles, ask, bgctl, connect, kill_server, query
from conftest import MIB, Start
from launch import fails
from ledger import Crowd, Ledger
from model import ignore_chunk, read_all, wait_for_all
from rawclient import READ, WRITE, WRITE_ZEROES, RawClient, pack_request
from relay import Relay
from server_process import Server, wait_until

from xnbd.system.file_locks import RangeLocks

SIZE = 24 * MIB + 512
CLIENTS = 8


@pytest.fixture
def content() -> bytes:
    return random.Random(4).randbytes(SIZE)


@pytest.fixture
def far(start: Start, tmp_path: Path, content: bytes) -> Server:
    """The origin."""
    path = tmp_path / "origin.img"
    path.write_bytes(content)
    return start("--target", "--readonly", path, tcp=True)


def test_a_switch_under_load_is_seen_by_nobody(
    start: Start, tmp_path: Path, files: CacheFiles, far: Server, content: bytes, seed: int
) -> None:
    """Clients of two servers; the origin is stopped after the switch."""
    second = tmp_path / "control2"
    proxies = [start(*files.arguments(far.uri)), start(*files.arguments(far.uri, control=second))]
    ledger, rng = Ledger(content), random.Random(seed)
    for proxy in proxies:
        proxy.wait_for_log("INFO: serving ")  # the control socket is the last one to be there
    ledger.hot = (0, ledger.sectors // 2)  # so that blocks are missing, however long the refusal takes
    crowd = Crowd([proxy.uri for proxy in proxies], CLIENTS, ledger, rng)
    crowd.wait_for(50)
    status, _, complaint = bgctl("--switch", files.control, check=False)
    assert status == 1
    assert "blocks are missing" in complaint
    ledger.hot = (0, ledger.sectors)
    bgctl("--cache-all", files.control)
    crowd.take_longest()
    crowd.wait_for(100)
    before = crowd.take_longest()
    pause = ask(second, "switch")["longest_pause_ms"]
    crowd.wait_for(100)
    print(f"slowest requests before the switch {before * 1e3:.0f} ms, around it {crowd.take_longest() * 1e3:.0f} ms;")
    print(f"the gate was held for {pause} ms")
    far.stop()
    crowd.wait_for(100)
    assert query(files.control)["mode"] == "target"
    crowd.finish()
    ledger.check_files(files.image, files.bitmap)
    for proxy in proxies:
        assert read_all(connect(proxy.uri)) == ledger.base
        proxy.stop()
    assert files.image.read_bytes() == ledger.base


def test_what_was_written_after_a_switch_is_there_when_all_are_killed(
    start: Start, files: CacheFiles, far: Server, content: bytes, seed: int
) -> None:
    proxy = start(*files.arguments(far.uri))
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    ledger = Ledger(content)
    crowd = Crowd([proxy.uri], CLIENTS, ledger, random.Random(seed))
    crowd.wait_for(100)
    kill_server(proxy)
    crowd.finish()
    ledger.check_files(files.image, files.bitmap)
    again = start(*files.arguments(far.uri))
    assert query(files.control)["mode"] == "proxy"
    assert read_all(connect(again.uri)) == ledger.base


def test_a_forced_switch_lets_nothing_from_the_origin_come_over_what_is_written(
    start: Start, files: CacheFiles, far: Server
) -> None:
    """Writes that wait because another client's blocks are on their way go on at the switch, before those come."""
    blocks, errors = range(0, 256, 3), Errors()
    with Relay(far.port, delay=0.2) as relay:
        proxy = start(*files.arguments(relay.uri, "--readahead", "0"))
        writer, *readers = clients = [connect(proxy.uri) for _ in range(5)]
        for number, reader in enumerate(readers):
            reader.aio_pread(nbd.Buffer(1), (5000 + 100 * number) * BLOCK)
        wait_for_all(readers)
        relay.stall()
        for number, reader in enumerate(readers):
            reader.aio_pread_structured(nbd.Buffer(64 * BLOCK), number * 64 * BLOCK, ignore_chunk, errors.on_completion)
        wait_until(lambda: query(files.control)["queue"]["requests"] == 4, "the readers to wait")
        for block in blocks:
            writer.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"w" * BLOCK)), block * BLOCK, errors.on_completion)
        relay.resume()
        assert ask(files.control, "switch", force=True).get("done")
        wait_for_all(clients)
        assert errors.found == [0] * (4 + len(blocks))
        for client in clients:
            data = bytes(client.pread(256 * BLOCK, 0))
            assert [block for block in blocks if data[block * BLOCK : (block + 1) * BLOCK] != b"w" * BLOCK] == []
            client.shutdown()
        proxy.stop()


class Errors:
    """How requests have ended."""

    def __init__(self) -> None:
        self.found: List[int] = []

    def on_completion(self, error: Any) -> int:
        self.found.append(error.value)
        return 1


def test_a_forced_switch_is_not_undone_by_a_restart(
    start: Start, tmp_path: Path, files: CacheFiles, far: Server
) -> None:
    """Blocks that are missing read as zeros in the target: a proxy would show the origin's again."""
    proxy = start(*files.arguments(far.uri))
    client = connect(proxy.uri)
    client.pwrite(b"w" * BLOCK, 0)
    client.shutdown()
    bgctl("--force", "--switch", files.control)
    proxy.stop()
    assert "switched to a plain target by force" in fails(*files.arguments(far.uri), "--unix", tmp_path / "s")[1]
    target = start("--target", files.image)
    assert bytes(connect(target.uri).pread(2 * BLOCK, 0)) == b"w" * BLOCK + bytes(BLOCK)


def test_a_switch_while_replies_leave_slowly_lets_a_long_write_that_waits_for_its_last_block_go_on(
    start: Start, files: CacheFiles, far: Server
) -> None:
    """In the middle of its payload others are answered; their replies are not taken, and meanwhile the disk changes."""
    proxy = start(*files.arguments(far.uri, "--readahead", "0"))
    behind, data = 10 * MIB, random.Random(1).randbytes(9 * MIB + 100)
    with RawClient(proxy.connect()).negotiate() as client, files.bitmap.open("rb+") as bitmap:
        locks = RangeLocks(bitmap.fileno())
        assert locks.try_acquire(0, 8 * MIB >> 15)  # more than a session holds in memory
        assert locks.try_acquire(len(data) >> 15, 1)
        assert locks.try_acquire(behind >> 15, 8)
        client.send(pack_request(READ, behind, 64 * BLOCK) * 16)
        client.request(WRITE_ZEROES, behind + 1, 10)
        wait_until(lambda: query(files.control)["queue"]["requests"] == 17, "requests that wait")
        client.request(WRITE, 0, len(data), data=data)
        locks.release(behind >> 15, 8)
        wait_until(lambda: bool(select.select([client.sock], [], [], 0)[0]), "the first reply")
        with ThreadPoolExecutor(1) as background:
            switch = background.submit(ask, files.control, "switch", force=True)
            wait_until(lambda: query(files.control)["mode"] == "target", "the switch")
            assert [client.simple_reply(64 * BLOCK)[0] for _ in range(16)] == [0] * 16
            assert [client.simple_reply()[0] for _ in range(2)] == [0, 0]
            assert switch.result().get("done")
        assert client.read(0, len(data)) == data
    proxy.stop()
