"""What all processes of one disk share besides its blocks.
 Servers of a proxy keep the scoreboard beside the cache's bitmap, so that those started separately share it too;
others have one that ends with them. Nothing in it has to outlive the last of them.

`layout` says where in it lies what. This module puts its parts together: the gate, a line for each process, the turn of
commands, the snapshot that is made, the origin's address; and has the few fields that need no more than a look.
"""

from __future__ import annotations

import mmap
import os
from typing import Callable, Optional

from ..system.file_locks import RangeLocks
from ..system.process import closed_on_error, pid_namespace
from .command_turn import CommandTurn
from .gate import Gate
from .holders import Holders
from .layout import COMPLETE, GATE, HEAD, PASSAGE, PROXY, check_header, put
from .lines import Lines, clock
from .origin_address import OriginPlace
from .place import Place
from .room import Room
from .snapshots import Snapshots
from .tally import Tally

_MODE = HEAD.at["mode"]
_COPY_WANTED = HEAD.at["copy_wanted"]
_COPY_RATE_AT, _COPY_RATE = HEAD.at["copy_rate"], HEAD.form["copy_rate"]
_READS_THROUGH = HEAD.at["reads_through"]
_CHECKPOINTS_AT, _CHECKPOINTS = HEAD.at["checkpoints"], HEAD.form["checkpoints"]


class Scoreboard:
    """The scoreboard in the file behind *fd*, which this process has opened, after the fork, and this object owns.

    Raises `OtherVersion` if servers of another version have made it, or it is none.
    """

    failure_at = HEAD.at["failure"]
    """Where in the file a disk without a state file has its `storage.writeback.Record`."""

    def __init__(self, fd: int, *, readonly: bool = False) -> None:
        """*readonly* is for who has opened the file for reading, and only looks."""
        with closed_on_error(fd):
            check_header(fd)
            self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE)
        self.fd = fd
        self.namespace = pid_namespace()
        self._locks = RangeLocks(fd)
        self.lines = Lines(self._map, self._locks, self.namespace)
        self.gate = Gate(self._map, self._locks, self.lines)
        self.holders = Holders(self._map, self.lines)
        self.turn = CommandTurn(self._map, self._locks, self.namespace)
        self.snapshots = Snapshots(self._map, self._locks, self.gate)
        self.origin = OriginPlace(self._map)
        self.room = Room(self._map, self._locks, self.lines)

    def take_place(self, tally: Optional[Tally] = None) -> Place:
        """A line for this process, which tells its *tally* the same. Raises `OSError` if all are taken."""
        return Place(self._map, self._locks, self.lines, tally)

    @property
    def mode(self) -> int:
        """`layout.PROXY`, `COMPLETE` or `TARGET`."""
        return self._map[_MODE]

    @mode.setter
    def mode(self, mode: int) -> None:
        self._map[_MODE] = mode
        self.gate.note_change()

    def note_complete(self, is_complete: Callable[[], bool]) -> bool:
        """No block is missing: `PROXY` becomes `COMPLETE`. False if it does not, for a process switches, or has.

        *is_complete* looks once more, while nobody can let blocks go.
        """
        if not self._locks.try_acquire(GATE, 1):
            return False
        try:
            if self.mode != PROXY or not is_complete():
                return False
            self.mode = COMPLETE
            return True
        finally:
            self._locks.release(GATE, 1)

    def note_incomplete(self) -> None:
        """A block is missing again: `COMPLETE` becomes `PROXY`. Inside the gate, where nobody can switch."""
        if self.mode == COMPLETE:
            self.mode = PROXY

    @property
    def wanted_copy(self) -> Optional[int]:
        """Bytes per second (0: as fast as it goes) of a copy of all blocks that no operator waits for; None: none."""
        return int(_COPY_RATE.unpack_from(self._map, _COPY_RATE_AT)[0]) if self._map[_COPY_WANTED] else None

    @wanted_copy.setter
    def wanted_copy(self, rate: Optional[int]) -> None:
        self._map[_COPY_WANTED] = 0
        if rate is not None:
            put(self._map, _COPY_RATE_AT, _COPY_RATE, rate)
            self._map[_COPY_WANTED] = 1

    @property
    def reads_through(self) -> bool:
        """Whether the log was told that what is fetched finds no room in the cache (`proxy.passage`)."""
        return bool(self._map[_READS_THROUGH])

    def change_reads_through(self, told: bool) -> bool:
        """Whether it is this process that has changed it, and now tells the log."""
        if self.reads_through == told:
            return False
        try:
            if not self._locks.try_acquire(PASSAGE, 1):
                return False
            changed = self.reads_through != told
            self._map[_READS_THROUGH] = told
            self._locks.release(PASSAGE, 1)
        except OSError:
            return False  # a lock that fails: another process tells
        return changed

    def note_checkpoint(self) -> None:
        _, count = _CHECKPOINTS.unpack_from(self._map, _CHECKPOINTS_AT)
        put(self._map, _CHECKPOINTS_AT, _CHECKPOINTS, clock(), count + 1)

    def checkpoints(self) -> tuple[int, Optional[float]]:
        """How many there were, and when the last one was (as of `clock`)."""
        when, count = _CHECKPOINTS.unpack_from(self._map, _CHECKPOINTS_AT)
        return count, when or None

    def try_lock(self, what: int) -> bool:
        """Take one of the locks but `GATE` for as long as this process lives; False if another has it."""
        return self._locks.try_acquire(what, 1)

    def is_locked(self, what: int) -> bool:
        """Whether another process has the lock; to look does not keep anybody from taking it."""
        return self._locks.held_elsewhere(what, 1)

    def unlock(self, what: int) -> None:
        self._locks.release(what, 1)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
