"""What is made of what Ceph tells: where zeros are, what a clone stands on, and whether that is still there."""

from __future__ import annotations

import random
from typing import Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.origin.base import OriginLost
from xnbd.origin.rbd.disk import extents_between, reason
from xnbd.origin.rbd.lineage import Parent, is_kept, is_there, parse_parent, parse_snapshot, parse_time
from xnbd.origin.rbd.origin import is_zero

K = 1 << 10


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


# Answers of Ceph 16


ORPHAN = bytes.fromhex("010118000000ffffffffffffffff0000000000000000feffffffffffffff")
CHILD = bytes.fromhex("01012700000001000000000000000300000061c3a90c000000") + b"1011ef350c00" + bytes([4, *bytes(7)])


def test_what_a_clone_stands_on_is_in_its_header() -> None:
    assert parse_parent(ORPHAN) is None
    assert parse_parent(CHILD) == Parent(1, "aé", "1011ef350c00", 4)
    for answer in (b"", CHILD[:-1], CHILD[:20], CHILD.replace(b"\xc3", b"\xff")):
        with pytest.raises(OriginLost, match="header is not understood"):
            parse_parent(answer)


def test_the_last_write_is_told_in_utc() -> None:
    assert f"{parse_time(bytes.fromhex('b6780c6b887aaa39')):%Y-%m-%dT%H:%M:%S%z}" == "2026-11-29T19:10:46+0000"
    with pytest.raises(OriginLost, match="header is not understood"):
        parse_time(b"")


def snapshot(kind: int, rest: bytes, children: int) -> bytes:
    namespace = bytes([1, 1, 4 + len(rest), 0, 0, 0, kind, 0, 0, 0]) + rest
    body = bytes([4, *bytes(7)]) + namespace + b"\4\0\0\0snap" + b"s" * 8 + b"t" * 8 + bytes([children, 0, 0, 0])
    return bytes([1, 1, len(body), 0, 0, 0]) + body


@pytest.mark.parametrize(
    ("answer", "parsed", "kept", "there"),
    [
        (snapshot(0, b"", 0), (False, 0), True, True),
        (snapshot(0, b"", 3), (False, 3), True, True),
        (snapshot(2, b"\4\0\0\0snap" + bytes(4), 2), (True, 2), False, True),
        (snapshot(2, b"\4\0\0\0snap" + bytes(4), 0), (True, 0), False, False),
        (snapshot(3, b"of a mirror", 0) + b"and what is to come", (False, 0), True, True),
    ],
)
def test_a_snapshot_in_the_trash_is_there_as_long_as_it_has_clones(
    answer: bytes, parsed: Tuple[bool, int], kept: bool, there: bool
) -> None:
    assert parse_snapshot(answer) == parsed
    assert is_kept(answer) is kept
    assert is_there(answer) is there


@pytest.mark.parametrize("length", [0, 19, 51])
def test_what_is_not_understood_is_not_there(length: int) -> None:
    assert not is_kept(snapshot(0, b"", 0)[:length])
    assert not is_there(snapshot(0, b"", 0)[:length])
