"""Power failures under a running proxy: what was flushed is there afterwards, and no block is wrong.

The cache lies in a real file system on a loop device. ``EXT4_IOC_SHUTDOWN`` stops
that at once, as xfstests do: what has not been written to the device by then is
lost. Before, parts of the files are written back at random, each in its own time,
as the kernel may do. The next start is in "another boot": a boot id is mounted over
the kernel's in the server's mount namespace. All this takes root.

XNBD_ROUNDS sets the number of failures; without it the test takes `SECONDS`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import signal
import struct
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import nbd
import pytest
from caching import BLOCK, CacheFiles, bgctl, connect, hold, kill_server, release, wait_until_gone
from certificates import Certificates
from conftest import MIB, Start
from ledger import SECTOR, Crowd, Ledger
from model import read_all
from mounts import attach, detach, unmount
from server_process import Server, run, state_of, wait_until
from shared_ceph import SharedCeph
from web_server import WebServer

SECONDS = 9.0
SIZE = 16 * MIB + 3 * SECTOR
CLIENTS = 4
FAILURES_PER_CACHE = 5

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_WRITE_AND_WAIT = 7
BOOT_ID = "/proc/sys/kernel/random/boot_id"

pytestmark = pytest.mark.root(reason="file systems are mounted by root only")


class Disk:
    """An ext4 on a loop device, at the directory *path* while it is mounted."""

    def __init__(self, backing: Path, path: Path) -> None:
        self.path = path
        with backing.open("wb") as file:
            file.truncate(96 * MIB)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", backing)
        self._device = attach(backing)
        path.mkdir()
        self.mount()

    def mount(self) -> None:
        run("mount", self._device, self.path)

    def unmount(self) -> None:
        """Returns when no namespace has it any more."""
        unmount(self.path, self._device)

    def fail(self) -> None:
        """From now on nothing reaches the device, the journal included."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Whoever writes to a file there sleeps."""
        fd = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)
            os.close(fd)

    def remove(self) -> None:
        run("umount", "-l", self.path, check=False)  # a server that a failed test has left may use it
        detach(self._device)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="xnbd-power-") as backing:
        disk = Disk(Path(backing.name), tmp_path / "disk")
        try:
            yield disk
        finally:
            disk.remove()


MAKE_BOOT = f"""
while read -r device path rest; do
    case $device in /dev/loop*) [ "$path" = "$2" ] || umount -l "$path" ;; esac
done </proc/mounts
mount --bind "$1" {BOOT_ID} && shift 2 && exec "$@"
"""
"""With boot id and disk as its first arguments. Disks of other tests, which cannot end elsewhere, are let go of."""


class Boot:
    """A server that lives in a boot of its own, with the *disk* at this path."""

    def __init__(self, directory: Path, disk: Path, arguments: List[str], env: Dict[str, str]) -> None:
        boot_id = directory / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        prefix = ["unshare", "--mount", "sh", "-c", MAKE_BOOT, "sh", str(boot_id), str(disk)]
        log_path = directory / "proxy.log"
        self._log_start = log_path.stat().st_size if log_path.exists() else 0
        self.server = Server(directory, "proxy", arguments, prefix=prefix, env=env)
        self.server.wait_until_ready()

    def log(self) -> str:
        return self.server.log_path.read_bytes()[self._log_start :].decode()

    def hold(self) -> None:
        """Nobody is answered from now on: an fdatasync that a shutdown overtakes may succeed for nothing."""
        if self.server.process.poll() is None:
            hold(self.server.pid)

    def die(self) -> None:
        kill_server(self.server)


