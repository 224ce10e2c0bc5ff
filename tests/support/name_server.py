"""A name server of a test's own, and programs for which there is no other one: root only."""

from __future__ import annotations

import random
import socket
import struct
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple

from server_process import wait_until

_HEADER = struct.Struct(">6H")
_RECORD = struct.Struct(">HHHIH")
_TYPES = {1: socket.AF_INET, 28: socket.AF_INET6}
_ANSWER, _NO_SUCH_NAME = 0x8580, 0x8583
_NAME_OF_THE_QUESTION = 0xC00C


class NameServer:
    """Answers from ``hosts``, unless told to `hold` its answers; a context.

    A program that is started with ``prefix`` before its command line asks this server
    only. Source of the messages: RFC 1035.
    """

    def __init__(self, directory: Path) -> None:
        self.hosts: Dict[str, List[str]] = {}
        self.questions = 0
        self._held: List[Tuple[bytes, Any]] = []
        self._holding = False
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._bind()
        self._resolver, self._order = directory / "resolv.conf", directory / "nsswitch.conf"
        self._resolver.write_text(
            f"nameserver {self._socket.getsockname()[0]}\nsearch .\noptions timeout:30 attempts:1\n"
        )
        self._order.write_text("hosts: files dns\n")
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _bind(self) -> None:
        for _ in range(100):
            try:
                self._socket.bind((f"127.53.{random.randrange(256)}.{random.randrange(1, 255)}", 53))
                return
            except OSError:
                pass  # another test has it
        raise AssertionError("no address for a name server is free")

    @property
    def prefix(self) -> List[str]:
        mounting = f"mount --bind {self._resolver} /etc/resolv.conf && mount --bind {self._order} /etc/nsswitch.conf"
        return ["unshare", "--mount", "sh", "-c", f'{mounting} && exec "$@"', "sh"]

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def hold(self) -> None:
        """Answer nobody any more."""
        self._holding = True

    def wait_for_question(self) -> None:
        """Somebody waits for an answer that is held."""
        wait_until(lambda: bool(self._held), "a question to the name server")

    def release(self) -> None:
        """Answer all that was asked, and will be."""
        with self._lock:
            self._holding = False
            held, self._held = self._held, []
            for question, peer in held:
                self._answer(question, peer)

    def _serve(self) -> None:
        while True:
            question, peer = self._socket.recvfrom(512)
            if not question:
                return
            self.questions += 1
            with self._lock:
                if self._holding:
                    self._held.append((question, peer))
                else:
                    self._answer(question, peer)

    def _answer(self, question: bytes, peer: Any) -> None:
        (number, *_), labels, at = _HEADER.unpack_from(question), [], _HEADER.size
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode())
            at += 1 + question[at]
        (kind,) = struct.unpack_from(">H", question, at + 1)
        found = self.hosts.get(".".join(labels))
        records = [_record(kind, address) for address in found or [] if (":" in address) == (kind == 28)]
        header = _HEADER.pack(number, _ANSWER if found else _NO_SUCH_NAME, 1, len(records), 0, 0)
        self._socket.sendto(header + question[_HEADER.size : at + 5] + b"".join(records), peer)


def _record(kind: int, address: str) -> bytes:
    data = socket.inet_pton(_TYPES[kind], address)
    return _RECORD.pack(_NAME_OF_THE_QUESTION, kind, 1, 0, len(data)) + data
