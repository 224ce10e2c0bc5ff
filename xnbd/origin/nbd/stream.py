"""The stream of bytes between us and an origin, as it is or in TLS (`tls.client`). Nothing here waits."""

from __future__ import annotations

import socket
from typing import Protocol, Union

RECORD = 16 << 10
"""Room for this many bytes has to be in a view that one `receive_into` is to empty the stream into."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Stream(Protocol):
    """Both directions; errors are `OSError`, and `BlockingIOError` says that poll(2) has to tell when to go on."""

    def fileno(self) -> int:
        """The descriptor to poll."""

    def receive_into(self, view: memoryview) -> int:
        """Receive what has come: the number of bytes, 0 at the end.

        If `RECORD` bytes of the view stay free, or it had no more from the beginning, poll(2) shows what comes next.
        """

    def send(self, data: Union[bytes, bytearray]) -> int:
        """Send the beginning of *data*: the number of bytes. What was not taken has to begin the next call."""

    def close(self) -> None:
        """Let go of the socket."""


class PlainStream:
    """A socket as it is."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive_into(self, view: memoryview) -> int:
        return self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)

    def send(self, data: Union[bytes, bytearray]) -> int:
        return self.sock.send(data, _SEND_FLAGS)

    def close(self) -> None:
        self.sock.close()


def send_from(unsent: bytearray, stream: Stream) -> None:
    """Send what can be sent of *unsent* at once, and drop that from it. Raises `OSError`."""
    try:
        while unsent:
            del unsent[: stream.send(unsent)]
    except BlockingIOError:
        pass
