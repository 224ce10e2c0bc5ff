"""How the bytes of one client come and go, below `server.session.connection`.

Nothing here waits. `BlockingIOError` says that there is nothing to receive, or that
nothing is taken, until the descriptor shows it to ``poll(2)``; waiting is the
business of `Connection`.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import Callable, Optional, Sequence, Union

Buffers = Sequence[Union[bytes, memoryview]]

_RECEIVE_FLAGS = socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Transport(ABC):
    """One client's stream of bytes in both directions; errors are `OSError`."""

    receive_into: Callable[[memoryview], int]
    """Receive into a view: the number of bytes, 0 at the end. Raises `BlockingIOError`, never with bytes `pending`."""

    pending: Optional[Callable[[], bool]] = None
    """Whether bytes have been taken from the descriptor that `receive_into` has not handed out.

    No poll shows these. None for a transport that never has any.
    """

    stays: str = "TLS"
    """Why no other process can go on with the descriptor alone; empty if one can."""

    @abstractmethod
    def send(self, buffers: Buffers) -> int:
        """Send the beginning of *buffers*, at most IOV_MAX of them: the number of bytes.

        Raises `BlockingIOError`, and `OSError` (EFAULT) if the next byte lies in
        memory that cannot be read.
        """

    def detach(self) -> socket.socket:
        """The socket, for a transport that goes on with it: this one is at its end."""
        raise NotImplementedError

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor to wait for."""

    @abstractmethod
    def shutdown(self) -> None:
        """Say that nothing more will be sent."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the descriptor, without a word to the client: another process may serve it on."""


class PlainTransport(Transport):
    """A socket's stream of bytes as it is.

    The descriptor stays blocking, because whoever handed it over shares its flags;
    every call asks not to wait.
    """

    stays = ""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sendmsg = sock.sendmsg
        receive_into = sock.recv_into
        self.receive_into = lambda view: receive_into(view, 0, _RECEIVE_FLAGS)  # by keywords takes longer
        sock.setblocking(True)

    def detach(self) -> socket.socket:
        return self._sock

    def send(self, buffers: Buffers) -> int:
        return self._sendmsg(buffers, (), _SEND_FLAGS)

    def fileno(self) -> int:
        return self._sock.fileno()

    def shutdown(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()
