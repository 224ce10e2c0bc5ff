"""The way of another process's client into this one: taken from an offer to the moment in which it is this one's."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import ExitStack
from typing import Callable, NamedTuple, Optional, Sequence

from ...logs import about, log
from ...protocol.constants import FLAG_READ_ONLY
from ...system.file_locks import do_nothing
from ...system.process import closed_on_error
from ...system.urgency import urgent
from ..process_loop import ProcessLoop
from .frozen import FrozenSession, parse_session
from .letters import (
    PATIENCE,
    READY,
    REFUSED,
    SESSION,
    Letter,
    claim,
    parse_offer,
    receive_letter,
    send_letter,
)

_CREDENTIALS = struct.Struct("3i")


class Arrival(NamedTuple):
    """A client that has come: its descriptor, its session, and the process *pid* that had it before.

    When the client is served *rest* is to be closed: the other process sleeps until then, and this one is `urgent`.
    """

    sock: socket.socket
    session: FrozenSession
    pid: int
    rest: ExitStack

    @property
    def peer(self) -> str:
        """The client's name in the log."""
        return self.session.peer


class Terms(NamedTuple):
    """The *disk* that is served here, as `Source.identity` names it; its *size*; whether it is *readonly*.

    *approach* connects to its origin, if it has one, for a client that may need it.
    """

    disk: Sequence[int]
    size: int
    readonly: bool
    approach: Callable[[], None] = do_nothing

    def check(self, session: FrozenSession) -> None:
        """Raises `ValueError` for a session that cannot go on here."""
        export = session.agreement.export
        if export is not None and export.size != self.size:
            raise ValueError(f"the disk has {self.size} bytes here, and {export.size} there")
        if export is not None and self.readonly and not export.flags & FLAG_READ_ONLY:
            raise ValueError("the disk is read-only here")


def take_offer(offers: socket.socket, *, with_kit: bool = False) -> Optional[Letter]:
    """The next offer of a client on *offers*, if there is one. The first descriptor is the channel."""
    try:
        offer = receive_letter(offers)
    except OSError as error:
        log.warning("cannot take a client of another process: %s", error.strerror, extra=about(error=error))
        return None
    if offer is not None and (not offer.fds if with_kit else len(offer.fds) != 1):
        offer.close()
        log.warning("an offer of a client makes no sense, and is left alone")
        return None
    return offer


def receive_client(offer: Letter, loop: ProcessLoop, terms: Terms) -> Optional[Arrival]:
    """Take the client that is offered; None if nothing comes of it.

    Raises `Stop`. Takes at most some seconds before the session is here.
    """
    try:
        channel = _adopt(offer.fds.pop(0))
    except OSError:
        return None  # the other process sees the end of the channel
    rest, arrival = ExitStack(), None
    try:
        rest.enter_context(channel)
        rest.enter_context(urgent())
        arrival = _take(offer.data, channel, loop, terms, rest)
    except ValueError as error:
        _refuse(channel, str(error))
    except OSError as error:
        _refuse(channel, error.strerror or str(error))
    finally:
        if arrival is None:
            rest.close()
    return arrival


def refuse_offer(offer: Letter, reason: str) -> None:
    """Say to the other process that nobody takes its client, unless `receive_client` has begun; let go of the offer."""
    if offer.fds:
        with _adopt(offer.fds.pop(0)) as channel:
            _refuse(channel, reason)
    offer.close()


def _refuse(channel: socket.socket, reason: str) -> None:
    log.warning("a client of another process is not taken: %s", reason)
    try:
        send_letter(channel, REFUSED + reason.encode("utf-8", "replace")[:1000])
    except OSError:
        pass  # it sees the end of the channel


def _take(offer: bytes, channel: socket.socket, loop: ProcessLoop, terms: Terms, rest: ExitStack) -> Optional[Arrival]:
    """Raises `ValueError` and `OSError` as long as the other process may be told that it cannot be."""
    fields = parse_offer(offer)
    if fields.get("disk") != list(terms.disk):
        raise ValueError("another disk is served here")
    if fields.get("origin"):
        terms.approach()
    try:
        send_letter(channel, READY + str(os.getpid()).encode())
    except OSError:
        return None  # it was withdrawn meanwhile
    loop.wait((channel.fileno(),), select.POLLIN, PATIENCE)
    letter = receive_letter(channel)
    if letter is None or not letter.data:
        return None
    try:
        if letter.data[:1] != SESSION or len(letter.fds) != 2:
            raise ValueError("what has come is no session")
        return _take_session(letter, channel, terms, rest)
    finally:
        letter.close()


def _take_session(letter: Letter, channel: socket.socket, terms: Terms, rest: ExitStack) -> Optional[Arrival]:
    client, file = letter.fds
    session, pid = parse_session(letter.data[1:], file), _process_behind(channel)
    terms.check(session)
    sock = _adopt(os.dup(client))
    try:
        ours = claim(file)
    except BaseException:
        sock.close()
        raise
    if not ours:  # the other process did not wait so long
        sock.close()
        return None
    return Arrival(sock, session, pid, rest)


def _adopt(fd: int) -> socket.socket:
    """The socket behind *fd*, which is closed if that fails."""
    with closed_on_error(fd):
        return socket.socket(fileno=fd)


def _process_behind(channel: socket.socket) -> int:
    pid: int = _CREDENTIALS.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid
