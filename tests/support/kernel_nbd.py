"""Runs in a guest: gives the kernel's NBD client its connections, over netlink, and new ones when they have died.

``python3 kernel_nbd.py connect|reconnect HOST PORT``, for /dev/nbd0. The kernel keeps
requests for a minute while no connection is left; nbd-client 3.24 cannot tell it to.
Messages are those of the kernel's include/uapi/linux/nbd-netlink.h and genetlink.h.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Tuple

CONNECTIONS = 2
REQUEST_TIMEOUT = 5
"""Seconds after which the kernel sends a request again whose connection has died."""

DEAD_CONNECTION_TIMEOUT = 60
BLOCK_SIZE = 4096

_NETLINK_GENERIC = 16

_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
_COMMANDS = {"connect": 1, "reconnect": 3}
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _SOCKETS, _DEAD_TIMEOUT = 1, 2, 3, 4, 5, 7, 8
_SOCK_ITEM, _SOCK_FD = 1, 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR, _NLA_F_NESTED = 1, 4, 2, 0x8000


def attribute(number: int, data: bytes) -> bytes:
    """A netlink attribute, padded to 4 bytes."""
    return struct.pack("=HH", 4 + len(data), number) + data + bytes(-len(data) % 4)


def ask(netlink: socket.socket, family: int, command: int, attributes: bytes) -> bytes:
    """Send a generic netlink message; its reply's attributes, if it has any. OSError if the kernel refuses it."""
    payload = struct.pack("=BBH", command, 1, 0) + attributes
    netlink.send(struct.pack("=IHHII", 16 + len(payload), family, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + payload)
    answer = b""
    while True:
        data = netlink.recv(65536)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _NLMSG_ERROR:
                (error,) = struct.unpack_from("=i", data, 16)
                if error:
                    raise OSError(-error, "the kernel refuses it")
                return answer
            answer, data = data[20:length], data[(length + 3) & ~3 :]


def family_of(netlink: socket.socket, name: bytes) -> int:
    answer = ask(netlink, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, attribute(_CTRL_ATTR_FAMILY_NAME, name + b"\0"))
    while answer:
        length, number = struct.unpack_from("=HH", answer)
        if number == _CTRL_ATTR_FAMILY_ID:
            return int(struct.unpack_from("=H", answer, 4)[0])
        answer = answer[(length + 3) & ~3 :]
    raise OSError(f"the kernel has no {name.decode()}")


def negotiate(host: str, port: int) -> Tuple[socket.socket, int, int]:
    """A connection in transmission, the disk's size, and its flags (NBD specification, NBD_OPT_EXPORT_NAME)."""
    sock = socket.create_connection((host, port))
    sock.recv(18, socket.MSG_WAITALL)
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
    size, flags = struct.unpack(">QH", sock.recv(10, socket.MSG_WAITALL))
    return sock, size, flags


def main(action: str, host: str, port: int) -> None:
    connections = [negotiate(host, port) for _ in range(CONNECTIONS)]
    _, size, flags = connections[0]
    items = b"".join(
        attribute(_SOCK_ITEM | _NLA_F_NESTED, attribute(_SOCK_FD, struct.pack("=I", sock.fileno())))
        for sock, _, _ in connections
    )
    attributes = attribute(_INDEX, struct.pack("=I", 0)) + attribute(_SOCKETS | _NLA_F_NESTED, items)
    if action == "connect":
        numbers = [(_SIZE, size), (_BLOCK_SIZE, BLOCK_SIZE), (_SERVER_FLAGS, flags)]
        numbers += [(_TIMEOUT, REQUEST_TIMEOUT), (_DEAD_TIMEOUT, DEAD_CONNECTION_TIMEOUT)]
        attributes += b"".join(attribute(number, struct.pack("=Q", value)) for number, value in numbers)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        netlink.bind((0, 0))
        ask(netlink, family_of(netlink, b"nbd"), _COMMANDS[action], attributes)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
