"""What is made of what librbd tells: which answers are to be doubted, and where the zeros are."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.origin.rbd.disk import extents_between, reason
from xnbd.origin.rbd.origin import has_zero_unit, is_zero

K = 1 << 10


@pytest.mark.parametrize(
    ("data", "offset", "unit", "doubtful"),
    [
        (b"x" * 64 * K, 0, 4096 * K, False),
        (bytes(64 * K), 0, 4096 * K, True),
        (b"x" + bytes(64 * K - 1), 0, 4096 * K, False),
        (bytes(64 * K - 1) + b"x", 0, 4096 * K, False),
        (bytes(32 * K) + b"x" + bytes(32 * K - 2) + b"x", 0, 4096 * K, False),
        (bytes(8 * K) + b"x" * 8 * K, 0, 8 * K, True),
        (b"x" * 8 * K + bytes(8 * K), 0, 8 * K, True),
        (b"x" * 4 * K + bytes(8 * K) + b"x" * 4 * K, 4 * K, 8 * K, True),
        (b"x" * 4 * K + bytes(8 * K) + b"x" * 4 * K, 0, 8 * K, False),
        (b"x" * 4 * K + bytes(1), 4 * K, 8 * K, True),
        (bytes(1), 12345, 512, True),
    ],
)
def test_an_answer_is_doubtful_if_an_object_may_be_missing(data: bytes, offset: int, unit: int, doubtful: bool) -> None:
    assert has_zero_unit(data, offset, unit) is doubtful


def test_zeros_are_zeros() -> None:
    assert is_zero(bytes(1)) and is_zero(bytes(64 * K))
    data = bytearray(64 * K)
    data[random.randrange(len(data))] = 1
    assert not is_zero(bytes(data))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=8), st.integers(0, 99), st.integers(1, 50))
def test_extents_tell_of_each_byte_whether_there_is_data(pairs: list[tuple[int, int]], start: int, length: int) -> None:
    data = sorted((min(pair), max(pair)) for pair in pairs)
    extents = extents_between(data, start, start + length)
    told = [zero for count, zero in extents for _ in range(count)]
    assert told == [not any(begin <= at < end for begin, end in data) for at in range(start, start + length)]


@pytest.mark.parametrize(("number", "text"), [(110, "does not answer"), (108, "shut this client out"), (5, "error")])
def test_errors_are_told_in_words(number: int, text: str) -> None:
    assert text in reason(number)
