"""What every TCP connection of this program is set to, clients' and origins' alike; and who listens."""

from __future__ import annotations

import socket

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


def set_socket_options(sock: socket.socket) -> None:
    """Small messages leave at once, and a peer that vanished is noticed (``tcp(7)``)."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def is_listening(path: str) -> bool:
    """Whether somebody listens on the Unix socket at *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(path)
        except BlockingIOError:
            return True  # somebody busy
        except (OSError, ValueError):
            return False
    return True
