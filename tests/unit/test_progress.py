"""How much of a disk is local, where bits are set and taken back."""

from __future__ import annotations

import os
from typing import Iterator

import pytest
from server_process import wait_until

from xnbd.server.steward.progress import Progress
from xnbd.storage.bitmap import Bitmap, bitmap_size
from xnbd.storage.blocks import BLOCK

LARGE = (4 << 20) * 8 + 100
"""Blocks of a disk whose bitmap is counted by a child."""


@pytest.fixture
def bitmap_fd() -> Iterator[int]:
    fd = os.memfd_create("bitmap")
    yield fd
    os.close(fd)


def bitmap_of(fd: int, blocks: int) -> Bitmap:
    os.ftruncate(fd, bitmap_size(blocks))
    bitmap = Bitmap(fd, blocks)
    bitmap.set(0, blocks)
    return bitmap


@pytest.mark.parametrize("blocks", [5000, LARGE])
def test_blocks_that_are_missing_again_are_told(bitmap_fd: int, blocks: int) -> None:
    bitmap = bitmap_of(bitmap_fd, blocks)
    progress = Progress(bitmap, blocks * BLOCK)
    assert (progress.complete, progress.missing()) == (True, 0)
    bitmap.clear(100, 101)
    wait_until(lambda: not progress.complete, "the look at all of it")
    assert progress.missing() >= 1
    bitmap.clear(50, 51)
    bitmap.set(100, 101)
    assert not progress.complete
    bitmap.set(50, 51)
    assert progress.look_again()


def test_all_of_a_large_disk_shows_on_its_map_though_nothing_was_counted(bitmap_fd: int) -> None:
    assert Progress(bitmap_of(bitmap_fd, LARGE), LARGE * BLOCK).shares(3) == [1.0] * 3
