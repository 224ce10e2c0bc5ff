"""Snapshots: what is in them, what they are called, and everything that can go wrong on the way.

`test_snapshot_cut` takes them under load.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import ContextManager, Iterator, List

import pytest
from conftest import MIB, Start
from injection import NO_PROCESSES, injected
from launch import Launched, launched
from mounts import attach, detach, small_tmpfs
from origin_programs import is_listening
from rawclient import FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, RawClient, bystander, pack_request
from server_process import Server, command, is_alive, run, wait_until
from snapshots import (
    bgctl,
    bgctl_command,
    held_snapshot,
    removed_files_of,
    shut_gate,
    snapshots_of,
    steward_of,
    take_by_command,
    take_by_signal,
)

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files cannot be cloned, so that snapshots are copies."""
    with small_tmpfs(tmp_path / "tmpfs", "64M") as directory:
        yield directory


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A tmpfs that every user may write to, outside of the directory that pytest closes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as outside:
        os.chmod(outside, 0o755)
        with small_tmpfs(Path(outside) / "tmpfs", "64M") as directory:
            os.chmod(directory, 0o777)
            yield directory


def serving_as_nobody(directory: Path, *arguments: object) -> ContextManager[Launched]:
    """A server that is not root; its sockets and its log are in *directory*."""
    where = ["--unix", directory / "nobody.sock", "--control", directory / "control"]
    return launched([*NOBODY, *command(*arguments, *where)], directory / "nobody.log")


@pytest.fixture
def disk(tmpfs: Path, image: Path) -> Path:
    """The image, in there."""
    return Path(shutil.move(image, tmpfs / "disk.img"))


@pytest.fixture
def target(start: Start, disk: Path, control: Path) -> Iterator[Server]:
    """A plain target of the disk, with a control socket."""
    server = start("--target", disk, "--control", control)
    yield server
    server.stop()


def connect(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


# What is in them


def test_a_snapshot_of_an_odd_size_is_the_disk_byte_by_byte(target: Server, disk: Path) -> None:
    taken = take_by_signal(target, disk)
    assert taken.path.read_bytes() == disk.read_bytes()


def test_the_name_tells_the_time(target: Server, disk: Path, control: Path) -> None:
    before = int(time.time())
    taken = take_by_command(control)
    match = re.fullmatch(r"disk\.img\.snapshot\.(\d+)", taken.path.name)
    assert match and taken.path.parent == disk.parent
    assert before <= int(match[1]) <= time.time()


def test_the_log_names_file_time_and_how_long_clients_were_held(target: Server, disk: Path) -> None:
    taken = take_by_signal(target, disk)
    name, size = re.escape(str(taken.path)), disk.stat().st_size
    line = rf"INFO: snapshot {name}: {size} bytes in [\d.]+ s, clients held for [\d.]+ ms"
    wait_until(lambda: re.search(line, target.log()), "the line in the log")


def test_sparse_images_stay_sparse(start: Start, tmpfs: Path, control: Path) -> None:
    image = tmpfs / "sparse.img"
    with open(image, "wb") as file:
        file.truncate(1 << 30)
        for at in (0, 300 * MIB + 5000, (1 << 30) - 100):
            file.seek(at)
            file.write(b"data" * 25)
    server = start("--target", image, "--control", control)
    taken = take_by_command(control)
    assert taken.path.stat().st_size == 1 << 30
    assert taken.path.stat().st_blocks <= image.stat().st_blocks
    run("cmp", image, taken.path)
    server.stop()


def test_holes_that_are_written_meanwhile_are_holes_in_the_snapshot(start: Start, tmpfs: Path) -> None:
    image = tmpfs / "sparse.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    server = start("--target", image, "--control", tmpfs / "control")
    with connect(server) as client, held_snapshot(server) as held:
        held.let_workers_keep(2048)
        assert client.write(MIB + 100, b"x" * 100000) == 0
        held.go_on()
        wait_until(lambda: snapshots_of(image), "the snapshot")
    (path,) = snapshots_of(image)
    assert path.stat().st_blocks == 0
    assert image.read_bytes()[MIB + 100 :].startswith(b"x" * 100000)
    server.stop()


@pytest.mark.parametrize("change", ["write", "long write", "trim", "zeroes"])
def test_what_is_changed_while_the_copy_runs_is_not_in_it(target: Server, disk: Path, change: str) -> None:
    original = disk.read_bytes()
    at, length = 2 * MIB + 777, 1500000
    with connect(target) as client, held_snapshot(target) as held:
        held.let_workers_keep(2048)
        if change == "write":
            errors = [client.write(at + n, b"new" * 100) for n in range(0, length, 100_000)]
        elif change == "long write":
            errors = [client.write(at, b"n" * length)]
        else:
            client.request(TRIM if change == "trim" else WRITE_ZEROES, at, length)
            errors = [client.simple_reply()[0]]
        assert not any(errors)
        assert disk.read_bytes() != original
        held.go_on()
        wait_until(lambda: snapshots_of(disk), "the snapshot")
    assert snapshots_of(disk)[0].read_bytes() == original


def test_a_client_that_comes_while_the_copy_runs_does_not_change_it(target: Server, disk: Path) -> None:
    original = disk.read_bytes()
    with held_snapshot(target) as held:
        held.let_workers_keep(2048)
        with connect(target) as client:
            assert client.write(3 * MIB, b"late" * 5000) == 0
        held.go_on()
        wait_until(lambda: snapshots_of(disk), "the snapshot")
    assert snapshots_of(disk)[0].read_bytes() == original


def test_writes_behind_replies_that_pile_up_are_kept_out(target: Server, disk: Path) -> None:
    """The client takes no replies until the snapshot has begun; its requests are one batch."""
    original = disk.read_bytes()
    with RawClient(target.connect()) as client:
        client.negotiate(structured=True)
        reads = b"".join(pack_request(READ, 0, 32768, cookie=n) for n in range(2100))
        client.send(reads + pack_request(WRITE, 5 * MIB, 4096, cookie=9) + b"N" * 4096)
        wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK), "the first reply")
        with held_snapshot(target) as held:
            held.let_workers_keep(2048)
            for _ in range(2100):
                client.chunk()
            assert client.simple_reply()[:2] == (0, 9)
            held.go_on()
            wait_until(lambda: snapshots_of(disk), "the snapshot")
    assert snapshots_of(disk)[0].read_bytes() == original


