"""What an image is to the servers that use it: the cache of a proxy, or a disk by itself.

It must not be both at once. Where blocks are missing a plain target would serve
zeros, and the proxy would fetch them over what the target's clients have written. So
every server holds a shared lock on one of two bytes of the image (`system.file_locks`),
and none starts while another server holds the other byte. The lock belongs to the
descriptor that the master has opened and its processes have inherited: it ends with
the last of them, and all change it together when a proxy is switched.

Who starts looks, takes its byte, and looks again: of two that start at once at least
one sees the other. It lets go then and tries again for a moment, in which servers
that are about to end or to be switched get that done.

Proxies on one cache share its bitmap: each shows by one byte more, which follows from
the cache's id in the state file, which bitmap that is, and does not start while another
one holds another such byte.

Where the file system has no such locks nobody is refused.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Callable, Iterator

from ..errors import ConfigurationError
from ..system.file_locks import RangeLocks, SharedLocks, is_exclusively_held

CACHE = 1 << 62
DISK = CACHE + 4096
"""Bytes beyond the end of any disk; not side by side, or the kernel would make one lock of two."""

FAILED, FAILED_COUNT = DISK + 4096, 1 << 32
"""One of these bytes is locked by a server that was told of a failed write-back (`storage.writeback`).

Exclusively, which takes the right to write: it ends all FLUSHes of all servers of the
image, and must not be in the power of who may only read it.
"""
BITMAPS, _BITMAPS_COUNT = 1 << 61, 1 << 60
_USES = {
    CACHE: "a proxy's cache",
    DISK: "served as a disk",
    BITMAPS: "the cache of a proxy with another bitmap",
}

_TRIES = 50
_LONGEST_PAUSE = 0.1


class ImageInUse(Exception):
    """Another server uses the image in the other way."""


class OtherBitmap(ImageInUse):
    """Another proxy uses the image with another bitmap."""


def attempts() -> Iterator[None]:
    """Comes back some 50 times in 2.5 seconds; counted, so that who was stopped meanwhile still has its tries."""
    for _ in range(_TRIES):
        yield
        time.sleep(_LONGEST_PAUSE * os.urandom(1)[0] / 256)  # two that disturb each other get out of step


def try_use_as(fd: int, use: int) -> bool:
    """Tell other servers what the image behind *fd* is, `CACHE` or `DISK`; False if they use it in the other way."""
    other = CACHE + DISK - use
    return _take(fd, use, lambda: _is_used_as(fd, other))


def try_use_bitmap(fd: int, cache_id: bytes) -> bool:
    """Tell other proxies that the cache behind *fd* is in use with the bitmap of *cache_id*; False if one has another.

    For who uses it as `CACHE`.
    """
    byte = BITMAPS + int.from_bytes(cache_id[:7], "little")
    return _take(fd, byte, lambda: _has_another_bitmap(fd, byte))


def _take(fd: int, byte: int, is_in_the_way: Callable[[], bool]) -> bool:
    """Look, take the byte, and look again: of two that do so at once at least one sees the other, and lets go."""
    if is_in_the_way():
        return False
    _hold(fd, byte)
    if is_in_the_way():
        _release(fd, byte)
        return False
    return True


def use_as_disk(fd: int, path: str) -> None:
    """For a server to which the image is a disk by itself. Raises `ConfigurationError` if it is a proxy's cache."""
    for _ in attempts():
        if try_use_as(fd, DISK):
            return
    raise _refusal(fd, path)


def refuse_cache(fd: int, path: str) -> None:
    """For who serves nothing. Raises `ConfigurationError` as `use_as_disk` would."""
    for _ in attempts():
        if not _is_used_as(fd, CACHE):
            return
    raise _refusal(fd, path)


def turn_into_disk(fd: int) -> None:
    """The proxy on this cache was switched, or has joined one that was."""
    _hold(fd, DISK)
    _release(fd, CACHE)


def tell_failed(fd: int) -> None:
    """A write-back of the image has failed: other servers hear of it, until the last process with *fd* ends."""
    with suppress(OSError):
        RangeLocks(fd).try_acquire(FAILED + int.from_bytes(os.urandom(4), "little"), 1)


def is_failed(fd: int) -> bool:
    """Whether that was told through another opening of the image."""
    try:
        return is_exclusively_held(fd, FAILED, FAILED_COUNT)
    except OSError:
        return False


def _refusal(fd: int, path: str) -> ConfigurationError:
    return ConfigurationError(
        stranger_in_the_way(fd, path, CACHE)
        or f"{path} is the cache of a running proxy: switch that one (xnbd-bgctl --switch), or stop it"
    )


def stranger_in_the_way(fd: int, path: str, use: int) -> str:
    """Who uses the image as `DISK`, `CACHE` or `BITMAPS` and is in the way, if no server for sure; else empty."""
    from ..system.holders import describe_strangers

    strangers = describe_strangers(fd, use, _BITMAPS_COUNT if use == BITMAPS else 1)
    return f"{path} is locked by {strangers}, as if it were {_USES[use]}: end that" if strangers else ""


def _is_used_as(fd: int, use: int) -> bool:
    try:
        return SharedLocks(fd).held_elsewhere(use)
    except OSError:
        return False


def _has_another_bitmap(fd: int, byte: int) -> bool:
    locks, end = SharedLocks(fd), BITMAPS + _BITMAPS_COUNT
    try:
        return locks.some_held_elsewhere(byte + 1, end - byte - 1) or (
            byte > BITMAPS and locks.some_held_elsewhere(BITMAPS, byte - BITMAPS)
        )
    except OSError:
        return False


def _hold(fd: int, use: int) -> None:
    with suppress(OSError):
        SharedLocks(fd).acquire(use)


def _release(fd: int, use: int) -> None:
    with suppress(OSError):
        SharedLocks(fd).release(use)
