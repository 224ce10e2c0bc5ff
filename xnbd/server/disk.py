"""The disk in the hands of one process: its image, its way through the gate, and what the process tells of itself."""

from __future__ import annotations

from ..logs import log
from ..scoreboard.layout import SNAPSHOT, TARGET
from ..scoreboard.scoreboard import Scoreboard
from ..storage.image import Image, Source
from ..storage.snapshot import Keeper, KeepingImage
from ..storage.target import reopen
from ..system.file_locks import do_nothing
from .snapshot_files import open_files


class Disk:
    """*source*, opened by this process, after the fork. Raises `OSError`.

    ``image`` is another one after `renew`, which nobody but the owner of a client's
    session calls, between two requests.
    """

    def __init__(self, source: Source[Scoreboard], scoreboard_fd: int) -> None:
        self._source = source
        self.name = source.name
        self._told = (0, "")
        self.scoreboard = Scoreboard(reopen(scoreboard_fd, readonly=False))
        self.place = self.scoreboard.take_place()
        self._open()

    def _open(self) -> None:
        """As long as this fails the disk is `outdated`, and the image that it had is still there."""
        changes, mode = self.place.changes, self.scoreboard.mode
        self.image: Image = self._source.open(self.scoreboard)
        self.changes, self._mode = changes, mode
        self.image.count_in(self.place.counts)
        self.place.tell_mode(self._mode)
        self._keep_for_snapshot()

    @property
    def outdated(self) -> bool:
        """Whether the disk has become a plain target, or a snapshot of it begun or ended, since `renew`."""
        return self.place.changes != self.changes

    def renew(self) -> None:
        """Go on with the disk as it is now. Called inside the gate."""
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

    def let_go(self) -> None:
        """Of a snapshot that has ended, for a process that sleeps."""
        if isinstance(self.image, KeepingImage) and self.outdated:
            self.image.let_go()

    def tell_health(self) -> None:
        """Tell of the origin, if there is news."""
        background = self.image.background
        if background is not None and (background.health, background.trouble) != self._told:
            self._told = background.health, background.trouble
            self.place.tell_origin(*self._told)

    def forget_results(self) -> None:
        """Nobody is there any more who waits for blocks: as long as there are results, a wait for them is none."""
        if self.image.background is not None:
            self.image.background.finished.clear()

    def part(self) -> None:
        """The client has left."""
        self.place.leave()
        self.place.tell()
        self.place.welcome("")
        self.image.wait_with(do_nothing)

    def close(self) -> None:
        """Let go of everything, the origin's connection included, which may take a moment."""
        self.image.close()
        self.scoreboard.close()
