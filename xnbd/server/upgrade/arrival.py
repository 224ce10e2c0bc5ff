"""The new program's arrival: from the exec until the operator who has ordered the upgrade has an answer.

- The old steward gives way first: it begins nothing any more and makes no checkpoint. Then the new
  one starts, so that never two look after the disk. The old one ends when its last operator has an
  answer: a snapshot, and a copy that somebody waits for, it brings to their end.
- When the first new worker can work, the old spare workers end, and give their silent connections
  to the new ones. Then the clients move (`upgrade.moves`). An old worker whose client has moved, or
  leaves, ends too.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress
from time import monotonic
from typing import Any, Callable, Dict, Mapping, Optional

from ...logs import log
from ..crew import Crew
from ..master_link import StewardLink
from .estate import Estate
from .moves import Moves

_PATIENCE = 20.0
"""Seconds that the old steward may take until it gives way."""

_RETRY = 0.05

Message = Dict[str, Any]


class FormerSteward:
    """The steward of the program before, until it has given way and its operator has the answer."""

    def __init__(self, packed: Mapping[str, Any], number: int) -> None:
        """*number* is the request that it waits for."""
        self.pid: int = packed["pid"]
        self._number = number
        self.link = StewardLink(socket.socket(fileno=packed["link"]), {"left": self._on_left})
        self._deadline = monotonic() + _PATIENCE
        self.has_left = False
        """Whether it has given way."""
        self._is_told = self.link.order("leave")

    def _on_left(self, _request: Message) -> None:
        self.has_left = True

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        if self.has_left:
            return None
        return self._deadline if self._is_told else monotonic() + _RETRY

    def progress(self) -> bool:
        """Hear what it says; False if it cannot be heard any more. One that does not give way in time is ended."""
        self._is_told = self._is_told or self.link.order("leave")
        if not self.has_left and monotonic() >= self._deadline:
            log.warning("the steward of the program before does not give way, and is ended")
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._deadline = monotonic() + _PATIENCE
        return self.link.progress()

    def answer(self, message: Message) -> None:
        """For the operator who has ordered the upgrade."""
        self.link.answer(self._number, message)


class Arrival:
    """What has to be done once, step by step; *start_steward* when the old one has given way."""

    def __init__(self, estate: Estate, crew: Crew, poll: select.poll, start_steward: Callable[[], None]) -> None:
        self._version = estate.version
        self._crew = crew
        self._poll = poll
        self._start_steward = start_steward
        self._has_steward = False
        self._moves: Optional[Moves] = None
        self.is_over = False
        self._steward: Optional[FormerSteward] = FormerSteward(estate.steward, estate.number)
        poll.register(self._steward.link, select.POLLIN)

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        if self._moves is not None:
            return self._moves.deadline()
        return None if self._steward is None or self._has_steward else self._steward.deadline()

    @property
    def clients(self) -> int:
        """That are to move to new workers yet."""
        return 0 if self._moves is None else self._moves.remaining

    def progress(self) -> None:
        """Take the next step."""
        if self._steward is not None and not self._steward.progress():
            self._drop_steward()
        if not self._has_steward and (self._steward is None or self._steward.has_left):
            self._has_steward = True
            self._start_steward()
        if self._moves is None and self._has_steward and self._crew.has_proven_spare:
            self._crew.let_go()
            self._moves = Moves(self._crew)
        if self._moves is not None:
            self._moves.progress()
            if self._moves.are_over:
                self._end(self._moves)

    def bury(self, pid: int) -> None:
        """The process *pid* has ended, which may be the old steward, before it was told to."""
        if self._steward is not None and pid == self._steward.pid:
            self._drop_steward()

    def _drop_steward(self) -> None:
        if self._steward is not None:
            self._poll.unregister(self._steward.link)
            self._steward.link.close()
            self._steward = None

    def _end(self, moves: Moves) -> None:
        outcome = moves.outcome(self._version, {})
        if self._steward is not None:
            self._steward.answer(outcome.message())
        self._drop_steward()
        self.is_over = True
