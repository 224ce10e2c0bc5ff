"""Replies on their way out when the kernel cannot read some of their data, over a real socket and a real mapping."""

from __future__ import annotations

import mmap
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Tuple

import pytest
from rawclient import RawClient

from xnbd.errors import Disconnected, ProtocolError
from xnbd.protocol import transmission as wire
from xnbd.protocol.reply_format import reply_format
from xnbd.server.process_loop import ProcessLoop
from xnbd.server.session.connection import Connection
from xnbd.server.session.replies import Replies

EIO = 5
PAGE = mmap.PAGESIZE
GOOD = memoryview(b"\x0d" * PAGE)

Ends = Tuple[RawClient, Replies]


@pytest.fixture
def loop() -> ProcessLoop:
    return ProcessLoop(handle_signals=False)


@pytest.fixture
def ends(loop: ProcessLoop) -> Iterator[Ends]:
    """A client, and the simple replies that go to it."""
    with connected(loop, structured=False) as both:
        yield both


@pytest.fixture
def structured_ends(loop: ProcessLoop) -> Iterator[Ends]:
    """A client, and the structured replies that go to it."""
    with connected(loop, structured=True) as both:
        yield both


@contextmanager
def connected(loop: ProcessLoop, *, structured: bool) -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with RawClient(ours) as client, theirs:
        yield client, Replies(Connection(theirs, loop), reply_format(structured=structured))


def mapped(path: Path, size: int, left: int) -> memoryview:
    """A mapping of a file of *size* bytes that was cut off afterwards: only *left* bytes can be read."""
    path.write_bytes(b"\x0d" * size)
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        file.truncate(left)
    return memoryview(mapping)


@pytest.fixture
def gone(tmp_path: Path) -> memoryview:
    """Eight pages of which none can be read."""
    return mapped(tmp_path / "gone", 8 * PAGE, 0)


def cookie(number: int) -> bytes:
    return number.to_bytes(8, "big")


def test_simple_reply_that_cannot_be_read_is_an_error_and_the_others_are_intact(ends: Ends, gone: memoryview) -> None:
    client, replies = ends
    for number, data in enumerate((GOOD, gone, GOOD, gone[PAGE:], gone[:1], GOOD)):
        replies.pieces += [wire.OK_PREFIX + cookie(number), data]
    replies.send()
    assert not replies.pieces
    for number, good in enumerate((True, False, True, False, False, True)):
        expected = (0, number, bytes(GOOD)) if good else (EIO, number, b"")
        assert client.simple_reply(PAGE) == expected


def test_chunk_that_cannot_be_read_is_an_error_chunk_and_the_others_are_intact(
    structured_ends: Ends, gone: memoryview
) -> None:
    client, replies = structured_ends
    for number, data in enumerate((GOOD, gone, GOOD)):
        replies.pieces += [wire.pack_data_chunk(cookie(number), number << 20, len(data)), data]
    replies.send()
    for number in range(3):
        (chunk,) = client.chunks()
        assert chunk.cookie == number
        assert chunk.kind == (0x8001 if number == 1 else 1)
        if number == 1:
            assert int.from_bytes(chunk.payload[:4], "big") == EIO
        else:
            assert chunk.payload == (number << 20).to_bytes(8, "big") + bytes(GOOD)


@pytest.mark.parametrize("flags", [0, 1])
def test_error_chunk_ends_the_reply_only_if_its_data_would_have(
    structured_ends: Ends, gone: memoryview, flags: int
) -> None:
    client, replies = structured_ends
    replies.pieces += [wire.pack_data_chunk(cookie(1), 0, len(gone), flags), gone]
    replies.send()
    chunk = client.chunk()
    assert (chunk.flags, chunk.kind) == (flags, 0x8001)


def test_reply_of_several_pieces_is_an_error_if_one_of_them_cannot_be_read(ends: Ends, gone: memoryview) -> None:
    client, replies = ends
    replies.pieces += [wire.OK_PREFIX + cookie(1), GOOD, gone, GOOD, wire.OK_PREFIX + cookie(2)]
    replies.send()
    assert client.simple_reply()[:2] == (EIO, 1)
    assert client.simple_reply()[:2] == (0, 2)


@pytest.mark.parametrize("left", [1, 7])
def test_reply_of_which_only_the_first_pages_can_be_read_is_an_error(ends: Ends, tmp_path: Path, left: int) -> None:
    client, replies = ends
    replies.pieces += [wire.OK_PREFIX + cookie(1), mapped(tmp_path / "part", 8 * PAGE, left * PAGE)]
    replies.pieces += [wire.OK_PREFIX + cookie(2), GOOD]
    replies.send()
    assert client.simple_reply() == (EIO, 1, b"")
    assert client.simple_reply(PAGE) == (0, 2, bytes(GOOD))


def test_replies_without_data_around_an_unreadable_one_are_intact(ends: Ends, gone: memoryview) -> None:
    client, replies = ends
    done = [wire.OK_PREFIX + cookie(number) for number in (1, 3)]
    replies.pieces += [done[0], wire.OK_PREFIX + cookie(2), gone, done[1]]
    replies.send()
    assert [client.simple_reply()[:2] for _ in range(3)] == [(0, 1), (EIO, 2), (0, 3)]


def test_reply_that_has_begun_and_cannot_be_finished_ends_the_connection(ends: Ends, tmp_path: Path) -> None:
    client, replies = ends
    half = mapped(tmp_path / "half", 32 * PAGE, 16 * PAGE)
    replies.pieces += [wire.OK_PREFIX + cookie(1), half, wire.OK_PREFIX + cookie(2)]
    with pytest.raises(ProtocolError, match="has begun"):
        replies.send()
    assert client.receive(16) == wire.OK_PREFIX + cookie(1)
    assert client.receive(PAGE) == bytes(GOOD)


def test_client_that_has_gone_is_no_reply_s_fault(ends: Ends) -> None:
    client, replies = ends
    client.sock.close()
    replies.pieces += [wire.OK_PREFIX + cookie(1), GOOD]
    with pytest.raises(Disconnected):
        replies.send()
