"""A client that reads as much as it can: ``flood.py SOCKET LENGTH DEPTH``. A process of its own, until it is killed."""

from __future__ import annotations

import socket
import sys

from rawclient import READ, RawClient, pack_request


def flood(path: str, length: int, depth: int) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    RawClient(sock).negotiate()
    request, answer = pack_request(READ, 0, length), 16 + length
    sock.sendall(request * depth)
    buffer, received = bytearray(1 << 20), 0
    while True:
        received += sock.recv_into(buffer)
        answers, received = divmod(received, answer)
        sock.sendall(request * answers)


if __name__ == "__main__":
    flood(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
