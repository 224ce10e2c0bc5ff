"""A service manager's end of ``NOTIFY_SOCKET``, as systemd has it."""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager
from typing import Dict, Iterator, List, Set

from server_process import wait_until


class Listening:
    """``heard`` has all messages so far, ``senders`` the processes that they came from."""

    def __init__(self, name: str) -> None:
        self.heard: List[str] = []
        self.senders: Set[int] = set()
        self.environment: Dict[str, str] = {"NOTIFY_SOCKET": name}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind("\0" + name[1:] if name.startswith("@") else name)
        self._sock.setblocking(False)

    def listen(self) -> List[str]:
        """Take in what has come."""
        while True:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(4096, 256)
            except BlockingIOError:
                return self.heard
            self.heard.append(data.decode())
            self.senders.add(struct.unpack("3i", ancillary[0][2])[0])

    def wait_for(self, message: str, count: int = 1) -> None:
        """Until *message* was heard so often."""
        wait_until(lambda: self.listen().count(message) >= count, f"{message!r} from the program")

    def close(self) -> None:
        self._sock.close()


@contextmanager
def listening(name: str) -> Iterator[Listening]:
    """*name* begins with ``@`` in the abstract name space."""
    manager = Listening(name)
    try:
        yield manager
    finally:
        manager.close()
