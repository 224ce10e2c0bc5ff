"""A conversation with a running server on its control socket, see ``xnbd-bgctl(8)``."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
from typing import Any, Dict, Iterator

from ..errors import ConfigurationError
from ..text import one_line

Message = Dict[str, Any]

LONGEST_REPLY = 64 << 20
"""Bytes."""

PATIENCE = 30.0
"""Seconds without a word after which a server is thought to hang: one that works on a command says so more often."""


class Departed(ConfigurationError):
    """The server has closed the connection without an answer, as in the moment of an upgrade."""


class ControlClient:
    """A connection to the control socket at *path*; *timeout* seconds is how long the server may be silent."""

    def __init__(self, path: str, timeout: float = PATIENCE) -> None:
        """Raises `ConfigurationError` if nobody can be reached there."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A non-blocking connect would fail at once when others wait before it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _pack_time(timeout))
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ConfigurationError(unreachable(path, error)) from error
        self._socket.settimeout(timeout)
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the server ends a command of this conversation that still runs."""
        self._lines.close()
        self._socket.close()

    def ask(self, **request: object) -> Message:
        """The last line of the reply. Raises `ConfigurationError` if the server says no."""
        *_, last = self.follow(**request)
        return last

    def follow(self, **request: object) -> Iterator[Message]:
        """The lines of the reply as they come. Raises `ConfigurationError` if the server says no."""
        given = {name: value for name, value in request.items() if value is not None}
        try:
            self._socket.sendall(json.dumps(given).encode() + b"\n")
            while True:
                message = self._receive()
                if not message.get("waiting"):
                    yield message
                if message.get("done"):
                    return
        except socket.timeout:
            raise ConfigurationError(silence(self._path)) from None
        except (ConnectionResetError, BrokenPipeError):
            raise departed(self._path) from None

    def _receive(self) -> Message:
        first = self._lines.peek(1)[:1]
        if not first:
            raise departed(self._path)
        if first != b"{":
            raise foreign(self._path)
        line = self._lines.readline(LONGEST_REPLY)
        if not line.endswith(b"\n"):
            raise departed(self._path)
        return parse_line(self._path, line)


def parse_line(path: str, line: bytes) -> Message:
    """A line of the reply of the server at *path*. Raises `ConfigurationError` if it says no."""
    try:
        message = dict(json.loads(line))
    except (ValueError, TypeError):
        raise foreign(path) from None
    if "error" in message:
        raise ConfigurationError(shown(message["error"]))
    return message


def departed(path: str) -> Departed:
    return Departed(f"the server at {path} closed the connection without an answer: see its log")


def foreign(path: str) -> ConfigurationError:
    return ConfigurationError(f"{path} is not a control socket: another program answers there")


def shown(text: object) -> str:
    """*text* in one line, without what a terminal might obey: parts of it come from other computers."""
    return one_line(str(text))


def unreachable(path: str, error: OSError) -> str:
    """Why nobody could be reached at *path*, and what to do."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"there is no control socket {path}: start the server, or give the path that it was started with"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission to use {path}: run this as the server's user or as root"
    if error.errno in (errno.ECONNREFUSED, errno.EPROTOTYPE):
        if error.errno == errno.ECONNREFUSED and _is_socket(path):
            return f"nobody listens on {path}: the server has ended, start it again"
        return f"{path} is not a control socket: give the path that the server was started with"
    if error.errno == errno.EAGAIN:
        return silence(path)
    return f"cannot connect to {path}: {error.strerror or error}"


def _pack_time(seconds: float) -> bytes:
    """As ``setsockopt(2)`` wants a time that is not 0, which would be for ever."""
    return struct.pack("@ll", int(seconds), max(1, int(seconds % 1 * 1e6)))


def silence(path: str) -> str:
    """What to say of a server that says nothing."""
    return f"the server at {path} does not answer: see whether it hangs or is stopped"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