class Machine:
    """A proxy of *origin*, a URI, whose clients write, flush and read until the power fails."""

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        origin: str,
        content: bytes,
        rng: random.Random,
        env: Optional[Dict[str, str]] = None,
        options: Sequence[object] = (),
    ) -> None:
        self.failures = 0
        self._options = options
        self.boot: Optional[Boot] = None
        self._disk = disk
        self._directory = directory
        self._origin = origin
        self._env = env or {}
        self._content = content
        self._rng = rng
        self._files = CacheFiles(disk.path)
        self._control = directory / "control"

    def begin(self) -> None:
        self._files.remove()
        self._ledger = Ledger(self._content)
        self._start()

    def _start(self) -> Boot:
        arguments = self._files.arguments(self._origin, *self._options, control=self._control)
        self.boot = Boot(self._directory, self._disk.path, arguments, self._env)
        return self.boot

    def play(self) -> None:
        """Load until the power fails, or until after an orderly end."""
        rng, boot = self._rng, self.boot
        assert boot is not None
        crowd = Crowd([boot.server.uri], CLIENTS, self._ledger, rng, may_fail=True)
        until = time.monotonic() + rng.random() * 0.4
        while time.monotonic() < until:
            self._write_something_back()
        orderly = rng.random() < 0.2
        if orderly:
            crowd.finish()
            boot.server.stop()
            assert self._files.is_clean()
        boot.hold()
        self._disk.fail()
        boot.die()
        crowd.finish()
        self._start_again(orderly=orderly)

    def _start_again(self, *, orderly: bool) -> None:
        self._disk.unmount()
        self._disk.mount()
        self.failures += 1
        log = self._start().log()
        assert orderly == ("recovered after a power failure" not in log), log
        self._check_files(orderly=orderly)

    def _check_files(self, *, orderly: bool) -> None:
        """While nothing is let go."""
        assert self.boot is not None
        held = hold(self.boot.server.pid) if self._options else []
        try:
            self._ledger.check_files(self._files.image, self._files.bitmap, power_failed=not orderly)
        finally:
            release(held)

    def _write_something_back(self) -> None:
        """One of the files, or a part of it, reaches the device before the others."""
        rng = self._rng
        path = rng.choice([self._files.image, self._files.image, self._files.bitmap, self._files.state])
        fd = os.open(path, os.O_RDONLY)
        try:
            if rng.random() < 0.3:
                os.fdatasync(fd)
            else:
                size = os.fstat(fd).st_size
                start = rng.randrange(size)
                length = rng.randint(1, 1 + (size - start) // 4)
                _sync_file_range(fd, start, length)
        finally:
            os.close(fd)
        time.sleep(rng.random() * 0.05)

    def read(self) -> None:
        """All of the disk once, so that more comes than there is room for."""
        assert self.boot is not None
        client = connect(self.boot.server.uri)
        assert read_all(client) == self._ledger.base
        client.shutdown()

    def switch(self) -> None:
        """Have everything cached, and the proxy become a plain target."""
        bgctl("--cache-all", self._control)
        bgctl("--switch", self._control)

    def fail(self) -> None:
        """The power fails while nobody is there."""
        assert self.boot is not None
        self._disk.fail()
        self.boot.die()
        self._start_again(orderly=False)

    def end(self) -> None:
        """The whole disk is as it should be."""
        assert self.boot is not None
        client = connect(self.boot.server.uri)
        assert read_all(client) == self._ledger.base
        client.shutdown()
        self.boot.server.stop()
        assert self._files.is_clean()


def _sync_file_range(fd: int, offset: int, length: int) -> None:
    """Have this part written back, without what it needs to be found again."""
    function = ctypes.CDLL(None, use_errno=True).sync_file_range
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if function(fd, offset, length, _WRITE_AND_WAIT):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def test_nothing_flushed_is_lost_when_the_power_fails(start: Start, tmp_path: Path, disk: Disk, seed: int) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(SIZE)
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    fail_for(SECONDS, Machine(disk, tmp_path, start("--target", "--readonly", image).uri, content, rng))
    assert "Traceback" not in (tmp_path / "proxy.log").read_text()
    assert image.read_bytes() == content


def test_nor_with_an_origin_on_a_web_server(tmp_path: Path, disk: Disk, seed: int, certificates: Certificates) -> None:
    rng = random.Random(seed)
    content, root = rng.randbytes(SIZE), tmp_path / "www"
    root.mkdir()
    (root / "origin.img").write_bytes(content)
    with WebServer(tmp_path, root, certificates.server) as web:
        fail_for(SECONDS / 3, Machine(disk, tmp_path, web.tls_uri("origin.img"), content, rng, web.env))
    assert "Traceback" not in (tmp_path / "proxy.log").read_text()


def test_nor_with_an_origin_in_ceph(tmp_path: Path, disk: Disk, seed: int, ceph: SharedCeph) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(SIZE)
    fail_for(SECONDS / 3, Machine(disk, tmp_path, ceph.make(content).uri(), content, rng))
    assert "Traceback" not in (tmp_path / "proxy.log").read_text()


def fail_for(seconds: float, machine: Machine) -> None:
    rounds, until = int(os.environ.get("XNBD_ROUNDS", 0)), time.monotonic() + seconds
    try:
        machine.begin()
        while machine.failures < rounds if rounds else time.monotonic() < until:
            machine.play()
            if machine.failures % FAILURES_PER_CACHE == 0:
                machine.switch()
                machine.play()
                machine.end()
                machine.begin()
        machine.switch()
        machine.play()
        machine.end()
    finally:
        if machine.boot is not None:
            machine.boot.die()
        print(f"{machine.failures} power failures")


def test_nor_is_it_where_blocks_are_let_go(start: Start, tmp_path: Path, disk: Disk, seed: int) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(SIZE)
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    origin = start("--target", "--readonly", image)
    machine = Machine(disk, tmp_path, origin.uri, content, rng, options=["--cache-limit", MIB])
    rounds, until = int(os.environ.get("XNBD_ROUNDS", 0)), time.monotonic() + SECONDS / 2
    try:
        machine.begin()
        while machine.failures < rounds if rounds else time.monotonic() < until:
            machine.read()
            machine.play()
            if machine.failures % FAILURES_PER_CACHE == 0:
                machine.end()
                machine.begin()
        machine.end()
    finally:
        if machine.boot is not None:
            machine.boot.die()
        print(f"{machine.failures} power failures")
    assert "Traceback" not in (tmp_path / "proxy.log").read_text()


def test_after_a_switch_all_blocks_are_known_to_be_there(start: Start, tmp_path: Path, disk: Disk, seed: int) -> None:
    """A power failure leaves the live bitmap as it was long before."""
    rng, image = random.Random(seed), tmp_path / "origin.img"
    content = rng.randbytes(SIZE)
    image.write_bytes(content)
    origin = start("--target", "--readonly", image)
    machine = Machine(disk, tmp_path, origin.uri, content, rng)
    try:
        machine.begin()
        machine.switch()
        machine.fail()
        origin.stop()
        machine.end()
    finally:
        if machine.boot is not None:
            machine.boot.die()


REQUESTS: Dict[str, Callable[[nbd.NBD], int]] = {
    "write": lambda client: client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"w" * 8 * BLOCK)), 8 * BLOCK),
    "zero": lambda client: client.aio_zero(8 * BLOCK, 8 * BLOCK, flags=nbd.CMD_FLAG_NO_HOLE),
    "trim": lambda client: client.aio_trim(8 * BLOCK, 8 * BLOCK),
    "read": lambda client: client.aio_pread(nbd.Buffer(8 * BLOCK), 8 * BLOCK),
    "write in a block": lambda client: client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"w")), 8 * BLOCK + 1),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_worker_that_dies_before_the_data_is_there_has_set_no_bit(
    start: Start, tmp_path: Path, disk: Disk, name: str
) -> None:
    """The cache is on a file system that is frozen: the worker is killed in the middle of writing to it."""
    content, image, files = random.Random(1).randbytes(MIB), tmp_path / "origin.img", CacheFiles(tmp_path)
    image.write_bytes(content)
    files.image = disk.path / "cache.img"
    files.image.write_bytes(b"garbage!" * (MIB // 8))
    proxy = start(*files.arguments(start("--target", "--readonly", image).uri, "--readahead", "0", "--clear-bitmap"))
    proxy.expected_errors.append("died: killed by SIGKILL")
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == content[:BLOCK]
    with disk.frozen():
        REQUESTS[name](client)
        (worker,) = proxy.busy_workers()
        wait_until(lambda: state_of(worker) == "D", "the worker to sleep in the file system")
        assert files.cached() == [0]
        os.kill(worker, signal.SIGKILL)
    wait_until_gone([worker])
    assert files.cached() == [0]
    again = connect(proxy.uri)
    assert read_all(again) == content
    again.shutdown()
    proxy.stop()
    assert files.image.read_bytes() == content
