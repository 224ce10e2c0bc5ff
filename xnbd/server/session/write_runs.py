"""Runs of WRITEs: plain ones of one length that came one behind the other. Most batches of them are nothing else.

What need not be looked at one by one costs less done for all of them: the requests are
unpacked with one call, and those that adjoin are one ``pwritev(2)``. What is not wholly
as expected is no run, and left to the loop.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import repeat
from struct import Struct
from typing import Sequence, Tuple

from ...protocol import constants as c
from ...protocol import transmission as wire
from .receive_buffer import ReceiveBuffer
from .replies import Replies

_FEWEST = 3
_MOST = 512
"""Requests of a run; IOV_MAX is no smaller."""

_HEADER = wire.REQUEST.size
_WRITE = wire.request_word(c.CMD_WRITE)
_BEGINNING = wire.REQUEST.pack(_WRITE, bytes(8), 0, 0)[:8]


@lru_cache(4)
def _writes(length: int) -> Struct:
    """A WRITE with *length* bytes of payload."""
    return Struct(f"{wire.REQUEST.format}{length}x")


class WriteRuns:
    """The runs of one client. What is done is answered; its requests are for the caller to take off and to count."""

    def __init__(self, receive_buffer: ReceiveBuffer, replies: Replies) -> None:
        self._buffer, self._view = receive_buffer.buffer, receive_buffer.view
        self._pieces = replies.pieces

    def do(self, start: int, end: int, fd: int, writable: int) -> Tuple[int, int]:
        """Do the WRITEs between *start* and *end* of the buffer: how many, and their bytes.

        None is done unless all of them are alike and lie within *writable* bytes of the disk
        behind *fd*. If one fails none is answered, and all are the caller's again: to write
        the same bytes a second time, in the same order, changes nothing.
        """
        word, _, _, length = wire.REQUEST.unpack_from(self._buffer, start)
        stride = _HEADER + length
        count = min((end - start) // stride, _MOST)
        second = start + stride
        if word != _WRITE or not length or count < _FEWEST or self._buffer[second : second + 8] != _BEGINNING:
            return 0, 0
        stop, view = start + count * stride, self._view
        words, cookies, offsets, lengths = zip(*_writes(length).iter_unpack(view[start:stop]))
        if words.count(_WRITE) != count or lengths.count(length) != count or max(offsets) + length > writable:
            return 0, 0
        payloads = [view[at : at + length] for at in range(start + _HEADER, stop, stride)]
        if not _write_all(fd, payloads, offsets, length):
            return 0, 0
        self._pieces.append(wire.OK_PREFIX + wire.OK_PREFIX.join(cookies))
        return count, count * length


def _write_all(fd: int, payloads: Sequence[memoryview], offsets: Tuple[int, ...], length: int) -> bool:
    """Write each of the *payloads*, of *length* bytes, in their order; whether all of it could be written."""
    first, last = offsets[0], offsets[-1]
    try:
        if last - first == (len(offsets) - 1) * length and offsets == tuple(range(first, last + 1, length)):
            written = os.pwritev(fd, payloads, first)
        else:
            written = sum(map(os.pwrite, repeat(fd), payloads, offsets))
    except OSError:
        return False  # done one by one, it is heard of again
    return written == len(offsets) * length
