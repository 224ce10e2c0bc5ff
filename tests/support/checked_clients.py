"""Many clients whose every byte is checked, while something happens to the server."""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import Callable, Iterator, List

from rawclient import RawClient

_LANE = 32 << 10
_PIECE = 4096


class CheckedClient:
    """Writes to a lane of its own, the *number*-th of the disk, and reads back what has to be there."""

    def __init__(self, client: RawClient, number: int) -> None:
        self._client = client
        self._start = number * _LANE
        self._random = random.Random(number)
        self._content = bytearray(client.read(self._start, _LANE))
        self.rounds = 0

    def work(self) -> None:
        """One write and one read."""
        at = self._random.randrange(0, _LANE - _PIECE)
        data = self._random.randbytes(_PIECE)
        assert self._client.write(self._start + at, data) == 0
        self._content[at : at + _PIECE] = data
        at = self._random.randrange(0, _LANE - _PIECE)
        assert self._client.read(self._start + at, _PIECE) == self._content[at : at + _PIECE]
        self.rounds += 1

    def check(self) -> None:
        assert self._client.read(self._start, _LANE) == self._content


@contextmanager
def checked_clients(connect: Callable[[], RawClient], count: int) -> Iterator[List[CheckedClient]]:
    """So many clients work until the end, one after the other, in a thread; all of them have to be right to the end."""
    connected = [connect() for _ in range(count)]
    clients = [CheckedClient(client, number) for number, client in enumerate(connected)]
    failures: List[BaseException] = []
    over = threading.Event()

    def work() -> None:
        try:
            while not over.is_set():
                for client in clients:
                    client.work()
        except BaseException as failure:
            failures.append(failure)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield clients
    finally:
        over.set()
        worker.join()
    assert not failures, failures
    for client, connection in zip(clients, connected):
        client.check()
        connection.sock.close()
