"""After a kill the pages of a bitmap are looked at when they are used, and what was damaged meanwhile is mended."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from state_files import PAGE_BLOCKS, Cache, set_blocks, written_blocks

from xnbd.errors import ConfigurationError
from xnbd.proxy.state.checkpoint import ProcessState
from xnbd.proxy.state.format import PAGE, layout_of
from xnbd.proxy.state.known import has_cached_blocks

PAGES = 3
BLOCKS = PAGES * PAGE_BLOCKS
LAYOUT = layout_of(BLOCKS * 4096)
HERE = 2 * PAGE_BLOCKS
"""The page whose bits are damaged: eight blocks are clean there, and the next eight written."""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Of a server that was killed when all of its bits were durable, but for one on the first page."""
    cache = Cache(tmp_path, BLOCKS * 4096)
    shared = cache.open()
    with closing(shared.open_process()) as process:
        process.bitmap.set(HERE, HERE + 8)
        process.written.set(HERE + 8, HERE + 16)
        process.bitmap.set(HERE + 8, HERE + 16)
        process.checkpoint(cache.fd)
        process.bitmap.set(100, 101)
    shared.close()
    return cache


@pytest.fixture
def process(cache: Cache) -> Iterator[ProcessState]:
    shared = cache.open(thorough=False)
    with closing(shared), closing(shared.open_process()) as process:
        yield process


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def live(data: bytes) -> Tuple[str, int, bytes]:
    return "bitmap", HERE >> 3, data


def durable(data: bytes) -> Tuple[str, int, bytes]:
    return "state", LAYOUT.durable + (HERE >> 3), data


def marks(data: bytes) -> Tuple[str, int, bytes]:
    return "state", LAYOUT.written + (HERE >> 3), data


def damage(cache: Cache, *where: Tuple[str, int, bytes]) -> None:
    for name, offset, data in where:
        overwrite(cache.bitmap if name == "bitmap" else cache.state, offset, data)


def bits(process: ProcessState) -> List[bytes]:
    """Of the blocks around `HERE`: which are local, and which are written."""
    at = HERE >> 3
    return [process.bitmap.octets[at : at + 3], process.written.octets[at : at + 3]]


CASES = {
    "nothing": ([], b"\xff\xff\0", b"\0\xff\0"),
    "clean and written bits lost": ([live(b"\x0f\x00\0")], b"\x0f\xff\0", b"\0\xff\0"),
    "bits of blocks that never came": ([live(b"\xff\xff\x70")], b"\xff\xff\0", b"\0\xff\0"),
    "bits lost in the durable copy": ([durable(b"\0\0\0")], b"\0\xff\0", b"\0\xff\0"),
    "another bitmap": ([live(b"\xf0\x0f\xaa")], b"\xf0\xff\0", b"\0\xff\0"),
    "marks lost": ([marks(b"\0\x7f\0")], b"\xff\xff\0", b"\xff\xff\0"),
    "marks too many": ([marks(b"\xff\xff\x01")], b"\xff\xff\0", b"\xff\xff\0"),
    "a wrong checksum": ([("state", LAYOUT.sums + 4 * 2, b"no!!")], b"\xff\xff\0", b"\xff\xff\0"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_damaged_is_mended_before_it_is_used(cache: Cache, case: str) -> None:
    harm, local, written = CASES[case]
    damage(cache, *harm)
    shared = cache.open(thorough=False)
    with closing(shared.open_process()) as process:
        process.pages.look(HERE + 5, HERE + 6)
        assert bits(process) == [local, written]
        process.checkpoint(cache.fd)
    shared.close()
    shared = cache.open()  # which would refuse what does not fit
    with closing(shared.open_process()) as process:
        assert bits(process) == [local, written]
    shared.close()


def test_two_wrong_copies_are_an_error_on_their_page_only(cache: Cache) -> None:
    damage(cache, live(b"\xf0\xff\0"), marks(b"\0\x7f\0"))
    shared = cache.open(thorough=False)
    with closing(shared.open_process()) as process:
        process.pages.look(0, PAGE_BLOCKS)
        process.bitmap.set(PAGE_BLOCKS, PAGE_BLOCKS + 1)
        for _ in range(2):
            with pytest.raises(OSError, match="the bitmap was damaged"):
                process.pages.look(HERE - 1, HERE + 1)
        with pytest.raises(OSError, match="the bitmap was damaged"):
            process.bitmap.set(HERE + 100, HERE + 101)
    with pytest.raises(OSError, match="the bitmap was damaged"):
        shared.mark_clean(cache.fd)
    shared.close()
    cache.open(adopt=True).close()


def test_who_has_decided_on_bits_that_are_mended_meanwhile_changes_nothing(cache: Cache) -> None:
    damage(cache, marks(b"\0\x7f\0"))
    shared = cache.open(thorough=False)
    with closing(shared), closing(shared.open_process()) as process:
        with pytest.raises(BlockingIOError):
            process.bitmap.clear(HERE + 15, HERE + 16)
        assert bits(process) == [b"\xff\xff\0", b"\xff\xff\0"]
        process.bitmap.clear(HERE + 15, HERE + 16)


def test_an_end_in_good_order_has_looked_at_all(cache: Cache) -> None:
    damage(cache, live(b"\xff\0\0"))
    shared = cache.open(thorough=False)
    assert shared.mark_clean(cache.fd)
    shared.close()
    shared = cache.open()
    assert set_blocks(shared, BLOCKS) == [100, *range(HERE, HERE + 16)]
    assert written_blocks(shared, BLOCKS) == [*range(HERE + 8, HERE + 16)]
    shared.close()


def test_servers_on_one_cache_share_what_was_looked_at(cache: Cache) -> None:
    first, second = (cache.open(thorough=False) for _ in range(2))
    with closing(first), closing(second), closing(first.open_process()) as one, closing(second.open_process()) as other:
        one.pages.look(HERE, HERE + 1)
        one.bitmap.set(HERE + 99, HERE + 100)
        other.pages.look(HERE, HERE + 1)
        assert list(other.pages.look_at_all())
        assert not list(one.pages.look_at_all())
        assert HERE + 99 in other.bitmap


def test_pages_that_were_changed_last_are_compared_at_once(cache: Cache) -> None:
    overwrite(cache.state, LAYOUT.durable + 2, b"\xff")
    overwrite(cache.state, LAYOUT.written + 2, b"\xff")
    with pytest.raises(ConfigurationError, match="lacks 8"):
        cache.open(thorough=False)


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def test_a_start_after_a_kill_does_not_read_all_of_the_bitmap(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 40)
    shared = cache.open()
    with closing(shared.open_process()) as process:
        process.bitmap.set(0, cache.blocks)
        process.checkpoint(cache.fd)
        process.written.set(7 * PAGE_BLOCKS, 7 * PAGE_BLOCKS + 1)
    shared.close()
    before = bytes_read()
    assert has_cached_blocks(str(cache.bitmap))
    shared = cache.open(thorough=False)
    assert bytes_read() - before < 64 * PAGE
    with closing(shared), closing(shared.open_process()) as process:
        before = bytes_read()
        process.pages.look(9 * PAGE_BLOCKS, 10 * PAGE_BLOCKS)
        assert bytes_read() - before < 4 * PAGE
    os.truncate(tmp_path / "cache", 0)


def test_an_empty_bitmap_is_not_read_to_see_that_it_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 40)
    cache.open().close()
    before = bytes_read()
    assert not has_cached_blocks(str(cache.bitmap))
    assert bytes_read() - before < 64 * PAGE
