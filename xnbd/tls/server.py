"""The server's end of TLS over a connected socket: handshake, receive and send, none of which waits.

What is sent is encrypted by the kernel, if it can do that with what was agreed on (kTLS): then it takes bytes that lie
in mapped files as it does without TLS. Else OpenSSL encrypts a copy (`scratch`).
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Callable, Optional, Sequence, Union

from ..access.identity import NOBODY
from ..errors import Disconnected, Refused
from .credentials import ServerCredentials
from .peer import identity_of
from .psk import prepare, was_used
from .refusal import explain
from .scratch import Scratch

Buffers = Sequence[Union[bytes, memoryview]]

_SOL_TLS, _TLS_TX, _INFO_SIZE = 282, 1, 4
"""``linux/tls.h``: an option of the socket that is there if the kernel encrypts; version and cipher come first."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class ServerChannel:
    """TLS with the client of *sock*, which it takes over, by *credentials* as they are now."""

    receive_into: Callable[[memoryview], int]
    pending: Optional[Callable[[], bool]]

    def __init__(self, sock: socket.socket, credentials: ServerCredentials) -> None:
        self.identity = NOBODY
        self.description = ""
        """Version, cipher, and whether the kernel encrypts; empty before the handshake is done."""
        sock.setblocking(False)  # OpenSSL has no other way not to wait
        self._keys, self._anonymous = credentials.keys, credentials.anonymous
        self._keys.begin()
        self._tls = credentials.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        prepare(self._tls)
        self._scratch = Scratch()
        self._unsent = memoryview(b"")
        self._ready = select.poll()
        self._ready.register(self._tls.fileno(), select.POLLIN)
        self._send: Callable[[Buffers], int] = self._encrypt
        self.receive_into = self._receive_into
        self.pending = lambda: self._tls.pending() > 0

    # The handshake

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `Refused`, `Disconnected`, and `OSError`.
        """
        try:
            ssl.SSLSocket.do_handshake(self._tls)
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise Disconnected("client left while TLS began; perhaps it does not trust us") from error
        except ssl.SSLError as error:
            raise Refused(f"TLS: {explain(error, self._keys)}") from error
        self._accept()
        return 0

    def _accept(self) -> None:
        self.identity = identity_of(self._tls, self._keys)
        if not (self._anonymous or self._tls.getpeercert(binary_form=True) or was_used(self._tls)):
            raise Refused("TLS: the client has proved nothing")  # no cipher that is allowed gets here
        cipher = self._tls.cipher()
        words = [self._tls.version() or "", cipher[0] if cipher else ""]
        if self._kernel_encrypts():
            self._send = partial(_send_plain, self._tls)
            words.append("kTLS")
        self.description = " ".join(words)

    def _kernel_encrypts(self) -> bool:
        try:
            self._tls.getsockopt(_SOL_TLS, _TLS_TX, _INFO_SIZE)
        except OSError:
            return False
        return True

    # The bytes

    def _receive_into(self, view: memoryview) -> int:
        """All records that have come: OpenSSL gives one a call, and a batch of requests may be as many."""
        receive, pending, ready = self._tls.recv_into, self._tls.pending, self._ready.poll
        received, room = 0, len(view)
        try:
            received = count = receive(view, room)
            while count and received < room and (pending() or ready(0)):
                count = receive(view[received:], room - received)
                received += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not received:
                raise BlockingIOError from None
        except ssl.SSLError as error:
            if not received:
                raise _broken(error) from error
        return received

    def send(self, buffers: Buffers) -> int:
        """Send the beginning of *buffers*, at most IOV_MAX of them: the number of bytes.

        Raises `BlockingIOError`; the next call has to begin with the same bytes then, and sends them as they were.
        Raises `OSError` (EFAULT) if the next byte lies in memory that cannot be read.
        """
        return self._send(buffers)

    def _encrypt(self, buffers: Buffers) -> int:
        if not self._unsent:
            self._unsent = self._scratch.copy(buffers)
        try:
            sent = self._tls.send(self._unsent)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise BlockingIOError from None  # OpenSSL has made a record of the first bytes, and sends that first
        except ssl.SSLError as error:
            raise _broken(error) from error
        self._unsent = self._unsent[sent:]
        return sent

    # The end

    def fileno(self) -> int:
        return self._tls.fileno()

    def shutdown(self) -> None:
        """Say that nothing more will be sent. What still comes is no use to anybody, and handed out as it is."""
        with suppress(OSError):  # in the middle of a handshake or a record; or the answer would have to be waited for
            self._tls.unwrap()
        self._tls.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the descriptors, without a word: another process may have the connection too."""
        self._unsent = memoryview(b"")
        self._scratch.close()
        self._tls.close()


def _send_plain(tls: ssl.SSLSocket, buffers: Buffers) -> int:
    """What is sent past OpenSSL, the kernel encrypts."""
    return socket.socket.sendmsg(tls, buffers, (), _SEND_FLAGS)


def _broken(error: ssl.SSLError) -> OSError:
    reason = (error.reason or "").lower().replace("_", " ")
    return OSError(errno.EPROTO, f"TLS has failed: {reason or error.strerror}")
