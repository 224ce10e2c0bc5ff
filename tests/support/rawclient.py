"""An NBD client that says exactly what a test wants, right or wrong, byte by byte.

It shares no code with the server: formats and numbers are written out from the
specification a second time, so that a mistake in one of them shows.
"""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Optional, Tuple

from server_process import Server

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16

EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = 1, 2, 3, 6, 7, 8, 9, 10
ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (0x80000000 + n for n in (1, 3, 6, 9))


class Chunk(NamedTuple):
    """A structured reply's chunk."""

    flags: int
    kind: int
    cookie: int
    payload: bytes


class RawClient:
    """Talks over *sock*; what it receives it checks for the right magic, nothing else."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.size = 0
        self.flags = 0

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly *length* bytes; EOFError if the server closes before."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError(f"closed after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def closed(self) -> bool:
        """Wait until the server closes the connection (or resets it); False if it sends something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        """Go without a word: TCP sends RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def finish_sending(self) -> None:
        """Close this end only; what the server still sends can be received."""
        self.sock.shutdown(socket.SHUT_WR)

    # Handshake

    def greet(self, flags: int = 3) -> int:
        """Take the greeting, answer with client *flags*; returns the server's."""
        magic, option_magic, server_flags = struct.unpack(">QQH", self.receive(18))
        assert magic == 0x4E42444D41474943
        assert option_magic == 0x49484156454F5054
        self.send(struct.pack(">I", flags))
        return int(server_flags)

    def send_option(self, option: int, data: bytes = b"", length: Optional[int] = None) -> None:
        self.send(struct.pack(">QII", 0x49484156454F5054, option, len(data) if length is None else length) + data)

    def receive_option_reply(self) -> Tuple[int, int, bytes]:
        """Option, reply type, data."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        return option, kind, self.receive(length)

    def option(self, option: int, data: bytes = b"", length: Optional[int] = None) -> List[Tuple[int, bytes]]:
        """Send an option; all its replies as (type, data), up to the ACK or the error."""
        self.send_option(option, data, length)
        replies = []
        while True:
            answered, kind, payload = self.receive_option_reply()
            assert answered == option
            replies.append((kind, payload))
            if kind == ACK or kind & 0x80000000:
                return replies

    def go(self, name: str = "", option: int = GO) -> List[Tuple[int, bytes]]:
        """GO (or INFO) without information requests; remembers size and flags."""
        replies = self.option(option, go_data(name))
        for kind, payload in replies:
            if kind == REP_INFO and payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", payload[2:12])
        return replies

    def negotiate(self, name: str = "", *, structured: bool = False, allocation: bool = False) -> RawClient:
        """The whole handshake with GO."""
        self.greet()
        if structured or allocation:
            assert self.option(STRUCTURED_REPLY) == [(ACK, b"")]
        if allocation:
            assert self.option(SET_META_CONTEXT, context_data(name, "base:allocation"))[-1][0] == ACK
        assert self.go(name)[-1][0] == ACK
        return self

    # Transmission

    def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, data: bytes = b""
    ) -> None:
        self.send(pack_request(command, offset, length, flags=flags, cookie=cookie) + data)

    def simple_reply(self, length: int = 0) -> Tuple[int, int, bytes]:
        """Error, cookie, and *length* bytes of data if there is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698, f"reply magic {magic:#x}"
        return error, cookie, self.receive(0 if error else length)

    def chunk(self) -> Chunk:
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == 0x668E33EF, f"chunk magic {magic:#x}"
        return Chunk(flags, kind, cookie, self.receive(length))

    def chunks(self) -> List[Chunk]:
        """All chunks of one structured reply."""
        chunks = [self.chunk()]
        while not chunks[-1].flags & 1:
            chunks.append(self.chunk())
        return chunks

    def read(self, offset: int, length: int) -> bytes:
        """A plain READ in a session without structured replies."""
        self.request(READ, offset, length, cookie=77)
        error, cookie, data = self.simple_reply(length)
        assert (error, cookie) == (0, 77)
        return data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        """A WRITE; returns the error."""
        self.request(WRITE, offset, len(data), data=data, flags=flags, cookie=78)
        error, cookie, _ = self.simple_reply()
        assert cookie == 78
        return error

    def works(self) -> bool:
        """Whether the session still answers requests as it should (no structured replies)."""
        self.request(FLUSH, cookie=0xABCDEF)
        return self.simple_reply()[:2] == (0, 0xABCDEF)


def pack_request(command: int, offset: int, length: int, *, flags: int = 0, cookie: int = 1) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def pack_option(option: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, option, len(data)) + data


def string(text: str) -> bytes:
    """A string with its 32-bit length in front."""
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw


def go_data(name: str = "", *requests: int) -> bytes:
    return string(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def context_data(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


@contextmanager
def bystander(server: Server) -> Iterator[RawClient]:
    """A client of *server* who must notice nothing of what happens meanwhile; nor may the master end."""
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.works()  # its worker has logged by now that it is here
        yield client
        assert client.works()
        assert server.process.poll() is None, server.log()
