"""A small HTTP/1.1 server for pages that are made at once: GET and HEAD, connections that stay open.

Nothing here waits: the owner's loop polls `HttpServer.interests` and calls `HttpServer.progress`. A client
that says nothing, or takes nothing, costs a connection for a while. There are `MOST_CONNECTIONS`, and
`_MOST_UNSENT` bytes; beyond them the connection goes on which nothing has moved for longest.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import time
from time import monotonic
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..logs import Seldom, about, log
from ..system.polling import poll_patiently
from ..text import one_line
from .hosts import OwnNames

MOST_CONNECTIONS = 128
_MOST_UNSENT = 64 << 20
_LARGEST_HEAD = 8 << 10
_REQUEST_TIME = 10.0
"""Seconds from the first byte of a request to its last, and from a connection to its first request."""

_IDLE_TIME = 300.0
"""Seconds until the next request: who scrapes does it every few minutes at most."""

_SEND_TIME = 30.0
_DRAIN_TIME = 2.0
_RETRY_ACCEPT = 1.0
_TELL_OF_SHORTAGE = 30.0
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
}


class Request(NamedTuple):
    """What a client asks for; names of *headers* are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    keep_alive: bool


class Response(NamedTuple):
    """What it gets. *headers* are further ones."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Tuple[Tuple[str, str], ...] = ()


Page = Callable[[Request], Response]


class HttpServer:
    """Serves *pages*, by their paths, on *listeners*, which are others' and do not block."""

    def __init__(self, listeners: Sequence[socket.socket], pages: Mapping[str, Page]) -> None:
        self._listeners = list(listeners)
        self._site = _Site(pages)
        self._connections: List[_Connection] = []
        self._accept_at: Optional[float] = None
        self._shortages = Seldom(_TELL_OF_SHORTAGE)

    @property
    def is_busy(self) -> bool:
        """Whether somebody is to be answered yet."""
        return any(connection.is_waiting for connection in self._connections)

    def leave(self) -> None:
        """Another process accepts from now on; who has come before, or has asked, is answered."""
        self._listeners.clear()
        for connection in self._connections:
            connection.finish()

    def close(self) -> None:
        """Nobody is waited for any more."""
        for connection in self._connections:
            connection.close()

    def interests(self) -> List[Tuple[int, int]]:
        """Descriptors and what to poll them for."""
        accepting = self._listeners if self._accept_at is None else []
        listening = [(listener.fileno(), select.POLLIN) for listener in accepting]
        return listening + [(connection.fileno(), connection.mask()) for connection in self._connections]

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called, whatever the descriptors do (monotonic seconds)."""
        deadlines = [0.0 if connection.has_more else connection.deadline for connection in self._connections]
        return min([*deadlines, *([] if self._accept_at is None else [self._accept_at])], default=None)

    def progress(self) -> None:
        """Do all that can be done without waiting."""
        poll = select.poll()
        for fd, mask in self.interests():
            poll.register(fd, mask)
        ready: Dict[int, int] = dict(poll_patiently(poll, 0))
        now = monotonic()
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
        for connection in list(self._connections):
            if not connection.progress(ready.get(connection.fileno(), 0), now):
                self._drop(connection)
        for listener in self._listeners:
            if listener.fileno() in ready:
                self._accept(listener)
        while sum(connection.unsent for connection in self._connections) > _MOST_UNSENT:
            self._make_room()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MOST_CONNECTIONS):
            try:
                sock = listener.accept()[0]
            except BlockingIOError:
                return
            except OSError as error:
                self._shortages.log(
                    logging.ERROR, "metrics: cannot accept: %s", error.strerror, extra=about(error=error)
                )
                self._accept_at = monotonic() + _RETRY_ACCEPT
                return
            if len(self._connections) >= MOST_CONNECTIONS:
                self._make_room()
            self._connections.append(_Connection(sock, self._site))

    def _make_room(self) -> None:
        self._drop(min(self._connections, key=lambda connection: connection.moved_at))

    def _drop(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        connection.close()


class _Site:
    """What is answered: the *pages*, to who asks by a name of this computer."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._names = OwnNames()

    def answer(self, request: Request) -> Response:
        """Never raises."""
        host = request.headers.get("host")
        if host is not None and not self._names.include(host):
            return _refusal(421, f"{one_line(host)} is no name of this computer: ask by its address, or by localhost")
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "only GET and HEAD are allowed")._replace(headers=(("Allow", "GET, HEAD"),))
        page = self._pages.get(request.path)
        if page is None:
            return _refusal(404, f"there is no such page; there are: {' '.join(self._pages)}")
        try:
            return page(request)
        except Exception:
            log.exception("metrics: %s cannot be made", request.path)
            return _refusal(500, "this page cannot be made; the log says why")


