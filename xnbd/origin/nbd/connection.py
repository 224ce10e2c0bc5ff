"""One pipelined connection to an origin that speaks NBD, which never waits.

Whoever owns the poll loop asks `OriginConnection.events` what to poll for, and by
when to come back at the latest; the connection does all that can be done at once
and returns. Anything wrong ends it with one `OriginLost`: then `unfinished` tells
what to ask again on a new connection.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
from time import monotonic
from typing import Any, Callable, List, Optional, Tuple

from ...errors import ProtocolError
from ...protocol.client_handshake import ClientHandshake, RemoteExport
from ...protocol.constants import CMD_DISC, MAXIMUM_PAYLOAD
from ...protocol.transmission import REQUEST, request_word
from ...system.sockets import set_socket_options
from ..base import Origin, OriginLost, Sink, Terms
from .address import NbdAddress
from .lookup import Candidate, HostNotFound, Lookup, numeric
from .replies import ReplyParser

BUFFER_SIZE = 1 << 20
"""Bytes received at once: many small replies, or several large pieces."""

_RECEIVES = 4
"""Full buffers that are worked through before the owner gets its turn."""

_UNACKNOWLEDGED = 90_000
"""Milliseconds after which a host that takes no bytes counts as gone: keepalive is silent while there are some."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class OriginConnection(Origin):
    """A connection to the disk at *address*; replies go to *sink*.

    Before it is `ready`, it looks the host's name up, connects, and shakes hands.
    """

    def __init__(self, address: NbdAddress, sink: Sink, terms: Terms) -> None:
        self.address = address
        self.export: Optional[RemoteExport] = None
        self.bytes_received = 0
        self._terms = terms
        self._lookup: Optional[Lookup] = None
        self._sock: Optional[socket.socket] = None
        self._step: Callable[[int], None] = _stay_idle
        self._candidates: List[Candidate] = []
        self._until = 0.0  # when the look-up, connecting to this address, or the handshake has taken too long
        self._give_up_at = 0.0
        self.heard_at = 0.0
        self._handshake = ClientHandshake(address.export_name)
        self._greetings = bytearray()
        self._requests = bytearray()
        self._replies = ReplyParser(sink)
        self._view = memoryview(mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._end = 0

    # What the owner asks

    def interests(self) -> List[Tuple[int, int]]:
        return [(self.fileno(), self.events())]

    def fileno(self) -> int:
        """The descriptor to poll, another one after every event perhaps; -1 if there is none."""
        source = self._lookup or self._sock
        return source.fileno() if source else -1

    def events(self) -> int:
        """The poll mask to wait for."""
        if self._lookup:
            return select.POLLIN
        if self._sock is None:
            return 0
        if self._step == self._connect:
            return select.POLLOUT
        unsent = self._requests if self.export else self._greetings
        return select.POLLIN | select.POLLOUT if unsent else select.POLLIN

    @property
    def deadline(self) -> Optional[float]:
        if self._lookup is None and self._sock is None:
            return None
        if self.export is None:
            return self._until
        if self._terms.reply_timeout is None or not self._replies.pending:
            return None
        return self.heard_at + self._terms.reply_timeout

    @property
    def ready(self) -> bool:
        """Whether the handshake is done. Requests may be queued before."""
        return self.export is not None and self._sock is not None

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
        self._until = self._give_up_at = monotonic() + self._terms.connect_timeout
        address = self.address
        if address.unix_path:
            self._candidates = [(socket.AF_UNIX, address.unix_path)]
        else:
            self._find_host()
        if self._lookup is None:
            self._try_next("no address found")

    def read(self, token: Any, offset: int, length: int) -> None:
        self._note_waiting()
        self._requests += self._replies.ask_read(token, offset, length)

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        self._note_waiting()
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
        except OSError as error:  # no room for a socket, or one that takes no options
            raise self._lost(error.strerror or str(error)) from error

    def on_time(self) -> None:
        """Give up what has taken too long: the `deadline` has passed. Raises `OriginLost`."""
        deadline = self.deadline
        if deadline is None or monotonic() < deadline:
            return
        if self._lookup:
            raise self._lost(f"cannot find the host: no name server has answered in {self._terms.connect_timeout:g} s")
        if self._step == self._connect:
            self._try_next("connecting took too long")
        elif self.export is None:
            raise self._lost(f"the handshake took longer than {self._terms.connect_timeout:g} s")
        else:
            raise self._lost(f"silent for {self._terms.reply_timeout:g} s with {self.outstanding} requests waiting")

    def close(self) -> None:
        """Leave, politely if nothing is half sent."""
        if self._sock and self.export and not self._requests:
            try:
                self._sock.send(REQUEST.pack(request_word(CMD_DISC), bytes(8), 0, 0), _SEND_FLAGS)
            except OSError:
                pass  # it has gone first
        self._end_it()

    # Connecting

    def _find_host(self) -> None:
        """Know where to connect to, or have it looked up."""
        try:
            self._candidates = numeric(self.address.host, self.address.port)
            if not self._candidates:
                self._lookup = Lookup(self.address.host)
                self._step = self._take_addresses
        except HostNotFound as error:
            raise self._lost(f"cannot find the host: {error}") from error

    def _take_addresses(self, mask: int) -> None:
        if not mask or not self._lookup:
            return
        try:
            self._candidates = self._lookup.candidates(self.address.port)
        except HostNotFound as error:
            raise self._lost(f"cannot find the host: {error}") from error
        self._end_lookup()
        self._try_next("no address found")

    def _try_next(self, failure: str) -> None:
        """Connect to the next of the host's addresses; each gets its share of the time that is left.

        Raises `OriginLost` with *failure* if none is left.
        """
        while self._candidates:
            self._close_socket()
            family, socket_address = self._candidates.pop(0)
            try:
                error = self._begin_to_connect(family, socket_address)
            except OSError as problem:
                error = problem.errno or errno.EIO
            if not error:
                self._begin_handshake()
                return
            if error == errno.EINPROGRESS:
                now = monotonic()
                self._until = now + (self._give_up_at - now) / (len(self._candidates) + 1)
                self._step = self._connect
                return
            failure = os.strerror(error)
        raise self._lost(failure)

    def _begin_to_connect(self, family: int, socket_address: Any) -> int:
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock.connect_ex(socket_address)

    def _connect(self, mask: int) -> None:
        if not mask or not self._sock:
            return
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._try_next(os.strerror(error))
        else:
            self._begin_handshake()

    # Handshake

    def _begin_handshake(self) -> None:
        assert self._sock
        set_socket_options(self._sock)
        if self._sock.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED)
        self._until = self._give_up_at
        self._step = self._negotiate

    def _negotiate(self, mask: int) -> None:
        handshake = self._handshake
        self._send(self._greetings)
        while handshake.export is None:
            received = self._receive(self._view[: handshake.wanted])
            if received < 0:
                return
            if not received:
                raise self._lost(handshake.end_means(), refused=True)
            try:
                self._greetings += handshake.receive(bytes(self._view[:received]))
            except ProtocolError as error:
                raise self._lost(str(error), refused=True) from error
            self._send(self._greetings)
        self._agree(handshake.export)
        self._transmit(mask)

    def _agree(self, export: RemoteExport) -> None:
        if self._terms.expected_size not in (None, export.size):
            raise self._lost(f"its disk has {export.size} bytes, not {self._terms.expected_size} as before")
        self.export = export
        self._replies.agree(export.structured, export.allocation_context)
        self.heard_at = monotonic()
        self._step = self._transmit

    # Transmission

    def _note_waiting(self) -> None:
        if not self._replies.pending:
            self.heard_at = monotonic()

    def _transmit(self, mask: int) -> None:
        if self._requests:
            self._send(self._requests)
        if not mask & ~select.POLLOUT:
            return
        for _ in range(_RECEIVES):
            received = self._receive(self._view[self._end :])
            if received < 0:
                return
            if not received:
                raise self._lost(f"it closed the connection with {self.outstanding} requests waiting")
            more = self._end + received == BUFFER_SIZE
            self.heard_at = monotonic()
            self._work(self._end + received)
            if self._requests:
                self._send(self._requests)
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

    # The socket

    def _receive(self, view: memoryview) -> int:
        """The number of bytes, 0 at the end, -1 if there are none yet."""
        assert self._sock
        try:
            received = self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return -1
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error
        self.bytes_received += received
        return received

    def _send(self, unsent: bytearray) -> None:
        """Send what can be sent of *unsent*, and drop that from it."""
        assert self._sock
        try:
            while unsent:
                del unsent[: self._sock.send(unsent, _SEND_FLAGS)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    def _lost(self, reason: str, *, refused: bool = False) -> OriginLost:
        self._end_it()
        return OriginLost(f"origin {self.address}: {reason}", refused=refused)

    def _end_it(self) -> None:
        """Close, and let go of the buffer without waiting for the garbage collector."""
        self._end_lookup()
        self._close_socket()
        self._step = _stay_idle
        self._view = memoryview(b"")

    def _end_lookup(self) -> None:
        if self._lookup:
            self._lookup.close()
            self._lookup = None

    def _close_socket(self) -> None:
        if self._sock:
            self._sock.close()
            self._sock = None


def _stay_idle(mask: int) -> None:
    """What a connection does that has not begun, or is no more."""
