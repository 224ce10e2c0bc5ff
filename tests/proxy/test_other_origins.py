"""A proxy of an origin that is no NBD server: the seam is `xnbd.origin.base`, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Iterator

import pytest
from caching import BLOCK, CacheFiles, Reading, ask, bgctl, connect
from conftest import MIB, Start
from file_origin import PREFIX, register
from model import read_all
from server_process import Server, wait_until

from xnbd.errors import ConfigurationError
from xnbd.origin import address
from xnbd.origin.base import OriginLost
from xnbd.origin.probe import probe
from xnbd.proxy.image import DEFAULT_READAHEAD, ProxyImage
from xnbd.proxy.origin_link import Patience
from xnbd.proxy.passage import PassedParcel
from xnbd.proxy.source import ProxySettings, ProxySource
from xnbd.proxy.state.opening import open_state
from xnbd.server.disk import Disk
from xnbd.storage.image import NotLocal
from xnbd.storage.target import create_sparse, open_disk

SIZE = 4 * MIB + 1234
HOLE, HOLE_END = MIB + BLOCK, 2 * MIB + 3 * BLOCK


@pytest.fixture
def disk() -> bytes:
    noise = random.Random(8).randbytes(SIZE)
    return noise[:HOLE] + bytes(HOLE_END - HOLE) + noise[HOLE_END:]


@pytest.fixture
def origin(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    return path


@pytest.fixture(autouse=True)
def scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "SCHEMES", dict(address.SCHEMES))
    register()


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def proxy(start: Start, files: CacheFiles, origin: Path, control: Path) -> Server:
    return start(*files.arguments(f"test://{origin}", control=control), prefix=PREFIX)


def test_all_of_the_disk_comes_from_a_file(proxy: Server, disk: bytes) -> None:
    client = connect(proxy.uri)
    assert client.pread(3 * BLOCK, 7 * BLOCK) == disk[7 * BLOCK : 10 * BLOCK]
    client.pwrite(b"w" * 100, HOLE + 50)
    expected = disk[: HOLE + 50] + b"w" * 100 + disk[HOLE + 150 :]
    assert read_all(client) == expected


def test_it_is_copied_and_then_served_without_it(proxy: Server, origin: Path, control: Path, disk: bytes) -> None:
    bgctl("--cache-all", control)
    bgctl("--switch", control)
    origin.unlink()
    assert read_all(connect(proxy.uri)) == disk
    assert ask(control, "query")["counters"]["bytes_fetched"] <= SIZE - (HOLE_END - HOLE)


def test_its_loss_is_told_and_its_return_ends_the_wait(proxy: Server, origin: Path, disk: bytes) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    away = origin.rename(origin.with_suffix(".away"))
    reading = Reading(client, 3 * MIB, BLOCK)
    proxy.wait_for_log(f"origin test://{origin}: No such file or directory; 1 request waits for it, trying again")
    assert not reading.is_done()
    away.rename(origin)
    assert reading.content() == disk[3 * MIB : 3 * MIB + BLOCK]
    proxy.wait_for_log(f"origin test://{origin}: answers again")


def test_a_proxy_moves_from_a_file_to_an_nbd_server(
    start: Start, proxy: Server, origin: Path, control: Path, disk: bytes
) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    target = start("--target", "--readonly", origin)
    bgctl("--reconnect", control, target.uri)
    origin.rename(origin.with_suffix(".away"))
    assert read_all(client) == disk


def test_one_of_another_size_is_refused_on_the_way(start: Start, proxy: Server, tmp_path: Path, control: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    answer = ask(control, "reconnect", uri=f"test://{other}")
    assert f"the disk at test://{other} has {MIB} bytes, not {SIZE}" in answer["error"]


def test_it_is_probed(origin: Path, tmp_path: Path) -> None:
    assert probe(address.parse_origin(f"test://{origin}"), timeout=20).size == SIZE
    with pytest.raises(OriginLost, match="No such file"):
        probe(address.parse_origin(f"test://{tmp_path}/nobody"), timeout=20)


def test_a_scheme_that_nobody_knows_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected a URI that begins with nbd:// or nbd\+unix:// or .* or test://"
    ):
        address.parse_origin("ftp://host/disk")


# Copies of what is local


@pytest.fixture
def opened(tmp_path: Path, origin: Path) -> Iterator[Disk]:
    """The disk of a proxy in this process."""
    cache, uri = tmp_path / "c.img", f"test://{origin}"
    create_sparse(str(cache), SIZE)
    fd = open_disk(str(cache), readonly=False)
    state = open_state(str(tmp_path / "c.bitmap"), fd, disk_size=SIZE, origin=uri, clear=False, adopt=False)
    settings = ProxySettings(str(cache), SIZE, False, address.parse_origin(uri), Patience(), DEFAULT_READAHEAD)
    source = ProxySource(fd, state, settings)
    disk = Disk(source, source.scoreboard_fd)
    yield disk
    disk.close()
    source.close()


def test_what_is_copied_has_to_be_local_first(opened: Disk, disk: bytes) -> None:
    image = opened.image
    background = image.background
    assert background is not None
    with pytest.raises(NotLocal) as missing:
        image.pread(100, 3 * BLOCK)

    def has_come() -> bool:
        background.progress()
        return missing.value.ticket in background.finished

    wait_until(has_come, "the blocks")
    data = image.pread(100, 3 * BLOCK)
    assert isinstance(data, bytes)
    assert data == disk[100 : 100 + 3 * BLOCK]
    assert image.pread(SIZE - 5, 0) == b""
    with pytest.raises(NotLocal):
        image.pread(SIZE - 5, 5)


def test_a_copy_is_made_of_what_is_local_and_what_is_in_hand(opened: Disk, disk: bytes) -> None:
    image = opened.image
    assert isinstance(image, ProxyImage)
    image.write(BLOCK, b"w" * BLOCK)
    image.take([PassedParcel(image.fetcher.arrivals.passage, 0, 3, disk[: 3 * BLOCK])])
    expected = disk[100:BLOCK] + b"w" * BLOCK + disk[2 * BLOCK : 3 * BLOCK]
    assert image.pread(100, 3 * BLOCK - 100) == expected
    assert b"".join(image.read(100, 3 * BLOCK - 100)) == expected
    image.take(None)
    with pytest.raises(NotLocal):
        image.pread(100, 3 * BLOCK - 100)