class _Connection:
    """One client: one request after the other. Nothing is received from it while it has a response to take."""

    def __init__(self, sock: socket.socket, site: _Site) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._site = site
        self._input = bytearray()
        self._output = memoryview(b"")
        self._last = self._draining = False
        self._is_new = True
        self.has_more = False
        """Whether another request has come already."""
        self.moved_at = monotonic()
        self.deadline = self.moved_at + _REQUEST_TIME

    @property
    def unsent(self) -> int:
        return len(self._output)

    @property
    def is_waiting(self) -> bool:
        """Whether it is to be answered, or to get the rest of an answer."""
        return not self._draining and bool(self._is_new or self._input or self._output)

    def fileno(self) -> int:
        return self._sock.fileno()

    def mask(self) -> int:
        return select.POLLOUT if self._output else 0 if self.has_more else select.POLLIN

    def finish(self) -> None:
        """Close as soon as it has its answer."""
        self._last = True
        if not self.is_waiting:
            self.deadline = 0.0

    def progress(self, events: int, now: float) -> bool:
        """Do what the poll's *events* and the time allow; False if the connection is over."""
        try:
            if events & select.POLLIN and not self._receive(now):
                return False
            if events & select.POLLOUT:
                self._send(now)
            if not events & (select.POLLIN | select.POLLOUT) and events & _GONE:
                return False
            if not (self._output or self._draining):
                self._answer(now)
        except OSError:
            return False
        return now < self.deadline

    def close(self) -> None:
        self._sock.close()

    def _receive(self, now: float) -> bool:
        data = self._sock.recv(_LARGEST_HEAD)
        if not data:
            return False
        if self._draining:
            return True
        if not self._input:
            self.deadline = now + _REQUEST_TIME
        self.moved_at = now
        self._input += data
        return True

    def _answer(self, now: float) -> None:
        """Answer the next request, if all of it is there."""
        end = _HEAD_END.search(self._input)
        if end is None or end.end() > _LARGEST_HEAD:
            if len(self._input) > _LARGEST_HEAD:
                self._respond(None, _refusal(431, "the request is too long"), now)
            return
        head = bytes(self._input[: end.start()])
        del self._input[: end.end()]
        self.has_more = _HEAD_END.search(self._input) is not None
        request = parse_request(head)
        response = _refusal(400, "this is no request") if request is None else self._site.answer(request)
        self._respond(request, response, now)

    def _respond(self, request: Optional[Request], response: Response, now: float) -> None:
        self._is_new = False
        self._last = self._last or request is None or not request.keep_alive
        headers = (
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Connection", "close" if self._last else "keep-alive"),
            *response.headers,
        )
        lines = [
            f"HTTP/1.1 {response.status} {_REASONS[response.status]}",
            *(f"{name}: {text}" for name, text in headers),
        ]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        body = b"" if request is not None and request.method == "HEAD" else response.body
        self._output = memoryview(head + body)
        self.deadline = now + _SEND_TIME
        self._send(now)

    def _send(self, now: float) -> None:
        try:
            sent = self._sock.send(self._output)
        except BlockingIOError:
            return
        self._output = self._output[sent:]
        self.moved_at = now
        if self._output:
            return
        self._output = memoryview(b"")  # lets go of the response
        if self._last:
            self._sock.shutdown(socket.SHUT_WR)  # and not closed: that would take back what is on its way
            self._draining, self.deadline = True, now + _DRAIN_TIME
        else:
            self.deadline = now + (_REQUEST_TIME if self._input else _IDLE_TIME)


def parse_request(head: bytes) -> Optional[Request]:
    """The request whose *head* this is, without the empty line; None if it makes no sense, or has a body."""
    first, *lines = re.split(rb"\r?\n", head)
    found = _REQUEST_LINE.fullmatch(first)
    fields = [_HEADER.fullmatch(line) for line in lines]
    if found is None or None in fields:
        return None
    headers: Dict[str, str] = {}
    for field in fields:
        assert field is not None
        name, text = field[1].decode("latin-1").lower(), field[2].decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return None
    path, _, query = found[2].decode("latin-1").partition("?")
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection if found[3] == b"1" else "keep-alive" in connection
    return Request(found[1].decode(), path, query, headers, keep_alive)


def _refusal(status: int, reason: str) -> Response:
    return Response(f"{reason}\n".encode(), status=status)
