"""Snapshots while clients write: each is the disk as it was at one instant.

Real file systems: with reflinks (Btrfs, XFS) and without (ext4, tmpfs).
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from certificates import Certificates
from conftest import Start
from mounts import loop_mount, small_tmpfs
from snapshots import Taken, take_by_command, take_by_signal
from stamps import DISK_SIZE, UNTOUCHED, check_cut, noise_disk, writers


@contextmanager
def file_system(directory: Path, kind: str) -> Iterator[Path]:
    if kind == "tmpfs":
        with small_tmpfs(directory, "512M"):
            yield directory
    else:
        with loop_mount(directory, kind, 512):
            yield directory


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4", "tmpfs"])
def test_every_snapshot_is_a_consistent_cut(start: Start, tmp_path: Path, kind: str) -> None:
    with file_system(tmp_path / "disks", kind) as directory:
        check_snapshots_of_target(start, tmp_path, directory, clones=kind in ("btrfs", "xfs"))


def test_every_snapshot_is_a_consistent_cut_for_clients_with_tls(
    start: Start, tmp_path: Path, certificates: Certificates
) -> None:
    with file_system(tmp_path / "disks", "tmpfs") as directory:
        check_snapshots_of_target(start, tmp_path, directory, clones=False, tls=certificates)


def check_snapshots_of_target(
    start: Start, tmp_path: Path, directory: Path, *, clones: bool, tls: Optional[Certificates] = None
) -> None:
    image, control = directory / "disk.img", tmp_path / "control"
    original = noise_disk(image)
    os.sync()
    server = start("--target", image, "--control", control, tls=tls)
    with writers(server.uri, tmp_path) as clients:
        taken = [take_by_signal(server, image), take_by_command(control), take_by_signal(server, image)]
        clients.stop()
    check(taken, clients.histories, original)
    end = max(max(history.acked) for history in clients.histories)
    check_cut(image.read_bytes(), clients.histories, end + 1, end + 2)
    if clones:
        assert space_of_another_snapshot(control, directory) < DISK_SIZE * 3 // 4
    server.stop()


def space_of_another_snapshot(control: Path, directory: Path) -> int:
    """Bytes that one takes while nobody writes: what is written to shared blocks takes space as well."""
    os.sync()
    before = os.statvfs(directory)
    take_by_command(control)
    os.sync()
    return (before.f_bavail - os.statvfs(directory).f_bavail) * before.f_frsize


def check(taken: List[Taken], histories: list, original: bytes) -> None:  # type: ignore[type-arg]
    for snapshot in taken:
        data = snapshot.path.read_bytes()
        assert len(data) == DISK_SIZE
        assert data[UNTOUCHED] == original[UNTOUCHED]
        check_cut(data, histories, snapshot.asked_at, snapshot.there_at)


@pytest.mark.parametrize("kind", ["xfs", "tmpfs"])
def test_a_snapshot_of_a_cow_disk_is_a_consistent_cut_of_base_and_changes(
    start: Start, tmp_path: Path, kind: str
) -> None:
    with file_system(tmp_path / "disks", kind) as directory:
        base, control = directory / "base.img", tmp_path / "control"
        original = noise_disk(base)
        server = start("--cow-target", base, "--control", control)
        with writers(server.uri, tmp_path) as clients:
            taken = [take_by_command(control), take_by_signal(server, base)]
            clients.stop()
        check(taken, clients.histories, original)
        assert base.read_bytes() == original
        assert {snapshot.path.parent for snapshot in taken} == {base.parent}
        assert all(snapshot.path.name.startswith("base.img.snapshot.") for snapshot in taken)
        server.stop()
