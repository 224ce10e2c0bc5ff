"""Who a client is: the names that its transport has proved."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple, Tuple

from ..text import one_line

_CREDENTIALS = struct.Struct("3i")


class Identity(NamedTuple):
    """The names of one client, the most telling one first; none at all for a client that has proved nothing.

    A name is the subject of a certificate as RFC 4514 writes it (``CN=alice,O=Example``), one of its subject
    alternative names (``dns:``, ``uri:``, ``email:``), ``psk:NAME`` for a pre-shared key, or ``uid:N`` for the
    user at the other end of a Unix socket (``SO_PEERCRED`` of ``unix(7)``). No name is empty.
    """

    names: Tuple[str, ...] = ()

    def __str__(self) -> str:
        """The first name, fit for a line whatever is in it."""
        return one_line(self.names[0]) if self.names else "anonymous"

    def at(self, peer: str) -> str:
        """What titles and tables call the client that is connected from *peer*, which says itself who is at a Unix
        socket."""
        return f"{peer} as {self}" if self.names and not self.names[0].startswith("uid:") else peer


NOBODY = Identity()


def peer_credentials(sock: socket.socket) -> Tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket, as they were when it connected."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def identity_of_peer(sock: socket.socket) -> Identity:
    """Who is at the other end of *sock*, as far as the kernel says so."""
    if sock.family != socket.AF_UNIX:
        return NOBODY
    return Identity((f"uid:{peer_credentials(sock)[1]}",))
