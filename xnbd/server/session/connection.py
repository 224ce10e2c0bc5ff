"""A client's connection: how this process waits for bytes to come and go.

They come and go by `server.session.transport`. Waiting is done in `ProcessLoop`, where a stop and
the master's death are noticed too.
"""

from __future__ import annotations

import select
import socket
from time import monotonic
from typing import Callable, Optional

from ...access.identity import Identity, identity_of_peer, peer_credentials
from ...errors import Disconnected, ProtocolError
from ...system.sockets import set_socket_options
from ..process_loop import ProcessLoop, Stop
from .spin import Spin
from .transport import PlainTransport, Transport

_LINGER = 1.0

_AT_ONCE = 1e-5
"""Seconds of a wait that was none: the next request was there already."""

LONGEST_SPIN = 0.01
"""Seconds: a worker polls inside the gate, and who closes that waits for it."""


class Connection:
    """One client's connection: sends and receives over a `Transport`, and sleeps in the process's loop.

    ``identity`` is who the client is; what gives it a transport that proves more adds to it.
    """

    def __init__(self, sock: socket.socket, loop: ProcessLoop, spin: float = 0.0, peer: str = "") -> None:
        """*spin* is the longest time in seconds to poll before sleeping."""
        set_socket_options(sock)
        self.peer = peer or describe_peer(sock)
        self.identity: Identity = identity_of_peer(sock)
        self.encryption = ""  # how its bytes are encrypted, in words; empty if they are not
        self.loop = loop
        self.waited = 0.0
        """Seconds that the client has been waited for in the middle of a reply, or of a long request."""
        self._late = False  # the last message was not there yet when it was looked for
        self._spin = Spin(spin)
        self.use(PlainTransport(sock))

    def move_to(self, loop: ProcessLoop, spin: float) -> None:
        """From now on sleep in *loop*: this process has become the client's server."""
        self.loop = loop
        self._spin = Spin(spin)

    def use(self, transport: Transport) -> None:
        """From now on bytes come and go by *transport*, of which none is left unsent or unread in the one before."""
        self.transport = transport
        self._fds = (transport.fileno(),)
        self._receive_into = transport.receive_into
        self._send = transport.send
        ready = select.poll()
        ready.register(transport.fileno(), select.POLLIN)
        self._ready: Callable[[int], object] = ready.poll
        pending = self._pending = transport.pending
        if pending is not None:  # a function of its own, so that those that need none do not pay for it
            self._ready = lambda timeout: pending() or ready.poll(timeout)

    def receive(self, view: memoryview) -> Optional[int]:
        """Receive the next requests into *view*: the number of bytes, 0 at the end, None if it was woken or called.

        Between messages: raises `Stop` as soon as the worker is to leave.
        """
        receive_into, spin = self._receive_into, self._spin
        if not self._late or (self._pending is not None and self._pending()):
            try:
                return receive_into(view)
            except BlockingIOError:  # which costs more than to look first
                self._late = True
        while self.soon():
            try:
                return receive_into(view)
            except BlockingIOError:
                pass  # a part of what the transport needs
        began = monotonic()
        while self.loop.wait(self._fds, select.POLLIN, results=True, calls=True):
            try:
                received = receive_into(view)
            except BlockingIOError:
                continue
            waited = monotonic() - began
            spin.missed(waited)
            self._late = waited > _AT_ONCE
            return received
        return None

    def receive_now(self, view: memoryview) -> Optional[int]:
        """Receive what is there: the number of bytes, 0 at the end, None if there is nothing yet."""
        try:
            return self._receive_into(view)
        except BlockingIOError:
            return None

    def soon(self) -> bool:
        """Poll for more requests as long as that has paid; whether some are there."""
        if not self._spin.seconds:
            return False
        ready, until = self._ready, 0.0
        while not ready(0):
            now = monotonic()
            if not until:
                until = now + self._spin.seconds
            if now >= until:
                return False
        self._late = until > 0
        self._spin.hit()
        return True

    def wait_beside(self, events: int, timeout: Optional[float]) -> bool:
        """Sleep until the client shows *events*; False if the background has results before, or somebody calls.

        Raises `Stop` as soon as the worker is to leave, `Disconnected` if the client
        is gone altogether.
        """
        began = monotonic()
        if not self.loop.wait(self._fds, events, timeout, results=True, calls=True):
            return False
        if events & select.POLLIN:
            self._spin.missed(monotonic() - began)
            return True
        poll = select.poll()
        poll.register(self._fds[0], events)
        if any(mask & (select.POLLHUP | select.POLLERR) for _, mask in poll.poll(0)):
            raise Disconnected("client left with requests waiting")
        return True

    def sleep(self, seconds: float, events: int, *, mid_message: bool) -> bool:
        """Sleep for so long, less if the process is woken or called.

        True if the client shows *events*, or is gone altogether. Raises `Stop` like `ProcessLoop.wait`.
        """
        return self.loop.wait(self._fds, events, seconds, mid_message=mid_message, results=True, calls=True)

    def receive_rest(self, view: memoryview) -> int:
        """Receive more of a message that has begun: at least one byte.

        Raises `Disconnected` at the end, `Stop` if the rest does not come in time
        once the worker is to leave.
        """
        received = self.receive_now(view)
        while received is None:
            began = monotonic()
            self.loop.wait(self._fds, select.POLLIN, mid_message=True)
            self.waited += monotonic() - began
            received = self.receive_now(view)
        if not received:
            raise Disconnected("client left in the middle of a message")
        return received

    def receive_more(self, view: memoryview) -> Optional[int]:
        """What `receive_rest` does; None if nothing has come yet, but the process slept or was called."""
        try:
            received = self._receive_into(view)
        except BlockingIOError:
            self.loop.wait(self._fds, select.POLLIN, mid_message=True, calls=True)
            return None
        if not received:
            raise Disconnected("client left in the middle of a message")
        return received

    def receive_exactly(self, length: int, deadline: float) -> bytes:
        """*length* bytes, for the handshake.

        Raises `Disconnected` at the end, `ProtocolError` if they are not there at
        *deadline* (monotonic seconds).
        """
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                received = self._receive_into(view)
            except BlockingIOError:
                self.wait_until(select.POLLIN, deadline)
                continue
            if not received:
                raise Disconnected("client left during the handshake")
            view = view[received:]
        return bytes(data)

    def send_until(self, data: bytes, deadline: float) -> None:
        """Send *data*, for the handshake; raises like `receive_exactly`."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._send((view,)) :]
            except BlockingIOError:
                self.wait_until(select.POLLOUT, deadline)

    def wait_until(self, events: int, deadline: float) -> None:
        """Sleep until the client shows *events*, for the handshake; raises like `receive_exactly`."""
        remaining = deadline - monotonic()
        if remaining <= 0 or not self.loop.wait(self._fds, events, remaining):
            raise ProtocolError("handshake took too long")

    def wait_for_room(self) -> None:
        """Sleep until the client takes more, or somebody calls who has not yet.

        Raises `Stop` if it does not take it in time once the worker is to leave.
        """
        began = monotonic()
        self.loop.wait(self._fds, select.POLLOUT, mid_message=True, calls=not self.loop.called)
        self.waited += monotonic() - began

    def linger(self) -> None:
        """Part without loss: a close with unread bytes would take back replies that are on their way."""
        try:
            self.transport.shutdown()
            rest = memoryview(bytearray(64 << 10))
            until = monotonic() + _LINGER
            while monotonic() < until and self._drain(rest, until):
                pass
        except (OSError, Stop):
            pass  # the client is gone, which is what this waits for

    def _drain(self, scratch: memoryview, until: float) -> int:
        try:
            return self._receive_into(scratch)
        except BlockingIOError:
            return self.loop.wait(self._fds, select.POLLIN, max(0.0, until - monotonic()), mid_message=True)

    def close(self) -> None:
        self.transport.close()


def describe_peer(sock: socket.socket) -> str:
    """The client's address for log lines and titles."""
    try:
        address = sock.getpeername()
    except OSError:
        return "a client that has left"
    if sock.family == socket.AF_INET6:
        host = address[0]
        if host.startswith("::ffff:"):
            return f"{host[7:]}:{address[1]}"
        return f"[{host}]:{address[1]}"
    if sock.family == socket.AF_INET:
        return f"{address[0]}:{address[1]}"
    return _describe_local_peer(sock)


def _describe_local_peer(sock: socket.socket) -> str:
    pid, uid, _gid = peer_credentials(sock)
    return f"unix:pid={pid},uid={uid}"
