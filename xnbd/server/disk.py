"""The disk in the hands of one process: its image, its way through the gate, and what the process tells of itself.

The disk may become another one while this process is outside the gate: a proxy
becomes a target, a snapshot begins or ends. The rules:

- Who works on the image is inside the gate.
- Who sleeps leaves the gate (`Disk.fall_asleep`, called by the process loop), and so
  does `Disk.outside`. Back inside, the image is still the old one, so that what is
  half done can be finished: replies may be half sent, and point into its memory.
- `Disk.enter`, `Disk.request` and `Disk.catch_up` go on with the disk as it is now, and
  nothing else does. Who calls them holds no image across the call, or compares
  ``generation`` after it. A session is told, by what it gave to `Disk.accompany`.

A process outside the gate that has no unsent replies (those in a line included) holds no
slice of the disk. One that leaves the gate with some tells so (`scoreboard.holders`), also if
it only waits at its door for whoever has closed the gate. It copies them when it is called:
blocks are about to be let go.

Two ask ``outdated`` themselves: the request loop (`Session._work`), because a call would
cost it too much; `Parked`, to send what is ready before it catches up. What ends with its
proxy (copies, checks) asks `Disk.stays_proxy`.
"""

from __future__ import annotations

from contextlib import contextmanager
from time import monotonic
from typing import Callable, Iterator, Optional, Protocol

from ..logs import log
from ..scoreboard.layout import SNAPSHOT, TARGET
from ..scoreboard.rates import RateBoard
from ..scoreboard.scoreboard import Scoreboard
from ..scoreboard.tally import Tally
from ..storage.image import Image, Source
from ..storage.snapshot import Keeper, KeepingImage
from ..storage.target import reopen
from ..system.file_locks import do_nothing
from .process_loop import Companion, Interests, ProcessLoop
from .snapshot_files import open_files

_LONGEST_APPROACH = 1.0
"""Seconds: a client that is offered does not wait for ever (`handover.letters.PATIENCE`)."""


class Holder(Protocol):
    """Who has replies to send that point into the disk."""

    def holds(self) -> bool:
        """Whether there are some."""

    def detach(self) -> None:
        """Copy them, as far as they are not too long and can be read."""


