"""A disk that becomes another one: who goes on with it, and who is told."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, Iterator, List, cast

import pytest

from xnbd.scoreboard.layout import create_scoreboard
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.server.disk import Disk
from xnbd.server.snapshot_files import place_of
from xnbd.storage.bitmap import bitmap_size
from xnbd.storage.blocks import block_count
from xnbd.storage.snapshot import KeepingImage, SnapshotFiles
from xnbd.storage.target import TargetImage, TargetSource, reopen
from xnbd.system.file_locks import do_nothing

SIZE = 1 << 20


class Changing:
    """A disk as this process has it open, and another view of its scoreboard, by which it is made another one."""

    def __init__(self, disk: Disk, scoreboard: Scoreboard, files: SnapshotFiles) -> None:
        self.disk = disk
        self.scoreboard = scoreboard
        self._files = files

    def begin_snapshot(self) -> None:
        self.scoreboard.snapshots.begin(place_of(self._files, self.scoreboard.namespace))

    def end_snapshot(self) -> None:
        self.scoreboard.snapshots.end()


def snapshots_open() -> int:
    """How often this process has the snapshot's file open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.readlink(link).startswith("/memfd:snapshot") for link in links if os.path.lexists(link))


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Changing]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    output, bitmap = os.memfd_create("snapshot"), os.memfd_create("bitmap")
    os.ftruncate(output, SIZE)
    os.ftruncate(bitmap, bitmap_size(block_count(SIZE)) + 1)
    with closing(TargetSource(str(path), readonly=False)) as source:
        fd = create_scoreboard(4)
        scoreboard = Scoreboard(reopen(fd, readonly=False))
        with closing(Disk(source, fd)) as disk:
            yield Changing(disk, scoreboard, SnapshotFiles(output, bitmap))
        scoreboard.close()
    for number in (fd, output, bitmap):
        os.close(number)


def test_a_request_is_inside_the_gate_on_the_disk_as_it_is_now(changing: Changing) -> None:
    disk = changing.disk
    with disk.request() as image:
        assert disk.place.inside
        assert isinstance(image, TargetImage)
    assert not disk.place.inside
    changing.begin_snapshot()
    with disk.request() as image:
        assert image is disk.image
        assert isinstance(image, KeepingImage)
    changing.end_snapshot()
    with disk.request() as image:
        assert isinstance(image, TargetImage)
    assert disk.generation == 2


def test_a_request_that_fails_leaves_the_gate(changing: Changing) -> None:
    with pytest.raises(OSError, match="full"), changing.disk.request():
        raise OSError("full")
    assert not changing.disk.place.inside


@pytest.mark.parametrize("inside", [False, True])
def test_catching_up_stays_where_it_was(changing: Changing, inside: bool) -> None:
    disk = changing.disk
    if inside:
        disk.enter()
    assert not disk.catch_up()
    changing.begin_snapshot()
    assert disk.catch_up()
    assert isinstance(disk.image, KeepingImage)
    assert disk.place.inside == inside
    assert not disk.catch_up()


@pytest.mark.parametrize("inside", [False, True])
def test_a_sleep_leaves_the_gate_and_changes_no_image(changing: Changing, inside: bool) -> None:
    disk = changing.disk
    image = disk.image
    if inside:
        disk.enter()
    disk.fall_asleep()
    assert not disk.place.inside
    changing.begin_snapshot()
    assert disk.progress()  # so that whoever waits for results looks
    disk.wake_up()
    assert disk.place.inside == inside
    assert disk.image is image
    assert disk.outdated


def test_what_is_outside_comes_back_on_the_same_image(changing: Changing) -> None:
    disk = changing.disk
    with disk.request() as image:
        with disk.outside():
            assert not disk.place.inside
            changing.begin_snapshot()
        assert disk.place.inside
        assert disk.image is image
        assert disk.catch_up()
        assert disk.image is not image


def test_a_session_is_told_until_it_parts_and_waits_on_the_new_image_too(changing: Changing) -> None:
    told: List[int] = []

    def on_wait() -> None:
        pass

    disk = changing.disk
    disk.accompany(on_wait, lambda: told.append(disk.generation))
    changing.begin_snapshot()
    disk.enter()
    disk.enter()
    assert told == [1]
    assert disk.image.on_wait is on_wait
    disk.part()
    changing.end_snapshot()
    disk.enter()
    assert told == [1]
    assert disk.image.on_wait is do_nothing


def test_a_process_that_sleeps_holds_no_files_of_a_snapshot_that_has_ended(changing: Changing) -> None:
    disk = changing.disk
    changing.begin_snapshot()
    disk.catch_up()
    assert snapshots_open() == 2
    changing.end_snapshot()
    disk.fall_asleep()
    assert disk.progress()
    assert snapshots_open() == 1


class _Holding:
    """Has replies to send that point into the disk."""

    def holds(self) -> bool:
        return True

    def detach(self) -> None:
        """It keeps them."""


def test_who_waits_at_the_gate_with_unsent_replies_tells_that_it_holds_them(changing: Changing) -> None:
    """It was inside when the gate was to be closed, came to its door once more, and counts as outside there."""
    disk, scoreboard, holds = changing.disk, changing.scoreboard, []
    disk.image.background = cast(Any, object())  # or no block is ever let go
    disk.accompany(do_nothing, do_nothing, _Holding())
    disk.enter()

    def close() -> None:
        with scoreboard.gate.closed(30):
            holds.extend(scoreboard.holders.now())

    closer = threading.Thread(target=close)
    closer.start()
    while closer.is_alive():
        disk.enter()
    assert len(holds) == 1
    disk.image.background = None
