"""One request to a control socket, for a program that talks to several servers at once: nothing here waits."""

from __future__ import annotations

import json
from socket import AF_UNIX, SOCK_NONBLOCK, SOCK_STREAM, socket
from time import monotonic
from typing import Optional

from ..errors import ConfigurationError
from .client import LONGEST_REPLY, Message, departed, foreign, parse_line, silence, unreachable

_PART = 1 << 18


class Asking:
    """A request on its way to the socket at *path*, over a connection of its own. It ends with `close`.

    *timeout* is how many seconds the server may be silent.
    """

    def __init__(self, path: str, request: Message, timeout: float) -> None:
        """Raises `ConfigurationError` if nobody can be reached there."""
        self._path = path
        self._timeout = timeout
        self._input = bytearray()
        self.began = self._heard = monotonic()
        self._socket = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        try:
            self._socket.connect(path)
            self._socket.sendall(json.dumps(request).encode() + b"\n")  # less than any socket's buffer
        except OSError as error:
            self._socket.close()
            raise ConfigurationError(unreachable(path, error)) from error

    def fileno(self) -> int:
        """To be polled for input."""
        return self._socket.fileno()

    def deadline(self) -> float:
        """When `progress` wants to be called at the latest (monotonic seconds)."""
        return self._heard + self._timeout

    def progress(self) -> Optional[Message]:
        """The last line of the answer, if it has come. Raises `ConfigurationError`, or `Departed`."""
        try:
            data = self._socket.recv(_PART)
        except BlockingIOError:
            if monotonic() >= self.deadline():
                raise ConfigurationError(silence(self._path)) from None
            return None
        except OSError:
            raise departed(self._path) from None
        self._heard = monotonic()
        self._input += data
        if self._input and not self._input.startswith(b"{"):
            raise foreign(self._path)
        if not data or len(self._input) > LONGEST_REPLY:
            raise departed(self._path)
        return self._last_line()

    def _last_line(self) -> Optional[Message]:
        while (end := self._input.find(b"\n")) >= 0:
            message = parse_line(self._path, bytes(self._input[:end]))
            del self._input[: end + 1]
            if message.get("done"):
                return message
        return None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
