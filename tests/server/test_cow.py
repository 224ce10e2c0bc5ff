"""Copy-on-write target: a disk that clients change while its base image stays as it is."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, List, Tuple

import nbd
import pytest
from conftest import MIB, Start
from model import Model
from mounts import mounted, small_tmpfs
from rawclient import BLOCK_STATUS, FAST_ZERO, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, RawClient, pack_request
from server_process import STOP_TIME, Server, command, is_alive, run, wait_until

from xnbd.system.file_locks import RangeLocks

BLOCK = 4096


@pytest.fixture
def base(image: Path) -> Iterator[Path]:
    """The image as a base: after the test its content and its times have to be what they were."""
    os.chmod(image, 0o444)
    before = fingerprint(image)
    yield image
    assert fingerprint(image) == before


def fingerprint(path: Path) -> Tuple[str, int, int, int]:
    status = path.stat()
    return hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns, status.st_ctime_ns, status.st_blocks


def connect(server: Server) -> nbd.NBD:
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(server.uri)
    return client


def overlay_of(server: Server) -> os.stat_result:
    """What the server's file without a name takes, found among the master's descriptors."""
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        if "(deleted)" in os.readlink(link) and "memfd" not in os.readlink(link):
            return link.stat()
    raise AssertionError("the server has no overlay")


# What clients see


@pytest.mark.parametrize(("size", "rounds"), [(1, 60), (511, 100), (4097, 200), (8 * MIB + 1, 250)])
def test_the_disk_agrees_with_a_copy_in_memory(start: Start, tmp_path: Path, seed: int, size: int, rounds: int) -> None:
    rng = random.Random(seed)
    image = tmp_path / "model.img"
    content = rng.randbytes(size)
    image.write_bytes(content)
    before = fingerprint(image)
    server = start("--cow-target", image)
    clients = [connect(server) for _ in range(4)]
    Model(clients, content, rng).run(rounds)
    for client in clients:
        client.shutdown()
    assert fingerprint(image) == before


def test_sparse_base_agrees_with_a_copy_in_memory(start: Start, tmp_path: Path, seed: int) -> None:
    server = start("--cow-target", "--create", 3 * MIB, tmp_path / "sparse.img")
    Model([connect(server) for _ in range(2)], bytes(3 * MIB), random.Random(seed)).run(150)


def test_what_one_client_writes_the_others_read_at_once(start: Start, base: Path) -> None:
    server = start("--cow-target", base)
    with RawClient(server.connect()) as one, RawClient(server.connect()) as other:
        one.negotiate()
        other.negotiate()
        for number in range(200):
            offset, text = number * 5000, b"stamp %d" % number
            assert one.write(offset, text) == 0
            assert other.read(offset, len(text)) == text


def test_parts_of_one_block_written_by_several_clients_at_once_all_stay(start: Start, base: Path, seed: int) -> None:
    """Whoever comes first fills the block from the base; nobody's bytes may get lost in that."""
    server = start("--cow-target", base)
    content = bytearray(base.read_bytes())
    rng = random.Random(seed)
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.connect())).negotiate() for _ in range(8)]
        for start_of_block in range(0, 400 * BLOCK, BLOCK):
            for client, place in zip(clients, rng.sample(range(16), len(clients))):
                offset, data = start_of_block + place * 256 + 3, rng.randbytes(100)
                client.request(WRITE, offset, len(data), data=data)
                content[offset : offset + len(data)] = data
        for client in clients:
            assert [client.simple_reply()[0] for _ in range(400)] == [0] * 400
        assert clients[0].read(0, 400 * BLOCK) == content[: 400 * BLOCK]


def test_several_servers_share_one_base_and_nothing_else(start: Start, base: Path) -> None:
    first, second = start("--cow-target", base), start("--cow-target", base)
    with RawClient(first.connect()) as one, RawClient(second.connect()) as two:
        one.negotiate()
        two.negotiate()
        assert one.write(0, b"mine") == 0
        assert two.read(0, 4) == base.read_bytes()[:4]


