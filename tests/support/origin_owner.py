"""What a proxy does with a connection to an origin, for tests: the poll loop, and a sink that keeps everything."""

from __future__ import annotations

import select
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Tuple, Type

import pytest

from xnbd.origin.address import parse_origin
from xnbd.origin.base import Data, OriginLost, Terms
from xnbd.origin.nbd.connection import OriginConnection

PATIENCE = 30.0


class Owner:
    """The poll loop, and a sink that keeps everything and checks the order of calls."""

    def __init__(self, uri: str, **options: Any) -> None:
        connection = parse_origin(uri).open(self, Terms(**options))
        assert isinstance(connection, OriginConnection)
        self.connection = connection
        self.data: Dict[Any, Dict[int, bytes]] = {}
        self.holes: List[Tuple[int, int]] = []
        self.extents: Dict[Any, List[Tuple[int, bool]]] = {}
        self.done: Dict[Any, int] = {}

    def on_data(self, token: Any, offset: int, data: Data) -> None:
        assert token not in self.done
        self.data.setdefault(token, {})[offset] = bytes(data)

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        self.holes.append((offset, length))
        self.on_data(token, offset, memoryview(bytes(length)))

    def on_extents(self, token: Any, extents: List[Tuple[int, bool]]) -> None:
        assert token not in self.done
        self.extents.setdefault(token, []).extend(extents)

    def on_done(self, token: Any, error: int) -> None:
        assert token not in self.done
        self.done[token] = error

    def content(self, token: Any) -> bytes:
        """What came for a READ that is done, its pieces in the order of their offsets, without gaps."""
        assert self.done[token] == 0
        pieces = sorted(self.data[token].items())
        for (offset, data), (following, _) in zip(pieces, pieces[1:]):
            assert offset + len(data) == following
        return b"".join(data for _, data in pieces)

    def turn(self, wait: float = PATIENCE) -> None:
        """Once around the loop. Raises `OriginLost`."""
        connection = self.connection
        poll = select.poll()
        poll.register(connection.fileno(), connection.events())
        if connection.deadline is not None:
            wait = min(wait, max(0.0, connection.deadline - time.monotonic()) + 0.001)
        for _, mask in poll.poll(wait * 1000):
            connection.on_events(mask)
        connection.on_time()

    def run_until(self, condition: Callable[[], bool]) -> Owner:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, "the origin took too long"
            self.turn()
        return self

    def connect(self) -> Owner:
        self.connection.start()
        return self.run_until(lambda: self.connection.ready)

    def finish(self) -> Owner:
        """Until nothing is outstanding."""
        return self.run_until(lambda: not self.connection.outstanding)

    def lost(self) -> str:
        """Wait for the loss of the connection; its message."""
        with pytest.raises(OriginLost) as loss:
            self.run_until(lambda: False)
        assert self.connection.fileno() == -1
        assert self.connection.events() == 0
        assert self.connection.deadline is None
        self.connection.on_events(select.POLLIN)
        self.connection.on_time()
        return str(loss.value)


Own = Callable[..., Owner]


@contextmanager
def owners() -> Iterator[Own]:
    """What makes owners; their connections are closed at the end."""
    made: List[Owner] = []

    def make(uri: str, kind: Type[Owner] = Owner, **options: Any) -> Owner:
        made.append(kind(uri, **options))
        return made[-1]

    yield make
    for owner in made:
        owner.connection.close()
