"""qemu's control channel: JSON lines over a Unix socket (QEMU Machine Protocol specification)."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Dict, List

from .errors import GuestError


class Qmp:
    """A connection to the QMP socket at *path*; GuestError if nobody answers there."""

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.events: List[Dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise GuestError(f"no QMP at {path}: {error.strerror}") from error
        self._lines = self._socket.makefile("rb")
        self._receive()
        self.execute("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return what it returns; GuestError if qemu refuses it. Events go to ``events``."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise GuestError(f"qemu refuses {command}: {message['error']['desc']}")
            else:
                return message["return"]

    def _receive(self) -> Dict[str, Any]:
        try:
            line = self._lines.readline()
        except socket.timeout as error:
            raise GuestError("qemu does not answer on its QMP socket") from error
        if not line:
            raise GuestError("qemu has closed its QMP socket")
        message: Dict[str, Any] = json.loads(line)
        return message