def test_block_status_tells_zeros_that_hide_the_base(start: Start, base: Path) -> None:
    server = start("--cow-target", base)
    client = connect(server)
    client.zero(10 * BLOCK, 3 * BLOCK)
    client.trim(2 * BLOCK, 20 * BLOCK)
    found: List[int] = []

    def note(_context: str, _offset: int, entries: List[int], _error: object) -> None:
        found.extend(entries)

    client.block_status(40 * BLOCK, 0, note)
    assert found == [3 * BLOCK, 0, 10 * BLOCK, 3, 7 * BLOCK, 0, 2 * BLOCK, 3, 18 * BLOCK, 0]
    assert client.pread(40 * BLOCK, 0)[3 * BLOCK : 13 * BLOCK] == bytes(10 * BLOCK)


def test_readonly_disconnects_a_client_that_writes(start: Start, base: Path) -> None:
    server = start("--cow-target", "--readonly", base)
    with RawClient(server.connect()) as client:
        client.negotiate()
        client.request(WRITE, 0, 4, data=b"nope")
        assert client.closed()


def test_fio_verifies_its_writes(start: Start, tmp_path: Path) -> None:
    server = start("--cow-target", "--create", "64M", tmp_path / "fio.img")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite", "--bsrange=512-64k",
        "--blockalign=512", "--size=16M", "--numjobs=4", "--offset_increment=16M", "--iodepth=16",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", f"--aux-path={tmp_path}", timeout=100,
    )  # fmt: skip


def test_file_system_made_on_the_disk_mounts_and_is_clean(start: Start, tmp_path: Path) -> None:
    """mkfs, mount and fsck through a real kernel: nbdfuse makes the disk a file, a loop device mounts it."""
    base = tmp_path / "base.img"
    server = start("--cow-target", "--create", "64M", base)
    mountpoint, fuse = tmp_path / "mnt", tmp_path / "disk"
    mountpoint.mkdir()
    fuse.write_bytes(b"")
    nbdfuse = subprocess.Popen(["nbdfuse", str(fuse), server.uri])
    try:
        wait_until(lambda: fuse.stat().st_size == 64 * MIB, "nbdfuse")
        run("mkfs.ext4", "-q", "-F", fuse)
        noise = random.Random(1).randbytes(20 * MIB)
        with mounted(fuse, mountpoint):
            (mountpoint / "noise").write_bytes(noise)
            run("sync", "-f", mountpoint / "noise")
        run("fsck.ext4", "-f", "-n", fuse)
        with mounted(fuse, mountpoint, "-r"):
            assert (mountpoint / "noise").read_bytes() == noise
    finally:
        run("fusermount3", "-u", "-z", fuse, check=False)  # when its loop device has let go
        nbdfuse.wait(60)
    assert base.stat().st_blocks == 0


# Waiting for another process


@contextmanager
def first_blocks_locked(worker: int) -> Iterator[RangeLocks]:
    """The blocks of the bitmap's first byte are locked, as if another worker wrote there."""
    links = Path(f"/proc/{worker}/fd").iterdir()
    fd = os.open(next(link for link in links if "memfd:xnbd-cow-bitmap" in os.readlink(link)), os.O_RDWR)
    try:
        locks = RangeLocks(fd)
        assert locks.try_acquire(0, 1)
        yield locks
    finally:
        os.close(fd)


@contextmanager
def client_and_worker(server: Server) -> Iterator[Tuple[RawClient, int]]:
    with RawClient(server.connect()) as client:
        client.negotiate()
        wait_until(lambda: len(server.busy_workers()) == 1, "the client's worker alone")
        yield client, server.busy_workers()[0]


def test_write_that_waits_for_a_lock_holds_back_no_reply_before_it(start: Start, base: Path) -> None:
    server = start("--cow-target", base)
    with client_and_worker(server) as (client, worker), first_blocks_locked(worker) as locks:
        client.send(pack_request(READ, 1, 100, cookie=1) + pack_request(WRITE, 10, 5, cookie=2) + b"hello")
        assert client.simple_reply(100) == (0, 1, base.read_bytes()[1:101])
        assert not select.select([client.sock], [], [], 0.1)[0]
        locks.release(0, 1)
        assert client.simple_reply() == (0, 2, b"")
        assert client.read(9, 7) == base.read_bytes()[9:10] + b"hello" + base.read_bytes()[15:16]


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES])
def test_stop_is_not_held_up_by_a_wait_for_a_lock(start: Start, base: Path, command: int) -> None:
    server = start("--cow-target", base)
    with client_and_worker(server) as (client, worker), first_blocks_locked(worker):
        client.request(command, 0, BLOCK, data=bytes(BLOCK if command == WRITE else 0))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_TIME) == 0


