"""The shortest way through: connect, read, write, leave."""

from __future__ import annotations

from pathlib import Path

from rawclient import RawClient
from server_process import Server


def test_what_is_written_is_read_back_and_lands_in_the_image(server: Server, image: Path) -> None:
    before = image.read_bytes()
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.size == len(before)
        assert client.read(4095, 4098) == before[4095 : 4095 + 4098]
        assert client.write(5, b"hello") == 0
        assert client.read(4, 7) == before[4:5] + b"hello" + before[10:11]
    assert image.read_bytes() == before[:5] + b"hello" + before[10:]
