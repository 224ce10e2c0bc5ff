"""Write-back that fails: from then on nothing is called durable, by no process and for no client, until a restart.

The disk is a loop device on a tmpfs that gets full, which takes root, or ``strace``
lets a sync fail. XNBD_ROUNDS sets the number of rounds of the random tests, XNBD_SYNCS
how many of the syncs of a process are tried.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import signal
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Tuple

import nbd
import pytest
from caching import BLOCK, CacheFiles, bgctl, connect, kill, kill_server, query
from conftest import MIB, Start
from failing_disk import DoubtfulLedger, DoubtfulWriter, FailingDisk, failing_disk
from injection import injected
from ledger import SECTOR, Crowd
from model import read_all
from mounts import unmount
from power_failure import watching_syncs
from server_process import Server, children_of, command, run, title_of, wait_until

from xnbd.scoreboard.layout import create_scoreboard
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.storage.failure import ATTRIBUTE
from xnbd.storage.writeback import RECORD_SIZE, Record, WriteBack, WriteBackFailed

ROUNDS = int(os.environ.get("XNBD_ROUNDS", 1))
SYNCS = range(1, int(os.environ.get("XNBD_SYNCS", 2)) + 1)
SIZE = 64 * MIB
MODEL_SIZE = 16 * MIB + 3 * SECTOR
LOG = [r": write-back failed(: | in another server of it: )", r"the last flush failed: write-back failed at "]

needs_root = pytest.mark.root(reason="loop devices are made by root only")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FailingDisk]:
    """64 MiB of which 24 have room."""
    with failing_disk(tmp_path / "small", SIZE, "24m") as made:
        yield made


def flushes(client: nbd.NBD) -> bool:
    """Whether a FLUSH succeeds; if not, FUA must not either."""
    try:
        client.flush()
    except nbd.Error as error:
        assert error.errno == "EIO"
        with pytest.raises(nbd.Error, match="Input/output error"):
            client.pwrite(client.pread(512, 0), 0, nbd.CMD_FLAG_FUA)
        return False
    return True


def check_nothing_is_durable(server: Server, clients: List[nbd.NBD]) -> None:
    """For these clients, nor for any that comes: more of them than there are spare workers."""
    later = [connect(server.uri) for _ in range(6)]
    for client in [*clients, *later]:
        assert not flushes(client)
        before = client.pread(11, 7 * MIB)
        client.pwrite(b"not durable", 7 * MIB)
        assert client.pread(11, 7 * MIB) == b"not durable"
        client.pwrite(before, 7 * MIB)
    for client in later:
        client.shutdown()
    assert server.log().count(": write-back failed: ") == 1


def fail(_fd: int) -> None:
    raise OSError(errno.EIO, "it is told once")


@pytest.mark.parametrize(
    "damaged", [b"\xff" * RECORD_SIZE, bytes(RECORD_SIZE - 1) + b"\x80", b"\x05" + bytes(14) + b"\x7f"]
)
def test_a_damaged_record_tells_of_a_failure_all_the_same(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "record").write_bytes(damaged)
    with (tmp_path / "record").open("rb+") as file:
        failure = Record(file.fileno(), 0).read()
    assert failure is not None
    assert failure.number == errno.EIO
    assert str(failure) == (
        "write-back failed at 1970-01-01T00:00:00Z (Input/output error), nothing is durable until the server's restart"
    )


def test_a_record_that_cannot_be_synced_is_synced_later(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(bytes(100))
    with (tmp_path / "record").open("rb+") as file:
        record = Record(file.fileno(), 10, lasting=True)
        assert record.read() is None
        assert record.note(errno.ENOSPC)
        assert not record.note(errno.EIO)
        with watching_syncs(lambda _fd, _whole: None, fail):
            record.keep()
        assert os.pread(file.fileno(), 8, 10) == b"\x1c\0\0\0\0\1\0\0"
        record.keep()
        assert os.pread(file.fileno(), 8, 10) == b"\x1c\0\0\0\1\1\0\0"
        failure = record.read()
        assert failure is not None
        assert failure.number == errno.ENOSPC
        record.clear()
        assert record.read() is None


def test_a_failure_that_cannot_even_be_noted_holds_for_its_process(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(bytes(16))
    with (tmp_path / "record").open("rb") as file:
        write_back = WriteBack(Record(file.fileno(), 0))
        write_back.sync(file.fileno())
        with watching_syncs(lambda _fd, _whole: None, fail), pytest.raises(WriteBackFailed):
            write_back.sync(file.fileno())
        with pytest.raises(WriteBackFailed):
            write_back.sync(file.fileno())


# Targets


@needs_root
def test_after_a_failed_flush_of_a_target_none_succeeds_until_its_restart(
    start: Start, tmp_path: Path, disk: FailingDisk
) -> None:
    control = tmp_path / "control"
    server = start("--target", "--control", control, disk.path)
    server.expected_errors += LOG
    clients = [connect(server.uri) for _ in range(3)]
    assert flushes(clients[0])
    for at in range(0, 40 * MIB, MIB):
        clients[0].pwrite(b"w" * MIB, at)
    assert not flushes(clients[1])
    check_nothing_is_durable(server, clients)
    failure = query(control)["write_back_failure"]
    assert (failure["errno"], failure["error"]) in [(5, "Input/output error"), (28, "No space left on device")]
    assert f"ago: {failure['error']}\n" in bgctl("--query", control)[1]
    assert server.stop() == 1
    disk.mend()
    assert flushes(connect(start("--target", disk.path).uri))


@needs_root
def test_another_server_of_the_image_hears_of_it(start: Start, disk: FailingDisk) -> None:
    first, second = start("--target", disk.path), start("--target", disk.path)
    for server in (first, second):
        server.expected_errors += LOG
    client = connect(first.uri)
    for at in range(0, 40 * MIB, MIB):
        client.pwrite(b"w" * MIB, at)
    assert not flushes(client)
    third = start("--target", disk.path)
    third.expected_errors += LOG
    assert not flushes(connect(third.uri))
    assert not flushes(connect(second.uri))
    assert [server.stop() for server in (first, second, third)] == [1, 1, 1]


@needs_root
def test_what_a_process_was_told_and_did_not_live_to_note_is_heard_of_by_those_that_come(disk: FailingDisk) -> None:
    with ExitStack() as descriptions:

        def description() -> int:
            fd = os.open(disk.path, os.O_RDWR)
            descriptions.callback(os.close, fd)
            return fd

        master, witness, dead = description(), description(), description()
        record = create_scoreboard(1)
        descriptions.callback(os.close, record)
        for at in range(0, 40 * MIB, MIB):
            os.pwrite(dead, b"w" * MIB, at)
        with pytest.raises(OSError, match=r"No space left|Input/output error"):
            os.fdatasync(dead)
        later = description()
        os.fdatasync(later)
        write_back = WriteBack(Record(record, Scoreboard.failure_at), master, witness)
        with pytest.raises(WriteBackFailed):
            write_back.sync(later)
        with pytest.raises(WriteBackFailed):
            WriteBack(Record(record, Scoreboard.failure_at)).sync(later)


@pytest.fixture
def failing_file(tmp_path: Path) -> Iterator[Tuple[Path, FailingDisk]]:
    """A file of 40 MiB, with its space, on a file system on a disk where some 20 have room."""
    directory = tmp_path / "mounted"
    directory.mkdir()
    with failing_disk(tmp_path / "small", SIZE, "24m") as disk:
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", disk.path)
        run("mount", disk.path, directory)
        try:
            path = directory / "disk.img"
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 40 * MIB)
            yield path, disk
        finally:
            unmount(directory, disk.path)


def on_the_device(path: Path, length: int) -> bytes:
    """What is there, whatever is in memory."""
    fd, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, length)
    try:
        with suppress(OSError):
            os.preadv(fd, [buffer], 0)  # which tells of the failed write-back, as a sync does
        assert os.preadv(fd, [buffer], 0) == length
        return buffer[:]
    finally:
        os.close(fd)


@needs_root
def test_what_a_killed_target_could_not_write_is_served_by_no_other(
    failing_file: Tuple[Path, FailingDisk], start: Start
) -> None:
    path, disk = failing_file
    server = start("--target", path)
    server.expected_errors += LOG
    client = connect(server.uri)
    for at in range(0, 40 * MIB, MIB):
        client.pwrite(b"w" * MIB, at)
    assert not flushes(client)
    kill_server(server)
    disk.mend()
    assert on_the_device(path, 40 * MIB) != b"w" * 40 * MIB
    again = start("--target", path)
    assert "under an earlier server: what was written after the last FLUSH that succeeded may be lost" in again.log()
    client = connect(again.uri)
    assert read_all(client) == on_the_device(path, 40 * MIB)
    assert flushes(client)
    assert again.stop() == 0
    last = start("--target", path)
    assert "earlier server" not in last.log()
    last.stop()


def test_a_target_s_mark_stays_as_long_as_it_means_something(start: Start, image: Path) -> None:
    """While the server that has failed runs, and until a server has come that may write."""
    server = start("--target", image)
    server.expected_errors += LOG
    client = connect(server.uri)
    (worker,) = server.busy_workers()
    with injected(worker, "fdatasync:error=EIO:when=1"):
        assert not flushes(client)
    assert os.getxattr(image, ATTRIBUTE).startswith(b"5.")
    beside = start("--target", image)
    assert "earlier server" not in beside.log()
    beside.expected_errors += LOG
    beside.stop()
    client.shutdown()
    assert server.stop() == 1
    for options in (["--readonly"], ["--readonly"], []):
        assert "(Input/output error) under an earlier server" in start("--target", *options, image).log()
    with pytest.raises(OSError, match="No data"):
        os.getxattr(image, ATTRIBUTE)


def test_there_is_no_snapshot_after_a_failed_flush(start: Start, tmp_path: Path, image: Path) -> None:
    control = tmp_path / "control"
    server = start("--target", "--control", control, image)
    server.expected_errors += LOG
    client = connect(server.uri)
    (worker,) = server.busy_workers()
    with injected(worker, "fdatasync:error=EDQUOT:when=1"):
        assert not flushes(client)
    assert "no snapshot: write-back failed at " in bgctl("--snapshot", control, check=False)[2]
    assert not list(tmp_path.glob("*.snapshot.*"))
    assert query(control)["write_back_failure"]["error"] == "Disk quota exceeded"
    client.shutdown()
    server.process.send_signal(signal.SIGTERM)
    assert server.stop() == 1  # also if a second signal says that it is urgent


@needs_root
def test_a_copy_on_write_target_whose_overlay_loses_something_says_so(
    start: Start, tmp_path: Path, image: Path
) -> None:
    """It syncs nothing, and no crash has to leave anything; but what is lost reads as zeros while it runs."""
    os.truncate(image, SIZE)
    with failing_disk(tmp_path / "small", SIZE + 32 * MIB, "24m") as disk, loop_file_system(disk, tmp_path) as overlays:
        control = tmp_path / "control"
        server = start("--cow-target", "--cow-dir", overlays, "--control", control, image)
        server.expected_errors += LOG
        clients = [connect(server.uri) for _ in range(2)]
        assert flushes(clients[0])
        for at in range(0, 40 * MIB, MIB):
            clients[0].pwrite(b"w" * MIB, at)
        run("sync", "-f", overlays, check=False)
        for client in [*clients, *(connect(server.uri) for _ in range(6))]:
            with pytest.raises(nbd.Error, match="Input/output error"):
                client.flush()
            client.shutdown()
        assert server.log().count(": write-back failed: ") == 1
        assert query(control)["write_back_failure"]["seconds_since"] >= 0
        assert "no snapshot: write-back failed at " in bgctl("--snapshot", control, check=False)[2]
        assert server.stop() == 1


@contextmanager
def loop_file_system(disk: FailingDisk, directory: Path) -> Iterator[Path]:
    """ext4 on *disk*, mounted below *directory*."""
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", disk.path)
    place = directory / "mounted"
    place.mkdir()
    run("mount", disk.path, place)
    try:
        yield place
    finally:
        run("umount", "-l", place)


# Proxies


@needs_root
def test_what_the_cache_s_disk_could_not_keep_is_fetched_again_after_a_restart(
    start: Start, tmp_path: Path, files: CacheFiles, disk: FailingDisk
) -> None:
    content = random.Random(11).randbytes(SIZE)
    (tmp_path / "origin.img").write_bytes(content)
    origin = start("--target", "--readonly", tmp_path / "origin.img")
    files.image = disk.path
    proxy = start(*files.arguments(origin.uri))
    proxy.expected_errors += LOG
    client = connect(proxy.uri)
    assert flushes(client)
    run("nbdcopy", proxy.uri, "null:")
    proxy.wait_for_log(": write-back failed: ")
    check_nothing_is_durable(proxy, [client])
    answer = query(files.control)
    assert answer["blocks"]["cached"] == SIZE // BLOCK
    assert answer["write_back_failure"]["seconds_since"] >= 0
    shown = bgctl("--query", files.control)[1]
    assert "no FLUSH succeeds until the server is restarted" in shown
    assert "all is durable" not in shown
    assert "cannot be made durable: write-back failed at " in bgctl("--switch", files.control, check=False)[2]
    client.shutdown()
    assert proxy.stop() == 1
    assert not files.is_clean()
    assert proxy.log().count("write-back failed: ") == 1
    disk.mend()
    again = start(*files.arguments(origin.uri))
    again.wait_for_log("recovered after a failed write-back (")
    kept = files.cached()
    assert len(kept) < SIZE // BLOCK - 4096
    with disk.path.open("rb") as device:
        for block in kept:
            device.seek(block * BLOCK)
            assert device.read(BLOCK) == content[block * BLOCK : (block + 1) * BLOCK]
    client = connect(again.uri)
    assert read_all(client) == content
    assert flushes(client)
    assert again.stop() == 0
    assert files.is_clean()


@needs_root
def test_servers_of_one_client_each_hear_of_each_other(start: Start, tmp_path: Path, disk: FailingDisk) -> None:
    """As a super-server or a wrapper starts them: without a master, each with a scoreboard of its own."""
    log = tmp_path / "inetd.log"
    clients = [nbd.NBD() for _ in range(3)]
    for client in clients[:2]:
        client.connect_command(command("--target", "--inetd", "--logpath", log, disk.path))
    for at in range(0, 40 * MIB, MIB):
        clients[0].pwrite(b"w" * MIB, at)
    assert not flushes(clients[0])
    clients[2].connect_command(command("--target", "--inetd", "--logpath", log, disk.path))
    for client in clients:
        assert not flushes(client)
    told = [
        line for line in log.read_text().splitlines() if re.search(r": write-back failed(:| in another server)", line)
    ]
    assert len(told) == 3


@needs_root
@pytest.mark.parametrize("round_number", range(ROUNDS))
@pytest.mark.parametrize("mode", ["target", "proxy", "two proxies"])
def test_a_flush_that_was_answered_is_kept_or_was_the_last_one(
    start: Start, tmp_path: Path, seed: int, mode: str, round_number: int
) -> None:
    """Clients at work on a disk that begins to fail at a random moment, and others who come later.

    A worker may be killed then, and in the end servers are stopped or killed.
    """
    with failing_disk(tmp_path / "small", MODEL_SIZE, "64m") as disk:
        play(start, tmp_path, disk, random.Random(f"{seed} {round_number}"), mode)


def play(start: Start, directory: Path, disk: FailingDisk, rng: random.Random, mode: str) -> None:
    files = CacheFiles(directory)
    files.image = disk.path
    content = bytes(MODEL_SIZE) if mode == "target" else rng.randbytes(MODEL_SIZE)
    ledger = DoubtfulLedger(content)
    lines: List[List[str]] = [["--target", str(disk.path)]]
    if mode != "target":
        (directory / "origin.img").write_bytes(content)
        origin = start("--target", "--readonly", directory / "origin.img").uri
        lines = [files.arguments(origin, control=directory / f"control{n}") for n in range(1 + (mode != "proxy"))]
    servers = [start(*line) for line in lines]
    crowd = doubtful_crowd(servers, ledger, rng)
    crowd.wait_for(rng.randrange(40))
    ledger.doubtful = True
    disk.fail()
    if rng.random() < 0.5:  # perhaps one that is told of the failure
        kill([rng.choice(rng.choice(servers).busy_workers())])
    wait_until(lambda: ledger.failed, "a FLUSH that fails")
    later = doubtful_crowd(servers, ledger, rng)
    later.wait_for(rng.randrange(10, 30))
    for clients in (crowd, later):
        clients.finish()
    for server in servers:
        server.expected_errors += [*LOG, "died: killed by SIGKILL"]
        if rng.random() < 0.3:
            kill_server(server)
        else:
            assert server.stop() == 1
    disk.mend()
    again = start(*lines[0])
    client = connect(again.uri)
    if mode == "target" and not flushes(client):  # of a failure that no process had been told of when all were killed
        again.expected_errors += LOG
        assert again.stop() == 1
        again = start(*lines[0])
        client = connect(again.uri)
    ledger.check_disk(read_all(client))
    assert flushes(client)
    client.shutdown()
    assert again.stop() == 0


def doubtful_crowd(servers: List[Server], ledger: DoubtfulLedger, rng: random.Random) -> Crowd:
    return Crowd([server.uri for server in servers], 4, ledger, rng, may_fail=True, kind=DoubtfulWriter)


# Any sync that fails, but once: the next one of the same file would succeed


def lines_of(mode: str, start: Start, image: Path, files: CacheFiles) -> List[str]:
    """A server of *mode*; a proxy's cache is empty."""
    if mode == "target":
        return ["--target", str(image)]
    origin = start("--target", "--readonly", image)
    if files.image.exists():
        files.remove()
    return files.arguments(origin.uri)


