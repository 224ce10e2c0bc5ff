"""A web server that serves one disk, and lies as it is told, for tests that want to see what is made of it."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Asked(NamedTuple):
    """A request: path with query, the bytes of the disk that it wants, and its headers with small letters."""

    target: str
    start: int
    stop: int
    headers: Dict[str, str]


class Answer(NamedTuple):
    """A reply; a *status* of 0 is none at all: the connection is closed. ``Content-Length`` is *length* if given.

    Only the first *cut* bytes of all that are sent, if it is given.
    """

    status: int
    headers: Dict[str, str]
    body: bytes = b""
    length: Optional[int] = None
    cut: Optional[int] = None

    def to_bytes(self) -> bytes:
        length = len(self.body) if self.length is None else self.length
        lines = [f"HTTP/1.1 {self.status} Told", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + self.body


class WebOrigin:
    """Serves *disk* on a port of this computer in threads. ``twist`` may make another answer of the honest one."""

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        self.etag: Optional[str] = '"one"'
        self.modified: Optional[str] = "Sat, 28 Nov 2026 12:00:00 GMT"
        self.heeds_conditions = True
        self.asked: List[Asked] = []
        self.twist: Callable[[Asked, Answer], Answer] = lambda asked, answer: answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def uri(self, path: str = "disk.raw") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def reads(self) -> List[Tuple[int, int]]:
        """What was asked for: begin and end."""
        return [(asked.start, asked.stop) for asked in list(self.asked)]

    def answer(self, asked: Asked) -> Answer:
        """The honest answer, as RFC 9110 has it."""
        validators = {"ETag": self.etag, "Last-Modified": self.modified}
        headers = {name: value for name, value in validators.items() if value is not None}
        wanted = asked.headers.get("if-match")
        if self.heeds_conditions and wanted is not None and wanted != self.etag:
            return Answer(412, headers)
        if asked.start >= len(self.disk):
            return Answer(416, {**headers, "Content-Range": f"bytes */{len(self.disk)}"})
        stop = min(asked.stop, len(self.disk))
        headers["Content-Range"] = f"bytes {asked.start}-{stop - 1}/{len(self.disk)}"
        return Answer(206, headers, self.disk[asked.start : stop])

    def _handler(self) -> type:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        match = _RANGE.match(handler.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match and match[2] else (0, len(self.disk))
        asked = Asked(handler.path, start, stop, {name.lower(): value for name, value in handler.headers.items()})
        self.asked.append(asked)
        answer = self.twist(asked, self.answer(asked))
        told = answer.to_bytes()[: answer.cut] if answer.status else b""
        handler.close_connection = not answer.status or answer.cut is not None or answer.length is not None
        try:
            handler.wfile.write(told)
        except OSError:
            handler.close_connection = True  # who has asked has gone


def path_of(asked: Asked) -> str:
    return urlsplit(asked.target).path
