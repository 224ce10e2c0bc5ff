"""Connections that have been greeted and have not said anything yet.

They are no clients: none of them has a process of its own or takes one of the places
that there are for clients, however many come. A process that accepts keeps a number
of them, and the one of them that speaks becomes its client. In a server the others
go to the processes that still wait for one, by a socket that all of them read from.
"""

from __future__ import annotations

import array
import resource
import select
import socket
import struct
from collections import OrderedDict
from logging import WARNING
from time import monotonic
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..logs import Seldom, about, log
from ..protocol.server_handshake import pack_greeting
from ..system.kept import Kept
from ..text import counted
from .session.connection import describe_peer

_MOST = 240
"""Connections in one process, and in one message between two of them (SCM_MAX_FD is 253)."""

_DONT_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TAKE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_TIME = struct.Struct("=d")


Waiting = Sequence[Tuple[int, float]]


class Guest(NamedTuple):
    """A connection that is no client yet, and the *deadline* of its handshake in monotonic seconds."""

    sock: socket.socket
    peer: str
    deadline: float


class Lobby:
    """The connections of one process that have been greeted and have not said anything yet."""

    def __init__(self, timeout: float, *, oldstyle: bool = False) -> None:
        """*timeout* seconds is how long a handshake may take. The *oldstyle* one is all the server's: nobody waits."""
        self.timeout = timeout
        self._oldstyle = oldstyle
        self._guests: OrderedDict[int, Guest] = OrderedDict()
        self._epoll = select.epoll()
        self._sparing = Seldom()
        self._most = max(1, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

    def __len__(self) -> int:
        return len(self._guests)

    def fileno(self) -> int:
        """A descriptor that is readable when somebody is a `speaker`."""
        return self._epoll.fileno()

    def deadline(self) -> Optional[float]:
        """When the first one's time is over."""
        return min((guest.deadline for guest in self._guests.values()), default=None)

    def greet(self, sock: socket.socket) -> None:
        """Take in a connection that was just accepted."""
        try:
            if not self._oldstyle:
                sock.send(pack_greeting(), _DONT_WAIT)
        except OSError:
            pass  # it has left, which is seen when it is read from
        self.take_in(Guest(sock, describe_peer(sock), monotonic() + self.timeout))

    def take_in(self, guest: Guest) -> None:
        """At the limit the one that has been silent for longest gives way."""
        if len(self._guests) >= self._most:
            oldest = self._part_from(next(iter(self._guests)))
            self._sparing.log(
                WARNING, "%s: disconnected: it was silent, and others wait", oldest.peer, extra=about(peer=oldest.peer)
            )
        self._guests[guest.sock.fileno()] = guest
        self._epoll.register(guest.sock, select.EPOLLOUT if self._oldstyle else select.EPOLLIN)

    def speaker(self) -> Optional[Guest]:
        """The first of those that have spoken or left, or need not speak; none of the lobby's any more."""
        for fd, _ in self._epoll.poll(0, 1):
            self._epoll.unregister(fd)
            return self._guests.pop(fd)
        return None

    def expire(self) -> None:
        """Part from those whose time is over."""
        now = monotonic()
        for fd in [fd for fd, guest in self._guests.items() if now >= guest.deadline]:
            peer = self._part_from(fd).peer
            log.warning("%s: disconnected: handshake took too long", peer, extra=about(peer=peer))

    def _part_from(self, fd: int) -> Guest:
        guest = self._guests.pop(fd)
        self._epoll.unregister(fd)
        guest.sock.close()
        return guest

    def close(self) -> None:
        """In a process that has no use for it."""
        self._epoll.close()
        for guest in self._guests.values():
            guest.sock.close()
        self._guests.clear()

    # From one program of a process to the next one

    def pack(self, kept: Kept) -> Waiting:
        """All of them, each with its deadline."""
        return [(kept(fd), guest.deadline) for fd, guest in self._guests.items()]

    def unpack(self, packed: Waiting) -> None:
        """Take in those of the program before."""
        for fd, deadline in packed:
            sock = socket.socket(fileno=fd)
            self.take_in(Guest(sock, describe_peer(sock), deadline))

    # From one process to another

    def hand_over(self, pool: socket.socket, *, patient: bool = False) -> bool:
        """Leave all of them to whoever reads from *pool* next; the time until then is not theirs.

        If too many wait there they are closed; or, if the caller is *patient*, stay here: False.
        """
        guests, now = list(self._guests.values()), monotonic()
        if not guests:
            return True
        times = b"".join(_TIME.pack(max(0.0, guest.deadline - now)) for guest in guests)
        fds = array.array("i", self._guests)
        try:
            pool.sendmsg([times], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], _DONT_WAIT)
        except OSError:
            if patient:
                return False
            silent = counted(len(guests), "connection that was silent is", "connections that were silent are")
            log.warning("%s closed: there are too many", silent)
        for guest in guests:
            self._epoll.unregister(guest.sock)
            guest.sock.close()
        self._guests.clear()
        return True

    def take_over(self, pool: socket.socket) -> None:
        """Take in what another process has left in *pool*, if there is something."""
        try:
            times, ancillary, _flags, _ = pool.recvmsg(_MOST * _TIME.size, socket.CMSG_SPACE(_MOST * 4), _TAKE)
        except BlockingIOError:
            return
        now = monotonic()
        for sock, (rest,) in zip(_sockets_in(ancillary), _TIME.iter_unpack(times)):
            self.take_in(Guest(sock, describe_peer(sock), now + rest))


def _sockets_in(ancillary: list[tuple[int, int, bytes]]) -> List[socket.socket]:
    """Fewer than were sent if there are too few descriptors."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return [socket.socket(fileno=fd) for fd in fds]
