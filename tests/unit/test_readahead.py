"""Which readers count as sequential, and what is fetched ahead of them."""

from __future__ import annotations

import random
from typing import List, Optional, Set, Tuple

import pytest

from xnbd.proxy.readahead import Readahead
from xnbd.storage.blocks import BLOCKS_PER_BYTE

DISK = 1 << 16
LONGEST = 2048


class Reader:
    """Reads a disk through *readahead*, and keeps what is local; what is asked for ahead comes at once."""

    def __init__(self, readahead: Readahead) -> None:
        self.readahead = readahead
        self.local: Set[int] = set()
        self.misses = 0
        self.ahead: List[Tuple[int, int]] = []

    def read(self, first: int, count: int) -> None:
        end = first + count
        if first // BLOCKS_PER_BYTE in self.readahead.marks:
            self._bring(self.readahead.on_marked(first // BLOCKS_PER_BYTE, end))
        wanted = set(range(first, end))
        if not wanted <= self.local:
            self.misses += 1
            self._bring(self.readahead.on_read(first, end))
            self.local |= wanted

    def _bring(self, blocks: Optional[Tuple[int, int]]) -> None:
        if blocks is not None:
            first, end = blocks
            assert 0 <= first < end <= DISK
            self.ahead.append((first, end))
            self.local.update(range(first, end))


@pytest.fixture
def reader() -> Reader:
    return Reader(Readahead(DISK, LONGEST))


@pytest.mark.parametrize("count", [1, 8, 64, 100])
def test_sequential_reader_misses_at_its_beginning_only(reader: Reader, count: int) -> None:
    for first in range(0, DISK - count, count):
        reader.read(first, count)
    assert reader.misses <= 3
    assert len(reader.local) == DISK


def test_window_grows_to_the_longest_and_no_further(reader: Reader) -> None:
    for first in range(0, DISK // 2, 8):
        reader.read(first, 8)
    lengths = [end - first for first, end in reader.ahead]
    assert lengths[0] <= 64
    assert max(lengths) == LONGEST
    assert max(reader.local) < DISK // 2 + 2 * LONGEST


def test_windows_do_not_overlap(reader: Reader) -> None:
    for first in range(0, DISK // 4, 8):
        reader.read(first, 8)
    assert all(one[1] <= other[0] for one, other in zip(reader.ahead, reader.ahead[1:]))


def test_random_reader_gets_nothing_ahead(reader: Reader) -> None:
    for block in random.Random(4).sample(range(0, DISK, 16), 1000):
        reader.read(block, 1)
    assert reader.ahead == []


def test_one_read_is_no_sequence(reader: Reader) -> None:
    reader.read(100, 64)
    assert reader.ahead == []


def test_several_sequential_readers_at_once(reader: Reader) -> None:
    for step in range(0, 4096, 8):
        for start in range(0, DISK, DISK // 6):
            reader.read(min(start + step, DISK - 8), 8)
    assert reader.misses <= 6 * 3


def test_sequential_reader_among_random_ones(reader: Reader) -> None:
    rng, misses = random.Random(5), 0
    for first in range(0, 8192, 8):
        before = reader.misses
        reader.read(first, 8)
        misses += reader.misses - before
        reader.read(rng.randrange(1024, DISK // 16) * 16, 1)
    assert misses <= 16


def test_requests_of_a_pipeline_may_come_a_little_out_of_order(reader: Reader) -> None:
    rng = random.Random(6)
    firsts = list(range(0, 16384, 32))
    for at in range(0, len(firsts), 4):
        group = firsts[at : at + 4]
        rng.shuffle(group)
        for first in group:
            reader.read(first, 32)
    assert reader.misses < 24


def test_end_of_the_disk(reader: Reader) -> None:
    for first in range(DISK - 256, DISK, 8):
        reader.read(first, 8)
    assert reader.ahead
    assert max(end for _, end in reader.ahead) == DISK


@pytest.mark.parametrize("longest", [0, 1, 7])
def test_longest_window_is_kept(longest: int) -> None:
    reader = Reader(Readahead(DISK, longest))
    for first in range(0, 4096, 8):
        reader.read(first, 8)
    assert all(end - first <= longest for first, end in reader.ahead)
    assert bool(reader.ahead) == bool(longest)


def test_marks_are_bounded(reader: Reader) -> None:
    rng = random.Random(7)
    for _ in range(300):
        start = rng.randrange(DISK - 4096)
        for first in range(start, start + 4 * 64, 64):
            reader.read(first, 64)
    assert len(reader.readahead.marks) <= DISK // BLOCKS_PER_BYTE


@pytest.mark.parametrize("count", [1, 8, 64, 100])
def test_a_sequential_reader_leaves_no_marks_behind(reader: Reader, count: int) -> None:
    for first in range(0, DISK - count, count):
        reader.read(first, count)
        assert len(reader.readahead.marks) <= 2 * LONGEST // BLOCKS_PER_BYTE