def content_of(number: int) -> bytes:
    return b"%8d" % number * (BLOCK // 8)


def write_until_failure(client: nbd.NBD) -> int:
    """Write blocks, each with a FLUSH, until that fails; how many FLUSHes have succeeded."""
    for number in range(1000):
        client.pwrite(content_of(number), number * BLOCK)
        if not flushes(client):
            return number
    raise AssertionError("no FLUSH has failed")


def check_restart(start: Start, line: List[str], blocks: int, *, failed: bool = True) -> None:
    """What was flushed is there, and may be made durable again."""
    server = start(*line)
    client = connect(server.uri)
    for number in range(blocks):
        assert client.pread(BLOCK, number * BLOCK) == content_of(number)
    assert flushes(client)
    client.shutdown()
    assert ("recovered after a failed write-back (Input/output error)" in server.log()) == (
        failed and line[0] == "--proxy"
    )
    assert server.stop() == 0


@pytest.mark.parametrize("number", SYNCS)
@pytest.mark.parametrize("mode", ["target", "proxy"])
def test_any_sync_of_a_worker_that_fails_is_the_last_one(
    start: Start, image: Path, files: CacheFiles, mode: str, number: int
) -> None:
    line = lines_of(mode, start, image, files)
    server = start(*line)
    server.expected_errors += LOG
    client = connect(server.uri)
    (worker,) = server.busy_workers()
    other = connect(server.uri)
    with injected(worker, f"fdatasync:error=EIO:when={number}"):
        flushed = write_until_failure(client)
        check_nothing_is_durable(server, [client, other])
    assert server.stop() == 1
    check_restart(start, line, flushed)


@pytest.mark.parametrize(("call", "number"), [("fdatasync", 1), ("fdatasync", 2), ("fdatasync", 3), ("msync", 1)])
def test_any_sync_of_a_steward_s_checkpoint_that_fails_is_the_last_one(
    start: Start, image: Path, files: CacheFiles, call: str, number: int
) -> None:
    line = lines_of("proxy", start, image, files)
    server = start(*line)
    server.expected_errors += LOG
    client = connect(server.uri)
    client.pwrite(content_of(0), 0)
    assert flushes(client)
    steward = next(pid for pid in children_of(server.pid) if "steward" in title_of(pid))
    with injected(steward, f"{call}:error=EIO:when={number}", children=True):
        client.pwrite(content_of(5), 5 * BLOCK)
        server.wait_for_log(": write-back failed: Input/output error")
        check_nothing_is_durable(server, [client])
    assert server.stop() == 1
    check_restart(start, line, 1)


@pytest.mark.parametrize("mode", ["target", "proxy"])
def test_any_sync_of_a_master_that_fails_is_told_by_its_exit_status(
    start: Start, image: Path, files: CacheFiles, mode: str
) -> None:
    number, failed = 0, True
    while failed:
        number += 1
        line = lines_of(mode, start, image, files)
        server = start(*line)
        server.expected_errors += LOG
        client = connect(server.uri)
        client.pwrite(content_of(0), 0)
        assert flushes(client)
        client.pwrite(content_of(1), 40 * BLOCK)
        with injected(server.pid, f"fdatasync:error=EIO:when={number}"):
            failed = server.stop() == 1
        assert failed == (": write-back failed: " in server.log())
        assert mode == "target" or files.is_clean() != failed
        check_restart(start, line, 1, failed=failed)
    assert number >= 2