# Where the changes live


def test_the_overlay_takes_space_for_what_was_written_and_gives_trimmed_space_back(start: Start, base: Path) -> None:
    server = start("--cow-target", base)
    client = connect(server)
    assert overlay_of(server).st_blocks == 0
    client.pwrite(b"x", 5 * BLOCK + 7)
    client.pread(8 * MIB, 0)
    assert overlay_of(server).st_blocks * 512 == BLOCK
    client.pwrite(bytes(range(256)) * 4096, MIB)
    assert overlay_of(server).st_blocks * 512 == BLOCK + MIB
    client.trim(MIB, MIB)
    client.zero(BLOCK, 5 * BLOCK)
    assert overlay_of(server).st_blocks == 0


@pytest.mark.parametrize("victims", ["master", "everything"])
def test_nothing_is_left_behind_when_the_server_is_killed(start: Start, base: Path, victims: str) -> None:
    server = start("--cow-target", base)
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.write(0, bytes(range(256)) * 64) == 0
        workers = server.workers()
        for pid in [server.pid, *(workers if victims == "everything" else [])]:
            os.kill(pid, signal.SIGKILL)
        server.process.wait()
        wait_until(lambda: not any(map(is_alive, workers)), "the workers' end")
    assert sorted(path.name for path in base.parent.iterdir()) == ["disk.img", "server0.log", "server0.sock"]


def test_full_file_system_is_an_error_reply_and_earlier_data_stays_right(start: Start, base: Path) -> None:
    content = bytearray(base.read_bytes())
    with small_tmpfs(base.parent / "small", "1M") as small:
        server = start("--cow-target", "--cow-dir", small, base)
        with RawClient(server.connect()) as client:
            client.negotiate()
            errors = set()
            for offset in range(100, 4 * MIB, 50_000):
                data = bytes([offset % 251]) * 30_000
                error = client.write(offset, data)
                errors.add(error)
                if not error:
                    content[offset : offset + len(data)] = data
                elif client.read(offset, len(data)) != content[offset : offset + len(data)]:
                    # A write that failed may have changed blocks that were there already.
                    content[offset : offset + len(data)] = client.read(offset, len(data))
            assert errors == {0, 28}
            assert client.read(0, len(content)) == content
            client.request(WRITE_ZEROES, 0, MIB)
            assert client.simple_reply()[0] == 0
            assert client.write(0, b"room again") == 0
        server.stop()


def test_server_starts_on_a_full_file_system(start: Start, base: Path, tmp_path: Path) -> None:
    """Trying out what the file system can do must not need space."""
    disk, full = tmp_path / "ext4.img", tmp_path / "full"
    disk.touch()
    os.truncate(disk, 4 * MIB)
    run("mkfs.ext4", "-q", "-m", 0, disk)
    full.mkdir()
    with mounted(disk, full):
        fill(full / "filler")
        server = start("--cow-target", "--cow-dir", full, base)
        with RawClient(server.connect()) as client:
            client.negotiate()
            assert client.write(0, b"no room") == 28
            assert client.read(0, 100) == base.read_bytes()[:100]
        server.stop()


def fill(path: Path) -> None:
    """Make a file that takes all the space there is."""
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(BLOCK))
            os.fsync(file.fileno())


