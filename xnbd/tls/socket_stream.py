"""TLS over a socket by OpenSSL alone.

- Nothing here waits: `BlockingIOError` says that the descriptor has to be polled for.
- For origins, from which much comes at once: no byte is copied more often than OpenSSL does.
- For clients, if the kernel encrypts what is sent (kTLS): OpenSSL tells it the keys, and bytes that lie in mapped files
  can be sent as they are.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
from contextlib import suppress
from typing import Any, Callable, Optional, Sequence, Union

from .memory_stream import RECORD
from .psk import prepare, shake_hands

_TCP_ULP = 31
"""``linux/tcp.h``: what works above the protocol."""

_SOL_TLS, _TLS_TX, _INFO_SIZE = 282, 1, 4
"""``linux/tls.h``: an option of the socket that is there if the kernel encrypts; version and cipher come first."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def kernel_knows_tls() -> bool:
    """Whether the kernel has TLS. It loads the module for it, if this process may ask for that."""
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
    except OSError as error:
        return error.errno == errno.ENOTCONN  # it is known, and wants a connection
    return True


class SocketStream:
    """TLS of *context* over the connected *sock*, which it takes over; ``tls`` tells what was agreed on.

    What goes wrong after the handshake is raised as *explain* says. As a client it asks for *name*.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        explain: Callable[[ssl.SSLError], OSError],
        *,
        server_side: bool = False,
        name: Optional[str] = None,
    ) -> None:
        sock.setblocking(False)  # OpenSSL has no other way not to wait
        self.tls = context.wrap_socket(
            sock, server_side=server_side, do_handshake_on_connect=False, server_hostname=name
        )
        prepare(self.tls)
        self._explain = explain
        self._read: Callable[[int, Any], int] = self.tls.read  # type: ignore[assignment]
        self._unsent: Union[bytes, bytearray, memoryview] = b""

    def fileno(self) -> int:
        return self.tls.fileno()

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `ssl.SSLError` and `OSError`.
        """
        try:
            shake_hands(self.tls)
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        return 0

    @property
    def encrypts_in_kernel(self) -> bool:
        """Whether `send_plain` may be used: known after the handshake."""
        try:
            self.tls.getsockopt(_SOL_TLS, _TLS_TX, _INFO_SIZE)
        except OSError:
            return False
        return True

    def pending(self) -> bool:
        """Whether OpenSSL has bytes that poll(2) does not show."""
        return self.tls.pending() > 0

    def receive_into(self, view: memoryview) -> int:
        """All records that have come and find room: the number of bytes, 0 at the end.

        Nothing is left to be `pending` if the *view* has the room of a record and a byte. Raises `BlockingIOError`, and
        `OSError`.
        """
        read, received, room = self._read, 0, len(view)
        try:
            while received <= max(room - RECORD, 0):
                count = read(room - received, view[received:])
                if not count:
                    break
                received += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not received:
                raise BlockingIOError from None
        except ssl.SSLError as error:
            if not received:  # else it is met again by the next call
                raise self._explain(error) from error
        return received

    def send_plain(self, buffers: Sequence[Union[bytes, memoryview]]) -> int:
        """Send the beginning of *buffers* past OpenSSL: the kernel encrypts it."""
        return socket.socket.sendmsg(self.tls, buffers, (), _SEND_FLAGS)

    @property
    def unsent(self) -> bool:
        """Whether OpenSSL has begun with what was to be sent: the next `send` goes on with that."""
        return bool(self._unsent)

    def send(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Send the beginning of *data*: the number of bytes. Raises `BlockingIOError`, and `OSError`.

        After a `BlockingIOError` the next call has to begin with the same bytes, and may leave them out if `unsent`:
        then they are still where they were.
        """
        if not self._unsent:
            self._unsent = data
        try:
            sent = self.tls.send(self._unsent)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise self._explain(error) from error
        self._unsent = self._unsent[sent:]
        return sent

    def shutdown(self) -> None:
        """Say that nothing more will be sent, without waiting for an answer. Raises `OSError`.

        What still comes is handed out as it is: it is no use to anybody.
        """
        with suppress(OSError):  # in the middle of a handshake or a record; or the answer would have to be waited for
            self.tls.unwrap()
        self.tls.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the descriptor, without a word."""
        self._unsent = b""
        self.tls.close()
