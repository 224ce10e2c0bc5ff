"""What is announced to an image that is not in memory, and when."""

from __future__ import annotations

import mmap
import os
from itertools import count
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from xnbd.scoreboard.layout import create_scoreboard
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.server.session.page_prefetch import PagePrefetch, pages_read
from xnbd.storage.target import TargetImage, TargetSource

MIB = 1 << 20
SLOW, FAST = 0.1, 1e-5


class RecordingImage(TargetImage):
    """A real image that remembers what was prefetched."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd, size, readonly=True)
        self.prefetched: List[Tuple[int, int]] = []

    def prefetch(self, offset: int, length: int) -> None:
        super().prefetch(offset, length)
        self.prefetched.append((offset, length))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RecordingImage]:
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
    source = TargetSource(str(path), readonly=True)
    plain = source.open(Scoreboard(create_scoreboard(1)))
    yield RecordingImage(plain.fd, source.size)
    plain.close()


@pytest.fixture
def ahead(disk: RecordingImage) -> PagePrefetch:
    """Whoever asks has read pages since the last time."""
    return PagePrefetch(disk, pages_read=count().__next__)


def test_nothing_is_announced_while_replies_leave_fast(ahead: PagePrefetch) -> None:
    for _ in range(100):
        ahead.sent(64, 64 * 4096, FAST)
        assert not ahead.active


def test_a_slow_batch_turns_it_on_and_fast_ones_turn_it_off_again(ahead: PagePrefetch) -> None:
    ahead.sent(2, 4096, SLOW)
    assert ahead.active
    for _ in range(100):
        ahead.sent(2, 4096, FAST)
    assert not ahead.active


def test_a_batch_that_was_slow_without_reading_pages_turns_nothing_on(disk: RecordingImage) -> None:
    ahead = PagePrefetch(disk)
    ahead.sent(2, 4096, SLOW)
    ahead.sent(2, 4096, SLOW)
    assert not ahead.active


def test_pages_that_are_read_for_a_send_count(tmp_path: Path) -> None:
    path, (reading, writing) = tmp_path / "disk.img", os.pipe()
    path.write_bytes(bytes(MIB))
    with open(path, "rb") as file, open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        os.fsync(file.fileno())
        mapping = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        before = pages_read()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pipe.write(mapping[:4096])
            assert pages_read() > before
        else:
            pytest.skip("this file system has all of its pages in memory")


def test_many_large_replies_may_take_their_time(ahead: PagePrefetch) -> None:
    ahead.sent(1000, 4 * MIB, 0.01)
    assert not ahead.active


def test_scattered_reads_are_announced_as_they_are(disk: RecordingImage, ahead: PagePrefetch) -> None:
    reads = [(30 * MIB, 4096), (5 * MIB, 512), (50 * MIB, 8192)]
    for offset, length in reads:
        ahead.announce(offset, length)
    assert disk.prefetched == reads


def test_a_sequential_reader_stays_behind_what_is_announced(disk: RecordingImage, ahead: PagePrefetch) -> None:
    step = 128 << 10
    for offset in range(0, 64 * MIB, step):
        ahead.announce(offset, step)
        assert max(start + length for start, length in disk.prefetched) >= min(offset + step + MIB, 64 * MIB)
    assert len(disk.prefetched) < 64 * MIB // MIB + 2
    covered = sorted(disk.prefetched)
    assert covered[0][0] == 0
    assert all(left[0] + left[1] == right[0] for left, right in zip(covered, covered[1:]))
    assert covered[-1][0] + covered[-1][1] == 64 * MIB
