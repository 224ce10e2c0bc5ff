"""The way of a client out of its process: offered to others, and handed to the one that takes it.

The client is served all the while. It waits from the moment when somebody is ready to take
it until that process has it: for as long as the session needs to be frozen, sent and read, and
one process to be woken up for it.
If nobody takes it, or something goes wrong on the way, its process goes on as if nothing
had been. `server.handover.letters` says how that is kept safe.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from time import monotonic
from typing import Callable, NamedTuple, Optional, Protocol, Sequence, Tuple

from ...errors import Disconnected
from ...logs import log
from ...system.file_locks import do_nothing
from ...system.process import closed_on_error
from ...system.urgency import urgent
from ..process_loop import ProcessLoop, Stop
from ..reports import Report
from .letters import (
    NO_KIT,
    PATIENCE,
    READY,
    REFUSED,
    SESSION,
    Kit,
    Letter,
    claim,
    pack_offer,
    receive_letter,
    send_letter,
)

_RETRY = 0.02
"""Seconds between two offers: one that nobody can take is let go of at once."""

_PATIENCE = 2.0
"""Seconds until the other process has to have taken a client, which is not served meanwhile: at the first attempt."""
_SILENT = b"the process that was to take it does not answer"


class Traveller(Protocol):
    """A session, between two of its requests."""

    @property
    def stays(self) -> str:
        """Why no other process can go on with it; empty if one can."""

    @property
    def has_origin(self) -> bool:
        """Whether the origin is connected, because blocks had to come from there."""

    def fileno(self) -> int:
        """The client's descriptor."""

    def freeze(self) -> Tuple[bytes, int]:
        """The session as a letter and a file, which the caller closes; afterwards it can go on. Raises `OSError`."""

    def let_go(self) -> None:
        """Close the client's descriptor, without a word to the client."""


class Telling(NamedTuple):
    """How a process tells of its client: that it has *moved* to the process with that id, or why it *stays*."""

    moved: Callable[[int], None]
    stays: Callable[[str], None]

    @classmethod
    def by_reports(cls, report: Callable[[Report], None], peer: str) -> Telling:
        """Of the client *peer* of this process; why it stays is for the log, too."""
        pid = os.getpid()

        def stays(reason: str) -> None:
            log.info("%s: stays with this process: %s", peer, reason)
            report(Report(pid, peer, stays=reason))

        return cls(lambda to: report(Report(pid, moved_to=to)), stays)


