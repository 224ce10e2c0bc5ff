"""What the environment does to a server: full and failing disks, too few descriptors or
processes, kills, signals, a super-server's streams, log files that are moved, and stops.

Whoever is not hit must be served on, and the master lives unless it is the one that is killed.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Callable, Dict, Iterator, List, Tuple

import mounts
import pytest
from caching import query
from conftest import MIB, Start
from launch import fails, launched
from origin_programs import is_listening
from rawclient import (
    ABORT,
    BLOCK_STATUS,
    FLUSH,
    FUA,
    GO,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    bystander,
    go_data,
    pack_option,
    pack_request,
)
from server_process import (
    STOP_TIME,
    Server,
    command,
    cpu_seconds,
    is_alive,
    kill_all,
    run,
    state_of,
    title_of,
    wait_until,
)

EIO, ENOSPC = 5, 28

SOON = 9.0
"""Seconds: more than a busy machine takes from anybody, and less than anything here ends by itself."""

needs_root = pytest.mark.root(reason="only root may mount, and set up loop devices")


@pytest.fixture
def server(start: Start, image: Path) -> Server:
    return start("--target", image, tcp=True)


@contextmanager
def raw_client(server: Server, *, structured: bool = False) -> Iterator[RawClient]:
    """A client over TCP, if *server* listens there."""
    with RawClient(server.connect(tcp=server.port != 0)) as client:
        yield client.negotiate(structured=structured)


def worker_of(server: Server, client: RawClient) -> int:
    """The worker that serves *client*, who came over TCP: its title says so."""
    host, port = client.sock.getsockname()
    (worker,) = [pid for pid in server.workers() if f"worker for {host}:{port} " in title_of(pid)]
    return worker


def error_of(client: RawClient, request: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
    client.request(request, offset, length, flags=flags)
    return client.simple_reply()[0]


def error_chunk(client: RawClient) -> int:
    """The error in a structured reply that ends with an error chunk."""
    last = client.chunks()[-1]
    assert last.kind == 0x8001
    return int(struct.unpack(">I", last.payload[:4])[0])


# Full and failing disks


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MiB."""
    with tempfile.TemporaryDirectory(prefix="xnbd-test-") as directory:
        run("mount", "-t", "tmpfs", "-o", "size=8m", "xnbd-test", directory)
        try:
            yield Path(directory)
        finally:
            run("umount", "--lazy", directory)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def fill(client: RawClient, step: int) -> int:
    """Write *step* bytes at a time until that fails with ENOSPC; where it failed."""
    for offset in range(MIB, 32 * MIB, step):
        error = client.write(offset, struct.pack(">Q", offset) * (step // 8))
        if error:
            assert error == ENOSPC
            return offset
    raise AssertionError("the disk is not full")


@needs_root
@pytest.mark.parametrize("step", [4096, 64 << 10, MIB, 4 * MIB])
def test_write_to_a_full_disk_is_enospc_and_earlier_data_stays(start: Start, small_disk: Path, step: int) -> None:
    image = sparse(small_disk / "disk.img", 64 * MIB)
    server = start("--target", image, tcp=True)
    with bystander(server), raw_client(server) as client:
        worker = worker_of(server, client)
        full = fill(client, step)
        assert full > MIB
        for offset in range(MIB, full, step):
            assert client.read(offset, step) == struct.pack(">Q", offset) * (step // 8)
        assert error_of(client, TRIM, MIB, 7 * MIB) == 0
        assert client.write(MIB, b"again") == 0
        assert client.read(MIB, 5) == b"again"
        assert worker == worker_of(server, client)


@needs_root
def test_reserving_zeros_on_a_full_disk_is_enospc(start: Start, small_disk: Path) -> None:
    server = start("--target", sparse(small_disk / "disk.img", 64 * MIB), tcp=True)
    with bystander(server), raw_client(server) as client:
        assert error_of(client, WRITE_ZEROES, 0, 32 * MIB, NO_HOLE) == ENOSPC
        assert client.works()
        assert error_of(client, WRITE_ZEROES, 0, 32 * MIB) == 0
        assert client.write(0, b"again") == 0


@needs_root
def test_enospc_in_a_session_with_structured_replies(start: Start, small_disk: Path) -> None:
    server = start("--target", sparse(small_disk / "disk.img", 64 * MIB), tcp=True)
    with bystander(server), raw_client(server, structured=True) as client:
        assert fill(client, MIB) > MIB
        assert client.works()


@needs_root
def test_holes_of_a_full_disk_read_as_zeros_or_as_an_error(start: Start, small_disk: Path) -> None:
    server = start("--target", sparse(small_disk / "disk.img", 64 * MIB), tcp=True)
    with bystander(server), raw_client(server) as client:
        worker = worker_of(server, client)
        fill(client, 4096)
        client.request(READ, 40 * MIB, MIB)
        error, _, data = client.simple_reply(MIB)
        assert error == EIO or data == bytes(MIB)
        assert client.works()
        assert worker == worker_of(server, client)


@pytest.fixture
def loop_device(small_disk: Path) -> Iterator[Callable[[Path], Path]]:
    """Makes block devices of files; a fault of the file is an I/O error of the device."""
    devices: List[Path] = []

    def attach(backing: Path) -> Path:
        devices.append(mounts.attach(backing))
        return devices[-1]

    try:
        yield attach
    finally:
        for device in devices:
            mounts.detach(device)


@needs_root
@pytest.mark.parametrize("flush", [FLUSH, WRITE, WRITE_ZEROES], ids=["FLUSH", "WRITE FUA", "WRITE_ZEROES FUA"])
def test_data_that_cannot_be_written_back_is_an_error_of_flush_and_fua(
    start: Start, small_disk: Path, loop_device: Callable[[Path], Path], flush: int
) -> None:
    device = loop_device(sparse(small_disk / "backing", 32 * MIB))
    server = start("--target", device, tcp=True)
    with raw_client(server) as other, raw_client(server) as client:
        for offset in range(0, 16 * MIB, MIB):
            assert client.write(offset, b"\xee" * MIB) == 0
        if flush == FLUSH:
            error = error_of(client, FLUSH)
        elif flush == WRITE:
            error = client.write(16 * MIB, b"\xee" * 4096, FUA)
        else:
            error = error_of(client, WRITE_ZEROES, 16 * MIB, 4096, FUA)
        assert error == EIO
        assert client.read(0, 4096) == b"\xee" * 4096
        assert error_of(other, FLUSH) == EIO
    server.expected_errors += [": write-back failed: ", "the last flush failed"]


@needs_root
@pytest.mark.parametrize("structured", [False, True])
def test_data_that_the_device_cannot_read_is_an_error(
    start: Start, small_disk: Path, loop_device: Callable[[Path], Path], structured: bool
) -> None:
    backing = small_disk / "backing"
    backing.write_bytes(b"\xab" * 4 * MIB)
    server = start("--target", loop_device(backing), tcp=True)
    with bystander(server), raw_client(server, structured=structured) as client:
        worker = worker_of(server, client)
        os.truncate(backing, MIB)
        for length in (4096, MIB):
            client.request(READ, 2 * MIB, length)
            error = error_chunk(client) if structured else client.simple_reply(length)[0]
            assert error == EIO
            server.wait_for_log(f"READ of {length} bytes at 2097152 failed: the data cannot be read (EIO)")
        assert client.works()
        client.request(READ, 4096, 4096)
        data = client.chunks()[0].payload[8:] if structured else client.simple_reply(4096)[2]
        assert data == b"\xab" * 4096
        assert worker == worker_of(server, client)


@needs_root
@pytest.mark.parametrize("structured", [False, True])
def test_read_of_which_the_device_can_read_the_beginning_is_an_error(
    start: Start, small_disk: Path, loop_device: Callable[[Path], Path], structured: bool
) -> None:
    backing = small_disk / "backing"
    backing.write_bytes(b"\xab" * 4 * MIB)
    server = start("--target", loop_device(backing), tcp=True)
    with bystander(server), raw_client(server, structured=structured) as client:
        os.truncate(backing, MIB)
        for length in (5000, 8192, 16 << 10):
            client.request(READ, MIB - 4096, length)
            assert (error_chunk(client) if structured else client.simple_reply(length)[0]) == EIO


@needs_root
@pytest.mark.parametrize("structured", [False, True])
def test_error_among_thousands_of_large_reads_is_told_at_once(
    start: Start, small_disk: Path, loop_device: Callable[[Path], Path], structured: bool
) -> None:
    """The replies behind it are more than could be looked through before: 128 GiB."""
    backing = sparse(small_disk / "backing", 34 * MIB)
    server = start("--target", loop_device(backing), tcp=True)
    with bystander(server), raw_client(server, structured=structured) as client:
        os.truncate(backing, 33 * MIB)
        requests = [(0, 4096), (33 * MIB, 4096), (8192, 4096), *[(0, 32 * MIB)] * 4000]
        client.send(b"".join(pack_request(READ, *request, cookie=n) for n, request in enumerate(requests)))
        client.sock.settimeout(8)
        for cookie in range(3):
            error = EIO if cookie == 1 else 0
            if structured:
                (chunk,) = client.chunks()
                assert (chunk.cookie, chunk.kind) == (cookie, 0x8001 if error else 1)
                assert error or chunk.payload[8:] == bytes(4096)
            else:
                assert client.simple_reply(4096) == (error, cookie, b"" if error else bytes(4096))


# An image that shrinks


@pytest.fixture
def whole(image: Path) -> bytes:
    """The image's content, also once it was cut off."""
    return image.read_bytes()


def test_reads_of_a_truncated_image_are_eio_until_it_has_grown_again(server: Server, image: Path, whole: bytes) -> None:
    with bystander(server), raw_client(server) as client:
        worker = worker_of(server, client)
        os.truncate(image, MIB)
        for offset, length in ((MIB, 1), (MIB - 1, 2), (4 * MIB, 4096), (0, 8 * MIB)):
            assert error_of(client, READ, offset, length) == EIO
        assert client.read(MIB - 4096, 4096) == whole[MIB - 4096 : MIB]
        os.truncate(image, len(whole))
        assert client.read(4 * MIB, 4096) == bytes(4096)
        assert client.write(4 * MIB, b"back") == 0
        assert client.read(4 * MIB, 5) == b"back\0"
        assert worker == worker_of(server, client)


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_an_image_that_has_shrunk_is_a_warning_of_query(start: Start, tmp_path: Path, mode: str) -> None:
    image, control = tmp_path / "shrinking.img", tmp_path / "control"
    image.write_bytes(bytes(2 * MIB))
    start(mode, "--control", control, image)
    assert query(control)["warnings"] == []
    os.truncate(image, MIB)
    (warning,) = query(control)["warnings"]
    assert warning.startswith("shrinking.img has shrunk to 1,048,576 of 2,097,152 bytes: what lay behind is lost.")
    os.truncate(image, 2 * MIB)


def test_structured_reads_of_a_truncated_image_are_eio(server: Server, image: Path, whole: bytes) -> None:
    with bystander(server), raw_client(server, structured=True) as client:
        os.truncate(image, MIB)
        for length in (512, 4096, MIB):
            client.request(READ, 4 * MIB, length)
            assert error_chunk(client) == EIO
        client.request(READ, 512, 512)
        assert client.chunks()[0].payload[8:] == whole[512:1024]
        os.truncate(image, len(whole))
        client.request(READ, 4 * MIB, 512)
        assert client.chunks()[0].payload[8:] == bytes(512)


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
def test_changes_beyond_the_end_of_a_truncated_image_are_eio(server: Server, image: Path, command: int) -> None:
    with bystander(server), raw_client(server) as client:
        os.truncate(image, MIB)
        for offset, length in ((MIB - 1, 2), (4 * MIB, 4096), (MIB, 7 * MIB)):
            client.request(command, offset, length, data=bytes(length if command == WRITE else 0))
            assert client.simple_reply()[0] == EIO
        assert client.works()
    assert image.stat().st_size == MIB


def test_client_that_comes_while_the_image_is_truncated_gets_errors_and_is_served_later(
    server: Server, image: Path, whole: bytes
) -> None:
    """More of them than spare workers: later ones are born while the image is short."""
    with bystander(server):
        os.truncate(image, MIB)
        clients = [RawClient(server.connect()).negotiate() for _ in range(12)]
        for client in clients:
            assert client.size == len(whole)
            assert client.read(0, 512) == whole[:512]
            assert error_of(client, READ, 4 * MIB, 512) == EIO
        os.truncate(image, len(whole))
        for client in clients:
            assert client.read(4 * MIB, 512) == bytes(512)
            client.sock.close()


def test_image_that_was_emptied_is_served_again_once_it_has_grown(server: Server, image: Path, whole: bytes) -> None:
    """More clients than spare workers, so that new workers have to be born while there is nothing to serve."""
    server.expected_errors.append("worker")
    with bystander(server), ExitStack() as clients:
        os.truncate(image, 0)
        for _ in range(12):
            clients.enter_context(RawClient(server.connect())).greet()
        wait_until(lambda: len(server.busy_workers()) == 13 or " died: " in server.log(), "workers for them")
        os.truncate(image, len(whole))
        with RawClient(server.connect()) as client:
            assert client.negotiate().read(4 * MIB, 512) == bytes(512)
    assert "Traceback" not in server.log()


def test_image_truncated_under_a_reply_gives_no_wrong_byte(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"\xab" * 64 * MIB)
    server = start("--target", image, tcp=True)
    with bystander(server), raw_client(server) as client:
        client.request(READ, 0, 64 * MIB)
        assert client.receive(16)[4:8] == bytes(4)
        assert client.receive(MIB) == b"\xab" * MIB
        os.truncate(image, 32 * MIB)
        with pytest.raises(EOFError):
            received = MIB
            while True:
                assert client.receive(4096) == b"\xab" * 4096
                received += 4096
        assert received < 64 * MIB
    server.wait_for_log("cannot be read")


def test_replies_around_an_unreadable_one_are_right(server: Server, image: Path, whole: bytes) -> None:
    with bystander(server), raw_client(server) as client:
        os.truncate(image, MIB)
        offsets = [0, 4 * MIB, 512, 5 * MIB, MIB - 512]
        client.send(b"".join(pack_request(READ, offset, 512, cookie=offset) for offset in offsets))
        for offset in offsets:
            error, cookie, data = client.simple_reply(512)
            assert (error, cookie) == (EIO if offset >= MIB else 0, offset)
            assert error or data == whole[offset : offset + 512]


# Too few descriptors or processes


def limit(pid: int, kind: int, soft: int) -> int:
    """Set the soft limit of a running process; returns what it was."""
    old, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, hard))
    return old


def spare_workers(server: Server) -> List[int]:
    """Those that wait for a client."""
    return [pid for pid in server.workers() if "spare worker" in title_of(pid)]


def first_free_descriptor(pid: int) -> int:
    used = {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return next(fd for fd in range(len(used) + 1) if fd not in used)


def test_out_of_descriptors_a_worker_accepts_later_and_does_not_spin(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    server.expected_errors.append("cannot accept a client")
    with bystander(server):
        wait_until(lambda: len(server.workers()) == 1 + len(spare_workers(server)) >= 5, "the spare workers")
        spares = {pid: limit(pid, resource.RLIMIT_NOFILE, first_free_descriptor(pid)) for pid in spare_workers(server)}
        before, start_time = sum(map(cpu_seconds, spares)), monotonic()
        with RawClient(server.connect()) as client:
            server.wait_for_log("cannot accept a client, trying again")
            wait_until(lambda: server.log().count("cannot accept") == len(spares), "a line of each")
            wait_until(lambda: monotonic() - start_time > 3, "more attempts")
            assert server.log().count("cannot accept") <= len(spares) * (1 + (monotonic() - start_time) // 30)
            assert sum(map(cpu_seconds, spares)) - before < 0.5
            for pid, old in spares.items():
                limit(pid, resource.RLIMIT_NOFILE, old)
            assert client.negotiate().works()


def test_a_worker_that_cannot_open_its_descriptors_is_replaced_later(start: Start, image: Path) -> None:
    server = start("--target", image, "--spare-workers", "1")
    server.expected_errors.append("worker")
    with bystander(server) as other, ExitStack() as clients:
        old = limit(server.pid, resource.RLIMIT_NOFILE, 3)
        clients.enter_context(RawClient(server.connect())).greet()
        server.wait_for_log("the next one starts in 1 s")
        before = cpu_seconds(server.pid)
        first = server.log().count("the next one")
        wait_until(lambda: server.log().count("the next one") >= first + 2, "two more attempts")
        assert cpu_seconds(server.pid) - before < 0.5
        assert other.works()
        limit(server.pid, resource.RLIMIT_NOFILE, old)
        with raw_client(server) as newcomer:
            assert newcomer.works()
    assert "Traceback" not in server.log()


UNPRIVILEGED = 64_321
"""A user whom nobody else runs processes as; root's number of processes is not limited."""


def as_unprivileged() -> List[str]:
    """What makes root's command line that of another user."""
    user = str(UNPRIVILEGED)
    return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"] if os.geteuid() == 0 else []


def limit_processes(pid: int, soft: str) -> str:
    """Limit the number of processes of the user whom *pid* belongs to, as that user; returns what it was."""
    prlimit = [*as_unprivileged(), "prlimit", "--pid", pid]
    old = run(*prlimit, "--nproc", "--output=SOFT", "--noheadings", "--raw")[1].strip()
    run(*prlimit, f"--nproc={soft}:")
    return old


@contextmanager
def unprivileged_server(*arguments: object) -> Iterator[Server]:
    """A server on a Unix socket, and on an image of its own, that is not root's."""
    directory = Path(tempfile.mkdtemp(prefix="xnbd-test-"))
    image = directory / "disk.img"
    image.write_bytes(bytes(MIB))
    if os.geteuid() == 0:
        for path in (directory, image):
            os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    server = object.__new__(Server)
    server.port = 0
    server.socket = directory / "server.sock"
    server.log_path = directory / "server.log"
    with open(server.log_path, "ab") as log:
        line = [*as_unprivileged(), *command("--target", image, "--unix", server.socket, *arguments)]
        server.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


def test_out_of_processes_new_clients_are_served_later_and_nothing_spins() -> None:
    with unprivileged_server("--spare-workers", "1") as server, bystander(server):
        wait_until(lambda: spare_workers(server), "the spare worker that takes the next client")
        old = limit_processes(server.pid, "1")
        with raw_client(server) as last, RawClient(server.connect()) as waiting:
            server.wait_for_log("cannot start a worker, trying again")
            before = cpu_seconds(server.pid)
            began, first = monotonic(), server.log().count("cannot start")
            wait_until(lambda: server.log().count("cannot start") >= first + 2, "two more attempts")
            attempts = server.log().count("cannot start") - first
            assert attempts <= 2 + monotonic() - began
            assert cpu_seconds(server.pid) - before < 0.5
            assert last.works()
            limit_processes(server.pid, old)
            assert waiting.negotiate().works()


def test_clients_above_the_limit_wait_until_one_leaves(start: Start, image: Path) -> None:
    server = start("--target", image, "--max-clients", "2")
    with bystander(server), raw_client(server) as second:
        server.wait_for_log("2 clients are connected, which is the limit")
        with RawClient(server.connect()) as waiting:
            assert second.works()
            assert len(server.workers()) == 2
            second.sock.close()
            assert waiting.negotiate().works()


# Kills


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, 40], ids=str)
def test_worker_that_is_killed_is_logged_with_its_reason_and_takes_only_its_client(server: Server, number: int) -> None:
    with bystander(server), raw_client(server) as victim:
        worker = worker_of(server, victim)
        server.expected_errors.append(f"worker {worker} of client .* died: killed by ")
        os.kill(worker, number)
        assert victim.closed()
        server.wait_for_log(f"worker {worker} of client 127.0.0.1:")
        with raw_client(server) as newcomer:
            assert newcomer.works()


def test_spare_workers_that_are_killed_are_replaced(server: Server) -> None:
    server.expected_errors.append("spare worker .* died: killed by SIGKILL")
    with bystander(server):
        for pid in spare_workers(server):
            os.kill(pid, signal.SIGKILL)
        with raw_client(server) as newcomer:
            assert newcomer.works()


def write_for_ever(client: RawClient) -> None:
    """Send writes as fast as they are taken, until that fails."""
    requests = (pack_request(WRITE, 0, 4096) + bytes(4096)) * 64
    try:
        while True:
            client.send(requests)
    except OSError:
        pass


def read_for_ever(client: RawClient) -> None:
    try:
        while client.works():
            pass
    except (OSError, EOFError):
        pass


@contextmanager
def in_background(work: Callable[[RawClient], None], client: RawClient) -> Iterator[None]:
    thread = threading.Thread(target=work, args=(client,))
    thread.start()
    try:
        yield
    finally:
        try:
            client.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server has closed it before
        thread.join(30)


@contextmanager
def clients_of_every_kind(server: Server) -> Iterator[None]:
    """Clients who are idle, silent, busy, in the middle of a payload, or not reading."""
    with ExitStack() as clients:
        clients.enter_context(RawClient(server.connect()))
        idle, busy, stalled, deaf = (clients.enter_context(raw_client(server)) for _ in range(4))
        clients.enter_context(in_background(read_for_ever, busy))
        assert idle.works()
        stalled.request(WRITE, 0, MIB, data=bytes(300_000))
        deaf.send(pack_request(READ, 0, MIB) * 100)
        wait_until(lambda: len(server.busy_workers()) == 4, "the workers of all but the silent one")
        yield


def test_no_worker_outlives_a_killed_master(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with clients_of_every_kind(server):
        wait_until(lambda: len(server.workers()) > 4, "a spare worker besides theirs")
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(is_alive, workers)), "the workers' end", SOON)


def test_worker_of_a_client_that_never_stops_sending_does_not_outlive_a_killed_master(
    start: Start, image: Path
) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as client:
        worker = worker_of(server, client)
        with in_background(write_for_ever, client):
            server.process.kill()
            server.process.wait()
            wait_until(lambda: not is_alive(worker), "the worker's end", SOON)


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """An image of 64 MiB in which data and holes alternate every 32 KiB."""
    path = sparse(tmp_path / "divided.img", 64 * MIB)
    with open(path, "r+b") as file:
        for offset in range(0, 64 * MIB, 64 << 10):
            os.pwrite(file.fileno(), b"\xdd" * (32 << 10), offset)
    return path


@pytest.mark.parametrize("master_too", [False, True])
def test_worker_does_not_work_on_for_a_client_that_has_gone(start: Start, divided: Path, master_too: bool) -> None:
    server = start("--target", divided)
    with raw_client(server, structured=True) as client:
        wait_until(lambda: len(server.busy_workers()) == 1, "the client's worker alone")
        (worker,) = server.busy_workers()
        client.send(pack_request(READ, 0, 64 * MIB) * 3000)
        client.receive(MIB)
    if master_too:
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not is_alive(worker), "the worker's end", SOON)
    else:
        wait_until(lambda: "spare worker" in title_of(worker) or not is_alive(worker), "its client's end", SOON)


