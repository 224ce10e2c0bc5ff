"""What a steward's duties are made of.

A duty has a module, and a line in the list of `steward.process`. It keeps its own
state, waits for nothing, and is asked for all it wants each time the steward wakes up.
What takes long is the work of a child, at whose end the steward wakes up by itself.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

from ...control.server import CommandTable, Reply
from ...proxy.source import ProxySource
from ...scoreboard.layout import TARGET
from ...scoreboard.rates import Rates
from ...scoreboard.scoreboard import Scoreboard
from ...scoreboard.tally import Sums, TallyReader
from ...storage.target import reopen
from ..master_link import MasterLink
from ..process_loop import ProcessLoop
from ..service import Service
from .child import Children
from .progress import Progress


class Duty:
    """One thing that a steward looks after."""

    def commands(self) -> CommandTable:
        """What it does for operators, by the names of the control socket."""
        return {}

    def interests(self) -> List[Tuple[int, int]]:
        """Descriptors and what to poll them for; children are polled for anyway."""
        return []

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called at the latest (monotonic seconds)."""
        return None

    def progress(self) -> None:
        """Do all that can be done without waiting. Called at least once a second."""

    def on_child_end(self) -> None:
        """A child of the steward has ended, whoever has started it: `progress` comes next."""

    def leave(self) -> None:
        """Another steward takes over: begin nothing any more, and stop what that one can go on with."""

    def is_busy(self) -> bool:
        """Whether something of this duty has to be finished before a steward that has been told to `leave` can end."""
        return False

    def end(self) -> None:
        """The steward ends; its children are stopped next."""


class Context:
    """What all duties of one steward work with. There is no *master* for the one process of a wrapped client."""

    def __init__(self, service: Service, loop: ProcessLoop, master: Optional[MasterLink]) -> None:
        """In the steward's own process. Raises `OSError`."""
        self.service = service
        self.source = service.source
        self.configuration = service.configuration
        self.expiries = self.configuration.expiries()
        self.loop = loop
        self.master = master
        self.scoreboard = Scoreboard(reopen(service.scoreboard_fd, readonly=False))
        self._tally = service.open_tally()
        self._counted: Optional[TallyReader] = None
        self.children = Children()
        self.children.let_go.append(self.scoreboard.close)  # its locks have to end with the steward
        if self._tally is not None:
            self.children.let_go.append(self._tally.close)
        if master is not None:
            self.children.let_go.append(master.close)

    @property
    def limits(self) -> Optional[Rates]:
        """How fast clients may be now, if they can be limited."""
        return self.service.rates

    def sums(self) -> Optional[Sums]:
        """What all processes of this server have done, if it counts that for metrics. Raises `OSError`."""
        if not self.service.tally_fds:
            return None
        if self._counted is None:
            self._counted = TallyReader(self.service.tally_fds)
        return self._counted.of(self.service.export_name)

    def count(self, row: str) -> None:
        """One more of what `tally.ROWS` has as *row*, for metrics."""
        if self._tally is not None:
            self._tally.count(row)

    def tell(self, row: str, number: int) -> None:
        """What `tally.ROWS` has as *row* is so now."""
        if self._tally is not None:
            self._tally.tell(row, number)


class Cache:
    """What the duties of a proxy share besides: the files, and how much of the disk is local."""

    def __init__(self, context: Context, source: ProxySource) -> None:
        """Raises `OSError`."""
        self.source = source
        self.state = source.open_state()
        self._scoreboard = context.scoreboard
        self.progress = Progress(self.state.bitmap, source.size)
        self.written = Progress(self.state.written, source.size)
        self._children = context.children

    def keep_up(self) -> bool:
        """Keep the figures of what is local and written up to date; False while children count that of a large disk."""
        up_to_date = [what.keep_up(self._children.start) for what in (self.progress, self.written)]
        return all(up_to_date)

    def count(self) -> Reply:
        """Wait until there is such a figure."""
        while self._scoreboard.mode != TARGET and not self.keep_up():
            yield None
