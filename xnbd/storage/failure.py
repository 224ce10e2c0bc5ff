"""A write-back that has failed, and of a target's image its mark, for the server that comes next.

What could not be written is clean in memory: a server that is killed leaves it there,
and the next one would serve it and have a FLUSH succeed. So whoever hears of the
failure sets the extended attribute `ATTRIBUTE`, which needs no sync: it has to last as
long as the memory. Who opens the image next forgets what memory has of it.

A block device can have no such attribute, and needs none: its memory goes with the last
process that has it open. A proxy has its state file.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from typing import NamedTuple, Optional

from ..logs import log
from . import image_use

ATTRIBUTE = "user.xnbd.failed"
_LONGEST = 20
_ERRNOS = 4096
_YEAR_10000 = 253402300800


class Failure(NamedTuple):
    """The errno *number* of the first write-back that failed, and *when* that was, in seconds since the epoch."""

    number: int
    when: int

    @property
    def at(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.when))

    def __str__(self) -> str:
        reason = os.strerror(self.number)
        return f"write-back failed at {self.at} ({reason}), nothing is durable until the server's restart"


def failure_from(number: int, when: int) -> Failure:
    """What a record or a mark says, which may be damaged: that there was a failure is believed in any case."""
    return Failure(number if 0 < number < _ERRNOS else errno.EIO, when if when < _YEAR_10000 else 0)


def put_mark(fd: int, failure: Failure) -> None:
    """Where there are no extended attributes there is no mark."""
    with suppress(OSError):
        os.setxattr(fd, ATTRIBUTE, f"{failure.number}.{failure.when}".encode())


def read_mark(fd: int) -> Optional[Failure]:
    """None if the image behind *fd* bears no mark; one that cannot be read is one of a failure."""
    try:
        data = os.getxattr(fd, ATTRIBUTE)
    except OSError:
        return None
    number, _, when = data.partition(b".")
    if len(data) < _LONGEST and number.isdigit() and when.isdigit():
        return failure_from(int(number), int(when))
    return Failure(errno.EIO, 0)


def vouch_anew(fd: int, path: str, *, readonly: bool) -> None:
    """Before an image that bears the mark is mapped and served: tell the log, and forget what was not written.

    Another server that has failed and still runs says so by itself.
    """
    failure = read_mark(fd)
    if failure is None or image_use.is_failed(fd):
        return
    log.warning(
        "%s: write-back failed at %s (%s) under an earlier server: what was written after the last FLUSH that "
        "succeeded may be lost; check what is on the disk",
        path, failure.at, os.strerror(failure.number),
    )  # fmt: skip
    drop_cached(fd)
    if not readonly:
        with suppress(OSError):
            os.removexattr(fd, ATTRIBUTE)


def drop_cached(fd: int) -> None:
    """Have readers see what is on stable storage, and not what could not be written: such pages are taken for clean."""
    with suppress(OSError):
        os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
