"""Proxy exports of a wrapper: several servers on one cache, from a real origin."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from conftest import MIB, Start, StartWrapper
from rawclient import RawClient
from server_process import Server, run, wait_until
from wrapper_process import Wrapper

SIZE = 8 * MIB


class Far:
    """A wrapper with the proxy export ``far`` of a real origin's disk, whose content is *content*."""

    def __init__(self, wrapper: Wrapper, origin: Server, content: bytes, directory: Path) -> None:
        self.wrapper = wrapper
        self.origin = origin
        self.content = content
        self.cache, self.bitmap, self.control = (directory / name for name in ("cache", "bitmap", "far.ctl"))
        files = [self.cache, self.bitmap, self.control]
        wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, *files)

    def client(self, **features: bool) -> RawClient:
        return self.wrapper.client("far", **features)


@pytest.fixture
def far(start_wrapper: StartWrapper, start: Start, tmp_path: Path) -> Far:
    content = random.Random(4).randbytes(SIZE)
    disk = tmp_path / "origin.img"
    disk.write_bytes(content)
    return Far(start_wrapper(), start("--target", "--readonly", disk, tcp=True), content, tmp_path)


def test_nbdcopy_reads_the_whole_origin_by_four_connections(far: Far, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=4", far.wrapper.uri("far"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == far.content
    assert far.cache.read_bytes() == far.content


def test_a_proxy_is_described_as_xnbd_server_describes_it(far: Far, start: Start, tmp_path: Path) -> None:
    def flags(uri: str) -> object:
        export = json.loads(run("nbdinfo", "--json", uri)[1])["exports"][0]
        return {key: value for key, value in export.items() if key.startswith(("can_", "is_", "block_", "export-size"))}

    files = [tmp_path / name for name in ("cache2", "bitmap2", "control2")]
    proxy = start("--proxy", "127.0.0.1", far.origin.port, *files)
    assert flags(far.wrapper.uri("far")) == flags(proxy.uri)


def test_two_clients_see_each_other_s_writes(far: Far) -> None:
    with far.client() as first, far.client() as second:
        assert first.write(5000, b"of the first") == 0
        assert second.read(4990, 30) == far.content[4990:5000] + b"of the first" + far.content[5012:5020]
        assert second.write(5003, b"THE") == 0
        assert first.read(5000, 12) == b"of THE first"


def test_clients_that_write_neighbouring_blocks_lose_nothing(far: Far, seed: int) -> None:
    shadow, lock, failures = bytearray(far.content), threading.Lock(), []

    def use(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            with far.client() as client:
                for _ in range(60):
                    # Every fourth KiB is this client's: blocks are everybody's.
                    offset = chance.randrange(64) * 4096 + number * 1024
                    data = chance.randbytes(chance.randrange(1, 1024))
                    assert client.write(offset, data) == 0
                    with lock:
                        shadow[offset : offset + len(data)] = data
                    assert client.read(offset, len(data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with far.client() as client:
        assert client.read(0, SIZE // 2) == shadow[: SIZE // 2]


def test_a_killed_server_loses_nothing_that_was_answered(far: Far) -> None:
    far.wrapper.expected_errors.append("died: killed by SIGKILL")
    with far.client() as bystander:
        assert bystander.read(0, 4096) == far.content[:4096]
        (other,) = far.wrapper.servers()
        with far.client() as victim:
            assert victim.write(MIB, b"answered") == 0
            (pid,) = set(far.wrapper.servers()) - {other}
            os.kill(pid, signal.SIGKILL)
            assert victim.closed()
        assert bystander.read(MIB - 4, 16) == far.content[MIB - 4 : MIB] + b"answered" + far.content[MIB + 8 : MIB + 12]


def test_cached_blocks_are_served_by_the_next_wrapper_while_the_origin_is_away(
    far: Far, start_wrapper: StartWrapper
) -> None:
    with far.client() as client:
        assert client.read(0, MIB) == far.content[:MIB]
    far.wrapper.ctl("--shutdown")
    far.origin.stop()
    again = start_wrapper()
    with again.client("far") as client:
        assert client.size == SIZE
        assert client.read(0, MIB) == far.content[:MIB]


def test_removed_and_added_again_it_goes_on_with_its_cache(far: Far) -> None:
    with far.client() as client:
        assert client.write(0, b"kept") == 0
    wait_until(lambda: not far.wrapper.servers(), "the server's end")
    far.wrapper.ctl("--remove-by-file", far.cache)
    files = [far.cache, far.bitmap, far.control]
    far.wrapper.ctl("--add-proxy", "again", "127.0.0.1", far.origin.port, *files)
    with far.wrapper.client("again") as client:
        assert client.read(0, 8) == b"kept" + far.content[4:8]
