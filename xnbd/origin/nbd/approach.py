"""From the address of an origin to a socket on which its disk was agreed on, without waiting.

The host's name is looked up, its addresses are tried one after the other, and hands are shaken.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from time import monotonic
from typing import Any, Callable, List, Optional

from ...errors import ProtocolError, XnbdError
from ...protocol.client_handshake import ClientHandshake, RemoteExport
from ...system.sockets import set_socket_options
from .address import NbdAddress
from .lookup import Candidate, HostNotFound, Lookup, numeric

_UNACKNOWLEDGED = 90_000
"""Milliseconds after which a host that takes no bytes counts as gone: keepalive is silent while there are some."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class NotReached(XnbdError):
    """There is no way; the message says why. ``refused`` as in `OriginLost`."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def send(sock: socket.socket, unsent: bytearray) -> None:
    """Send what can be sent of *unsent* at once, and drop that from it. Raises `OSError`."""
    try:
        while unsent:
            del unsent[: sock.send(unsent, _SEND_FLAGS)]
    except BlockingIOError:
        pass


class Approach:
    """The way to *address*, for *timeout* seconds at most. Always followed by `close`, or by taking ``sock``.

    ``export`` is what was agreed on in the end, None before. ``deadline`` is when to call
    `on_time`, in monotonic seconds. Methods raise `NotReached`, and `OSError`, where they say so.
    """

    def __init__(self, address: NbdAddress, timeout: float) -> None:
        self.sock: Optional[socket.socket] = None
        self.export: Optional[RemoteExport] = None
        self.deadline = self._give_up_at = monotonic() + timeout
        self._address = address
        self._timeout = timeout
        self._lookup: Optional[Lookup] = None
        self._candidates: List[Candidate] = []
        self._step: Callable[[int], None] = self._connect
        self._handshake = ClientHandshake(address.export_name)
        self._greetings = bytearray()

    def fileno(self) -> int:
        """The descriptor to poll, another one after every event perhaps; -1 if there is none."""
        source = self._lookup or self.sock
        return source.fileno() if source else -1

    def events(self) -> int:
        """The poll mask to wait for."""
        if self._lookup:
            return select.POLLIN
        if self.sock is None:
            return 0
        if self._step == self._connect:
            return select.POLLOUT
        return select.POLLIN | select.POLLOUT if self._greetings else select.POLLIN

    def start(self) -> None:
        """Begin. Raises `NotReached`, and `OSError`."""
        if self._address.unix_path:
            self._candidates = [(socket.AF_UNIX, self._address.unix_path)]
        else:
            self._find_host()
        if self._lookup is None:
            self._try_next("no address found")

    def on_events(self, mask: int) -> None:
        """Go on as far as that needs no waiting; *mask* is what the descriptor shows. Raises like `start`."""
        self._step(mask)

    def on_time(self) -> None:
        """The ``deadline`` has passed. Raises like `start`."""
        if self._lookup:
            raise NotReached(f"cannot find the host: no name server has answered in {self._timeout:g} s")
        if self._step == self._connect:
            self._try_next("connecting took too long")
        else:
            raise NotReached(f"the handshake took longer than {self._timeout:g} s")

    def close(self) -> None:
        self._end_lookup()
        self._close_socket()

    # Connecting

    def _find_host(self) -> None:
        """Know where to connect to, or have it looked up."""
        try:
            self._candidates = numeric(self._address.host, self._address.port)
            if not self._candidates:
                self._lookup = Lookup(self._address.host)
                self._step = self._take_addresses
        except HostNotFound as error:
            raise NotReached(f"cannot find the host: {error}") from error

    def _take_addresses(self, mask: int) -> None:
        if not mask or not self._lookup:
            return
        try:
            self._candidates = self._lookup.candidates(self._address.port)
        except HostNotFound as error:
            raise NotReached(f"cannot find the host: {error}") from error
        self._end_lookup()
        self._try_next("no address found")

    def _try_next(self, failure: str) -> None:
        """Connect to the next of the host's addresses; each gets its share of the time that is left.

        Raises `NotReached` with *failure* if none is left.
        """
        while self._candidates:
            self._close_socket()
            family, socket_address = self._candidates.pop(0)
            try:
                error = self._begin_to_connect(family, socket_address)
            except OSError as problem:
                error = problem.errno or errno.EIO
            if not error:
                self._begin_handshake()
                return
            if error == errno.EINPROGRESS:
                now = monotonic()
                self.deadline = now + (self._give_up_at - now) / (len(self._candidates) + 1)
                self._step = self._connect
                return
            failure = os.strerror(error)
        raise NotReached(failure)

    def _begin_to_connect(self, family: int, socket_address: Any) -> int:
        self.sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock.connect_ex(socket_address)

    def _connect(self, mask: int) -> None:
        if not mask or not self.sock:
            return
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._try_next(os.strerror(error))
        else:
            self._begin_handshake()

    # Handshake

    def _begin_handshake(self) -> None:
        assert self.sock
        set_socket_options(self.sock)
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED)
        self.deadline = self._give_up_at
        self._step = self._negotiate

    def _negotiate(self, _mask: int) -> None:
        """Receives nothing that comes after the handshake: that is not for here."""
        assert self.sock
        handshake = self._handshake
        send(self.sock, self._greetings)
        while handshake.export is None:
            try:
                received = self.sock.recv(handshake.wanted, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not received:
                raise NotReached(handshake.end_means(), refused=True)
            try:
                self._greetings += handshake.receive(received)
            except ProtocolError as error:
                raise NotReached(str(error), refused=True) from error
            send(self.sock, self._greetings)
        self.export = handshake.export

    # Ends

    def _end_lookup(self) -> None:
        if self._lookup:
            self._lookup.close()
            self._lookup = None

    def _close_socket(self) -> None:
        if self.sock:
            self.sock.close()
            self.sock = None
