"""Connections to origins that lie, stall, are cut or do what is unusual, and the parser of replies alone."""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import lying_origin as lie
import pytest
from conftest import MIB
from hypothesis import given
from hypothesis import strategies as st
from lying_origin import Asked, LyingOrigin, Visitor, data_chunk, hole_chunk, simple, status_chunk
from origin_owner import PATIENCE, Own, Owner, owners
from server_process import wait_until

from xnbd.errors import ProtocolError
from xnbd.origin.base import Data, OriginLost
from xnbd.origin.nbd.connection import OriginConnection
from xnbd.origin.nbd.replies import ReplyParser

KIB = 1 << 10
SIZE = 8 * MIB + 1536


@pytest.fixture
def own() -> Iterator[Own]:
    with owners() as make:
        yield make


# Lying origins


def answer_all(reply: Callable[[Asked], bytes], *, structured: bool = True) -> lie.Behaviour:
    """An honest handshake, then *reply* to every request."""

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE, structured=structured)
        while True:
            visitor.send(reply(visitor.request()))

    return behave


def disk_bytes(asked: Asked) -> bytes:
    return random.Random(asked.offset).randbytes(asked.length)


def in_pieces(*pieces: Tuple[int, int]) -> Callable[[Asked], bytes]:
    """A reply in data chunks: offset from the request's start, and length of each."""

    def reply(asked: Asked) -> bytes:
        chunks = [data_chunk(asked.cookie, asked.offset + start, bytes(length), 0) for start, length in pieces]
        return b"".join(chunks) + lie.chunk(asked.cookie, lie.NONE)

    return reply


OFFSET, LENGTH = 64 * KIB, 8 * KIB
NOT_OURS = "does not belong in the reply, or came twice"
Reply = Callable[[Asked], bytes]

LIES: Dict[str, Tuple[str, Reply]] = {
    "wrong magic": ("wrong reply magic", lambda a: b"\1" + data_chunk(a.cookie, a.offset, bytes(a.length))),
    "wrong cookie": ("a reply to no request", lambda a: data_chunk(a.cookie + 1, a.offset, bytes(a.length))),
    "simple with wrong cookie": ("a reply to no request", lambda a: simple(a.cookie + 1, error=5) + bytes(8)),
    "chunk before the request": (NOT_OURS, in_pieces((-512, LENGTH))),
    "chunk after the request": (NOT_OURS, in_pieces((LENGTH, 512))),
    "chunk beyond its end": (NOT_OURS, in_pieces((512, LENGTH))),
    "chunk far away": (NOT_OURS, lambda a: data_chunk(a.cookie, (1 << 64) - 1, bytes(a.length))),
    "too much": (NOT_OURS, in_pieces((0, LENGTH + 1))),
    "overlapping chunks": (NOT_OURS, in_pieces((0, 4096), (4095, 4097))),
    "overlapping chunks, last first": (NOT_OURS, in_pieces((4096, 4096), (0, 4097))),
    "a chunk twice": (NOT_OURS, in_pieces((0, 4096), (0, 4096))),
    "hole over data": (
        NOT_OURS,
        lambda a: data_chunk(a.cookie, a.offset, bytes(8), 0) + hole_chunk(a.cookie, a.offset, a.length),
    ),
    "hole beyond the end": (NOT_OURS, lambda a: hole_chunk(a.cookie, a.offset, a.length + 1)),
    "hole of 4 GiB": (NOT_OURS, lambda a: hole_chunk(a.cookie, a.offset, 0xFFFFFFFF)),
    "empty hole": (NOT_OURS, lambda a: hole_chunk(a.cookie, a.offset, 0)),
    "empty chunk": ("no place in this reply", lambda a: data_chunk(a.cookie, a.offset, b"")),
    "chunk without offset": ("no place in this reply", lambda a: lie.chunk(a.cookie, lie.OFFSET_DATA, bytes(7))),
    "hole of wrong length": ("no place in this reply", lambda a: lie.chunk(a.cookie, lie.OFFSET_HOLE, bytes(13))),
    "chunk of 4 GiB": (
        NOT_OURS,
        lambda a: struct.pack(">IHHQIQ", 0x668E33EF, 1, lie.OFFSET_DATA, a.cookie, 0xFFFFFFFF, a.offset),
    ),
    "nothing at all": ("ends before all of it has come", lambda a: lie.chunk(a.cookie, lie.NONE)),
    "short reply": ("ends before all of it has come", in_pieces((0, LENGTH - 1))),
    "gap": ("ends before all of it has come", in_pieces((0, 4095), (4096, 4096))),
    "done too early": ("ends before all of it has come", lambda a: data_chunk(a.cookie, a.offset, bytes(512))),
    "none with data": ("no place in this reply", lambda a: lie.chunk(a.cookie, lie.NONE, b"x")),
    "none that is not the last": ("no place in this reply", lambda a: lie.chunk(a.cookie, lie.NONE, flags=0)),
    "unknown type": ("no place in this reply", lambda a: lie.chunk(a.cookie, 99, bytes(8))),
    "block status": ("no place in this reply", lambda a: status_chunk(a.cookie, (a.length, 0))),
    "simple reply": ("a simple reply where", lambda a: simple(a.cookie, bytes(a.length))),
    "error zero": ("error chunk of", lambda a: lie.error_chunk(a.cookie, 0)),
    "short error": ("no place in this reply", lambda a: lie.chunk(a.cookie, lie.ERROR, b"\0\0\0\5\0")),
    "error with long text": ("error chunk of", lambda a: lie.chunk(a.cookie, lie.ERROR, b"\0\0\0\5\0\1")),
    "error of a megabyte": ("no place in this reply", lambda a: lie.error_chunk(a.cookie, 5)[:16] + b"\0\x10\0\0"),
    "shutdown": ("it is shutting down", lambda a: lie.error_chunk(a.cookie, 108)),
    "goes away": ("closed the connection", lambda a: data_chunk(a.cookie, a.offset, bytes(a.length))[:-1]),
}


