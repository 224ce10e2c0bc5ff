"""A proxy whose file system has no space left: what is cached is served, a start needs nothing, nor does the end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Iterator

import nbd
import pytest
from caching import BLOCK, CacheFiles, bgctl, connect, kill_server
from conftest import MIB, Start
from launch import fails
from mounts import loop_mount, small_tmpfs
from server_process import Server

SIZE = 4 * MIB


@pytest.fixture
def far(start: Start, tmp_path: Path) -> Server:
    """The origin, of nothing but ``o``."""
    path = tmp_path / "origin.img"
    path.write_bytes(b"o" * SIZE)
    return start("--target", "--readonly", path)


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    if request.param == "tmpfs":
        with small_tmpfs(directory, "16M"):
            yield directory
    else:
        with loop_mount(directory, request.param, {"ext4": 32, "xfs": 320}[request.param]):
            yield directory


def fill(directory: Path) -> None:
    """Not one byte more has room."""
    with open(directory / "filler", "ab", buffering=0) as file:
        for size in (MIB, BLOCK, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.fsync(file.fileno())


def proxy(start: Start, files: CacheFiles, far: Server, tmp_path: Path) -> Server:
    server = start(*files.arguments(far.uri, control=tmp_path / "control"))
    server.wait_for_log("INFO: serving ")
    return server


def test_a_cache_that_is_complete_is_served_from_start_to_clean_end(
    start: Start, small: Path, far: Server, tmp_path: Path
) -> None:
    """Also after all processes of the last server were killed."""
    files = CacheFiles(small)
    first = proxy(start, files, far, tmp_path)
    bgctl("--cache-all", tmp_path / "control")
    first.stop()
    fill(small)
    for end in (kill_server, Server.stop, Server.stop):
        server = proxy(start, files, far, tmp_path)
        with_data = connect(server.uri)
        assert bytes(with_data.pread(SIZE, 0)) == b"o" * SIZE
        with_data.pwrite(b"o" * BLOCK, 0, nbd.CMD_FLAG_FUA)
        with_data.shutdown()
        end(server)
        assert files.is_clean() == (end is Server.stop)
    assert "no space" not in server.log()


def test_a_cache_without_a_scoreboard_is_served_by_one_server(
    start: Start, small: Path, far: Server, tmp_path: Path
) -> None:
    """It was left by a server that removed its scoreboard; what has no space is kept in memory."""
    files = CacheFiles(small)
    first = proxy(start, files, far, tmp_path)
    bgctl("--cache-all", tmp_path / "control")
    first.stop()
    (small / "cache.bitmap.board").unlink()
    fill(small)
    server = proxy(start, files, far, tmp_path)
    assert "no space for" in server.log()
    assert bytes(connect(server.uri).pread(SIZE, 0)) == b"o" * SIZE
    status, message = fails(
        *files.arguments(far.uri, "--quiet", control=tmp_path / "other"), "--unix", tmp_path / "other.sock"
    )
    assert (status, "stop them all first" in message) == (1, True)
    server.stop()
    assert files.is_clean()