class Disk(Companion):
    """The disk behind a `Source`, as one process has it open; ``image`` is what it can read and write now.

    ``generation`` grows whenever ``image`` becomes another one. While the process sleeps
    the image's background works on.
    """

    def __init__(
        self,
        source: Source[Scoreboard],
        scoreboard_fd: int,
        name: str = "",
        tally: Optional[Tally] = None,
        rates: Optional[RateBoard] = None,
    ) -> None:
        """Opens *source* for this process, after the fork; it counts in the *tally*, too. Raises `OSError`.

        Clients know it by its *name*, and are held to *rates*.
        """
        self.rates = rates
        self._source = source
        self.name = name or source.name
        self._told = (0, "")
        self._returns = 0
        self._on_renewed: Callable[[], None] = do_nothing
        self._holder: Optional[Holder] = None
        self._inside = False
        self.at_work = False
        self.generation = 0
        self.scoreboard = Scoreboard(reopen(scoreboard_fd, readonly=False))
        self.place = self.scoreboard.take_place(tally)
        self.place.before_wait = self._tell_holding
        self._lettings = self.place.lettings
        self._open()

    def _open(self) -> None:
        """As long as this fails the disk is `outdated`, and the image that it had is still there."""
        changes, mode = self.place.changes, self.scoreboard.mode
        self.image: Image = self._source.open(self.scoreboard)
        self.changes, self._mode = changes, mode
        self.image.count_in(self.place.counts)
        self.image.tell_coming_by(self.place.tell_coming)
        self.place.tell_mode(self._mode)
        self._keep_for_snapshot()

    # The gate, and a disk that becomes another one

    @property
    def outdated(self) -> bool:
        """Whether the disk is another one: of another mode, perhaps a target, or a snapshot has begun or ended."""
        return self.place.changes != self.changes

    def enter(self) -> Image:
        """Enter the gate, and go on with the disk as it is now."""
        self.place.enter()
        if self.place.holding:
            self._tell_holding()
        if self.outdated:
            self._renew()
        return self.image

    @contextmanager
    def request(self) -> Iterator[Image]:
        """Be inside the gate, for one request on the disk as it is now."""
        try:
            yield self.enter()
        finally:
            self.place.leave()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the gate in the middle of a request, for what changes nothing and may take long."""
        self.leave()
        try:
            yield
        finally:
            self.place.enter()

    def leave(self) -> None:
        """Leave the gate. Replies that are unsent keep the blocks that they point to."""
        if self._holder is not None:
            self._tell_holding()
        self.place.leave()

    def _tell_holding(self) -> None:
        self.place.tell_holding(self._holder is not None and self._holder.holds())

    def catch_up(self) -> bool:
        """Go on with the disk as it is now; whether it was another one. Stays inside the gate, or outside."""
        if not self.outdated:
            return False
        if self.place.inside:
            self._renew()
        else:
            with self.request():
                pass
        return True

    def stays_proxy(self) -> bool:
        """For who works on the image of a proxy: False as soon as it is a target, and the image is the old one then.

        Every other change is caught up with. Stays inside the gate, or outside.
        """
        if not self.outdated:
            return True
        inside = self.place.inside
        if not inside:
            self.place.enter()
        try:
            if self.scoreboard.mode == TARGET:
                return False
            self._renew()
            return True
        finally:
            if not inside:
                self.place.leave()

    def _renew(self) -> None:
        on_wait = self.image.on_wait
        if self.scoreboard.mode == TARGET != self._mode:
            old = self.image
            self._open()
            old.close()
        else:
            self.changes = self.place.changes
            if isinstance(self.image, KeepingImage):
                self.image = self.image.release()
            self._keep_for_snapshot()
        self.image.wait_with(on_wait)
        self.generation += 1
        self._on_renewed()

    def _keep_for_snapshot(self) -> None:
        snapshot = self.scoreboard.snapshots.current
        if snapshot is None:
            return
        reason = "its process is alive, and cannot be found"
        try:
            files = None
            if snapshot.namespace != self.scoreboard.namespace:
                reason = "it is made in another PID namespace (container)"
            else:
                files = open_files(snapshot)
            if files is not None:
                self.image = KeepingImage(self.image, Keeper(self.image, files))
                return
            if not self.scoreboard.is_locked(SNAPSHOT):
                return  # a steward ends what a dead process has begun, and wakes those who keep blocks for it
        except (OSError, ValueError) as error:
            reason = str(error)
        if self.scoreboard.snapshots.current == snapshot:
            log.warning("cannot keep old blocks for the snapshot, which is given up: %s", reason)
            self.scoreboard.snapshots.end()

    # While the process sleeps

    def fall_asleep(self) -> None:
        """Leave the gate."""
        self._inside = self.place.inside
        self.place.tell()
        self.leave()

    def wake_up(self) -> None:
        """Back to where the process was. What it does next is done on the old image, until it catches up."""
        if self._inside:
            self.place.enter()

    def progress(self) -> bool:
        """Let the image's background work, inside the gate; True if it has results, or the disk is another one."""
        background, self.at_work = self.image.background, False
        if self.place.holding and self.place.lettings != self._lettings:
            self._detach()
        if self.place.changes != self.changes:
            if isinstance(self.image, KeepingImage):
                self.image.let_go()
            return True
        if background is None or not background.busy:
            return False
        self.place.enter()
        try:
            if self.outdated:
                return True
            background.progress()
            self.tell_health()
            self.place.tell()
        finally:
            self.place.leave()
        self.at_work = True
        return bool(background.finished)

    def _detach(self) -> None:
        self._lettings = self.place.lettings
        if self._holder is not None:
            self._holder.detach()
        self._tell_holding()

    def interests(self) -> Interests:
        background = self.image.background
        return () if background is None else background.interests()

    def deadline(self) -> Optional[float]:
        background = self.image.background
        return None if background is None else background.deadline()

    # A client

    def accompany(
        self, on_wait: Callable[[], None], on_renewed: Callable[[], None], holder: Optional[Holder] = None
    ) -> None:
        """Until `part` call *on_wait* while the image waits, and *on_renewed* when it has become another one.

        The *holder* has replies that may point into it.
        """
        self.image.wait_with(on_wait)
        self._on_renewed = on_renewed
        self._holder = None if self.image.background is None else holder  # of others no block is let go

    def tell_health(self) -> None:
        """Tell of the origin, if there is news."""
        background = self.image.background
        if background is None:
            return
        if (background.health, background.trouble) != self._told:
            self._told = background.health, background.trouble
            self.place.tell_origin(*self._told)
        news = background.news()
        if news is not None:
            self.place.tell_origins(news)
        if background.returns != self._returns:
            if self.place.tally is not None:
                self.place.tally.count("returns", background.returns - self._returns)
            self._returns = background.returns

    def approach_origin(self, loop: ProcessLoop) -> None:
        """Connect to the origin, for a client that may need it and waits for nothing yet. Raises `Stop`."""
        background, until = self.image.background, monotonic() + _LONGEST_APPROACH
        if background is None:
            return
        while not background.approach() and monotonic() < until:
            loop.wait((), 0, max(0.0, until - monotonic()), results=True)
            self.forget_results()

    def abandon(self) -> None:
        """The client goes on at another process: nobody waits here any more for the blocks that it needs."""
        if self.image.background is not None:
            self.image.background.abandon()

    def forget_results(self) -> None:
        """Nobody is there any more who waits for blocks: as long as there are results, a wait for them is none."""
        if self.image.background is not None:
            self.image.background.finished.clear()

    def part(self) -> None:
        """The client has left."""
        self.accompany(do_nothing, do_nothing)
        self._tell_holding()
        self.place.leave()
        self.place.tell()
        self.place.welcome("")

    def take_leave(self) -> None:
        """The process is about to end, and its origin hears of that. Does not wait."""
        if self.image.background is not None:
            self.image.background.take_leave()

    def close(self) -> None:
        """Let go of everything, the origin's connection included, which may take a moment."""
        self.image.close()
        if self.place.tally is not None:
            self.place.tally.close()
        if self.rates is not None:
            self.rates.close()
        self.scoreboard.close()