class Departure:
    """The departure of the client that this process has; ``under_way`` is whether `go_on` wants to be called often."""

    def __init__(
        self,
        loop: ProcessLoop,
        offers: Optional[socket.socket] = None,
        disk: Sequence[int] = (),
        telling: Optional[Telling] = None,
        kit: Kit = NO_KIT,
    ) -> None:
        """Who might take the client reads from the other end of *offers*, and serves *disk* (`Source.identity`).

        Or does not serve it yet, and needs the *kit*.
        """
        self.under_way = False
        self.first: Callable[[], None] = do_nothing
        """What has to be done before this client goes to yet another process."""
        self.taken_by = 0
        """The process that has the client now."""
        self._loop = loop
        self._offers = offers
        self._disk = disk
        self._telling = telling
        self._kit = kit
        self._channel: Optional[socket.socket] = None
        self._until = self._retry_at = 0.0
        self._patience = _PATIENCE

    def go_on(self, traveller: Traveller) -> bool:
        """Do the next step, if it is time for one; True if another process has the client now.

        Raises `Stop`, and `Disconnected` if it is not certain that no other process has it.
        """
        loop = self._loop
        loop.called = False
        if loop.ordered:
            loop.ordered = False
            self._begin(traveller.stays)
        if not self.under_way:
            return False
        try:
            return self._step(traveller)
        except OSError as error:
            self._give_up(error.strerror or str(error))
        except ValueError as error:
            self._give_up(str(error))
        return False

    def cancel(self) -> None:
        """The client leaves, or has to: nothing is to be handed over any more."""
        self._withdraw()
        self.under_way = self._loop.called = False

    def _begin(self, reason: str) -> None:
        self.first()
        if reason or self._offers is None:
            self._give_up(reason or "nobody else can take it")
        elif not self.under_way:
            self.under_way = True
            self._until = monotonic() + PATIENCE

    def _step(self, traveller: Traveller) -> bool:
        if self._channel is not None:
            answer = receive_letter(self._channel)
            if answer is not None and self._react(answer, traveller):
                return True
        if not self.under_way:
            return False
        if monotonic() > self._until:
            self._give_up("no other process takes it")
        elif self._channel is not None:
            self._loop.heed(self._channel.fileno(), self._until)
        elif monotonic() < self._retry_at:
            self._loop.heed(None, self._retry_at)
        else:
            self._retry_at = monotonic() + _RETRY
            self._make_offer(origin=traveller.has_origin)
        return False

    def _react(self, answer: Letter, traveller: Traveller) -> bool:
        kind, text = answer.data[:1], answer.data[1:]
        answer.close()
        if kind == READY:
            return self._hand_over(traveller, int(text))
        if kind == REFUSED:
            self._give_up(text.decode("utf-8", "replace"))
        elif kind:
            raise ValueError("the process that was to take it is of another version")
        else:
            self._withdraw()  # whoever was ready is gone: somebody else may be
        return False

    def _make_offer(self, *, origin: bool) -> None:
        assert self._offers is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            offer = pack_offer(self._disk, self._kit.fields, origin=origin)
            send_letter(self._offers, offer, (theirs.fileno(), *self._kit.fds))
        except OSError:  # as long as too many wait there
            ours.close()
            self._loop.heed(None, self._retry_at)
        else:
            self._channel = ours
            self._loop.heed(ours.fileno(), self._until)
        finally:
            theirs.close()

    def _hand_over(self, traveller: Traveller, pid: int) -> bool:
        """Process *pid* waits for the client."""
        channel = self._channel
        assert channel is not None
        with urgent():  # the client waits from now on
            letter, fd = traveller.freeze()
            with closed_on_error(fd):
                is_sent = _try_to_send(channel, SESSION + letter, (traveller.fileno(), fd))
        try:
            answer = self._hear_of(fd, channel) if is_sent else Letter(b"", [])
        finally:
            os.close(fd)
        if answer is None:
            self._part(traveller, pid)
            return True
        return self._react(answer, traveller)

    def _hear_of(self, fd: int, channel: socket.socket) -> Optional[Letter]:
        """None if the other process has the client of session *fd*; else why it has not. It cannot any more then."""
        try:
            answer = self._await_answer(channel)
        except (Stop, OSError):
            if self._has_gone(fd):
                return None
            raise
        return None if self._has_gone(fd) else answer

    def _await_answer(self, channel: socket.socket) -> Letter:
        """If there is none in time, the next process gets twice as long: the computer may be slow."""
        if not self._loop.wait((channel.fileno(),), select.POLLIN, self._patience, mid_message=True):
            self._patience = min(2 * self._patience, PATIENCE)
        return receive_letter(channel) or Letter(REFUSED + _SILENT, [])

    def _has_gone(self, fd: int) -> bool:
        """Whether the other process has the client; if not, it cannot any more. Raises `Disconnected` in doubt."""
        try:
            return not claim(fd)
        except OSError as error:
            raise Disconnected(f"it may be served by another process: {error.strerror}") from error

    def _part(self, traveller: Traveller, pid: int) -> None:
        """The client is another process's."""
        with suppress(OSError):
            traveller.let_go()
        try:
            if self._telling is not None:
                with suppress(OSError):  # the other process tells it too
                    self._telling.moved(pid)
        finally:
            self._withdraw()
            self.under_way, self.taken_by = False, pid

    def _give_up(self, reason: str) -> None:
        self._withdraw()
        self.under_way = False
        if self._telling is not None:
            self._telling.stays(reason)

    def _withdraw(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._loop.heed(None)
            channel.close()


def _try_to_send(channel: socket.socket, letter: bytes, fds: Tuple[int, int]) -> bool:
    """False if nobody has the other end any more. Raises `OSError`."""
    try:
        send_letter(channel, letter, fds)
    except ConnectionError:
        return False
    return True
