"""The bitmap and its locks: alone, against a set of numbers, and hammered by several processes."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Callable, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.storage.bitmap import Bitmap, bitmap_size
from xnbd.storage.blocks import bytes_of
from xnbd.system.file_locks import RangeLocks

BLOCKS = 700


@pytest.fixture
def bitmap_file(tmp_path: Path) -> Path:
    path = tmp_path / "bitmap"
    path.write_bytes(bytes(bitmap_size(BLOCKS)))
    return path


def open_bitmap(path: Path) -> Tuple[int, Bitmap]:
    fd = os.open(path, os.O_RDWR)
    return fd, Bitmap(fd, BLOCKS)


@pytest.mark.parametrize(("blocks", "size"), [(1, 8), (64, 8), (65, 16), (262144, 32768)])
def test_its_size_is_whole_words(blocks: int, size: int) -> None:
    assert bitmap_size(blocks) == size


def test_the_layout_is_least_significant_bit_first(bitmap_file: Path) -> None:
    _, bitmap = open_bitmap(bitmap_file)
    for block in (0, 9, 64):
        bitmap.set(block, block + 1)
    assert bitmap_file.read_bytes()[:9] == bytes([1, 2, 0, 0, 0, 0, 0, 0, 1])


def test_large_one_is_counted_whole(tmp_path: Path) -> None:
    blocks = (5 << 20) * 8 // 2 + 3
    fd = os.open(tmp_path / "bitmap", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, bitmap_size(blocks))
    bitmap = Bitmap(fd, blocks)
    os.close(fd)
    edges = range(1 << 23, blocks, 1 << 23)
    for edge in edges:
        bitmap.set(edge - 3, edge + 2)
    bitmap.set(blocks - 1, blocks)
    assert bitmap.count() == 5 * len(edges) + 1


RANGES = st.lists(st.tuples(st.integers(0, BLOCKS), st.integers(0, BLOCKS)).map(lambda pair: tuple(sorted(pair))))


@given(RANGES, st.integers(0, BLOCKS), st.integers(0, BLOCKS))
def test_it_is_a_set_of_numbers(ranges: List[Tuple[int, int]], a: int, b: int) -> None:
    fd = os.memfd_create("bitmap")
    os.ftruncate(fd, bitmap_size(BLOCKS))
    bitmap = Bitmap(fd, BLOCKS)
    os.close(fd)
    expected = set()
    for first, end in ranges:
        if first < end:
            bitmap.set(first, end)
        expected |= set(range(first, end))
    first, end = sorted((a, b))
    assert {n for n in range(BLOCKS) if n in bitmap} == expected
    assert bitmap.count() == len(expected)
    assert bitmap.all_set(first, end) == (set(range(first, end)) <= expected)
    runs = list(bitmap.runs(first, end))
    assert [n for run_first, run_end, _ in runs for n in range(run_first, run_end)] == list(range(first, end))
    assert all(set(range(f, e)) <= expected if s else expected.isdisjoint(range(f, e)) for f, e, s in runs)
    assert all(left[2] != right[2] for left, right in zip(runs, runs[1:]))
    if first < end:
        bitmap.clear(first, end)
        assert {n for n in range(BLOCKS) if n in bitmap} == expected - set(range(first, end))


def test_no_bit_is_lost_when_processes_set_neighbouring_bits_under_locks(bitmap_file: Path, seed: int) -> None:
    """Eight processes share every byte: a read-modify-write without its lock would lose some bits."""
    processes = 8

    def set_my_blocks(number: int) -> None:
        fd, bitmap = open_bitmap(bitmap_file)
        locks = RangeLocks(fd)
        mine = list(range(number, BLOCKS, processes))
        random.Random(seed + number).shuffle(mine)
        for block in mine:
            start, count = bytes_of(block, block + 1)
            locks.acquire(start, count)
            bitmap.set(block, block + 1)
            locks.release(start, count)

    run_processes([partial(set_my_blocks, number) for number in range(processes)])
    _, bitmap = open_bitmap(bitmap_file)
    assert bitmap.all_set(0, BLOCKS)


def test_a_lock_keeps_others_out_of_a_read_modify_write(tmp_path: Path, seed: int) -> None:
    """Processes add to counters of overlapping ranges, slowly enough to collide all the time."""
    path = tmp_path / "counters"
    path.write_bytes(bytes(64))
    processes, rounds = 4, 400

    def add(number: int) -> None:
        fd = os.open(path, os.O_RDWR)
        locks = RangeLocks(fd)
        dice = random.Random(seed + number)
        for _ in range(rounds):
            start = dice.randrange(0, 60)
            locks.acquire(start, 4)
            values = [int.from_bytes(os.pread(fd, 1, start), "little") for _ in range(3)]
            assert len(set(values)) == 1
            os.pwrite(fd, bytes([(values[0] + 1) % 251]), start)
            locks.release(start, 4)
        os.pwrite(total, b"x" * rounds, number * rounds)

    total = os.memfd_create("total")
    run_processes([partial(add, number) for number in range(processes)])
    counted = sum(path.read_bytes())
    assert counted % 251 == processes * rounds % 251
    assert os.fstat(total).st_size == processes * rounds


def test_a_lock_ends_with_the_process_that_holds_it(bitmap_file: Path) -> None:
    ready, ready_writer = os.pipe()
    pid = os.fork()
    if not pid:
        fd, _ = open_bitmap(bitmap_file)
        RangeLocks(fd).acquire(3, 2)
        os.write(ready_writer, b"x")
        signal.pause()
    fd, _ = open_bitmap(bitmap_file)
    locks = RangeLocks(fd)
    try:
        os.read(ready, 1)
        assert not locks.try_acquire(0, 4)
        assert locks.try_acquire(0, 3)
        locks.release(0, 3)
        assert locks.try_acquire(5, 10)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert locks.try_acquire(0, 4)


def test_a_lock_survives_the_closing_of_another_descriptor_of_the_file(bitmap_file: Path) -> None:
    fd, _ = open_bitmap(bitmap_file)
    RangeLocks(fd).acquire(0, 1)
    os.close(os.open(bitmap_file, os.O_RDWR))
    other, _ = open_bitmap(bitmap_file)
    assert not RangeLocks(other).try_acquire(0, 1)


def run_processes(works: List[Callable[[], None]]) -> None:
    """Run every one of *works* in a process of its own; all have to succeed."""
    children = []
    for work in works:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
