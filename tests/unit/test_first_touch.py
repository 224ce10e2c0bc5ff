"""When reads are copied instead of touched in the mapping, over real files and real page faults."""

from __future__ import annotations

import mmap
import os
import random
from itertools import count
from typing import Iterator

import pytest

from xnbd.server.session import first_touch
from xnbd.server.session.first_touch import LARGE, FirstTouch, how_not_to_wait
from xnbd.storage.target import TargetImage

PAGE = mmap.PAGESIZE


@pytest.fixture
def disk() -> Iterator[TargetImage]:
    """A large disk in memory, of which nothing is written but its last page."""
    made = in_memory(LARGE)
    yield made
    made.close()


def in_memory(size: int) -> TargetImage:
    fd = os.memfd_create("disk")
    os.truncate(fd, size)
    os.pwrite(fd, b"\x0d" * PAGE, size - PAGE)
    return TargetImage(fd, size, readonly=False)


def read(image: TargetImage, times: int, *, span: int = LARGE) -> None:
    """Send as many pages of the mapping somewhere."""
    assert image.flat is not None
    with open(os.memfd_create("sink"), "wb", buffering=0) as sink:
        for _ in range(times):
            offset = random.randrange(span // PAGE) * PAGE
            os.pwrite(sink.fileno(), image.flat[offset : offset + PAGE], 0)


def test_scattered_reads_of_a_large_disk_are_copied_and_the_mapping_tried_again(disk: TargetImage) -> None:
    touch = FirstTouch(disk, 1000)
    assert not touch.active
    read(disk, touch.due - 1000)
    touch.look(disk, touch.due)
    assert touch.active
    touch.look(disk, touch.due)
    assert not touch.active


def test_who_has_touched_what_is_read_goes_on_with_the_mapping(disk: TargetImage) -> None:
    read(disk, 100, span=8 * PAGE)
    touch = FirstTouch(disk, 0)
    read(disk, touch.due, span=8 * PAGE)
    touch.look(disk, touch.due)
    assert not touch.active


def test_all_of_a_small_disk_is_touched_soon() -> None:
    image = in_memory(LARGE - PAGE)
    assert FirstTouch(image, 0).due > 1 << 60
    image.close()


def test_after_many_copies_the_mapping_is_used_for_good(disk: TargetImage, monkeypatch: pytest.MonkeyPatch) -> None:
    touch, periods, faults = FirstTouch(disk, 0), 0, count(1 << 30, 1 << 20)
    monkeypatch.setattr(first_touch, "page_faults", faults.__next__)
    while touch.due < 1 << 40:
        touch.look(disk, touch.due)
        periods += touch.active
    assert periods == 64
    assert not touch.active


def test_copies_are_what_the_disk_has(disk: TargetImage) -> None:
    copied = FirstTouch(disk, 0).reader(disk)
    disk.write(PAGE + 7, b"here")
    (piece,) = copied(PAGE, 11)
    assert (bytes(piece), isinstance(piece.obj, bytearray)) == (bytes(7) + b"here", True)


def test_long_reads_and_those_beyond_the_end_take_the_way_of_the_mapping(disk: TargetImage) -> None:
    copied = FirstTouch(disk, 0).reader(disk)
    (piece,) = copied(0, 1 << 20)
    assert (len(piece), isinstance(piece.obj, mmap.mmap)) == (1 << 20, True)
    os.truncate(disk.fd, LARGE - PAGE)
    assert isinstance(copied(LARGE - PAGE, 512)[0].obj, mmap.mmap)


def test_a_file_that_may_make_it_wait_and_cannot_say_so_is_not_copied() -> None:
    with open("/proc/self/maps", "rb") as other:
        assert how_not_to_wait(other.fileno()) is None


def test_a_disk_that_is_not_in_memory_is_given_up(disk: TargetImage, monkeypatch: pytest.MonkeyPatch) -> None:
    touch, faults = FirstTouch(disk, 0), count(1 << 30, 1 << 20)
    monkeypatch.setattr(first_touch, "page_faults", faults.__next__)
    touch.look(disk, touch.due)
    assert touch.active
    copied = touch.reader(disk)
    with monkeypatch.context() as patched:
        patched.setattr(disk, "flat_fd", -1)  # as if nothing could be had without a wait
        for _ in range(2000):
            copied(0, 512)
    touch.look(disk, touch.due)
    assert (touch.active, touch.due > 1 << 60) == (False, True)