def test_a_readonly_disk_has_snapshots(start: Start, disk: Path, control: Path) -> None:
    server = start("--target", "--readonly", disk, "--control", control)
    assert take_by_command(control).path.read_bytes() == disk.read_bytes()
    server.stop()


@pytest.mark.parametrize("mode", [["--target", "--readonly"], ["--cow-target"]])
def test_an_image_that_nobody_may_write_has_snapshots(open_to_all: Path, image: Path, mode: List[str]) -> None:
    """Served by a user who is not root."""
    disk = Path(shutil.move(image, open_to_all / "disk.img"))
    os.chmod(disk, 0o444)
    with serving_as_nobody(open_to_all, *mode, disk):
        path = take_by_command(open_to_all / "control").path
    assert path.read_bytes() == disk.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_snapshot_lets_in_no_group_that_may_not_read_the_image(open_to_all: Path, image: Path) -> None:
    """Served by a user who cannot give it the image's group."""
    disk = Path(shutil.move(image, open_to_all / "disk.img"))
    os.chmod(disk, 0o640)
    os.chown(disk, 65534, 0)
    with serving_as_nobody(open_to_all, "--target", disk):
        path = take_by_command(open_to_all / "control").path
    assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o600, 65534)


def test_the_snapshot_of_a_cow_disk_lies_beside_the_base(
    start: Start, disk: Path, tmp_path: Path, control: Path
) -> None:
    original = bytearray(disk.read_bytes())
    (tmp_path / "changes").mkdir()
    server = start("--cow-target", disk, "--cow-dir", tmp_path / "changes", "--control", control)
    with connect(server) as client:
        assert client.write(MIB + 5, b"changed" * 9999) == 0
    original[MIB + 5 : MIB + 5 + 7 * 9999] = b"changed" * 9999
    taken = take_by_command(control)
    assert taken.path.parent == disk.parent
    assert taken.path.read_bytes() == original
    server.stop()


# Asking for them


