"""Range arithmetic, against the obvious definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xnbd.storage import blocks
from xnbd.storage.blocks import BLOCK

SIZES = st.integers(1, 40 * BLOCK)
OFFSETS = st.integers(0, 40 * BLOCK)


@given(SIZES, OFFSETS, OFFSETS)
def test_blocks_touched_and_covered_are_those_that_a_look_at_every_byte_finds(size: int, a: int, b: int) -> None:
    offset, stop = sorted((min(a, size), min(b, size)))
    inside = [
        sum(1 for edge in (start, min(start + BLOCK, size) - 1) if offset <= edge < stop)
        for start in range(0, size, BLOCK)
    ]
    wholly = [
        offset <= start and min(start + BLOCK, size) <= stop
        for start in range(0, blocks.block_count(size) * BLOCK, BLOCK)
    ]
    first, end = blocks.touched(offset, stop - offset)
    touched = set(range(first, end)) if stop > offset else set()
    covered = set(range(*blocks.covered(offset, stop - offset, size))) if stop > offset else set()
    assert covered == {n for n, whole in enumerate(wholly) if whole and stop > offset}
    assert {n for n, edges in enumerate(inside) if edges} <= touched
    assert all(n * BLOCK < stop and offset < (n + 1) * BLOCK for n in touched)


@given(SIZES)
def test_the_blocks_of_a_disk_end_where_the_disk_ends(size: int) -> None:
    count = blocks.block_count(size)
    stops = [blocks.block_stop(n, size) for n in range(count)]
    assert stops[-1] == size
    assert [blocks.block_start(n) for n in range(1, count)] == stops[:-1]


@given(st.integers(0, 200), st.integers(1, 200))
def test_a_bitmap_byte_speaks_for_eight_blocks(first: int, length: int) -> None:
    start, count = blocks.bytes_of(first, first + length)
    assert set(range(start, start + count)) == {n // 8 for n in range(first, first + length)}


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 100))
def test_steps_follow_each_other_and_end_at_multiples(offset: int, length: int, step: int) -> None:
    position = offset
    for at, count in blocks.steps(offset, length, step):
        assert at == position
        assert 0 < count <= step
        position += count
        assert position % step == 0 or position == offset + length
    assert position == offset + length
