"""A control socket with a test's own commands, driven by a loop as the server's master drives it."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from server_process import wait_until

from xnbd.control.server import CommandTable, ControlSocket

Message = Dict[str, Any]


class ControlLoop:
    """Serves *commands* at *path* in a thread until `stop`; counts how often it woke up."""

    def __init__(self, path: Path, commands: CommandTable) -> None:
        self.path = path
        self.wake_ups = 0
        self.control = ControlSocket(str(path), commands)
        self._failure: Optional[BaseException] = None
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._wait():
                self.control.progress()
        except BaseException as failure:
            self._failure = failure
        finally:
            self.control.close()

    def _wait(self) -> bool:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd, mask in self.control.interests():
            poll.register(fd, mask)
        deadline = self.control.deadline()
        ready = poll.poll(None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000))
        self.wake_ups += 1
        return self._wake not in dict(ready)

    def stop(self) -> None:
        """End the loop, close the control socket; raises what went wrong in the loop."""
        os.write(self._waker, b"x")
        self._thread.join(60)
        assert not self._thread.is_alive(), "the control socket's loop hangs"
        os.close(self._wake)
        os.close(self._waker)
        if self._failure is not None:
            raise self._failure

    def sleeps(self) -> bool:
        """Whether the loop has nothing to do: it does not wake up meanwhile."""
        before = self.wake_ups
        time.sleep(0.3)
        return self.wake_ups == before

    def wait_until_it_sleeps(self) -> None:
        wait_until(self.sleeps, "the loop to have nothing to do")


class Client:
    """Talks to a control socket in raw bytes."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.sock.settimeout(60)
        self.lines = self.sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.lines.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, command: str, **arguments: object) -> None:
        self.send(json.dumps({"command": command, **arguments}).encode() + b"\n")

    def line(self) -> Message:
        """The next line; EOFError if the server has closed."""
        line = self.lines.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))

    def reply(self) -> List[Message]:
        """The lines of one reply."""
        lines = [self.line()]
        while not lines[-1].get("done"):
            lines.append(self.line())
        return lines

    def ask(self, command: str, **arguments: object) -> Message:
        """A whole reply, of one line."""
        self.request(command, **arguments)
        (line,) = self.reply()
        return line

    def is_closed(self) -> bool:
        """Wait until the server closes the connection; False if it sends something instead."""
        try:
            return self.lines.readline() == b""
        except ConnectionResetError:
            return True
