"""The new program's arrival: from the exec until the operator who has ordered the upgrade has an answer.

- The old steward gives way first: it begins nothing any more and makes no checkpoint. Then the new
  one starts, so that never two look after the disk. The old one ends when its last operator has an
  answer: a snapshot, and a copy that somebody waits for, it brings to their end.
- When the first new worker can work, the old spare workers end, and give their silent connections
  to the new ones. An old worker whose client leaves ends too.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress
from time import monotonic
from typing import Any, Callable, Dict, Mapping, Optional

from ... import __version__
from ...logs import log
from ..master_link import StewardLink
from .estate import Estate
from .former import Former

_PATIENCE = 20.0
"""Seconds that the old steward may take until it gives way."""

Message = Dict[str, Any]


class FormerSteward:
    """The steward of the program before, until it has given way and its operator has the answer."""

    def __init__(self, packed: Mapping[str, Any]) -> None:
        self.pid: int = packed["pid"]
        self._number: int = packed["number"]
        self.link = StewardLink(socket.socket(fileno=packed["link"]), {"left": self._on_left})
        self._deadline = monotonic() + _PATIENCE
        self.has_left = False
        """Whether it has given way."""
        self.link.order("leave")

    def _on_left(self, _request: Message) -> None:
        self.has_left = True

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return None if self.has_left else self._deadline

    def progress(self) -> bool:
        """Hear what it says; False if it cannot be heard any more. One that does not give way in time is ended."""
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

    def __init__(self, estate: Estate, former: Former, poll: select.poll, start_steward: Callable[[], None]) -> None:
        self._version = estate.version
        self._former = former
        self._poll = poll
        self._start_steward = start_steward
        self._steward: Optional[FormerSteward] = None
        self._has_steward = False
        self._clients = former.clients
        self.is_over = False
        if estate.steward is not None:
            self._steward = FormerSteward(estate.steward)
            former.stewards.add(self._steward.pid)
            poll.register(self._steward.link, select.POLLIN)

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return None if self._steward is None or self._has_steward else self._steward.deadline()

    def progress(self, *, proven: bool) -> None:
        """*proven*: a new worker can work."""
        if self._steward is not None and not self._steward.progress():
            self._drop_steward()
        if not self._has_steward and (self._steward is None or self._steward.has_left):
            self._has_steward = True
            self._start_steward()
        if self._has_steward and proven:
            self._former.dismiss()
            self._end()

    def bury(self, pid: int) -> None:
        """The process *pid* has ended, which may be the old steward, before it was told to."""
        if self._steward is not None and pid == self._steward.pid:
            self._drop_steward()

    def _drop_steward(self) -> None:
        if self._steward is not None:
            self._poll.unregister(self._steward.link)
            self._steward.link.close()
            self._steward = None

    def _end(self) -> None:
        outcome: Message = {"from": self._version, "to": __version__, "moved": 0, "staying": self._clients}
        log.info("upgraded, %s -> %s; %d clients stay", self._version, __version__, self._clients)
        if self._steward is not None:
            self._steward.answer({"done": True, **outcome})
        self._drop_steward()
        self.is_over = True
