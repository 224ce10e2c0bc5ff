"""Whole sessions over a transport that takes much from its socket at once and hands it out in pieces, as TLS has to."""

from __future__ import annotations

import os
import random
import socket
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import MIB, Start
from rawclient import FLUSH, READ, RawClient, pack_request

from xnbd.origin.address import parse_origin
from xnbd.protocol.server_handshake import Agreement
from xnbd.proxy.origin_link import Patience
from xnbd.proxy.source import ProxySettings, ProxySource
from xnbd.proxy.state.opening import open_state
from xnbd.scoreboard.layout import create_scoreboard
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.server.disk import Disk
from xnbd.server.process_loop import ProcessLoop
from xnbd.server.session.connection import Connection
from xnbd.server.session.loop import Session
from xnbd.server.session.parking import QueueLimits
from xnbd.server.session.transport import PlainTransport
from xnbd.storage.image import Source
from xnbd.storage.target import TargetSource

PIECES = (28, 1000, 70_000)
"""Exactly one request without payload; some requests and a part of one; more than most messages."""


NO_LIMITS = QueueLimits()


class BufferingTransport(PlainTransport):
    """Hands out at most *piece* bytes a call of what it has taken from *sock*."""

    def __init__(self, sock: socket.socket, piece: int) -> None:
        super().__init__(sock)
        self._take = self.receive_into
        self._piece = piece
        self._space = memoryview(bytearray(256 << 10))
        self._held = self._space[:0]
        self.receive_into = self._hand_out
        self.pending = self._holds_some

    def _hand_out(self, view: memoryview) -> int:
        if not self._held:
            self._held = self._space[: self._take(self._space)]
        count = min(len(self._held), self._piece, len(view))
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _holds_some(self) -> bool:
        return bool(self._held)


@contextmanager
def session(
    source: Source[Scoreboard], piece: int, spin: float = 0.0, limits: QueueLimits = NO_LIMITS
) -> Iterator[RawClient]:
    """The client of a session on *source*, which runs in a thread and has ended without an error afterwards."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    loop = ProcessLoop(handle_signals=False)
    disk = Disk(source, source.scoreboard_fd or create_scoreboard(4))
    loop.companion = disk
    connection = Connection(theirs, loop, spin)
    connection.use(BufferingTransport(theirs, piece))
    errors: List[BaseException] = []

    def run() -> None:
        try:
            Session(connection, disk, Agreement(), limits).run()
        except BaseException as error:
            errors.append(error)
        finally:
            disk.part()
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with RawClient(ours) as client:
            yield client
    finally:
        thread.join(60)
        disk.close()
    assert not thread.is_alive()
    assert not errors


@pytest.fixture
def disk_image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(5).randbytes(4 * MIB))
    return path


@pytest.fixture
def proxy(start: Start, disk_image: Path, tmp_path: Path) -> Iterator[ProxySource]:
    """A proxy with nothing in its cache, before a server of the disk."""
    origin = start("--target", "--readonly", disk_image)
    cache = os.open(tmp_path / "cache", os.O_RDWR | os.O_CREAT)
    os.ftruncate(cache, 4 * MIB)
    state = open_state(str(tmp_path / "bitmap"), cache, disk_size=4 * MIB, origin=origin.uri, clear=False, adopt=False)
    settings = ProxySettings(str(tmp_path / "cache"), 4 * MIB, False, parse_origin(origin.uri), Patience(), 0)
    with closing(ProxySource(cache, state, settings)) as source:
        yield source


def read_many(client: RawClient, content: bytes, count: int, seed: int) -> None:
    """Sends *count* reads at once, and checks the replies in whatever order they come."""
    wanted = random.Random(seed)
    places = [(wanted.randrange(len(content) - 9000), wanted.randrange(1, 9000)) for _ in range(count)]
    client.send(b"".join(pack_request(READ, at, size, cookie=at << 16 | size) for at, size in places))
    left = set(places)
    for _ in places:
        header = client.receive(16)
        assert header[:8] == bytes.fromhex("67446698 00000000")
        cookie = int.from_bytes(header[8:], "big")
        at, size = cookie >> 16, cookie & 0xFFFF
        assert client.receive(size) == content[at : at + size]
        left.discard((at, size))
    assert not left


def write_some(client: RawClient, content: bytearray) -> None:
    """A short write, one across many blocks, and one too long for the receive buffer; then what they have left."""
    for seed, (at, size) in enumerate([(100, 5), (70_001, 123_456), (MIB - 77, 2 * MIB + 333)]):
        data = random.Random(seed).randbytes(size)
        assert client.write(at, data) == 0
        content[at : at + size] = data
    assert client.works()
    for at in range(0, len(content), MIB):
        assert client.read(at, MIB) == content[at : at + MIB]


@pytest.mark.parametrize("spin", [0.0, 0.001])
@pytest.mark.parametrize("piece", PIECES)
def test_a_target_over_a_transport_that_buffers(disk_image: Path, piece: int, spin: float) -> None:
    content = bytearray(disk_image.read_bytes())
    with closing(TargetSource(str(disk_image), readonly=False)) as source, session(source, piece, spin) as client:
        for seed in range(5):
            read_many(client, bytes(content), 60, seed)
        write_some(client, content)


@pytest.mark.parametrize("piece", PIECES)
def test_requests_that_wait_for_an_origin(proxy: ProxySource, disk_image: Path, piece: int) -> None:
    content = bytearray(disk_image.read_bytes())
    with session(proxy, piece) as client:
        for seed in range(3):
            read_many(client, bytes(content), 60, seed)
        write_some(client, content)


def test_a_client_that_has_to_wait_at_the_limit_of_parked_requests(proxy: ProxySource, disk_image: Path) -> None:
    with session(proxy, 28, limits=QueueLimits(requests=2)) as client:
        read_many(client, disk_image.read_bytes(), 200, 1)


def test_what_was_taken_from_the_socket_is_answered_after_the_client_has_stopped_sending(disk_image: Path) -> None:
    with closing(TargetSource(str(disk_image), readonly=False)) as source, session(source, 28) as client:
        assert client.works()
        client.send(b"".join(pack_request(FLUSH, 0, 0, cookie=number) for number in range(10)))
        client.finish_sending()
        assert [client.simple_reply()[:2] for _ in range(10)] == [(0, number) for number in range(10)]
        assert client.closed()
