"""What one client's replies hold of the disk: those that are to be sent, and those that stand in line."""

from __future__ import annotations

import errno
import os
from typing import List

from .parking import Parking
from .replies import MOST_DETACHED, Piece, Replies

_MOST_AT_ONCE = 1024


class Held:
    """Memory of the disk that *replies* and answers in the line of *parking* point to (`server.disk.Holder`)."""

    def __init__(self, replies: Replies, parking: Parking) -> None:
        self._replies = replies
        self._pieces = replies.pieces
        self._parking = parking

    def holds(self) -> bool:
        """Whether there is any. Asked before every sleep."""
        if self._pieces and self._replies.attached:
            return True
        return self._parking.blocked and any(map(_points, self._parking.answers()))

    def detach(self) -> None:
        """Have copies take its place, unless they would be too long, or it cannot be read."""
        self._replies.detach()
        for answer in self._parking.answers():
            if _points(answer) and sum(map(len, answer)) <= MOST_DETACHED:
                _copy(answer)


def _points(answer: List[Piece]) -> bool:
    return any(isinstance(piece, memoryview) for piece in answer)


def _copy(answer: List[Piece]) -> None:
    """Through a file, for mapped memory is not looked at."""
    fd = os.memfd_create("xnbd-answer")
    try:
        rest, length = list(answer), sum(map(len, answer))
        while rest:
            written = os.writev(fd, rest[:_MOST_AT_ONCE])
            if written != sum(map(len, rest[:_MOST_AT_ONCE])):
                return  # the rest cannot be read, which is heard of when it is sent
            del rest[:_MOST_AT_ONCE]
        answer[:] = [os.pread(fd, length, 0)]
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
    finally:
        os.close(fd)
