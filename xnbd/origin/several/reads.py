"""What is asked of several origins: reads, the attempts at them, and which answer counts.

- The first good answer to a read counts. Whatever comes for it later goes nowhere.
- The sink gets the data of one attempt at a time. What a second attempt brings while the first one is still
  under way is kept, and given to the sink when it is all there and the first one has not been quicker.
- An error of one origin is none as long as another one can be asked.
"""

from __future__ import annotations

import errno
from time import monotonic
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Union

from ..base import Data, Sink

if TYPE_CHECKING:
    from .member import Member

_Kept = List[Tuple[int, Union[bytes, int, List[Tuple[int, bool]]]]]
"""Offsets, each with data, the length of a hole, or extents."""


class Read:
    """What the sink waits for: *length* bytes at *offset*, or with *extents* where they are zeros.

    ``refused_by`` are the members that have answered with an error, the last of which is ``error``.
    """

    __slots__ = ("attempts", "done", "error", "extents", "length", "offset", "refused_by", "since", "token")

    def __init__(self, token: Any, offset: int, length: int, *, extents: bool = False) -> None:
        self.token = token
        self.offset = offset
        self.length = length
        self.extents = extents
        self.attempts: List[Attempt] = []
        self.refused_by: List[Member] = []
        self.error = errno.EIO
        self.since = monotonic()
        self.done = False


class Attempt:
    """*member* is asked for *read*, or for something that shows whether it answers if that is None.

    ``kept`` is what has come, of one that is not the first under way.
    """

    __slots__ = ("asked_at", "kept", "length", "member", "read")

    def __init__(self, member: Member, read: Optional[Read], now: float, length: int) -> None:
        self.member = member
        self.read = read
        self.asked_at = now
        self.length = length
        self.kept: Optional[_Kept] = [] if read is not None and read.attempts else None


class Race:
    """The sink of all members: hands on to *sink* what counts. *again* asks once more for a read that has failed."""

    def __init__(self, sink: Sink, again: Callable[[Read], bool]) -> None:
        self.reads: Dict[Read, None] = {}
        """Those that are not done, in the order in which they were asked."""
        self._sink = sink
        self._again = again

    def on_data(self, token: Attempt, offset: int, data: Data) -> None:
        read = token.read
        if read is None or read.done:
            return
        if token.kept is None:
            self._sink.on_data(read.token, offset, data)
        else:
            token.kept.append((offset, bytes(data)))

    def on_hole(self, token: Attempt, offset: int, length: int) -> None:
        read = token.read
        if read is None or read.done:
            return
        if token.kept is None:
            self._sink.on_hole(read.token, offset, length)
        else:
            token.kept.append((offset, length))

    def on_extents(self, token: Attempt, extents: List[Tuple[int, bool]]) -> None:
        """Kept always: extents add up, so that none of an attempt that fails may get through."""
        if token.kept is None:
            token.kept = []
        token.kept.append((0, extents))

    def on_done(self, token: Attempt, error: int) -> None:
        read = token.read
        counts = read is not None and not read.done and not error
        token.member.on_answer(token, error, counts=counts)
        if read is None:
            return
        read.attempts.remove(token)
        if read.done:
            return
        if not error:
            self._hand_on(read, token.kept or [])
            self.finish(read, 0)
            return
        read.refused_by.append(token.member)
        read.error = error
        if not read.attempts and not self._again(read):
            self.finish(read, error)

    def _hand_on(self, read: Read, kept: _Kept) -> None:
        for offset, what in kept:
            if isinstance(what, bytes):
                self._sink.on_data(read.token, offset, what)
            elif isinstance(what, int):
                self._sink.on_hole(read.token, offset, what)
            else:
                self._sink.on_extents(read.token, what)

    def finish(self, read: Read, error: int) -> None:
        """*read* is over, well or with that errno."""
        read.done = True
        del self.reads[read]
        self._sink.on_done(read.token, error)
