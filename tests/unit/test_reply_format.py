"""The formats of replies: what each makes of the same answers."""

from __future__ import annotations

import errno

import pytest

from xnbd.protocol import constants as c
from xnbd.protocol import transmission as wire
from xnbd.protocol.reply_format import reply_format

COOKIE = b"\xc0\x0c\x1e\x00\xff\x01\x02\x03"
SIMPLE, STRUCTURED = reply_format(structured=False), reply_format(structured=True)


def test_commands_that_return_nothing_have_simple_replies_in_both_formats() -> None:
    for replies in (SIMPLE, STRUCTURED):
        assert replies.success(COOKIE) == wire.pack_simple_reply(COOKIE)
        assert replies.error(c.CMD_FLUSH, COOKIE, c.EIO, "lost") == wire.pack_simple_reply(COOKIE, c.EIO)


@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_BLOCK_STATUS])
def test_errors_of_commands_that_return_something_are_chunks_where_there_are_some(command: int) -> None:
    assert SIMPLE.error(command, COOKIE, errno.EINVAL, "wrong") == wire.pack_simple_reply(COOKIE, errno.EINVAL)
    assert STRUCTURED.error(command, COOKIE, errno.EINVAL, "wrong") == wire.pack_error_chunk(COOKIE, 22, "wrong")


def test_only_a_format_with_chunks_has_holes_and_block_status() -> None:
    assert STRUCTURED.chunked
    assert STRUCTURED.hole(COOKIE, 4096, 8192, 0) == wire.pack_hole_chunk(COOKIE, 4096, 8192, 0)
    assert STRUCTURED.block_status(COOKIE, 1, [(512, 3)]) == wire.pack_block_status(COOKIE, 1, [(512, 3)])
    assert not SIMPLE.chunked
    with pytest.raises(TypeError):
        SIMPLE.hole(COOKIE, 4096, 8192, 0)
    with pytest.raises(TypeError):
        SIMPLE.block_status(COOKIE, 1, [(512, 3)])


@pytest.mark.parametrize("flags", [0, c.REPLY_FLAG_DONE])
def test_an_error_takes_the_place_of_data_and_ends_the_reply_where_the_data_would(flags: int) -> None:
    simple, chunk = SIMPLE.data_header(COOKIE, 0, 9), STRUCTURED.data_header(COOKIE, 0, 9, flags)
    assert SIMPLE.error_instead(simple, "gone") == wire.pack_simple_reply(COOKIE, c.EIO)
    assert STRUCTURED.error_instead(chunk, "gone") == wire.pack_error_chunk(COOKIE, c.EIO, "gone", flags)
