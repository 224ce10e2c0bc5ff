"""From the address of an origin to a socket on which its disk was agreed on, without waiting.

The host's name is looked up, its addresses are tried one after the other, and hands are shaken (`handshake`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any, Callable, List, Optional

from ...errors import WrongName
from ...protocol.client_handshake import RemoteExport
from ...system.sockets import set_socket_options
from .address import NbdAddress
from .handshake import Handshake, NotReached, read_credentials
from .lookup import Candidate, HostNotFound, Lookup, numeric
from .stream import Stream

if TYPE_CHECKING:
    from ...tls.client_credentials import ClientCredentials

_UNACKNOWLEDGED = 90_000
"""Milliseconds after which a host that takes no bytes counts as gone: keepalive is silent while there are some."""


class Approach:
    """The way to *address*, for *timeout* seconds at most. Always followed by `close`, or by `take_stream`.

    ``deadline`` is when to call `on_time`, in monotonic seconds. Methods raise `NotReached`, and
    `OSError`, where they say so.
    """

    def __init__(self, address: NbdAddress, timeout: float) -> None:
        self.deadline = self._give_up_at = monotonic() + timeout
        self._address = address
        self._timeout = timeout
        self._lookup: Optional[Lookup] = None
        self._candidates: List[Candidate] = []
        self._candidate: Optional[Candidate] = None
        self._sock: Optional[socket.socket] = None
        self._handshake: Optional[Handshake] = None
        self._step: Callable[[int], None] = self._connect
        self._credentials: Optional[ClientCredentials] = None
        self._only_names = False

    @property
    def export(self) -> Optional[RemoteExport]:
        """What was agreed on in the end, None before."""
        return self._handshake.export if self._handshake else None

    def take_stream(self) -> Stream:
        """The way to the export that was agreed on, which is the caller's to close from now on."""
        handshake, self._handshake, self._sock = self._handshake, None, None
        assert handshake
        return handshake.stream

    def fileno(self) -> int:
        """The descriptor to poll, another one after every event perhaps; -1 if there is none."""
        source = self._lookup or (self._handshake.stream if self._handshake else self._sock)
        return source.fileno() if source else -1

    def events(self) -> int:
        """The poll mask to wait for."""
        if self._lookup:
            return select.POLLIN
        if self._handshake:
            return self._handshake.events()
        return select.POLLOUT if self._sock else 0

    def start(self) -> None:
        """Begin. Raises `NotReached`, and `OSError`."""
        self._credentials = read_credentials(self._address.encryption)
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
            self._candidate = self._candidates.pop(0)
            try:
                error = self._begin_to_connect(*self._candidate)
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
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock.connect_ex(socket_address)

    def _connect(self, mask: int) -> None:
        if not mask or not self._sock:
            return
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._try_next(os.strerror(error))
        else:
            self._begin_handshake()

    # Handshake

    def _begin_handshake(self) -> None:
        sock = self._sock
        assert sock
        set_socket_options(sock)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED)
        self.deadline = self._give_up_at
        self._handshake = Handshake(sock, self._address, self._credentials, only_names=self._only_names)
        self._step = self._shake_hands

    def _shake_hands(self, _mask: int) -> None:
        assert self._handshake
        try:
            self._handshake.go_on()
        except WrongName as error:
            self._ask_for_names(error)

    def _ask_for_names(self, error: WrongName) -> None:
        """The certificate is another host's: connect once more, to tell whose, because OpenSSL has not told us."""
        assert self._candidate
        self._only_names = True
        self._candidates = [self._candidate]
        self._try_next(str(error))

    # Ends

    def _end_lookup(self) -> None:
        if self._lookup:
            self._lookup.close()
            self._lookup = None

    def _close_socket(self) -> None:
        if self._handshake:
            self._handshake.stream.close()
        if self._sock:
            self._sock.close()
        self._handshake = self._sock = None