def lost_to(own: Own, origin: LyingOrigin, ask: Callable[[OriginConnection], None]) -> Tuple[Owner, str]:
    owner = own(origin.uri).connect()
    ask(owner.connection)
    return owner, owner.lost()


def tell_then_close(reply: Reply, *, structured: bool = True) -> lie.Behaviour:
    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE, structured=structured)
        visitor.send(reply(visitor.request()))

    return behave


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_data_ends_the_connection_and_nothing_is_done(own: Own, tmp_path: Path, name: str) -> None:
    message, reply = LIES[name]
    with LyingOrigin(tmp_path / "s", tell_then_close(reply)) as origin:
        owner, lost = lost_to(own, origin, lambda connection: connection.read("token", OFFSET, LENGTH))
    assert message in lost
    assert lost.startswith(f"origin {origin.uri}: ")
    assert owner.done == {}
    assert owner.connection.unfinished() == ["token"]


STATUS_LIES: Dict[str, Tuple[str, Reply]] = {
    "wrong context": ("not asked for", lambda a: status_chunk(a.cookie, (a.length, 0), context=99)),
    "twice": ("not asked for", lambda a: status_chunk(a.cookie, (512, 0), flags=0) + status_chunk(a.cookie, (512, 0))),
    "empty extent": ("empty extent", lambda a: status_chunk(a.cookie, (0, 0))),
    "beyond the request": ("beyond the request", lambda a: status_chunk(a.cookie, (a.length, 0), (512, 3))),
    "no extent": ("a block status of 4 bytes", lambda a: status_chunk(a.cookie)),
    "half an extent": ("a block status of 8 bytes", lambda a: lie.chunk(a.cookie, lie.STATUS, bytes(8))),
    "nothing": ("a block status of 0 bytes", lambda a: lie.chunk(a.cookie, lie.STATUS)),
    "too many extents": (
        "a block status of 8388620 bytes",
        lambda a: struct.pack(">IHHQI", 0x668E33EF, 1, lie.STATUS, a.cookie, 4 + 8 * (MIB + 1)),
    ),
    "none": ("ends before all of it has come", lambda a: lie.chunk(a.cookie, lie.NONE)),
    "data": ("no place in this reply", lambda a: data_chunk(a.cookie, a.offset, bytes(a.length))),
    "simple reply": ("a simple reply where", lambda a: simple(a.cookie) + bytes(8)),
}


