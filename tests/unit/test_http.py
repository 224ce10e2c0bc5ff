"""The HTTP server of metrics, in this process, with real sockets."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import Iterator

import pytest
from scraping import ask, connect, get, read_answer

from xnbd.metrics import http
from xnbd.metrics.http import MOST_CONNECTIONS, HttpServer, Request, Response, parse_request


def hello(request: Request) -> Response:
    return Response(f"{request.method} {request.query}".encode())


def broken(_request: Request) -> Response:
    raise ValueError("no")


LARGE = bytes(8 << 20)
PAGES = {"/": hello, "/large": lambda _: Response(LARGE), "/broken": broken}


class Loop:
    """The server's loop in a thread."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.server = HttpServer([self.listener], PAGES)
        self.over = threading.Event()
        self.turns = 0

    def run(self) -> None:
        while not self.over.is_set():
            self.turns += 1
            poll = select.poll()
            for fd, events in self.server.interests():
                poll.register(fd, events)
            deadline = self.server.deadline()
            timeout = 0.05 if deadline is None else min(0.05, max(0.0, deadline - time.monotonic()))
            poll.poll(timeout * 1000)
            self.server.progress()


@contextmanager
def serving() -> Iterator[Loop]:
    loop = Loop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop
    finally:
        loop.over.set()
        thread.join()
        loop.listener.close()
        loop.server.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    with serving() as loop:
        yield loop


def test_a_connection_is_used_again(loop: Loop) -> None:
    with connect(loop.port) as sock:
        for _ in range(3):
            assert ask(sock, "/?a=b").body == b"GET a=b"
        answer = ask(sock, "/", Connection="close")
        assert answer.headers["connection"] == "close"
        assert sock.recv(1) == b""


def test_head_has_no_body(loop: Loop) -> None:
    with connect(loop.port) as sock:
        answer = ask(sock, "/", "HEAD")
        assert (answer.status, answer.headers["content-length"]) == (200, "5")
        assert ask(sock, "/").body == b"GET "


def test_requests_that_come_together_are_answered_in_order(loop: Loop) -> None:
    with connect(loop.port) as sock:
        sock.sendall(b"".join(b"GET /?%d HTTP/1.1\r\n\r\n" % number for number in range(300)))
        bodies, data = b"", b""
        while data.count(b"HTTP/1.1 200") < 300 or not data.endswith(b"GET 299"):
            part = sock.recv(1 << 16)
            assert part
            data += part
        bodies = data
        assert [b"GET %d" % number in bodies for number in range(300)] == [True] * 300


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /none HTTP/1.1\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\n\r\n", 405),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 9000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.0\n\n", 200),
        (b"GET / HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 421),
        (b"POST /none HTTP/1.1\r\nHost: elsewhere.example:1\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
    ],
)
def test_what_is_asked_wrongly_is_refused(loop: Loop, request_: bytes, status: int) -> None:
    with connect(loop.port) as sock:
        sock.sendall(request_)
        assert read_answer(sock).status == status


def test_a_request_that_comes_byte_by_byte_is_answered(loop: Loop) -> None:
    with connect(loop.port) as sock:
        for byte in b"GET / HTTP/1.1\r\nAccept: x\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert read_answer(sock).body == b"GET "


def test_who_takes_nothing_and_who_says_nothing_keep_nobody_waiting(loop: Loop) -> None:
    with ExitStack() as stack:
        for number in range(MOST_CONNECTIONS + 60):
            sock = stack.enter_context(connect(loop.port))
            sock.sendall((b"GET /large HTTP/1.1\r\n\r\n", b"GET / HT", b"")[number % 3])
            if not number % 20:
                assert get(loop.port, "/").body == b"GET "
        assert get(loop.port, "/large").body == LARGE
        turns = loop.turns
        time.sleep(0.5)  # nothing moves: then the loop does not turn either
        assert loop.turns - turns < 60


def test_a_connection_without_a_request_ends(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_REQUEST_TIME", 0.2)
    with connect(loop.port) as silent, connect(loop.port) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        assert (silent.recv(1), slow.recv(1)) == (b"", b"")


def test_who_was_answered_gets_the_rest_when_another_process_goes_on(loop: Loop) -> None:
    with connect(loop.port) as sock, connect(loop.port) as idle:
        assert ask(idle, "/").status == 200
        sock.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        while not loop.server.is_busy:
            time.sleep(0.01)
        loop.server.leave()
        assert read_answer(sock).body == LARGE
        assert sock.recv(1) == b""
        assert idle.recv(1) == b""


def test_a_head_is_parsed() -> None:
    request = parse_request(b"GET /a?b=c HTTP/1.1\r\nAccept:  x \r\naccept: y\nHost: h")
    assert request == Request("GET", "/a", "b=c", {"accept": "x, y", "host": "h"}, True)
    assert parse_request(b"GET / HTTP/1.0") == Request("GET", "/", "", {}, False)