def test_two_in_one_second_have_different_names(target: Server, disk: Path, control: Path) -> None:
    taken = [take_by_command(control).path for _ in range(4)]
    assert len(set(taken)) == 4
    assert sorted(taken) == sorted(snapshots_of(disk))


def test_ten_signals_at_once_make_at_least_one_and_no_half_ones(target: Server, disk: Path, control: Path) -> None:
    for _ in range(10):
        os.kill(target.pid, signal.SIGUSR1)
    wait_until(lambda: snapshots_of(disk), "a snapshot")
    take_by_command(control)
    wait_until(lambda: target.log().count("INFO: snapshot ") == len(snapshots_of(disk)), "all of them")
    assert all(path.read_bytes() == disk.read_bytes() for path in snapshots_of(disk))


def test_a_signal_needs_no_control_socket(start: Start, disk: Path) -> None:
    server = start("--target", disk)
    assert take_by_signal(server, disk).path.read_bytes() == disk.read_bytes()
    server.stop()


def test_progress_is_shown_and_the_path_printed(target: Server, disk: Path, control: Path) -> None:
    _, out, err = bgctl("--snapshot", "--progress", control)
    assert [Path(out.rstrip("\n"))] == snapshots_of(disk)
    assert re.search(r"the snapshot took .*, clients were held for [\d.]+ ms\n$", err)


def test_the_server_answers_queries_while_the_copy_runs(target: Server, control: Path) -> None:
    with held_snapshot(target):
        _, out, _ = bgctl("--query", control)
    assert "disk.img" in out


def test_interrupting_the_command_ends_its_snapshot(target: Server, disk: Path, control: Path) -> None:
    with held_snapshot(target, by=control) as held:
        snapshotter = held.snapshotter
        held.command.send_signal(signal.SIGINT)
        wait_until(lambda: not is_alive(snapshotter), "the end of the snapshotting process")
    assert snapshots_of(disk) == []
    take_by_command(control)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (NO_PROCESSES, "the server cannot start a process: Resource temporarily unavailable"),
        ("memfd_create:error=EMFILE", "Too many open files"),
    ],
    ids=["processes", "descriptors"],
)
def test_short_of_what_a_snapshot_takes_there_is_none_and_the_steward_lives(
    target: Server, disk: Path, control: Path, fault: str, reason: str
) -> None:
    wait_until(lambda: is_listening(control), "the steward")
    steward = steward_of(target)
    assert steward is not None
    with injected(steward, fault):
        _, _, err = bgctl("--snapshot", control, check=False)
        assert err == f"xnbd-bgctl: no snapshot: {reason}\n"
        os.kill(target.pid, signal.SIGUSR1)
        wait_until(lambda: target.log().count(f"WARNING: no snapshot: {reason}") == 2, "the second line in the log")
    assert steward_of(target) == steward
    take_by_signal(target, disk)


def test_a_block_device_is_refused(start: Start, image: Path, control: Path) -> None:
    os.truncate(image, 8 * MIB)
    device = attach(image)
    try:
        server = start("--target", device, "--control", control)
        status, _, err = bgctl("--snapshot", control, check=False)
        assert (status, err) == (
            1,
            f"xnbd-bgctl: no snapshot: {device} is no regular file: what makes the device can make snapshots of it\n",
        )
        server.stop()
    finally:
        detach(device)


# Faults


def test_no_space(start: Start, tmpfs: Path, control: Path) -> None:
    """The server goes on, nothing is lost, the log says why, and the next one works once there is room."""
    image = tmpfs / "disk.img"
    image.write_bytes(os.urandom(40 * MIB))
    server = start("--target", image, "--control", control)
    with connect(server) as client:
        os.kill(server.pid, signal.SIGUSR1)
        for n in range(200):
            assert client.write(n * 4096, n.to_bytes(8, "little") * 512) == 0
        wait_until(lambda: "no snapshot" in server.log(), "the line in the log")
        assert re.search(r"WARNING: no snapshot: the copy may need .* free", server.log())
        assert snapshots_of(image) == []
        assert client.read(199 * 4096, 8) == (199).to_bytes(8, "little")
        run("mount", "-o", "remount,size=128M", tmpfs)
        assert take_by_signal(server, image).path.read_bytes() == image.read_bytes()
    server.stop()