@pytest.mark.parametrize("name", STATUS_LIES)
def test_a_lie_about_holes_ends_the_connection_and_nothing_is_done(own: Own, tmp_path: Path, name: str) -> None:
    message, reply = STATUS_LIES[name]
    with LyingOrigin(tmp_path / "s", tell_then_close(reply)) as origin:
        owner, lost = lost_to(own, origin, lambda connection: connection.query_extents("token", OFFSET, LENGTH))
    assert message in lost
    assert owner.done == {}
    assert owner.connection.unfinished() == ["token"]


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ("wrong reply magic 0x668e33ef", lambda a: data_chunk(a.cookie, a.offset, bytes(a.length))),
        ("wrong reply magic", lambda a: b"\1" + simple(a.cookie, bytes(a.length))),
        ("a reply to no request", lambda a: simple(a.cookie - 1, bytes(a.length))),
        ("closed the connection", lambda a: simple(a.cookie, bytes(a.length - 1))),
    ],
)
def test_lies_in_simple_replies_end_the_connection(own: Own, tmp_path: Path, message: str, reply: Reply) -> None:
    with LyingOrigin(tmp_path / "s", tell_then_close(reply, structured=False)) as origin:
        owner, lost = lost_to(own, origin, lambda connection: connection.read("token", OFFSET, LENGTH))
    assert message in lost
    assert owner.done == {}
    assert owner.connection.unfinished() == ["token"]


@pytest.mark.parametrize("structured", [True, False])
def test_a_second_reply_to_one_request_ends_the_connection(own: Own, tmp_path: Path, structured: bool) -> None:
    def reply(asked: Asked) -> bytes:
        data = disk_bytes(asked)
        return 2 * (data_chunk(asked.cookie, asked.offset, data) if structured else simple(asked.cookie, data))

    with LyingOrigin(tmp_path / "s", answer_all(reply, structured=structured)) as origin:
        owner, lost = lost_to(own, origin, lambda connection: connection.read("token", OFFSET, LENGTH))
    assert "a reply to no request" in lost
    assert owner.done == {"token": 0}


@pytest.mark.parametrize("size", [0, 1 << 63, (1 << 64) - 1])
def test_an_impossible_size_ends_the_connection(own: Own, tmp_path: Path, size: int) -> None:
    def behave(visitor: Visitor) -> None:
        visitor.send(lie.oldstyle_greeting(size))
        visitor.wait_until_gone()

    with LyingOrigin(tmp_path / "s", behave) as origin:
        owner = own(origin.uri)
        with pytest.raises(OriginLost, match=f"a disk of {size} bytes is not possible"):
            owner.connect()


def test_an_old_server_that_closes_on_the_export_name_has_none(own: Own, tmp_path: Path) -> None:
    def behave(visitor: Visitor) -> None:
        visitor.send(lie.greeting(0))
        visitor.receive(4)
        visitor.option()

    with LyingOrigin(tmp_path / "s", behave) as origin:
        owner = own(origin.uri.replace("///", "///x"))
        owner.connection.start()
        assert "an export named 'x': it seems to have none" in owner.lost()


# Cuts


