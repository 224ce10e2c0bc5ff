"""Telling sequential readers from others, and how far to read ahead of them.

A reader that goes on where it was gets a window, which doubles whenever half of it
is used up. To notice that, the bytes of the bitmap that speak for a window are
marked: a read of local blocks costs one look into that table.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, List, Optional, Tuple

from ..storage.blocks import BLOCKS_PER_BYTE

_READERS = 8
_NEWCOMERS = 32
_FIRST_WINDOW = 32


class Stream:
    """A reader whose next block is *next*; blocks up to *reach* are asked for already.

    It has no marks before the byte *marked_from*.
    """

    __slots__ = ("marked_from", "next", "reach", "window")

    def __init__(self, first: int, window: int) -> None:
        self.next = self.reach = first
        self.marked_from = first // BLOCKS_PER_BYTE
        self.window = window


class Readahead:
    """The sequential readers of a disk of *blocks* blocks; no window is larger than *longest* blocks, 0 for none.

    ``marks`` has the bytes of the bitmap whose reading `on_marked` wants to hear of.
    """

    def __init__(self, blocks: int, longest: int) -> None:
        self.marks: Dict[int, Stream] = {}
        self._blocks = blocks
        self._longest = longest
        self._streams: List[Stream] = []
        self._newcomers: Deque[int] = deque(maxlen=_NEWCOMERS)

    def on_read(self, first: int, end: int) -> Optional[Tuple[int, int]]:
        """The blocks from *first* up to *end* are missing: the blocks to fetch ahead now, if any."""
        for index, stream in enumerate(self._streams):
            if stream.next <= first <= stream.reach or stream.next < end <= stream.reach:
                if index:
                    self._streams.insert(0, self._streams.pop(index))
                return self._go_on(stream, end)
        if first in self._newcomers and self._longest:
            return self._begin(end, end - first)
        self._newcomers.append(end)
        return None

    def _begin(self, end: int, length: int) -> Optional[Tuple[int, int]]:
        """Somebody goes on from where a read has ended a moment ago."""
        if len(self._streams) == _READERS:
            self._forget(self._streams.pop())
        stream = Stream(end, min(self._longest, max(_FIRST_WINDOW, 2 * length)))
        self._streams.insert(0, stream)
        return self._go_on(stream, end)

    def _go_on(self, stream: Stream, end: int) -> Optional[Tuple[int, int]]:
        stream.next = max(stream.next, end)
        if stream.reach - stream.next >= stream.window // 2:
            return None
        start = max(stream.reach, stream.next)
        stop = min(start + stream.window, self._blocks)
        stream.window = min(self._longest, 2 * stream.window)
        stream.reach = max(stop, start)
        self._unmark(stream, stream.next // BLOCKS_PER_BYTE)
        if start >= stop:
            return None
        self.marks.update(dict.fromkeys(range(start // BLOCKS_PER_BYTE, -(-stop // BLOCKS_PER_BYTE)), stream))
        return start, stop

    def on_marked(self, byte: int, end: int) -> Optional[Tuple[int, int]]:
        """Blocks up to *end* are read, which are local; *byte* was marked."""
        stream = self.marks.pop(byte)
        return self._go_on(stream, end) if stream in self._streams else None

    def _forget(self, stream: Stream) -> None:
        """Take all its marks away."""
        self._unmark(stream, -(-stream.reach // BLOCKS_PER_BYTE))

    def _unmark(self, stream: Stream, end: int) -> None:
        """Take away the marks before byte *end*. Of a long read only the first byte was looked up."""
        marks = self.marks
        for byte in range(stream.marked_from, end):
            if marks.get(byte) is stream:
                del marks[byte]
        stream.marked_from = max(stream.marked_from, end)
