"""The benchmark's load generator: cold caches are measured rightly only if it asks for each block once."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from certificates import Certificates
from origin_programs import is_listening
from server_process import ROOT, run, wait_until

BLOCK = 4096
DISK_BLOCKS = 256


@pytest.fixture(scope="module")
def nbdload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("nbdload") / "nbdload"
    return compile_nbdload(program, "-DWITH_TLS", "-lssl", "-lcrypto")


def compile_nbdload(program: Path, *tls: str) -> Path:
    sources = [ROOT / "contrib" / "bench" / name for name in ("nbdload.c", "nbdload_tls.c")]
    run("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, *sources, *tls)
    return program


class LoggedDisk:
    """An nbdkit whose log says what was asked for; it demands TLS if it has a directory of *certificates*."""

    def __init__(self, directory: Path, certificates: Optional[Path] = None) -> None:
        self.socket = directory / "sock"
        self._log = directory / "log"
        disk = ["--filter=log", "memory", str(DISK_BLOCKS * BLOCK), f"logfile={self._log}"]
        tls = ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"] if certificates else []
        self.process = subprocess.Popen(["nbdkit", "--foreground", "--unix", str(self.socket), *tls, *disk])

    def blocks_read(self) -> List[int]:
        """In the order of the log, once all connections have ended."""
        wait_until(self._is_over, "the end of all connections in nbdkit's log")
        return self.blocks_read_so_far()

    def blocks_read_so_far(self) -> List[int]:
        offsets = re.findall(r" Read id=\d+ offset=0x([0-9a-f]+) ", self._log.read_text())
        return [int(offset, 16) // BLOCK for offset in offsets]

    def _is_over(self) -> bool:
        log = self._log.read_text()
        return 0 < log.count(" Connect ") == log.count(" Disconnect ")


@contextmanager
def serving(logged: LoggedDisk) -> Iterator[LoggedDisk]:
    try:
        wait_until(lambda: is_listening(logged.socket), "nbdkit to listen")
        yield logged
    finally:
        logged.process.terminate()
        logged.process.wait(60)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoggedDisk]:
    with serving(LoggedDisk(tmp_path)) as logged:
        yield logged


@pytest.fixture
def tls_disk(tmp_path: Path, certificates: Certificates) -> Iterator[LoggedDisk]:
    with serving(LoggedDisk(tmp_path, certificates.server)) as logged:
        yield logged


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("op", ["read", "randread"])
def test_once_asks_for_each_block_once(nbdload: Path, disk: LoggedDisk, op: str, connections: int) -> None:
    out = run(nbdload, "--once", "--op", op, "--depth", 8, "--connections", connections, disk.socket)[1]
    assert sorted(disk.blocks_read()) == list(range(DISK_BLOCKS))
    assert json.loads(out)["requests"] == DISK_BLOCKS


def test_once_is_random_with_randread(nbdload: Path, disk: LoggedDisk) -> None:
    run(nbdload, "--once", "--op", "randread", disk.socket)
    blocks = disk.blocks_read()
    neighbours = sum(after == before + 1 for before, after in zip(blocks, blocks[1:]))
    assert neighbours < DISK_BLOCKS // 8


def test_limit_bounds_once(nbdload: Path, disk: LoggedDisk) -> None:
    run(nbdload, "--once", "--op", "read", "--limit", 10, "--connections", 2, disk.socket)
    assert sorted(disk.blocks_read()) == list(range(10))


def test_span_keeps_to_the_start_of_the_disk(nbdload: Path, disk: LoggedDisk) -> None:
    run(nbdload, "--once", "--op", "randread", "--span", 20 * BLOCK, disk.socket)
    assert sorted(disk.blocks_read()) == list(range(20))


def test_a_pending_read_asks_for_the_last_block_and_must_not_be_answered(nbdload: Path, disk: LoggedDisk) -> None:
    status, _, err = run(nbdload, "--pending", 1, "--span", 20 * BLOCK, disk.socket, check=False)
    assert (status, "a reply to no request" in err) == (1, True), err
    # An nbdkit whose client leaves while it sends may die of that (an assertion in its connections.c).
    assert DISK_BLOCKS - 1 in disk.blocks_read_so_far()


def test_pending_reads_need_room_beyond_the_span(nbdload: Path, disk: LoggedDisk) -> None:
    status, _, err = run(nbdload, "--pending", 2, "--once", disk.socket, check=False)
    assert (status, "no room for pending reads" in err) == (1, True), err


# TLS


@pytest.mark.parametrize("op, size", [("randread", BLOCK), ("write", 20_000)])
def test_requests_go_over_tls(
    nbdload: Path, tls_disk: LoggedDisk, certificates: Certificates, op: str, size: int
) -> None:
    options = ["--once", "--op", op, "--bytes", size, "--depth", 8, "--connections", 2]
    out = run(nbdload, "--tls", certificates.alice, *options, tls_disk.socket)[1]
    assert json.loads(out)["requests"] == DISK_BLOCKS * BLOCK // size


def test_first_reads_and_idle_connections_go_over_tls(
    nbdload: Path, tls_disk: LoggedDisk, certificates: Certificates
) -> None:
    tls = ["--tls", certificates.alice]
    assert json.loads(run(nbdload, *tls, "--first", 2, tls_disk.socket)[1])["first"] == 2
    assert json.loads(run(nbdload, *tls, "--idle", 3, tls_disk.socket)[1])["idle"] == 3


def test_a_server_that_another_authority_has_signed_is_refused(
    nbdload: Path, tls_disk: LoggedDisk, certificates: Certificates
) -> None:
    status, _, err = run(nbdload, "--tls", certificates.other_authority.path, tls_disk.socket, check=False)
    assert (status, err.count("\n"), "nbdload: TLS: " in err) == (1, 1, True), err


def test_without_the_library_a_line_says_how_to_get_it(
    tmp_path: Path, tls_disk: LoggedDisk, certificates: Certificates
) -> None:
    plain = compile_nbdload(tmp_path / "nbdload")
    status, _, err = run(plain, "--tls", certificates.alice, tls_disk.socket, check=False)
    assert (status, err.count("\n"), "apt-get install libssl-dev" in err) == (1, 1, True), err
