"""What the service manager hears of a master: how it is doing, and that it is alive.

A watchdog restarts a program, and that costs connected clients their disk. So as long as
there are some it is told that the program is alive whenever the master's loop turns.
Without clients a worker that could serve the next one has to be there, and the steward
has to answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from ..logs import log
from ..system.service_manager import ServiceManager
from .crew import Crew

if TYPE_CHECKING:
    from .master_link import StewardLink


class Vitals:
    """Of a master that *needs_steward*, or does not, for its *manager*."""

    def __init__(self, manager: ServiceManager, *, needs_steward: bool) -> None:
        self._manager = manager
        self._needs_steward = needs_steward
        self._told = ""

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return self._manager.deadline()

    def progress(self, crew: Crew, link: Optional[StewardLink], failure: str) -> None:
        """Tell what is to be told now; *failure* is that of the last reload."""
        if not self._manager.listens:
            return
        parts = (f"clients: {len(crew.clients)}", link.state if link is not None else "", failure)
        self._manager.show("; ".join(filter(None, parts)))
        self._manager.progress(lambda: not self._trouble(crew, link))

    def _trouble(self, crew: Crew, link: Optional[StewardLink]) -> str:
        """Why a restart might make something better; told once."""
        trouble = "" if crew.clients else self._trouble_of_all(crew, link)
        if trouble and trouble != self._told:
            log.warning("nothing is told to the service manager's watchdog: %s", trouble)
        self._told = trouble
        return trouble

    def _trouble_of_all(self, crew: Crew, link: Optional[StewardLink]) -> str:
        patience = (self._manager.watchdog or 0.0) / 2
        if self._needs_steward and (link is None or link.silence() > patience):
            return "the steward does not answer"
        return "" if crew.has_proven_spare else "no worker is ready for a client"
