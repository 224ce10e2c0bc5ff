"""Locks on ranges of a file's bytes, between processes.

These are record locks of the "open file description" kind (``fcntl(2)``): they end
with the process that holds them, whatever happens to it, and unlike the older kind
not by closing some other descriptor of the same file. A fork shares them, so every
process needs a descriptor that it has opened itself.

Shared locks need the right to read only. Where the operator lets others read a file,
they can hold one, on purpose or by accident, on bytes that servers want for
themselves. No server does that: such locks are waited for no longer than a moment.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import struct
import time
from typing import Callable, Iterator, Optional, Tuple

_FLOCK = struct.Struct("hhqqi4x")
_BUSY = (errno.EAGAIN, errno.EACCES)
_LONGEST_PAUSE = 1e-3
_UNLOCK_ATTEMPTS = 100
_LOOK_EVERY = 0.1

PATIENCE_WITH_SHARED = 2.0
"""Seconds for which a lock is waited for that no server takes."""


def do_nothing() -> None:
    """For callers of what may wait who do not mind."""


class LockHeld(OSError):
    """Somebody holds a lock for too long; the message says who, and on which file."""

    def __init__(self, fd: int, start: int, count: int, *, shared: bool) -> None:
        from .holders import describe_holders
        from .lock_table import READ, WRITE

        path = os.readlink(f"/proc/self/fd/{fd}")
        who = describe_holders(fd, start, count, READ if shared else WRITE, strangers=shared)
        how = "has a shared lock, as no server does" if shared else "has locked it for too long"
        super().__init__(errno.EDEADLK, f"{path} is kept from this server by {who}, which {how}: end that")


class RangeLocks:
    """Exclusive locks of this process on ranges of bytes of a file, which it has opened for writing itself."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def try_acquire(self, start: int, count: int) -> bool:
        """Lock *count* bytes from *start* on, all or none of them; False if some are locked elsewhere."""
        try:
            _set(self._fd, fcntl.F_WRLCK, start, count)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
        return True

    def acquire(
        self, start: int, count: int, on_wait: Optional[Callable[[], None]] = None, timeout: float = math.inf
    ) -> None:
        """Lock like `try_acquire`, again and again until it works; *on_wait* is called before every pause.

        A process may wait here only while it holds no other lock. Raises `LockHeld`
        after *timeout* seconds, or if the lock in the way is one that no server takes.
        """
        if self.try_acquire(start, count):
            return
        pause, began = 0.0, time.monotonic()
        look_at, strange_since = began + _LOOK_EVERY, math.inf
        while not self.try_acquire(start, count):
            if on_wait is not None:
                on_wait()
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause + 1e-5)
            now = time.monotonic()
            if now < look_at:
                continue
            look_at = now + _LOOK_EVERY
            strange_since = min(now, strange_since) if self.is_shared(start, count) else math.inf
            if now - strange_since > PATIENCE_WITH_SHARED:
                raise self.complaint(start, count)
            if now - began > timeout:
                raise LockHeld(self._fd, start, count, shared=False)

    def acquire_unless_used(self, start: int, count: int) -> bool:
        """Lock like `try_acquire`. Raises `LockHeld` if all that is in the way is a lock that no server takes."""
        until = time.monotonic() + PATIENCE_WITH_SHARED
        while not self.try_acquire(start, count):
            if not self.is_shared(start, count):
                return False
            if time.monotonic() > until:
                raise self.complaint(start, count)
            time.sleep(_LONGEST_PAUSE)
        return True

    def complaint(self, start: int, count: int) -> LockHeld:
        """What to raise about a shared lock there."""
        return LockHeld(self._fd, start, count, shared=True)

    def is_shared(self, start: int, count: int) -> bool:
        """Whether the first lock in the way is a shared one, which no server takes where these locks are."""
        return _first_in_the_way(self._fd, start, count)[0] == fcntl.F_RDLCK

    def held_by_server(self, start: int, count: int) -> bool:
        """What `held_elsewhere` tells, but for shared locks."""
        return _first_in_the_way(self._fd, start, count)[0] == fcntl.F_WRLCK

    def release(self, start: int, count: int) -> None:
        """Raises `OSError` only if the kernel refuses again and again: then the lock ends with this process."""
        _unlock(self._fd, start, count)

    def held_elsewhere(self, start: int, count: int) -> bool:
        """Whether some of these bytes are locked through another descriptor than this one."""
        return _first_in_the_way(self._fd, start, count)[0] != fcntl.F_UNLCK


class SharedLocks:
    """Shared locks on single bytes of a file that is open for reading; several processes may hold one at once.

    They belong to all processes that have inherited the descriptor, and end with the last of them.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def acquire(self, byte: int) -> None:
        """Raises `OSError`, also if somebody has an exclusive lock there."""
        _set(self._fd, fcntl.F_RDLCK, byte, 1)

    def release(self, byte: int) -> None:
        _unlock(self._fd, byte, 1)

    def held_elsewhere(self, byte: int) -> bool:
        """Whether such a lock is held through another opening of the file; a longer one is somebody else's business."""
        return self.some_held_elsewhere(byte, 1)

    def some_held_elsewhere(self, start: int, count: int) -> bool:
        """Whether such a lock is held on one of these bytes, on none of which *fd* has one itself.

        The kernel names but one lock that is in the way. Where that is somebody else's,
        ``/proc`` tells of all.
        """
        kind, _, length = _first_in_the_way(self._fd, start, count)
        if kind == fcntl.F_UNLCK:
            return False
        if (kind, length) == (fcntl.F_RDLCK, 1):
            return True
        return any(start <= byte < start + count for byte in _shared_bytes(self._fd))


def _shared_bytes(fd: int) -> Iterator[int]:
    """The bytes of the file behind *fd* that have a shared lock of their own, this process's included."""
    from .lock_table import READ, locks_of

    for lock in locks_of(fd):
        if lock.open_file and lock.kind == READ and lock.first == lock.last:
            yield lock.first


def _unlock(fd: int, start: int, count: int) -> None:
    """A lock that stays would keep everybody out: a kernel that is short of memory for a moment gets that moment."""
    for attempt in range(1, _UNLOCK_ATTEMPTS + 1):
        try:
            _set(fd, fcntl.F_UNLCK, start, count)
            return
        except OSError:
            if attempt == _UNLOCK_ATTEMPTS:
                raise
            time.sleep(_LONGEST_PAUSE)


def _set(fd: int, kind: int, start: int, count: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))


def is_exclusively_held(fd: int, start: int, count: int) -> bool:
    """Whether one of these bytes is locked through another opening of the file by who may write it.

    A longer lock is somebody else's business, who cannot have it beside one of a server.
    """
    kind, _, length = _first_in_the_way(fd, start, count, fcntl.F_RDLCK)
    return (kind, length) == (fcntl.F_WRLCK, 1)


def _first_in_the_way(fd: int, start: int, count: int, kind: int = fcntl.F_WRLCK) -> Tuple[int, int, int]:
    """Kind, start and length of a lock that would keep *fd* from one of *kind*; the kind is F_UNLCK without any."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    kind, _, found_start, found_count, _ = _FLOCK.unpack(answer)
    return kind, found_start, found_count
