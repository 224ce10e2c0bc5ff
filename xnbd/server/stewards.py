"""The master's steward: started, asked, and started again when it has died."""

from __future__ import annotations

import os
import select
import signal
from time import monotonic
from typing import TYPE_CHECKING, Callable, Iterable, List, Mapping, Optional, Set

from ..errors import ConfigurationError
from ..logs import log
from ..system.file_locks import do_nothing
from .endings import reason_of
from .premises import Premises
from .retries import FIRST, Pauses
from .service import Service

if TYPE_CHECKING:
    from .master_link import Command, StewardLink


class Stewards:
    """The steward of this program with its ``link``, and the process ids of *former* ones that have not ended yet."""

    def __init__(
        self,
        premises: Premises,
        poll: select.poll,
        close_first: Callable[[], None],
        commands: Mapping[str, Command],
        former: Iterable[int] = (),
    ) -> None:
        """In a steward *close_first* lets go of what is the master's alone. *commands* are what it may ask for."""
        self._premises = premises
        self._poll = poll
        self._close_first = close_first
        self._commands = commands
        self.former: Set[int] = set(former)
        self.pid: Optional[int] = None
        self.link: Optional[StewardLink] = None
        self._start_at = 0.0
        self._pauses = Pauses()

    def start(self, service: Service, lifeline: int, prepare: Callable[[], None] = do_nothing) -> None:
        """The steward does *prepare* first. Raises `ConfigurationError` if it cannot work."""
        from .master_link import StewardLink, link
        from .steward.process import Steward

        try:
            stewards, masters = link()
        except OSError as error:
            raise ConfigurationError(f"the steward cannot be started: {error.strerror}") from error
        steward = Steward(service, self._premises.control, stewards)

        def close_first() -> None:
            masters.close()
            self._close_first()
            prepare()

        try:
            self.pid = steward.spawn(lifeline, close_first)
        except ConfigurationError:
            masters.close()
            raise
        finally:
            stewards.close()
        self.link = StewardLink(masters, self._commands)
        self._poll.register(self.link, select.POLLIN)

    def start_again(self, service: Service, lifeline: int) -> None:
        """What prevents that is for the log; it is tried again later then."""
        self._start_at = 0.0
        if self.pid is not None:
            return
        try:
            self.start(service, lifeline)
            self._pauses.failures = 0
        except ConfigurationError as error:
            pause = self._pauses.next()
            log.error("%s; trying again in %g s", error, pause)
            self._start_at = monotonic() + pause

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return self._start_at or None

    def progress(self, service: Service, lifeline: int) -> None:
        """Start the next one if it is time for that."""
        if self._start_at and monotonic() >= self._start_at:
            self.start_again(service, lifeline)

    def hear(self) -> None:
        """Do what the steward asks for."""
        if self.link is not None and not self.link.progress():
            self._drop_link()

    def _drop_link(self) -> None:
        """The steward at its other end is gone."""
        if self.link is not None:
            self._poll.unregister(self.link)
            self.link.close()
            self.link = None

    def close(self) -> None:
        """In a worker."""
        if self.link is not None:
            self.link.close()

    def pids(self) -> List[int]:
        return [*self.former, *([] if self.pid is None else [self.pid])]

    def bury(self, pid: int, exit_code: int, *, stopping: bool) -> None:
        """A child of the master has ended. A steward that was told to end, as by Ctrl-C to all, has not failed."""
        self.former.discard(pid)
        if pid != self.pid:
            return
        self.pid = None
        self._drop_link()
        if stopping:
            return
        if exit_code:
            log.error("the steward died: %s; the next one starts in a second", reason_of(exit_code))
        else:
            log.info("the steward was told to end; unless the server ends, the next one starts in a second")
        self._start_at = monotonic() + FIRST

    def ask_for_snapshot(self, service: Service, lifeline: int) -> None:
        self.start_again(service, lifeline)
        if self.pid is not None:
            os.kill(self.pid, signal.SIGUSR1)

    def ask_for_switch(self, service: Service) -> None:
        if self.pid is not None and service.source.mode == "proxy":
            os.kill(self.pid, signal.SIGUSR2)
        else:
            log.warning("SIGUSR2 does nothing here: it switches a proxy")
