"""How processes find the files of a snapshot that another one makes: by its place on the scoreboard."""

from __future__ import annotations

import errno
import os
from typing import List, Optional, Tuple

from ..scoreboard.snapshots import SnapshotPlace
from ..storage.snapshot import SnapshotFiles, duplicate


def place_of(files: SnapshotFiles, namespace: int) -> SnapshotPlace:
    """Where others find *files* of this process, which is of the PID *namespace*."""
    return SnapshotPlace(os.getpid(), files.output, files.bitmap, namespace, _identities(files))


def _identities(files: SnapshotFiles) -> Tuple[int, int, int, int]:
    output, bitmap = (os.fstat(fd) for fd in files)
    return output.st_dev, output.st_ino, bitmap.st_dev, bitmap.st_ino


def open_files(place: SnapshotPlace) -> Optional[SnapshotFiles]:
    """The files of the snapshot that is made at *place*, of this PID namespace; None if they are not there any more.

    Another process may have the number by now, and its descriptors are nobody's
    business: they are opened as a path only, and looked at first. Raises `OSError`.
    """
    looked_at: List[int] = []
    try:
        for number in (place.output, place.bitmap):
            looked_at.append(os.open(f"/proc/{place.pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC))
        found = SnapshotFiles(*looked_at)
        return duplicate(found) if _identities(found) == place.files else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
    finally:
        for fd in looked_at:
            os.close(fd)
