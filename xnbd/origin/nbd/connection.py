"""One pipelined connection to an origin that speaks NBD, which never waits.

Whoever owns the poll loop asks `OriginConnection.events` what to poll for, and by
when to come back at the latest; the connection does all that can be done at once
and returns. Anything wrong ends it with one `OriginLost`: then `unfinished` tells
what to ask again on a new connection.
"""

from __future__ import annotations

import mmap
import select
from functools import partial
from time import monotonic
from typing import Any, Callable, List, Optional, Tuple

from ...errors import ProtocolError
from ...protocol.client_handshake import RemoteExport
from ...protocol.constants import CMD_DISC, MAXIMUM_PAYLOAD
from ...protocol.transmission import REQUEST, request_word
from ...text import counted
from ..base import Origin, OriginLost, Sink, Terms
from .address import NbdAddress
from .approach import Approach
from .handshake import NotReached
from .replies import ReplyParser
from .stream import RECORD, Stream, send_from

BUFFER_SIZE = 1 << 20
"""Bytes received at once: many small replies, or several large pieces."""

_RECEIVES = 4
"""Full buffers that are worked through before the owner gets its turn."""


class OriginConnection(Origin):
    """A connection to the disk at *address*; replies go to *sink*.

    Before it is `ready` there is an `Approach`.
    """

    def __init__(self, address: NbdAddress, sink: Sink, terms: Terms) -> None:
        self.address = address
        self.export: Optional[RemoteExport] = None
        self.bytes_received = 0
        self._terms = terms
        self._approach: Optional[Approach] = None
        self._stream: Optional[Stream] = None
        self._step: Callable[[int], None] = _stay_idle
        self.heard_at = 0.0
        self._requests = bytearray()
        self._replies = ReplyParser(sink)
        self._view = memoryview(mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._end = 0

    # What the owner asks

    def interests(self) -> List[Tuple[int, int]]:
        return [(self.fileno(), self.events())]

    def fileno(self) -> int:
        """The descriptor to poll, another one after every event perhaps; -1 if there is none."""
        source = self._approach or self._stream
        return source.fileno() if source else -1

    def events(self) -> int:
        """The poll mask to wait for."""
        if self._approach:
            return self._approach.events()
        if self._stream is None:
            return 0
        return select.POLLIN | select.POLLOUT if self._requests else select.POLLIN

    @property
    def deadline(self) -> Optional[float]:
        if self._approach:
            return self._approach.deadline
        if self._stream is None:
            return None
        if self._terms.reply_timeout is None or not self._replies.pending:
            return None
        return self.heard_at + self._terms.reply_timeout

    @property
    def ready(self) -> bool:
        """Whether the handshake is done. Requests may be queued before."""
        return self.export is not None and self._stream is not None

    @property
    def size(self) -> int:
        return self.export.size if self.export else 0

    @property
    def can_tell_zeros(self) -> bool:
        return self.export is not None and self.export.allocation_context is not None

    @property
    def maximum_read(self) -> int:
        return self.export.maximum_payload if self.export else MAXIMUM_PAYLOAD

    @property
    def outstanding(self) -> int:
        return len(self._replies.pending)

    def unfinished(self) -> List[Any]:
        return [request.token for request in self._replies.pending.values()]

    # What the owner does

    def start(self) -> None:
        self._approach = Approach(self.address, self._terms.connect_timeout)
        self._step = self._come_near
        self._go_near(self._approach.start)

    def read(self, token: Any, offset: int, length: int) -> None:
        if not self._replies.pending:
            self.heard_at = monotonic()
        self._requests += self._replies.ask_read(token, offset, length)

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        if not self._replies.pending:
            self.heard_at = monotonic()
        self._requests += self._replies.ask_block_status(token, offset, length)

    def push(self) -> None:
        self.on_events(0)

    def progress(self) -> None:
        if self.ready:
            self.on_events(select.POLLIN)
        else:
            poll = select.poll()
            poll.register(self.fileno(), self.events())
            for _, mask in poll.poll(0):
                self.on_events(mask)
        self.on_time()

    def on_events(self, mask: int) -> None:
        """Do all that can be done without waiting; with *mask* 0: send what is queued. Raises `OriginLost`."""
        try:
            self._step(mask)
        except OSError as error:  # no room for a socket, or one that takes no options, or that is broken
            raise self._lost(error.strerror or str(error)) from error

    def on_time(self) -> None:
        """Give up what has taken too long: the `deadline` has passed. Raises `OriginLost`."""
        deadline = self.deadline
        if deadline is None or monotonic() < deadline:
            return
        if self._approach:
            self._go_near(self._approach.on_time)
        else:
            raise self._lost(
                f"silent for {self._terms.reply_timeout:g} s with {counted(self.outstanding, 'request')} waiting"
            )

    def close(self) -> None:
        """Leave, politely if nothing is half sent."""
        if self._stream and self.export and not self._requests:
            try:
                send_from(bytearray(REQUEST.pack(request_word(CMD_DISC), bytes(8), 0, 0)), self._stream)
            except OSError:
                pass  # it has gone first
        self._end_it()

    # Before the disk was agreed on

    def _go_near(self, step: Callable[[], None]) -> None:
        """Do what the approach does next. Raises `OriginLost`."""
        try:
            step()
        except NotReached as error:
            raise self._lost(str(error), refused=error.refused) from error
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    def _come_near(self, mask: int) -> None:
        approach = self._approach
        assert approach
        self._go_near(partial(approach.on_events, mask))
        if approach.export is None:
            return
        export = approach.export
        self._approach, self._stream = None, approach.take_stream()
        if self._terms.expected_size not in (None, export.size):
            what = f"its disk has {export.size} bytes, not {self._terms.expected_size} as before"
            raise self._lost(what, refused=True)
        self.export = export
        self._replies.agree(self.export.structured, self.export.allocation_context)
        self.heard_at = monotonic()
        self._step = self._transmit
        self._transmit(mask)

    # Transmission

    def _transmit(self, mask: int) -> None:
        assert self._stream
        if self._requests:
            send_from(self._requests, self._stream)
        if not mask & ~select.POLLOUT:
            return
        for _ in range(_RECEIVES):
            try:
                received = self._stream.receive_into(self._view[self._end :])
            except BlockingIOError:
                return
            self.bytes_received += received
            if not received:
                raise self._lost(f"it closed the connection with {counted(self.outstanding, 'request')} waiting")
            more = self._end + received > BUFFER_SIZE - RECORD  # else poll shows what comes next (`Stream`)
            self.heard_at = monotonic()
            self._work(self._end + received)
            if self._requests:
                send_from(self._requests, self._stream)
            if not more:
                return

    def _work(self, end: int) -> None:
        """Work through the replies in the buffer, and move what is incomplete to its front."""
        view = self._view
        try:
            done = self._replies.parse(view, end)
        except ProtocolError as error:
            raise self._lost(str(error)) from error
        self._end = end - done
        if done and self._end:
            view[: self._end] = view[done:end]

    # The end

    def _lost(self, reason: str, *, refused: bool = False) -> OriginLost:
        self._end_it()
        return OriginLost(f"origin {self.address}: {reason}", refused=refused)

    def _end_it(self) -> None:
        """Close, and let go of the buffer without waiting for the garbage collector."""
        if self._approach:
            self._approach.close()
        if self._stream:
            self._stream.close()
        self._approach = self._stream = None
        self._step = _stay_idle
        self._view = memoryview(b"")


def _stay_idle(mask: int) -> None:
    """What a connection does that has not begun, or is no more."""
