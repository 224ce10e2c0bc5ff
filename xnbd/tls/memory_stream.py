"""TLS over a socket by way of memory: one receive brings many records, and many records leave with one send.

OpenSSL's own way (`socket_stream`) takes two system calls for each record that comes, and one for each that goes. Here
every byte is copied once more: a client has many small requests, and large ones cost a tenth more. Nothing here waits:
`BlockingIOError` says that the descriptor has to be polled for.
"""

from __future__ import annotations

import errno
import mmap
import select
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Optional, Union

from .psk import prepare, shake_hands

RECORD = 16 << 10
"""The most bytes that one record brings."""

_ARRIVING = 256 << 10
"""Bytes that one receive may bring. Memory is taken only for what has been used."""

_DEPARTING = 32 << 10
"""Bytes that leave together: so the other side decrypts them while the next ones are encrypted, and all stay cached.

Half of this is a wake-up too many, twice as much keeps the other side waiting: both were a tenth slower.
"""

_LONGEST = 48 << 10
"""Bytes that leave together if they are the last: a small rest would be a wake-up of its own."""

_MOST_UNASKED = 64 << 10
"""Bytes that OpenSSL may have to say by itself to one that takes nothing."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class MemoryStream:
    """TLS of *context* with the client of *sock*, which it takes over; ``tls`` tells what was agreed on.

    What goes wrong after the handshake is raised as *explain* says.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        explain: Callable[[ssl.SSLError], OSError],
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        prepare(self.tls)
        self._sock = sock
        self._explain = explain
        self._read: Callable[[int, Any], int] = self.tls.read  # type: ignore[assignment]
        self._arrived = memoryview(mmap.mmap(-1, _ARRIVING, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._departing = memoryview(b"")  # encrypted and not sent
        self._promised = 0  # bytes of the caller's that these are
        self._holds = False
        self._at_end: Optional[Callable[[memoryview], int]] = None  # how to go on where nothing comes any more

    def fileno(self) -> int:
        return self._sock.fileno()

    def pending(self) -> bool:
        """Whether `receive_into` has something to tell that poll(2) does not show."""
        return self._holds

    @property
    def unsent(self) -> bool:
        """Whether something is encrypted and not sent: the next `send` goes on with that."""
        return bool(self._promised)

    def shake_hands(self) -> int:
        """Go on with the handshake: 0 when it is done, else the poll events to wait for.

        Raises `ssl.SSLError`, when the other side has been told, and `OSError`.
        """
        while True:
            done = self._shake()
            if not self._flush():
                return select.POLLOUT
            if done:
                self._holds = bool(self._incoming.pending)
                return 0
            try:
                self._take_in(_ARRIVING)
            except BlockingIOError:
                return select.POLLIN

    def _shake(self) -> bool:
        try:
            shake_hands(self.tls)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            with suppress(OSError):
                self._flush()
            raise
        return True

    # What comes

    def _take_in(self, most: int) -> bool:
        """Receive *most* bytes; whether more have perhaps come. Raises `OSError`."""
        most = min(most, _ARRIVING)
        count = self._sock.recv_into(self._arrived, most, socket.MSG_DONTWAIT)
        if count:
            self._incoming.write(self._arrived[:count])
        else:
            self._incoming.write_eof()
        return count == most

    def receive_into(self, view: memoryview) -> int:
        """Receive all that has come: the number of bytes, 0 at the end. Raises `BlockingIOError`, and `OSError`.

        A client that is answered piece by piece would wake up for each. Nothing is left to be `pending` if the *view*
        has more than twice the room of a record.
        """
        if self._at_end:
            return self._at_end(view)
        more = not self._holds and self._take_in(max(len(view) - RECORD, RECORD))
        received = self._decrypt(view)
        while more and len(view) - received > 2 * RECORD:
            try:
                more = self._take_in(len(view) - received - RECORD)
            except OSError:
                break  # what is wrong is met again by the next call
            received += self._decrypt(view[received:])
        if received:
            return received
        if self._at_end:
            return self._at_end(view)
        raise BlockingIOError(errno.EAGAIN, "nothing has come")

    def _decrypt(self, view: memoryview) -> int:
        """What has been taken in, as far as it finds room: the number of bytes."""
        read, incoming, room, received = self._read, self._incoming, len(view), 0
        try:
            while received < room:
                count = read(room - received, view[received:])
                received += count
                if not count:
                    self._end(None)
                    break
                if not incoming.pending:
                    break
        except ssl.SSLWantReadError:
            pass  # the beginning of a record
        except ssl.SSLError as error:
            self._end(error)
        if self._outgoing.pending:
            self._answer()
        self._holds = bool(self._at_end or (received == room and (incoming.pending or self.tls.pending())))
        return received

    def _end(self, error: Optional[ssl.SSLError]) -> None:
        """From now on the caller hears of the end, or of the *error*, each time that it wants to receive."""
        self._at_end = partial(_fail, self._explain(error)) if error and not is_end(error) else _nothing

    def _answer(self) -> None:
        """OpenSSL has something to say by itself: what is wrong, or no to another handshake of TLS 1.2."""
        if not self._departing:
            with suppress(OSError):  # whoever is gone is noticed when something is received
                self._flush()
        if self._outgoing.pending > _MOST_UNASKED:
            error = OSError(errno.EPROTO, "TLS has failed: the other side asks and takes no answers")
            self._at_end = partial(_fail, error)

    # What goes

    def send(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Send the beginning of *data*: the number of bytes. Raises `BlockingIOError`, and `OSError`.

        After a `BlockingIOError` the next call has to begin with the same bytes, and may leave them out if `unsent`.
        """
        if self._departing:
            if not self._transmit():
                raise BlockingIOError(errno.EAGAIN, "nothing is taken")
            if self._promised:
                done, self._promised = self._promised, 0
                return done
        done, length = 0, len(data)
        while done < length:
            stop = length if length - done <= _LONGEST else done + _DEPARTING
            self._encrypt(data[done:stop])
            if not self._flush():
                self._promised = stop - done
                if done:
                    return done
                raise BlockingIOError(errno.EAGAIN, "not all was taken")
            done = stop
        return done

    def _encrypt(self, data: Union[bytes, bytearray, memoryview]) -> None:
        try:
            self.tls.write(data)
        except ssl.SSLError as error:
            raise self._explain(error) from error

    def _flush(self) -> bool:
        """Send what OpenSSL has ready; whether all is taken. Raises `OSError`."""
        if not self._departing:
            self._departing = memoryview(self._outgoing.read())
        return self._transmit()

    def _transmit(self) -> bool:
        departing = self._departing
        if departing:
            try:
                departing = departing[self._sock.send(departing, _SEND_FLAGS) :]
            except BlockingIOError:
                return False
            self._departing = departing
        return not departing

    # The end

    def shutdown(self) -> None:
        """Say that nothing more will be sent, without waiting for an answer. Raises `OSError`.

        What still comes is handed out as it is: it is no use to anybody.
        """
        with suppress(OSError, ValueError):  # in the middle of a handshake; or the answer is not there yet
            self.tls.unwrap()
        with suppress(OSError):
            if self._flush():
                self._flush()  # what OpenSSL had ready while something else was on its way
        self._holds, self._at_end = True, partial(_receive_raw, self._sock)
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the descriptor, without a word."""
        self._sock.close()


def is_end(error: ssl.SSLError) -> bool:
    """Whether the other side has gone, with a goodbye or without."""
    ends = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return isinstance(error, ends) or error.reason == "UNEXPECTED_EOF_WHILE_READING"


def _receive_raw(sock: socket.socket, view: memoryview) -> int:
    return sock.recv_into(view, 0, socket.MSG_DONTWAIT)


def _nothing(_view: memoryview) -> int:
    return 0


def _fail(error: OSError, _view: memoryview) -> int:
    raise error