def test_overlay_goes_to_tmpdir_where_the_base_lies_in_a_directory_that_cannot_be_written(
    start: Start, base: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("mount", "--bind", tmp_path, elsewhere)
    try:
        run("mount", "-o", "remount,bind,ro", elsewhere)
        server = start("--cow-target", elsewhere / base.name, env={"TMPDIR": str(tmp_path)})
        with RawClient(server.connect()) as client:
            client.negotiate()
            assert client.write(1, b"hello") == 0
        server.stop()
    finally:
        run("umount", elsewhere)


def test_directory_that_does_not_exist_is_refused_in_one_line(base: Path) -> None:
    status, output, errors = run(*command("--cow-target", "--cow-dir", "/nonexistent", base), check=False)
    assert (status, output) == (1, "")
    assert errors.splitlines() == [
        "xnbd-server: cannot keep changes in /nonexistent: No such file or directory"
        " (--cow-dir names another directory)"
    ]


def test_cow_dir_without_cow_target_is_refused(image: Path) -> None:
    status, _, errors = run(*command("--target", "--cow-dir", "/tmp", image), check=False)
    assert status == 2
    assert errors.splitlines() == ["xnbd-server: --cow-dir is for --cow-target only"]


# Every other way to start it


def test_inetd_style(base: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen(command("--cow-target", "--inetd", base), stdin=fd, stdout=fd, stderr=fd)
    ours.settimeout(60)
    with RawClient(ours) as client:
        client.negotiate()
        assert client.write(7, b"seven") == 0
        assert client.read(7, 5) == b"seven"
    assert process.wait(60) == 0


def test_connected_fd(base: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            command("--cow-target", "--connected-fd", theirs.fileno(), base), pass_fds=[theirs.fileno()]
        )
    ours.settimeout(60)
    with RawClient(ours) as client:
        client.request(WRITE, 7, 5, data=b"seven", flags=FUA)
        assert client.simple_reply()[0] == 0
        client.request(FLUSH)
        assert client.simple_reply()[0] == 0
        client.request(READ, 6, 7)
        assert client.simple_reply(7)[2][1:6] == b"seven"
        client.request(WRITE_ZEROES, 0, 1, flags=FAST_ZERO)
        assert client.simple_reply()[0] == 0
    assert process.wait(60) == 0


def test_daemonized(base: Path, tmp_path: Path) -> None:
    pid_file, log, path = tmp_path / "pid", tmp_path / "log", tmp_path / "socket"
    run(*command("--cow-target", "--daemonize", "--pidfile", pid_file, "--logpath", log, "--unix", path, base))
    pid = int(pid_file.read_text())
    try:
        client = nbd.NBD()
        client.connect_unix(str(path))
        client.pwrite(b"hello", 12345)
        assert client.pread(5, 12345) == b"hello"
        client.shutdown()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the end of the daemon")
    assert "ERROR" not in log.read_text()


def test_base_that_becomes_shorter_leaves_what_clients_have_written(start: Start, image: Path) -> None:
    """Behind its end the rest is an error, and never zeros; it is there again when the base is."""
    content = image.read_bytes()
    server = start("--cow-target", image)
    with RawClient(server.connect()) as client, RawClient(server.connect()) as other:
        client.negotiate()
        other.negotiate(structured=True, allocation=True)
        assert client.write(6 * MIB, b"x" * 8192) == 0
        os.truncate(image, 4 * MIB)
        assert client.read(6 * MIB, 8192) == b"x" * 8192
        assert client.write(7 * MIB, b"y" * 4096) == 0
        assert client.read(7 * MIB, 4096) == b"y" * 4096
        assert client.read(0, 4 * MIB) == content[: 4 * MIB]
        for offset, length in ((4 * MIB, 4096), (4 * MIB - 4096, 8192), (6 * MIB, 12288), (5 * MIB, 2 * MIB)):
            client.request(READ, offset, length)
            assert client.simple_reply()[0] == 5
        other.request(READ, 5 * MIB, MIB // 2)
        assert other.chunk().kind == 1 << 15 | 1
        other.request(BLOCK_STATUS, 5 * MIB, MIB // 2)
        assert other.chunk().kind == 1 << 15 | 1
        assert client.write(5 * MIB + 1, b"z") == 5  # the rest of the block is not to be had
        image.write_bytes(content)
        assert client.read(5 * MIB, 4096) == content[5 * MIB : 5 * MIB + 4096]
    server.wait_for_log("the base image has shrunk")
