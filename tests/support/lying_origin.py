"""An NBD server that behaves as a test tells it, to be the origin of a proxy that must not believe it.

It shares no code with the program: see `rawclient` for the numbers.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

from rawclient import ACK, ERR_UNSUP, GO, REP_INFO, REP_META_CONTEXT, SET_META_CONTEXT, STRUCTURED_REPLY

CONTEXT = 7
"""The id under which an honest handshake grants ``base:allocation``."""

DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
_STOP_TIME = 30.0


class Asked(NamedTuple):
    """A request as it came."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Visitor:
    """The client of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly *length* bytes; EOFError if the client leaves before."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def wait_until_gone(self) -> None:
        """Stay silent until the client leaves."""
        while self.sock.recv(1 << 16):
            pass

    def reset(self) -> None:
        """Go without a word: TCP sends RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def option(self) -> Tuple[int, bytes]:
        """The next option: number and data."""
        magic, number, length = struct.unpack(">QII", self.receive(16))
        assert magic == 0x49484156454F5054
        return number, self.receive(length)

    def request(self) -> Asked:
        """The next request of those that carry no data; EOFError once the client has left."""
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        assert magic == 0x25609513
        if command == 2:
            raise EOFError
        return Asked(flags, command, cookie, offset, length)

    def negotiate(self, size: int, *, structured: bool = True) -> None:
        """An honest handshake, up to a granted GO; without *structured* replies no block status either."""
        self.send(greeting())
        self.receive(4)
        self.haggle(size, structured=structured)

    def haggle(self, size: int, *, structured: bool = True) -> None:
        """What follows greeting and flags in an honest handshake."""
        while True:
            number, _ = self.option()
            if number == GO:
                self.send(export_info(size) + option_reply(GO, ACK))
                return
            granted = structured and number in (STRUCTURED_REPLY, SET_META_CONTEXT)
            if granted and number == SET_META_CONTEXT:
                self.send(option_reply(number, REP_META_CONTEXT, struct.pack(">I", CONTEXT) + b"base:allocation"))
            self.send(option_reply(number, ACK if granted else ERR_UNSUP))


Behaviour = Callable[[Visitor], None]


class LyingOrigin:
    """Listens on a Unix socket at *path* and does *behave* to each client in turn, then closes.

    A client who leaves in the middle is no failure; anything else that *behave*
    raises fails the test at the end of the ``with`` block.
    """

    def __init__(self, path: Path, behave: Behaviour) -> None:
        self.path = path
        self.behave = behave
        self.visits = 0
        self._failures: List[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._current: List[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> LyingOrigin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _STOP_TIME
        while self._thread.is_alive() and time.monotonic() < deadline:
            for sock in list(self._current):  # and who has waited behind them comes after
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it ended by itself
            self._thread.join(0.02)
        assert not self._thread.is_alive(), "the lying origin did not stop"
        self._listener.close()
        if self._failures:
            raise self._failures[0]

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.visits += 1
            self._current.append(sock)
            try:
                self.behave(Visitor(sock))
            except (EOFError, ConnectionError):
                pass  # the client has heard enough
            except BaseException as failure:
                self._failures.append(failure)
            finally:
                self._current.remove(sock)
                sock.close()


def greeting(flags: int = 3) -> bytes:
    return struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, flags)


def oldstyle_greeting(size: int, flags: int = 3) -> bytes:
    return struct.pack(">QQQI", 0x4E42444D41474943, 0x420281861253, size, flags) + bytes(124)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def export_info(size: int, flags: int = 3) -> bytes:
    """The reply to GO that tells size and flags."""
    return option_reply(GO, REP_INFO, struct.pack(">HQH", 0, size, flags))


def simple(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", flags: int = DONE) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def data_chunk(cookie: int, offset: int, data: bytes, flags: int = DONE) -> bytes:
    return chunk(cookie, OFFSET_DATA, struct.pack(">Q", offset) + data, flags)


def hole_chunk(cookie: int, offset: int, length: int, flags: int = DONE) -> bytes:
    return chunk(cookie, OFFSET_HOLE, struct.pack(">QI", offset, length), flags)


def status_chunk(cookie: int, *extents: Tuple[int, int], context: int = CONTEXT, flags: int = DONE) -> bytes:
    body = b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(cookie, STATUS, struct.pack(">I", context) + body, flags)


def error_chunk(cookie: int, error: int, text: bytes = b"", flags: int = DONE) -> bytes:
    return chunk(cookie, ERROR, struct.pack(">IH", error, len(text)) + text, flags)