def two_replies(first: Asked, second: Asked, structured: bool) -> List[bytes]:
    """Good replies to two reads, the second in several chunks if *structured*."""
    data = disk_bytes(second)
    if not structured:
        return [simple(first.cookie, disk_bytes(first)), simple(second.cookie, data)]
    middle = second.offset + len(data) // 2
    pieces = data_chunk(second.cookie, middle, data[len(data) // 2 :], 0)
    pieces += data_chunk(second.cookie, second.offset, data[: len(data) // 2], 0)
    return [data_chunk(first.cookie, first.offset, disk_bytes(first)), pieces + lie.chunk(second.cookie, lie.NONE)]


@pytest.mark.parametrize("structured", [True, False])
def test_a_cut_at_every_byte_of_a_reply_marks_nothing_done_that_is_not(
    own: Own, tmp_path: Path, structured: bool
) -> None:
    lengths = (40, 60)

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE, structured=structured)
        replies = two_replies(visitor.request(), visitor.request(), structured)
        visitor.send(b"".join(replies)[: origin.visits - 1])

    with LyingOrigin(tmp_path / "s", behave) as origin:
        asked = [Asked(0, 0, token + 1, 4096 * token, lengths[token]) for token in (0, 1)]
        first, second = map(len, two_replies(asked[0], asked[1], structured))
        for cut in range(first + second):
            owner = own(origin.uri).connect()
            for token, request in enumerate(asked):
                owner.connection.read(token, request.offset, request.length)
            assert "closed the connection" in owner.lost()
            complete = [0] if cut >= first else []
            assert list(owner.done) == complete
            assert owner.connection.unfinished() == ([1] if complete else [0, 1])
            assert [owner.content(token) for token in complete] == [disk_bytes(asked[token]) for token in complete]
        assert origin.visits == first + second


def test_a_cut_at_every_byte_of_the_handshake_is_a_loss(own: Own, tmp_path: Path) -> None:
    class Cut(Visitor):
        left = 0

        def send(self, data: bytes) -> None:
            self.sock.sendall(data[: self.left])
            self.left -= len(data)
            if self.left < 0:
                raise EOFError

    def behave(visitor: Visitor) -> None:
        cut = Cut(visitor.sock)
        cut.left = origin.visits - 1
        cut.negotiate(SIZE)
        visitor.wait_until_gone()

    with LyingOrigin(tmp_path / "s", behave) as origin:
        for _ in range(500):
            owner = own(origin.uri)
            try:
                owner.connect()
            except OriginLost as loss:
                assert "it closed the connection during the handshake" in str(loss) or "reset" in str(loss)
            else:
                break
    assert 18 + 20 < origin.visits < 500


def test_a_reset_in_the_middle_of_a_reply_is_a_loss(own: Own, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        owner = own(f"nbd://127.0.0.1:{listener.getsockname()[1]}/")
        owner.connection.start()
        visitor = Visitor(listener.accept()[0])
        visitor.send(lie.oldstyle_greeting(SIZE))
        owner.run_until(lambda: owner.connection.ready)
        owner.connection.read("token", 0, 4096)
        owner.connection.on_events(0)
        visitor.send(simple(visitor.request().cookie, bytes(100)))
        visitor.reset()
        assert "Connection reset by peer" in owner.lost()
        assert owner.connection.unfinished() == ["token"]


# Stalls


def test_a_server_that_says_nothing_is_given_up(own: Own, tmp_path: Path) -> None:
    with LyingOrigin(tmp_path / "s", Visitor.wait_until_gone) as origin:
        owner = own(origin.uri, connect_timeout=0.5)
        owner.connection.start()
        assert "the handshake took longer than 0.5 s" in owner.lost()


def test_a_stalled_origin_is_waited_for_unless_there_is_a_limit(own: Own, tmp_path: Path) -> None:
    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        visitor.wait_until_gone()

    with LyingOrigin(tmp_path / "s", behave) as origin:
        patient = own(origin.uri).connect()
        patient.connection.read("token", 0, 4096)
        assert patient.connection.deadline is None
        patient.connection.close()
        assert patient.connection.unfinished() == ["token"]
        hasty = own(origin.uri, reply_timeout=0.3).connect()
        assert hasty.connection.deadline is None
        hasty.connection.read("token", 0, 4096)
        assert "silent for 0.3 s with 1 request waiting" in hasty.lost()
        assert hasty.connection.unfinished() == ["token"]


def test_an_origin_that_reads_no_requests_does_not_stop_the_owner(own: Own, tmp_path: Path) -> None:
    hears = threading.Event()

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE, structured=False)
        assert hears.wait(PATIENCE), "the test took too long"
        while True:
            visitor.send(simple(visitor.request().cookie, error=5))

    with LyingOrigin(tmp_path / "s", behave) as origin:
        owner = own(origin.uri).connect()
        for token in range(30_000):
            owner.connection.read(token, 0, 4096)
        owner.connection.on_events(0)
        assert owner.connection.events() == select.POLLIN | select.POLLOUT
        hears.set()
        owner.finish()
        assert owner.done == dict.fromkeys(range(30000), errno.EIO)
        assert owner.connection.events() == select.POLLIN


# Honest, but unusual


def with_replies(own: Own, tmp_path: Path, reply: Reply, *asks: Tuple[int, int], structured: bool = True) -> Owner:
    """All of *asks* read from an origin that gives *reply* to each; tokens count from 0."""
    with LyingOrigin(tmp_path / "s", answer_all(reply, structured=structured)) as origin:
        owner = own(origin.uri).connect()
        for token, (offset, length) in enumerate(asks):
            owner.connection.read(token, offset, length)
        owner.finish().connection.close()
    return owner


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("error", "told"), [(1, 1), (5, 5), (12, 12), (22, 22), (28, 28), (75, 75), (95, 95), (2, 5)])
def test_errors_are_told_by_number(own: Own, tmp_path: Path, structured: bool, error: int, told: int) -> None:
    def reply(asked: Asked) -> bytes:
        if asked.offset:
            return simple(asked.cookie, error=error)
        return lie.error_chunk(asked.cookie, error, b"sorry") if structured else simple(asked.cookie, error=error)

    assert with_replies(own, tmp_path, reply, (0, 512), (512, 512), structured=structured).done == {0: told, 1: told}


def test_an_error_in_the_middle_of_a_structured_reply_is_the_requests_end(own: Own, tmp_path: Path) -> None:
    def reply(asked: Asked) -> bytes:
        at = struct.pack(">IHQ", 28, 0, asked.offset)
        first = data_chunk(asked.cookie, asked.offset, bytes(512), 0)
        return first + lie.chunk(asked.cookie, lie.ERROR_OFFSET, at, 0) + lie.error_chunk(asked.cookie, 5)

    assert with_replies(own, tmp_path, reply, (0, 4096), (0, 4096)).done == {0: errno.ENOSPC, 1: errno.ENOSPC}


def test_chunks_in_any_order_are_a_good_reply(own: Own, tmp_path: Path) -> None:
    def reply(asked: Asked) -> bytes:
        data, at, cookie = disk_bytes(asked), asked.offset, asked.cookie
        starts = random.Random(at).sample(range(0, asked.length, 1000), -(-asked.length // 1000))
        return b"".join(data_chunk(cookie, at + s, data[s : s + 1000], s == starts[-1]) for s in starts)

    owner = with_replies(own, tmp_path, reply, (0, 30_000), (77, 1_234_567))
    assert owner.content(0) == random.Random(0).randbytes(30_000)
    assert owner.content(1) == random.Random(77).randbytes(1_234_567)


def test_replies_in_any_order_find_their_requests(own: Own, tmp_path: Path) -> None:
    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        asked = [visitor.request() for _ in range(20)]
        random.Random(1).shuffle(asked)
        visitor.send(b"".join(data_chunk(a.cookie, a.offset, disk_bytes(a)) for a in asked))
        visitor.wait_until_gone()

    with LyingOrigin(tmp_path / "s", behave) as origin:
        owner = own(origin.uri).connect()
        for token in range(20):
            owner.connection.read(token, token * 8192, 8192)
        owner.finish()
        assert [owner.content(t) for t in range(20)] == [random.Random(t * 8192).randbytes(8192) for t in range(20)]


def test_a_block_status_with_very_many_extents_is_taken_as_it_comes(own: Own, tmp_path: Path) -> None:
    extents = [(512, n & 2) for n in range(300_000)]

    with LyingOrigin(tmp_path / "s", answer_all(lambda asked: status_chunk(asked.cookie, *extents))) as origin:
        owner = own(origin.uri).connect()
        owner.connection.query_extents(0, 0, 300_000 * 512)
        assert owner.finish().extents[0] == [(length, bool(flags)) for length, flags in extents]


def test_the_last_extent_may_go_beyond_the_request_and_is_told_up_to_there(own: Own, tmp_path: Path) -> None:
    with LyingOrigin(tmp_path / "s", answer_all(lambda a: status_chunk(a.cookie, (512, 0), (1 << 30, 3)))) as origin:
        owner = own(origin.uri).connect()
        owner.connection.query_extents(0, 0, 8192)
        assert owner.finish().extents[0] == [(512, False), (7680, True)]


def test_a_sink_may_ask_for_more_when_a_request_is_done(own: Own, tmp_path: Path) -> None:
    class Chain(Owner):
        def on_done(self, token: Any, error: int) -> None:
            super().on_done(token, error)
            if token < 99:
                self.connection.read(token + 1, 0, 512)

    with LyingOrigin(tmp_path / "s", answer_all(lambda a: data_chunk(a.cookie, 0, bytes(512)))) as origin:
        owner = own(origin.uri, Chain).connect()
        owner.connection.read(0, 0, 512)
        owner.finish()
        assert owner.done == dict.fromkeys(range(100), 0)


def test_leaving_is_announced(own: Own, tmp_path: Path) -> None:
    heard: List[bytes] = []

    def behave(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        heard.append(visitor.receive(28))

    with LyingOrigin(tmp_path / "s", behave) as origin:
        own(origin.uri).connect().connection.close()
        wait_until(lambda: bool(heard), "the farewell")
    assert struct.unpack(">IHH", heard[0][:8]) == (0x25609513, 0, 2)


# The parser alone


class Calls:
    """A sink that puts data together, however it was cut."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.others: List[object] = []

    def on_data(self, token: Any, offset: int, data: Data) -> None:
        self.data += data

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        self.others.append(("hole", token, offset, length))

    def on_extents(self, token: Any, extents: List[Tuple[int, bool]]) -> None:
        self.others += [("extent", token, extent) for extent in extents]

    def on_done(self, token: Any, error: int) -> None:
        self.others.append((token, error))


def feed(replies: ReplyParser, stream: bytes, cuts: Optional[List[int]] = None) -> None:
    """Let *replies* have the *stream*, cut at *cuts*, what it left in front of what comes next."""
    rest = b""
    edges = [0, *sorted(cuts or []), len(stream)]
    for start, end in zip(edges, edges[1:]):
        rest += stream[start:end]
        rest = rest[replies.parse(memoryview(rest), len(rest)) :]
    assert not rest


def read_and_status() -> Tuple[Calls, ReplyParser]:
    calls = Calls()
    replies = ReplyParser(calls)
    replies.agree(True, lie.CONTEXT)
    for token, length in enumerate([9000, 300_000, 5000]):
        replies.ask_read(token, token << 20, length)
    replies.ask_block_status(3, 0, 4096)
    replies.ask_read(4, 0, 512)
    return calls, replies


NOISE = random.Random(5).randbytes(300_000)
STREAM = (
    data_chunk(2, MIB, NOISE)
    + data_chunk(1, 0, NOISE[:5000], 0)
    + status_chunk(4, (1024, 3), (1024, 0), (2048, 3), flags=0)
    + hole_chunk(1, 5000, 4000, 0)
    + data_chunk(3, 2 << 20, NOISE[:5000])
    + lie.chunk(4, lie.NONE)
    + lie.chunk(1, lie.NONE)
    + simple(5, error=5)
)


@given(st.lists(st.one_of(st.integers(0, len(STREAM)), st.integers(len(STREAM) - 5400, len(STREAM))), max_size=30))
def test_however_replies_are_cut_they_mean_the_same(cuts: List[int]) -> None:
    calls, replies = read_and_status()
    feed(replies, STREAM, cuts)
    assert calls.data == NOISE + NOISE[:5000] + NOISE[:5000]
    assert calls.others == [
        (1, 0),
        ("extent", 3, (1024, True)),
        ("extent", 3, (1024, False)),
        ("extent", 3, (2048, True)),
        ("hole", 0, 5000, 4000),
        (2, 0),
        (3, 0),
        (0, 0),
        (4, errno.EIO),
    ]
    assert not replies.pending


def test_a_reply_in_countless_pieces_is_refused() -> None:
    replies = ReplyParser(Calls())
    replies.agree(True, None)
    replies.ask_read(0, 0, MIB)
    with pytest.raises(ProtocolError, match="too many pieces"):
        for offset in range(0, MIB, 2):
            feed(replies, data_chunk(1, offset, b"x", 0))


@given(st.integers(0, len(STREAM) - 1), st.binary(min_size=1, max_size=100))
def test_noise_in_the_stream_is_ignored_data_or_a_protocol_error(place: int, noise: bytes) -> None:
    _, replies = read_and_status()
    stream = STREAM[:place] + noise + STREAM[place + len(noise) :]
    try:
        replies.parse(memoryview(stream), len(stream))
    except ProtocolError as error:
        assert str(error)
