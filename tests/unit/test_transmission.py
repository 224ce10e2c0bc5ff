"""Requests, replies and error numbers of the transmission phase, against bytes written by hand."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xnbd.protocol import transmission as wire

COOKIE = b"\xc0\x0c\x1e\x00\xff\x01\x02\x03"


def test_request_is_magic_flags_type_cookie_offset_length() -> None:
    data = bytes.fromhex("25609513 0005 0006") + COOKIE + bytes.fromhex("0000000100000002 00001003")
    word, cookie, offset, length = wire.REQUEST.unpack(data)
    assert wire.split_word(word) == (0x25609513, 5, 6)
    assert (cookie, offset, length) == (COOKIE, 0x100000002, 0x1003)


@pytest.mark.parametrize(
    ("command", "flags", "word"),
    [(0, 0, 0x2560951300000000), (1, 0, 0x2560951300000001), (6, 18, 0x2560951300120006), (7, 8, 0x2560951300080007)],
)
def test_request_word_is_the_first_eight_bytes(command: int, flags: int, word: int) -> None:
    assert wire.request_word(command, flags) == word


@given(st.binary(min_size=8, max_size=8))
def test_any_word_splits_into_its_fields(data: bytes) -> None:
    fields = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:6], "big"), int.from_bytes(data[6:], "big")
    assert wire.split_word(int.from_bytes(data, "big")) == fields


def test_simple_reply() -> None:
    assert wire.pack_simple_reply(COOKIE) == bytes.fromhex("67446698 00000000") + COOKIE
    assert wire.pack_simple_reply(COOKIE, 28) == bytes.fromhex("67446698 0000001c") + COOKIE
    assert wire.pack_simple_reply(COOKIE) == wire.OK_PREFIX + COOKIE


def test_done_chunk_has_the_done_flag_and_no_payload() -> None:
    assert wire.pack_done(COOKIE) == bytes.fromhex("668e33ef 0001 0000") + COOKIE + bytes(4)


def test_data_chunk_counts_its_offset_into_the_length() -> None:
    expected = bytes.fromhex("668e33ef 0001 0001") + COOKIE + bytes.fromhex("00000208 0000000500000006")
    assert wire.pack_data_chunk(COOKIE, 0x500000006, 0x200) == expected
    assert wire.pack_data_chunk(COOKIE, 0x500000006, 0x200, 0)[4:6] == b"\0\0"


def test_hole_chunk() -> None:
    expected = bytes.fromhex("668e33ef 0000 0002") + COOKIE + bytes.fromhex("0000000c 0000000500000006 00010000")
    assert wire.pack_hole_chunk(COOKIE, 0x500000006, 0x10000, 0) == expected


def test_error_chunk_carries_number_and_message() -> None:
    expected = bytes.fromhex("668e33ef 0001 8001") + COOKIE + bytes.fromhex("0000000b 00000016 0005") + b"wrong"
    assert wire.pack_error_chunk(COOKIE, 22, "wrong") == expected


def test_error_chunk_without_message() -> None:
    expected = bytes.fromhex("668e33ef 0000 8001") + COOKIE + bytes.fromhex("00000006 00000005 0000")
    assert wire.pack_error_chunk(COOKIE, 5, flags=0) == expected


def test_error_message_stays_below_the_limit_of_strings() -> None:
    chunk = wire.pack_error_chunk(COOKIE, 5, "x" * 10_000)
    length = int.from_bytes(chunk[16:20], "big")
    assert len(chunk) == 20 + length
    assert length - 6 == int.from_bytes(chunk[24:26], "big") <= 4096


def test_block_status_is_one_chunk_of_context_and_extents() -> None:
    expected = bytes.fromhex("668e33ef 0001 0005") + COOKIE
    expected += bytes.fromhex("00000014 00000001 00001000 00000000 fffff000 00000003")
    assert wire.pack_block_status(COOKIE, 1, [(0x1000, 0), (0xFFFFF000, 3)]) == expected


def test_cookie_stands_at_one_place_in_every_reply() -> None:
    for reply in (
        wire.pack_simple_reply(COOKIE),
        wire.pack_done(COOKIE),
        wire.pack_data_chunk(COOKIE, 1, 2),
        wire.pack_hole_chunk(COOKIE, 1, 2),
        wire.pack_error_chunk(COOKIE, 5),
    ):
        assert reply[wire.COOKIE_IN_REPLY] == COOKIE


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, 1),
        (errno.EACCES, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.EOPNOTSUPP, 95),
        (errno.ENOTSUP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 5),
        (errno.EFAULT, 5),
        (0, 5),
    ],
    ids=lambda number: errno.errorcode.get(number, str(number)),
)
def test_errno_becomes_the_error_that_the_specification_has_for_it(number: int, error: int) -> None:
    assert wire.nbd_error(number) == error


def test_no_errno_becomes_success_or_a_number_the_specification_lacks() -> None:
    known = {1, 5, 12, 22, 28, 75, 95, 108}
    assert {wire.nbd_error(number) for number in range(-1, 4096)} == known
