"""What has come from a client and is still to be worked on: whole requests, and the beginning of another one."""

from __future__ import annotations

import mmap
from typing import Iterator, Tuple

from ...protocol.constants import CMD_READ
from ...protocol.transmission import REQUEST, request_word
from ...storage.blocks import BLOCK
from .connection import Connection

BUFFER_SIZE = 1 << 20
"""Bytes received at once: many small requests, or several large writes."""


class ReceiveBuffer:
    """One client's bytes that were received and are still to be worked on: ``view`` from ``start`` up to ``end``.

    ``buffer`` is the memory behind ``view``. Whoever receives adds to ``end``, whoever
    takes a request off adds to ``start``.
    """

    def __init__(self, connection: Connection) -> None:
        self._receive_rest = connection.receive_rest
        self.buffer = mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.buffer)
        self.start = self.end = 0

    def room(self) -> memoryview:
        """Where what comes next belongs."""
        if self.start > BUFFER_SIZE // 2:
            self.move_to_front()
        return self.view[self.end :]

    def move_to_front(self) -> None:
        """Make room for more behind what is left."""
        rest = self.end - self.start
        if rest:
            self.view[:rest] = self.view[self.start : self.end]
        self.start, self.end = 0, rest

    def offset_of_read(self, cookie: bytes, length: int) -> int:
        """Of a READ that was worked on, and whose bytes are still there as a rule: its offset, or -1 if they are not.

        Without looking beyond what is certain: cookies may come again.
        """
        beginning = REQUEST.pack(request_word(CMD_READ), cookie, 0, 0)[:16]
        at = self.buffer.find(beginning, 0)
        if at < 0 or at != self.buffer.rfind(beginning) or at + REQUEST.size > BUFFER_SIZE:
            return -1
        _, _, offset, found = REQUEST.unpack_from(self.buffer, at)
        return int(offset) if found == length else -1

    def payload(self, offset: int, length: int) -> Iterator[Tuple[int, memoryview]]:
        """The payload of *length* bytes from ``start`` on, with the offsets where its pieces belong.

        A piece ends at a block's end, so that no block has to be written twice. It has
        to be used before the next one is asked for. Raises like `Connection.receive_rest`.
        """
        view = self.view
        while self.end - self.start < length:
            usable = self.end - self.start
            usable -= (offset + usable) % BLOCK
            if usable > 0:
                yield offset, view[self.start : self.start + usable]
                self.start += usable
                offset += usable
                length -= usable
            self.move_to_front()
            wanted = min(length, len(view))
            while self.end < wanted:
                self.end += self._receive_rest(view[self.end : wanted])
        yield offset, view[self.start : self.start + length]
        self.start += length
