"""``--metrics`` of a wrapper, as the wrapper itself has to do with it: a tally for all exports, and an observer."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from ..logs import log
from ..scoreboard.tally import Tally
from ..server.observers import Observers
from ..system.kept import Kept
from ..system.listen import Listeners
from .children import Children

if TYPE_CHECKING:
    from ..server.observer.process import Observed


class MetricsPlace(NamedTuple):
    """Where metrics are asked for, what is counted in, and the processes that answer there since the program before."""

    listeners: Listeners
    tallies: Sequence[int]
    former: Sequence[int] = ()

    def __str__(self) -> str:
        return str(self.listeners)


class Metrics:
    """An observer at the *place*, of what *observed* opens in its process. Without a place there is none."""

    def __init__(self, place: Optional[MetricsPlace], children: Children, observed: Callable[[], Observed]) -> None:
        self._place = place
        self._children = children
        self._lifeline = self._lifeline_master = -1
        self.is_stopping = self._is_observer = False
        former = () if place is None else place.former
        listeners = None if place is None else place.listeners
        self._observers = Observers(listeners, self._fork, observed, "", former)
        for pid in former:
            children.adopt(pid, partial(self._on_end, pid))

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        return None if self.is_stopping else self._observers.deadline()

    def progress(self) -> None:
        """Start the observer if there is none."""
        if self._place is None or self.is_stopping:
            return
        if self._lifeline < 0:
            self._lifeline, self._lifeline_master = os.pipe()
        self._observers.progress(self._lifeline)

    def _fork(self, live: Callable[[], int]) -> int:
        pids: List[int] = []
        self._is_observer = True  # in the child
        try:
            pids.append(self._children.start(live, lambda status: self._on_end(pids[0], status)))
        finally:
            self._is_observer = False
        return pids[0]

    def _on_end(self, pid: int, status: int) -> None:
        self._observers.bury(pid, status, stopping=self.is_stopping)

    def after_fork(self) -> None:
        """In a child: the lifeline has to break with the wrapper, and only the observer listens."""
        if self._lifeline_master >= 0:
            os.close(self._lifeline_master)
        if self._place is not None and not self._is_observer:
            for sock in self._place.listeners.sockets:
                sock.close()

    def replace(self) -> None:
        """What is observed has changed."""
        self._observers.replace()

    def stop(self) -> None:
        """The wrapper ends."""
        self.is_stopping = True
        self._observers.replace()

    def close(self) -> None:
        """At the wrapper's end."""
        if self._place is not None:
            self._place.listeners.close()

    def count_death(self, export: str) -> None:
        """A process with a client of *export* has died."""
        if self._place is None:
            return
        try:
            tally = Tally(self._place.tallies[0], export)
        except OSError as error:
            log.warning("metrics do not count that: %s", error)
            return
        tally.count("deaths")
        tally.close()

    def pack(self, kept: Kept) -> Optional[Dict[str, Any]]:
        """For the next program of this process."""
        if self._place is None:
            return None
        return {
            "listeners": self._place.listeners.pack(kept),
            "tallies": [kept(fd) for fd in self._place.tallies],
            "observers": [pid for pid in self._observers.pids() if pid in self._children.pids()],
        }
