"""A block device, here a loop device, as the disk: its size, and changes whose ends are no sector's.

Making loop devices takes root.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Iterator

import nbd
import pytest
from conftest import MIB, Start, StartWrapper
from launch import fails
from model import Model
from mounts import attach, detach
from server_process import run

SECTOR = 512
SIZE = 4 * MIB + SECTOR

pytestmark = pytest.mark.root(reason="loop devices are made by root only")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """The file behind the loop device."""
    path = tmp_path / "backing.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[str]:
    path = attach(backing)
    yield str(path)
    detach(path)


@pytest.fixture
def read_only_device(backing: Path) -> Iterator[str]:
    path = attach(backing, "--read-only")
    yield str(path)
    detach(path)


def connect(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    return client


def test_size_is_the_device_s(start: Start, device: str) -> None:
    client = connect(start("--target", device).uri)
    assert client.get_size() == SIZE


def test_export_has_the_device_s_name(start: Start, device: str) -> None:
    assert run("nbdinfo", "--list", start("--target", device).uri)[1].count(f'export="{Path(device).name}"') == 1


def test_device_is_read_to_its_last_byte(start: Start, device: str, backing: Path) -> None:
    client = connect(start("--target", device).uri)
    content = backing.read_bytes()
    assert bytes(client.pread(SIZE, 0)) == content
    assert bytes(client.pread(7, SIZE - 7)) == content[-7:]


def test_written_bytes_reach_the_device_with_a_flush(start: Start, device: str, backing: Path) -> None:
    content = backing.read_bytes()
    client = connect(start("--target", device).uri)
    client.pwrite(b"over a sector's end", 10 * SECTOR - 5)
    client.flush()
    start_of_change = 10 * SECTOR - 5
    end_of_change = start_of_change + len(b"over a sector's end")
    assert backing.read_bytes() == content[:start_of_change] + b"over a sector's end" + content[end_of_change:]


@pytest.mark.parametrize("flags", [0, nbd.CMD_FLAG_NO_HOLE])
@pytest.mark.parametrize("offset, length", [(0, SIZE), (511, 2), (1, 510), (1000, 100_001), (MIB, MIB), (SIZE - 1, 1)])
def test_write_zeroes_is_exact_to_the_byte(
    start: Start, device: str, backing: Path, offset: int, length: int, flags: int
) -> None:
    content = backing.read_bytes()
    client = connect(start("--target", device).uri)
    client.zero(length, offset, flags | nbd.CMD_FLAG_FUA)
    expected = content[:offset] + bytes(length) + content[offset + length :]
    assert bytes(client.pread(SIZE, 0)) == expected
    assert backing.read_bytes() == expected


def test_trim_gives_space_back_and_leaves_the_bytes_around_it(start: Start, device: str, backing: Path) -> None:
    content = backing.read_bytes()
    client = connect(start("--target", device).uri)
    before = backing.stat().st_blocks
    client.trim(2 * MIB, MIB - 100, nbd.CMD_FLAG_FUA)
    assert backing.stat().st_blocks <= before - 2 * MIB // 512 + 16
    assert bytes(client.pread(MIB - 100, 0)) == content[: MIB - 100]
    rest = 3 * MIB - 100
    assert bytes(client.pread(SIZE - rest, rest)) == content[rest:]


def test_trim_of_less_than_a_sector_changes_nothing(start: Start, device: str, backing: Path) -> None:
    content = backing.read_bytes()
    client = connect(start("--target", device).uri)
    client.trim(300, 5 * SECTOR + 100)
    assert bytes(client.pread(SIZE, 0)) == content


def test_random_requests_agree_with_a_copy(start: Start, device: str, backing: Path, seed: int) -> None:
    server = start("--target", device)
    clients = [connect(server.uri) for _ in range(3)]
    model = Model(clients, backing.read_bytes(), random.Random(seed), exact_trim=False)
    model.run(100)
    clients[0].flush()
    assert backing.read_bytes() == model.content


def test_read_only_device_is_served_with_readonly(start: Start, read_only_device: str) -> None:
    client = connect(start("--target", "--readonly", read_only_device).uri)
    assert client.is_read_only()
    assert client.get_size() == SIZE


def test_read_only_device_is_refused_without_readonly(read_only_device: str) -> None:
    status, message = fails("--target", "--lport", 0, read_only_device)
    assert status == 1
    assert read_only_device in message
    assert "--readonly" in message


def test_zeroing_gives_space_back_where_holes_are_allowed(start: Start, device: str, backing: Path) -> None:
    before = backing.stat().st_blocks
    connect(start("--target", device).uri).zero(2 * MIB, MIB, nbd.CMD_FLAG_FUA)
    assert backing.stat().st_blocks <= before - 2 * MIB // SECTOR + 16


@pytest.fixture
def device_that_cannot_zero(tmp_path: Path) -> Iterator[str]:
    """A device for which the kernel has to write zeros: ramfs has no way to make them."""
    directory = tmp_path / "ramfs"
    directory.mkdir()
    run("mount", "-t", "ramfs", "ramfs", directory)
    try:
        (directory / "backing").write_bytes(b"\xdd" * MIB)
        path = attach(directory / "backing")
        assert Path(f"/sys/block/{path.name}/queue/write_zeroes_max_bytes").read_text() == "0\n"
        yield str(path)
        detach(path)
    finally:
        run("umount", "-l", directory)


def test_fast_zeroing_is_refused_by_a_device_that_cannot_zero(start: Start, device_that_cannot_zero: str) -> None:
    client = connect(start("--target", device_that_cannot_zero).uri)
    for flags in (nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE):
        with pytest.raises(nbd.Error, match="Operation not supported"):
            client.zero(64 << 10, 0, flags)
    assert client.pread(MIB, 0) == b"\xdd" * MIB
    client.zero(64 << 10, 0, nbd.CMD_FLAG_NO_HOLE)
    client.zero(64 << 10, 64 << 10)
    assert client.pread(MIB, 0) == bytes(128 << 10) + b"\xdd" * (MIB - (128 << 10))


def test_a_wrapper_s_export_may_be_a_device(start_wrapper: StartWrapper, device: str, backing: Path) -> None:
    wrapper = start_wrapper()
    wrapper.ctl("--add-target", "device", device)
    client = connect(wrapper.uri("device"))
    assert client.get_size() == SIZE
    assert bytes(client.pread(SIZE, 0)) == backing.read_bytes()