def test_space_that_is_gone_in_the_middle(target: Server, disk: Path) -> None:
    """It is a client's write that finds no room for the old block."""
    with connect(target) as client:
        with held_snapshot(target) as held:
            held.let_workers_keep(2048)
            fill(disk.parent / "other")
            assert client.write(MIB, b"a" * MIB) == 0
            held.go_on()
            target.wait_for_log("WARNING: no snapshot: No space left on device")
        assert snapshots_of(disk) == []
        assert client.read(MIB, MIB) == b"a" * MIB
        (disk.parent / "other").unlink()
        assert take_by_signal(target, disk).path.read_bytes() == disk.read_bytes()


def fill(path: Path) -> None:
    """Leave no space on this file system."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(MIB))
    with open(path, "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_snapshot_without_space_takes_none_from_the_clients(start: Start, tmpfs: Path, control: Path) -> None:
    image = tmpfs / "disk.img"
    image.write_bytes(os.urandom(40 * MIB))
    os.truncate(image, 60 * MIB)
    server = start("--target", image, "--control", control)
    with connect(server) as client:
        asking = subprocess.Popen(bgctl_command("--snapshot", control), stdout=-1, stderr=-1)
        errors = [client.write(40 * MIB + n * 65536, b"y" * 65536) for n in range(200)]
        assert asking.communicate(timeout=30)[1].startswith(b"xnbd-bgctl: no snapshot: ")
    assert not any(errors)
    server.stop()


def test_no_permission(open_to_all: Path, image: Path) -> None:
    (open_to_all / "closed").mkdir()
    disk = Path(shutil.move(image, open_to_all / "closed" / "disk.img"))
    os.chmod(disk, 0o666)
    with serving_as_nobody(open_to_all, "--target", disk) as server:
        status, _, err = bgctl("--snapshot", open_to_all / "control", check=False)
        assert (status, err) == (1, "xnbd-bgctl: no snapshot: Permission denied\n")
        assert "no snapshot: Permission denied" in server.log()
        os.chmod(disk.parent, 0o777)
        assert take_by_command(open_to_all / "control").path.read_bytes() == disk.read_bytes()


def test_a_stop_in_the_middle_is_told_in_the_log(target: Server, disk: Path) -> None:
    with held_snapshot(target):
        target.process.send_signal(signal.SIGTERM)
        target.wait_for_log("WARNING: no snapshot: the server ends")
    assert target.process.wait(30) == 0
    assert list(disk.parent.iterdir()) == [disk]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_the_snapshotting_process_leaves_nothing(target: Server, disk: Path, number: int) -> None:
    with bystander(target) as client:
        with held_snapshot(target) as held:
            held.let_workers_keep(2048)
            assert client.write(MIB, b"a" * 4096) == 0
            os.kill(held.snapshotter, number)
            held.go_on()
            target.wait_for_log("WARNING: no snapshot: ")
        assert list(disk.parent.iterdir()) == [disk]
        assert client.write(2 * MIB, b"b" * 4096) == 0
        assert take_by_signal(target, disk).path.read_bytes() == disk.read_bytes()


def test_the_death_of_the_steward_leaves_nothing(target: Server, disk: Path) -> None:
    target.expected_errors.append("the steward died")
    with bystander(target) as client:
        with held_snapshot(target) as held:
            held.let_workers_keep(2048)
            steward, snapshotter = steward_of(target), held.snapshotter
            assert steward is not None
            os.kill(steward, signal.SIGKILL)
            wait_until(lambda: not is_alive(snapshotter), "the end of the snapshotting process")
            wait_until(lambda: steward_of(target) not in (None, steward), "the next steward")
            assert client.write(MIB, b"a" * 4096) == 0
        assert list(disk.parent.iterdir()) == [disk]
        assert take_by_signal(target, disk).path.read_bytes() == disk.read_bytes()


def test_a_snapshot_whose_steward_died_is_not_finished(target: Server, disk: Path, control: Path) -> None:
    """Its process stands still until the next steward is there."""
    target.expected_errors.append("the steward died")
    with bystander(target) as client, held_snapshot(target) as held:
        held.let_workers_keep(2048)
        steward, snapshotter = steward_of(target), held.snapshotter
        assert steward is not None
        os.kill(snapshotter, signal.SIGSTOP)
        os.kill(steward, signal.SIGKILL)
        wait_until(lambda: not is_alive(steward), "the steward's end")
        wait_until(lambda: is_listening(control), "the next steward")
        assert client.write(MIB, b"a" * 4096) == 0
        held.go_on()
        os.kill(snapshotter, signal.SIGCONT)
        wait_until(lambda: not is_alive(snapshotter), "the end of the snapshotting process")
    assert snapshots_of(disk) == []


def test_the_death_of_the_master_leaves_nothing(start: Start, disk: Path, control: Path) -> None:
    server = start("--target", disk, "--control", control)
    with held_snapshot(server) as held:
        snapshotter = held.snapshotter
        server.process.kill()
        wait_until(lambda: not is_alive(snapshotter), "the end of the snapshotting process")
        wait_until(lambda: not is_listening(control), "the end of the steward")
    assert list(disk.parent.iterdir()) == [disk]
    server.process.wait()
    again = start("--target", disk, "--control", control)
    assert take_by_signal(again, disk).path.read_bytes() == disk.read_bytes()
    again.stop()


def test_stopping_the_server_in_the_middle_leaves_nothing(start: Start, disk: Path, control: Path) -> None:
    server = start("--target", disk, "--control", control)
    with held_snapshot(server):
        assert server.stop() == 0
    assert list(disk.parent.iterdir()) == [disk]


def test_an_idle_client_does_not_keep_the_space_of_a_snapshot_that_was_removed(target: Server, disk: Path) -> None:
    with connect(target) as client:
        with held_snapshot(target) as held:
            held.let_workers_keep(2048)
            assert client.write(MIB, b"a" * 4096) == 0
            assert removed_files_of(target, disk.parent)
            held.go_on()
            wait_until(lambda: snapshots_of(disk), "the snapshot")
        snapshots_of(disk)[0].unlink()
        wait_until(lambda: not removed_files_of(target, disk.parent), "the end of the last descriptor")
        assert client.works()


# Clients that take their time: as long as there is no snapshot, which is given up if they are waited for


def test_replies_that_wait_at_a_shut_gate_are_sent_once(target: Server, disk: Path) -> None:
    """The client begins to take them when the worker cannot go on."""
    count, length = 700, 32768  # more pieces than one sendmsg takes
    with RawClient(target.connect()) as client:
        client.negotiate()
        reads = b"".join(pack_request(READ, n * 4096, length, cookie=n) for n in range(count))
        client.send(reads + pack_request(FLUSH, 0, 0, cookie=count))  # which sends what is before it, inside the gate
        wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK), "the first reply")
        with shut_gate(target):
            early = take_what_comes(client)
        data = early + client.receive(count * (16 + length) - len(early))
        assert client.simple_reply()[:2] == (0, count)
    content = disk.read_bytes()
    for n, at in enumerate(range(0, len(data), 16 + length)):
        assert data[at : at + 16] == struct.pack(">IIQ", 0x67446698, 0, n)
        assert data[at + 16 : at + 16 + length] == content[n * 4096 : n * 4096 + length]


def take_what_comes(client: RawClient) -> bytes:
    """Everything, until nothing has come for a moment."""
    data = bytearray()
    while select.select([client.sock], [], [], 0.2)[0]:
        data += client.sock.recv(1 << 20)
    return bytes(data)


def test_a_slow_payload_does_not_hold_the_snapshot_up(target: Server, disk: Path) -> None:
    with connect(target) as client, bystander(target) as other:
        client.send(pack_request(WRITE, 0, 2 * MIB) + b"s" * MIB)
        taken = take_by_signal(target, disk)
        assert other.write(4 * MIB, b"o" * 4096) == 0
        client.send(b"s" * MIB)
        assert client.simple_reply()[0] == 0
    assert taken.path.read_bytes()[2 * MIB :] != disk.read_bytes()[2 * MIB :]


def test_a_client_that_takes_no_replies_does_not_hold_the_snapshot_up(target: Server, disk: Path) -> None:
    with connect(target) as client:
        client.send(b"".join(pack_request(READ, 0, MIB, cookie=n) for n in range(50)))
        wait_until(lambda: client.sock.recv(1, socket.MSG_PEEK), "the first reply")
        assert take_by_signal(target, disk).path.read_bytes() == disk.read_bytes()
