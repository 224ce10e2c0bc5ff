"""Clients who read all over a disk and write to some blocks of their own, and know what has to be where.

A client goes on at the next server when its connection breaks. What it was about to write then
may be there or not, which it learns from its next read.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import Callable, Dict, List, Optional, Set

import nbd

BLOCK = 4096
_SPACING = 64
_LONGEST = 24
_PATIENCE = 60.0


def stamp(number: int, block: int, serial: int) -> bytes:
    return struct.pack("<HHIQ", number, 0xA55A, block, serial) * (BLOCK // 16)


class LoadClient(threading.Thread):
    """Client *number* of *count*, of a disk that holds *content* but for what clients write.

    *uri* tells where a server is now. ``trouble`` is what must not be, and ends it.
    """

    def __init__(self, number: int, count: int, content: bytes, uri: Callable[[], str], ends: threading.Event) -> None:
        super().__init__(daemon=True)
        self.trouble: Optional[str] = None
        self.reads = self.breaks = 0
        self._number = number
        self._content = content
        self._uri = uri
        self._ends = ends
        self._rng = random.Random(number)
        blocks = len(content) // BLOCK
        self._others = {block for other in range(count) if other != number for block in lane(other, count, blocks)}
        self._lane = lane(number, count, blocks)
        self._mine: Dict[int, List[bytes]] = {block: [_at(content, block)] for block in self._lane}
        self._serial = 0

    def run(self) -> None:
        try:
            while not self._ends.is_set() and self.trouble is None:
                try:
                    self._work(self._connect())
                except nbd.Error as error:
                    self.breaks += 1
                    if error.errno in ("EIO", "ENOSPC", "EINVAL"):
                        self.trouble = f"client {self._number}: {error}"
        except Exception as error:
            self.trouble = f"client {self._number}: {error!r}"

    def _connect(self) -> nbd.NBD:
        until = time.monotonic() + _PATIENCE
        while True:
            client = nbd.NBD()
            try:
                client.set_uri_allow_local_file(True)
                client.connect_uri(self._uri())
                return client
            except nbd.Error:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def _work(self, client: nbd.NBD) -> None:
        while not self._ends.is_set() and self.trouble is None:
            chance = self._rng.random()
            if chance < 0.15:
                self._write(client)
            elif chance < 0.17:
                client.flush()
            else:
                self._read(client)
        client.shutdown()

    def _write(self, client: nbd.NBD) -> None:
        block = self._rng.choice(self._lane)
        self._serial += 1
        data = stamp(self._number, block, self._serial)
        if self._rng.random() < 0.5 and len(self._mine[block]) == 1:
            data = self._mine[block][0][:1024] + data[1024:]
            self._mine[block].append(data)
            client.pwrite(data[1024:], block * BLOCK + 1024)
        else:
            self._mine[block].append(data)
            client.pwrite(data, block * BLOCK)
        self._mine[block] = [data]

    def _read(self, client: nbd.NBD) -> None:
        blocks = len(self._content) // BLOCK
        count = self._rng.choice((1, 1, 2, _LONGEST))
        first = self._rng.randrange(blocks - count)
        data = bytes(client.pread(count * BLOCK, first * BLOCK))
        self.reads += 1
        self.check(data, first)

    def check(self, data: bytes, first: int) -> None:
        """Compare *data*, which was read from block *first* on."""
        for index in range(len(data) // BLOCK):
            block, found = first + index, _at(data, index)
            if block in self._mine:
                if found not in self._mine[block]:
                    self.trouble = f"client {self._number}: its block {block} holds {found[:16]!r}"
                self._mine[block] = [found]
            elif block not in self._others and found != _at(self._content, block):
                self.trouble = f"client {self._number}: block {block} holds {found[:16]!r}"


def lane(number: int, count: int, blocks: int) -> List[int]:
    """The blocks that a client writes, each between some that nobody does."""
    return list(range(_SPACING * number + 3 + number, blocks, _SPACING * count))


def lanes(count: int, blocks: int) -> Set[int]:
    """All blocks that some client writes."""
    return {block for number in range(count) for block in lane(number, count, blocks)}


def _at(data: bytes, block: int) -> bytes:
    return data[block * BLOCK : (block + 1) * BLOCK]
