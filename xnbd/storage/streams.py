"""Telling sequential readers from others, and how far to read ahead of them.

A reader that goes on where it was gets a window, which doubles whenever half of it
is used up. To notice that, the bytes of the bitmap that speak for a window are
marked: a read of local blocks costs one look into that table.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from .blocks import BLOCKS_PER_BYTE

_READERS = 8
_FIRST_WINDOW = 32


class Stream:
    """A reader whose next block is *next*; blocks up to *reach* are asked for already."""

    __slots__ = ("begin", "next", "reach", "window")

    def __init__(self, end: int, window: int) -> None:
        self.begin = self.next = self.reach = end
        self.window = window


class Streams:
    """The sequential readers of a disk of *blocks* blocks; no window is larger than *longest* blocks, 0 for none.

    ``marks`` has the bytes of the bitmap whose reading `on_read` wants to hear of.
    """

    def __init__(self, blocks: int, longest: int) -> None:
        self.marks: Dict[int, Stream] = {}
        self._blocks = blocks
        self._longest = longest
        self._streams: List[Stream] = []

    def on_read(self, first: int, end: int) -> Optional[Tuple[int, int]]:
        """The blocks from *first* up to *end* are read: the blocks to fetch ahead now, if any."""
        streams = self._streams
        for index, stream in enumerate(streams):
            if stream.next <= first <= stream.reach or stream.next < end <= stream.reach:
                if index:
                    streams.insert(0, streams.pop(index))
                return self._go_on(stream, end)
        if self._longest:
            if len(streams) == _READERS:
                self._forget(streams.pop())
            streams.insert(0, Stream(end, min(self._longest, max(_FIRST_WINDOW, 2 * (end - first)))))
        return None

    def _go_on(self, stream: Stream, end: int) -> Optional[Tuple[int, int]]:
        stream.next = max(stream.next, end)
        if stream.reach - stream.next >= stream.window // 2:
            return None
        start = max(stream.reach, stream.next)
        stop = min(start + stream.window, self._blocks)
        stream.window = min(self._longest, 2 * stream.window)
        stream.reach = max(stop, start)
        if start >= stop:
            return None
        self.marks.update(dict.fromkeys(range(start // BLOCKS_PER_BYTE, -(-stop // BLOCKS_PER_BYTE)), stream))
        return start, stop

    def on_marked(self, byte: int, end: int) -> Optional[Tuple[int, int]]:
        """Blocks up to *end* are read, which are local; *byte* was marked."""
        stream = self.marks.pop(byte)
        return self._go_on(stream, end) if stream in self._streams else None

    def _forget(self, stream: Stream) -> None:
        """Take its marks away; only a window that has not been read to its end has left some."""
        marks = self.marks
        first = max(stream.begin, stream.reach - 2 * self._longest)
        if first < stream.reach:
            for byte in range(first // BLOCKS_PER_BYTE, -(-stream.reach // BLOCKS_PER_BYTE)):
                if marks.get(byte) is stream:
                    del marks[byte]