def test_worker_with_many_slow_requests_in_hand_does_not_outlive_a_killed_master(start: Start, divided: Path) -> None:
    server = start("--target", divided, tcp=True)
    with RawClient(server.connect(tcp=True)) as client:
        client.negotiate(allocation=True)
        worker = worker_of(server, client)
        os.kill(worker, signal.SIGSTOP)  # so that it finds many requests at once
        client.send(pack_request(BLOCK_STATUS, 0, 64 * MIB) * 4000)
        os.kill(worker, signal.SIGCONT)
        client.receive(20)
        with in_background(discard, client):
            server.process.kill()
            server.process.wait()
            wait_until(lambda: not is_alive(worker), "the worker's end", SOON)


def discard(client: RawClient) -> None:
    """Take whatever comes until nothing comes any more."""
    try:
        while client.sock.recv(MIB):
            pass
    except OSError:
        pass


def test_everything_killed_the_next_start_on_the_same_socket_and_pid_file_works(image: Path, tmp_path: Path) -> None:
    path, pid_file = tmp_path / "server.sock", tmp_path / "server.pid"
    line = command("--target", image, "--unix", path, "--pidfile", pid_file)
    for attempt in range(3):
        with launched(line, tmp_path / f"{attempt}.log") as server:
            server.wait_for_log("INFO: serving ")
            assert int(pid_file.read_text()) == server.process.pid
            assert served_at(path)
            if attempt < 2:
                kill_all(server.process.pid)
            assert path.exists()
    assert not path.exists()
    assert not pid_file.exists()


