"""The server's end of TLS over a connected socket: handshake, receive and send, none of which waits.

What is sent is encrypted by the kernel, if it can do that with what was agreed on (kTLS): then it takes bytes that lie
in mapped files as it does without TLS. Else OpenSSL encrypts a copy (`scratch`).
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Callable, Optional, Sequence, Union

from ..access.identity import NOBODY
from ..errors import Disconnected, Refused
from .credentials import ServerCredentials
from .memory_stream import MemoryStream, is_end
from .peer import identity_of
from .psk import was_used
from .refusal import explain
from .scratch import Scratch
from .socket_stream import SocketStream

Buffers = Sequence[Union[bytes, memoryview]]


class ServerChannel:
    """TLS with the client of *sock*, which it takes over, by *credentials* as they are now."""

    receive_into: Callable[[memoryview], int]
    pending: Optional[Callable[[], bool]]

    def __init__(self, sock: socket.socket, credentials: ServerCredentials) -> None:
        self.identity = NOBODY
        self.description = ""
        """Version, cipher, and whether the kernel encrypts; empty before the handshake is done."""
        self._keys, self._anonymous = credentials.keys, credentials.anonymous
        self._keys.begin()
        self._stream: Union[MemoryStream, SocketStream]
        if credentials.kernel_encrypts and sock.family != socket.AF_UNIX:
            self._stream = SocketStream(sock, credentials.context, _broken, server_side=True)
        else:
            self._stream = MemoryStream(sock, credentials.context, _broken)
        self._scratch = Scratch()
        self._send_plain: Optional[Callable[[Buffers], int]] = None  # where the kernel encrypts
        self.receive_into = self._stream.receive_into
        self.pending = self._stream.pending

    # The handshake

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `Refused`, `Disconnected`, and `OSError`.
        """
        try:
            events = self._stream.shake_hands()
        except ssl.SSLError as error:
            if is_end(error):
                raise Disconnected("client left while TLS began; perhaps it does not trust us") from error
            raise Refused(f"TLS: {explain(error, self._keys)}") from error
        if not events:
            self._accept()
        return events

    def _accept(self) -> None:
        stream = self._stream
        tls = stream.tls
        self.identity = identity_of(tls, self._keys)
        if not (self._anonymous or tls.getpeercert(binary_form=True) or was_used(tls)):
            raise Refused("TLS: the client has proved nothing")  # no cipher that is allowed gets here
        cipher = tls.cipher()
        words = [tls.version() or "", cipher[0] if cipher else ""]
        if isinstance(stream, SocketStream) and stream.encrypts_in_kernel:
            self._send_plain = stream.send_plain
            words.append("kTLS")
        self.description = " ".join(words)

    # The bytes

    def send(self, buffers: Buffers) -> int:
        """Send the beginning of *buffers*, at most IOV_MAX of them: the number of bytes.

        Raises `BlockingIOError`; the next call has to begin with the same bytes then, and sends them as they were.
        Raises `OSError` (EFAULT) if the next byte lies in memory that cannot be read.
        """
        if self._send_plain:
            return self._send_plain(buffers)
        stream = self._stream
        return stream.send(b"" if stream.unsent else self._scratch.copy(buffers))

    # The end

    def fileno(self) -> int:
        return self._stream.fileno()

    def shutdown(self) -> None:
        """Say that nothing more will be sent. What still comes is no use to anybody, and handed out as it is."""
        self._stream.shutdown()

    def close(self) -> None:
        """Let go of the descriptors, without a word: another process may have the connection too."""
        self._stream.close()
        self._scratch.close()


def _broken(error: ssl.SSLError) -> OSError:
    reason = (error.reason or "").lower().replace("_", " ")
    return OSError(errno.EPROTO, f"TLS has failed: {reason or error.strerror}")
