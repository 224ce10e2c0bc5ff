"""Which process makes a snapshot, and where: all others keep old blocks for it.
 The process has the lock `SNAPSHOT` as long as it makes the snapshot. Without that lock what the scoreboard says is a
dead process's.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple, Optional, Tuple

from ..system.file_locks import RangeLocks
from .gate import Gate
from .layout import HEAD, SNAPSHOT, put

_AT, _FORM = HEAD.at["snapshot"], HEAD.form["snapshot"]
_FILES_AT, _FILES = HEAD.at["snapshot_files"], HEAD.form["snapshot_files"]


class SnapshotPlace(NamedTuple):
    """Where the snapshot is made: a process, its descriptors of snapshot and bitmap, and what tells that they are it.

    *files* has device and inode of the one, then of the other.
    """

    pid: int
    output: int
    bitmap: int
    namespace: int = 0
    files: Tuple[int, int, int, int] = (0, 0, 0, 0)


class Snapshots:
    """The snapshot that is made now, if there is one."""

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, gate: Gate) -> None:
        self._map = memory
        self._locks = locks
        self._gate = gate

    @property
    def current(self) -> Optional[SnapshotPlace]:
        """Where one is made."""
        pid, output, bitmap = _FORM.unpack_from(self._map, _AT)
        if not pid:
            return None
        namespace, *files = _FILES.unpack_from(self._map, _FILES_AT)
        return SnapshotPlace(pid, output, bitmap, namespace, tuple(files))

    def begin(self, place: SnapshotPlace) -> None:
        """From now on old blocks are kept; the gate is closed, and this process has the lock `SNAPSHOT`."""
        put(self._map, _FILES_AT, _FILES, place.namespace, *place.files)
        put(self._map, _AT, _FORM, place.pid, place.output, place.bitmap)
        self._gate.note_change()

    def end(self) -> None:
        if self.current:
            put(self._map, _AT, _FORM, 0, 0, 0)
            self._gate.note_change()

    def end_dead(self) -> bool:
        """End what a process that is no more has begun; tells whether there was such a thing."""
        if not self.current or not self._locks.try_acquire(SNAPSHOT, 1):
            return False
        try:
            found = self.current is not None
            self.end()
        finally:
            self._locks.release(SNAPSHOT, 1)
        return found