def test_master_killed_the_next_start_on_the_same_socket_and_pid_file_works(image: Path, tmp_path: Path) -> None:
    path, pid_file = tmp_path / "server.sock", tmp_path / "server.pid"
    line = command("--target", image, "--unix", path, "--pidfile", pid_file)
    with launched(line, tmp_path / "first.log") as first:
        first.wait_for_log("INFO: serving ")
        assert served_at(path)
        first.process.kill()
        first.process.wait()
        wait_until(lambda: not is_listening(path), "the workers' end", SOON)
    with launched(line, tmp_path / "second.log") as second:
        second.wait_for_log("INFO: serving ")
        assert served_at(path)


def served_at(path: Path) -> bool:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(path))
    with RawClient(sock) as client:
        return client.negotiate().works()


# Under a super-server


def under_inetd(arguments: List[object], said: bytes, env: Dict[str, str]) -> Tuple[bytes, int]:
    """Start a server with a socket as all its standard streams and say something: its answer and its status."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            process = subprocess.Popen(command(*arguments), stdin=fd, stdout=fd, stderr=fd, env=env)
        ours.settimeout(60)
        ours.sendall(said)
        ours.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while True:
            try:
                part = ours.recv(1 << 16)
            except ConnectionResetError:
                continue  # the server has left something unread; what it said before is still there
            if not part:
                return bytes(answer), process.wait(60)
            answer += part


BARE_ENVIRONMENTS: Dict[str, Dict[str, str]] = {
    "warnings": {"PATH": "", "PYTHONWARNINGS": "always"},
    "empty": {},
    "development mode": {"PATH": "", "PYTHONDEVMODE": "1"},
}

each_environment = pytest.mark.parametrize("env", BARE_ENVIRONMENTS.values(), ids=BARE_ENVIRONMENTS.keys())


@each_environment
def test_inetd_client_gets_nothing_but_nbd(image: Path, env: Dict[str, str]) -> None:
    said = struct.pack(">I", 3) + pack_option(GO, go_data("")) + pack_request(READ, 0, 512)
    answer, status = under_inetd(["--target", "--inetd", image], said, env)
    assert answer.startswith(b"NBDMAGICIHAVEOPT\0\3")
    # The greeting, an information and an acknowledgement of GO, and a simple reply with the data.
    assert len(answer) == 18 + (20 + 12) + 20 + (16 + 512)
    assert answer.endswith(image.read_bytes()[:512])
    assert status == 0


def test_inetd_client_that_talks_nonsense_gets_nothing_but_nbd(image: Path) -> None:
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 3) + bytes(16), struct.pack(">I", 3) + b"\xff" * 99):
        answer, _ = under_inetd(["--target", "--inetd", "--verbose", image], said, BARE_ENVIRONMENTS["warnings"])
        assert answer == b"NBDMAGICIHAVEOPT\0\3"


@each_environment
def test_inetd_client_of_a_missing_image_gets_nothing(tmp_path: Path, env: Dict[str, str]) -> None:
    assert under_inetd(["--target", "--inetd", tmp_path / "missing"], b"", env) == (b"", 1)


@pytest.mark.parametrize(
    "arguments",
    [["--no-such-option"], [], ["--target", "--inetd"], ["--target", "--inetd", "--unix", "x", "y"]],
    ids=str,
)
def test_inetd_client_of_a_bad_command_line_gets_nothing(arguments: List[object]) -> None:
    assert under_inetd(arguments, b"", BARE_ENVIRONMENTS["warnings"]) == (b"", 2)


def test_inetd_client_of_a_bad_log_path_gets_nothing(image: Path) -> None:
    line: List[object] = ["--target", "--inetd", "--logpath", "/nonexistent/log", image]
    assert under_inetd(line, b"", BARE_ENVIRONMENTS["warnings"]) == (b"", 1)


def test_inetd_client_asking_for_help_or_version_gets_nothing() -> None:
    for option in ("--help", "--version"):
        assert under_inetd([option], b"", BARE_ENVIRONMENTS["warnings"]) == (b"", 0)


def test_inetd_client_of_an_image_that_shrinks_gets_nothing_but_nbd(image: Path) -> None:
    os.truncate(image, 4096)
    said = struct.pack(">I", 3) + pack_option(ABORT)
    answer, _ = under_inetd(["--target", "--inetd", image], said, BARE_ENVIRONMENTS["warnings"])
    assert len(answer) == 18 + 20


# Signals


def test_bursts_of_signals_are_taken_together(server: Server) -> None:
    with bystander(server), raw_client(server) as busy, in_background(read_for_ever, busy):
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD) * 100:
            os.kill(server.pid, number)
        server.wait_for_log("configuration read again: nothing has changed")
        server.wait_for_log("SIGUSR2")
        server.wait_for_log("INFO: snapshot ")
        with raw_client(server) as newcomer:
            assert newcomer.works()


def test_bursts_of_signals_to_a_worker_change_nothing(server: Server) -> None:
    with bystander(server), raw_client(server) as client:
        worker = worker_of(server, client)
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD) * 100:
            os.kill(worker, number)
        assert client.works()
        assert is_alive(worker)


def test_many_workers_that_die_at_once_are_each_logged_once(server: Server) -> None:
    server.expected_errors.append("worker .* died: killed by SIGKILL")
    with bystander(server), ExitStack() as clients:
        workers = [worker_of(server, clients.enter_context(raw_client(server))) for _ in range(50)]
        os.kill(server.pid, signal.SIGSTOP)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        os.kill(server.pid, signal.SIGCONT)
        wait_until(lambda: server.log().count("died: killed by SIGKILL") >= 50, "all of them in the log")
        assert [server.log().count(f"worker {pid} of client") for pid in workers] == [1] * 50
        with raw_client(server) as newcomer:
            assert newcomer.works()


# Log files


def test_log_path_that_is_a_symbolic_link_is_refused_and_its_target_untouched(image: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "server.log"
    target.write_text("precious\n")
    link.symlink_to(target)
    status, message = fails("--target", "--unix", tmp_path / "socket", "--logpath", link, image)
    assert status == 1
    assert "symbolic link" in message
    assert target.read_text() == "precious\n"


def test_log_path_that_is_a_dangling_link_makes_no_file(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "server.log"
    link.symlink_to(tmp_path / "elsewhere")
    assert fails("--target", "--unix", tmp_path / "socket", "--logpath", link, image)[0] == 1
    assert not (tmp_path / "elsewhere").exists()


def test_pid_file_that_is_a_symbolic_link_is_refused_and_its_target_untouched(image: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "server.pid"
    target.write_text("precious\n")
    link.symlink_to(target)
    assert fails("--target", "--unix", tmp_path / "socket", "--pidfile", link, image)[0] == 1
    assert target.read_text() == "precious\n"


def test_socket_path_that_is_a_regular_file_is_refused_and_the_file_untouched(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious\n")
    assert fails("--target", "--unix", target, image)[0] == 1
    assert target.read_text() == "precious\n"


def test_existing_log_file_is_appended_to(start: Start, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "kept.log"
    log.write_text("a line from before\n")
    server = start("--target", image, "--logpath", log)
    with raw_client(server) as client:
        assert client.works()
    wait_until(lambda: ": left" in log.read_text(), "the client's leaving in the log")
    lines = log.read_text().splitlines()
    assert lines[0] == "a line from before"
    assert "serving disk image" in lines[1]
    assert server.log() == ""


def test_log_file_that_was_moved_away_is_made_anew(start: Start, image: Path, tmp_path: Path) -> None:
    log, moved = tmp_path / "current.log", tmp_path / "moved.log"
    server = start("--target", image, "--logpath", log)
    with bystander(server), raw_client(server) as client:
        assert client.works()
        log.rename(moved)
        kept = moved.read_text()
        client.sock.close()
        wait_until(lambda: log.exists() and ": left" in log.read_text(), "the client's leaving in the new file")
        assert moved.read_text() == kept


def test_log_file_that_was_replaced_by_a_link_is_not_followed(start: Start, image: Path, tmp_path: Path) -> None:
    log, precious = tmp_path / "current.log", tmp_path / "precious"
    precious.write_text("precious\n")
    server = start("--target", image, "--logpath", log)
    with bystander(server):
        log.unlink()
        log.symlink_to(precious)
        still_serves_and_logs_again(server, log)
    assert precious.read_text() == "precious\n"


def test_log_directory_that_was_removed_ends_nobody(start: Start, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "current.log"
    log.parent.mkdir()
    server = start("--target", image, "--logpath", log)
    with bystander(server):
        shutil.rmtree(log.parent)
        still_serves_and_logs_again(server, log)


def still_serves_and_logs_again(server: Server, log: Path) -> None:
    """While there is nowhere to log to, and once there is again."""
    os.kill(server.pid, signal.SIGHUP)
    for _ in range(6):
        with raw_client(server) as client:
            assert client.works()
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    with raw_client(server) as client:
        assert client.works()
    wait_until(lambda: log.exists() and ": left" in log.read_text(), "lines in a new log")


@needs_root
def test_log_on_a_full_disk_ends_nobody(start: Start, image: Path, small_disk: Path) -> None:
    log = small_disk / "server.log"
    server = start("--target", image, "--logpath", log)
    with bystander(server):
        try:
            with open(small_disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        for _ in range(60):
            os.kill(server.pid, signal.SIGHUP)
            with raw_client(server) as client:
                assert client.works()


# Stops


def stop_now(server: Server) -> None:
    os.kill(server.pid, signal.SIGTERM)
    server.wait_for_log("stopping; ")


def wait_for_end(server: Server) -> int:
    return server.process.wait(STOP_TIME)


def test_stop_ends_idle_clients_with_an_end_of_file(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as idle, RawClient(server.connect()) as silent:
        silent.receive(18)
        stop_now(server)
        assert idle.closed()
        assert silent.closed()
        assert wait_for_end(server) == 0
    assert not server.socket.exists()


@pytest.mark.parametrize("count", [1, 16])
def test_stop_lets_replies_that_are_on_their_way_arrive(start: Start, image: Path, count: int) -> None:
    server, data = start("--target", image, tcp=True), image.read_bytes()
    with raw_client(server) as client:
        client.send(b"".join(pack_request(READ, n, 4 * MIB, cookie=n) for n in range(count)))
        header = client.receive(16)
        stop_now(server)
        assert header + client.receive(4 * MIB) == pack_reply(0) + data[: 4 * MIB]
        for n in range(1, count):
            assert client.simple_reply(4 * MIB) == (0, n, data[n : n + 4 * MIB])
        assert client.closed()
        assert wait_for_end(server) == 0


def pack_reply(cookie: int) -> bytes:
    return struct.pack(">IIQ", 0x67446698, 0, cookie)


def test_stop_answers_what_was_sent_before_it_while_the_worker_was_busy(start: Start, image: Path) -> None:
    server, data = start("--target", image, tcp=True), image.read_bytes()
    with raw_client(server) as client:
        client.send(pack_request(READ, 0, 8 * MIB) * 4)
        received = client.receive(16)  # the worker is stuck now in replies that do not fit into the socket
        for n in range(20):
            client.request(WRITE, n * 512, 512, data=bytes([n]) * 512, cookie=n)
        stop_now(server)
        received += client.receive(4 * (16 + 8 * MIB) - 16)
        assert received.count(data[1 * MIB : 8 * MIB]) == 4
        for n in range(20):
            assert client.simple_reply() == (0, n, b"")
        assert client.closed()
        assert wait_for_end(server) == 0
    assert image.read_bytes()[: 20 * 512] == b"".join(bytes([n]) * 512 for n in range(20))


def test_stop_waits_for_the_rest_of_a_payload(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as client:
        client.request(WRITE, 0, MIB, data=b"\xee" * 600_000)
        stop_now(server)
        client.send(b"\xee" * (MIB - 600_000))
        assert client.simple_reply() == (0, 1, b"")
        assert client.closed()
        assert wait_for_end(server) == 0
    assert image.read_bytes()[:MIB] == b"\xee" * MIB


@pytest.mark.parametrize("length", [100, 4096, MIB])
def test_stop_is_not_held_up_by_a_client_that_stalls_in_a_payload(start: Start, image: Path, length: int) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as stalled:
        stalled.request(WRITE, 0, length, data=bytes(length // 2))
        stop_now(server)
        wait_for_end(server)


def test_stop_is_not_held_up_by_a_client_that_does_not_read(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as deaf:
        deaf.send(pack_request(READ, 0, MIB) * 100)
        stop_now(server)
        wait_for_end(server)


@pytest.mark.parametrize("work", [read_for_ever, write_for_ever])
def test_stop_is_not_held_up_by_a_client_that_never_pauses(
    start: Start, image: Path, work: Callable[[RawClient], None]
) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as client, in_background(work, client):
        stop_now(server)
        wait_for_end(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once_and_without_a_traceback(start: Start, image: Path, number: int) -> None:
    server = start("--target", image, tcp=True)
    with raw_client(server) as stalled:
        stalled.request(WRITE, 0, MIB, data=bytes(600_000))
        worker = worker_of(server, stalled)
        server.expected_errors.append("worker .* died: killed by SIGKILL")
        stop_now(server)
        os.kill(server.pid, number)
        assert server.process.wait(STOP_TIME) == 1
        assert not is_alive(worker)
        assert stalled.closed()
    server.wait_for_log("ending ")
    assert not server.socket.exists()


def has_sigterm_pending(pid: int) -> bool:
    found = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(found and int(found[1], 16) & 1 << signal.SIGTERM - 1)


def test_second_signal_when_the_last_worker_has_just_ended_is_no_failure(server: Server) -> None:
    held = server.workers()
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(state_of(pid) == "T" for pid in held), "all workers to stand still")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(map(has_sigterm_pending, held)), "SIGTERM to all workers")
    server.process.send_signal(signal.SIGSTOP)
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not any(map(is_alive, server.workers())), "the end of all workers")  # zombies by now
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGCONT)
    assert server.process.wait(STOP_TIME) == 0
    assert "ending" not in server.log()


@needs_root
def test_second_signal_ends_without_a_flush(
    start: Start, small_disk: Path, loop_device: Callable[[Path], Path]
) -> None:
    """Whoever is in a hurry need not wait for a disk: here a flush would fail, and the log tell of it."""
    server = start("--target", loop_device(sparse(small_disk / "backing", 32 * MIB)), tcp=True)
    with raw_client(server) as stalled:
        for offset in range(0, 16 * MIB, MIB):
            assert stalled.write(offset, b"\xee" * MIB) == 0
        stalled.request(WRITE, 0, MIB, data=bytes(600_000))
        stop_now(server)
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(STOP_TIME) == 1
    assert "flush" not in server.log()


def test_signals_that_come_together_stop_the_server_once(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    server.expected_errors.append("worker .* died: killed by SIGKILL")
    with raw_client(server) as client:
        assert client.works()
        for _ in range(20):
            server.process.send_signal(signal.SIGTERM)
        assert client.closed()
        assert server.process.wait(STOP_TIME) in (0, 1)
    assert server.log().count("stopping; ") == 1


def test_stop_flushes_and_removes_what_the_server_made(start: Start, image: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "server.pid"
    server = start("--target", image, "--pidfile", pid_file)
    assert int(pid_file.read_text()) == server.pid
    assert server.stop() == 0
    assert not pid_file.exists()
    assert not server.socket.exists()
