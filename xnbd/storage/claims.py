"""What an image is to the servers that use it: the cache of a proxy, or a disk by itself.

It must not be both at once. Where blocks are missing a plain target would serve
zeros, and the proxy would fetch them over what the target's clients have written. So
every server holds a shared lock on one of two bytes of the image (`storage.locks`),
and none starts while another server holds the other byte. The lock belongs to the
descriptor that the master has opened and its processes have inherited: it ends with
the last of them, and all change it together when a proxy is switched.

Who starts looks, takes its byte, and looks again: of two that start at once at least
one sees the other. It lets go then and tries again for a moment, in which servers
that are about to end or to be switched get that done.

Where the file system has no such locks nobody is refused.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Iterator

from ..errors import ConfigurationError
from .locks import SharedLocks

CACHE = 1 << 62
DISK = CACHE + 4096
"""Bytes beyond the end of any disk; not side by side, or the kernel would make one lock of two."""

FAILED = DISK + 4096
"""Locked likewise by a server that was told of a failed write-back (`storage.writeback`)."""

_TRIES = 50
_LONGEST_PAUSE = 0.1


class ImageInUse(Exception):
    """Another server uses the image in the other way."""


def attempts() -> Iterator[None]:
    """Comes back some 50 times in 2.5 seconds; counted, so that who was stopped meanwhile still has its tries."""
    for _ in range(_TRIES):
        yield
        time.sleep(_LONGEST_PAUSE * os.urandom(1)[0] / 256)  # two that disturb each other get out of step


def try_claim(fd: int, use: int) -> bool:
    """Tell other servers what the image behind *fd* is, `CACHE` or `DISK`; False if they use it in the other way."""
    other = CACHE + DISK - use
    if _is_claimed(fd, other):
        return False
    _hold(fd, use)
    if _is_claimed(fd, other):
        _let_go(fd, use)
        return False
    return True


def claim_disk(fd: int, path: str) -> None:
    """For a server to which the image is a disk by itself. Raises `ConfigurationError` if it is a proxy's cache."""
    for _ in attempts():
        if try_claim(fd, DISK):
            return
    raise _refusal(path)


def refuse_cache(fd: int, path: str) -> None:
    """For who serves nothing. Raises `ConfigurationError` as `claim_disk` would."""
    for _ in attempts():
        if not _is_claimed(fd, CACHE):
            return
    raise _refusal(path)


def turn_into_disk(fd: int) -> None:
    """The proxy on this cache was switched, or has joined one that was."""
    _hold(fd, DISK)
    _let_go(fd, CACHE)


def tell_failed(fd: int) -> None:
    """A write-back of the image has failed: other servers hear of it, until the last process with *fd* ends."""
    _hold(fd, FAILED)


def is_failed(fd: int) -> bool:
    """Whether that was told through another opening of the image."""
    return _is_claimed(fd, FAILED)


def _refusal(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is the cache of a running proxy: switch that one (xnbd-bgctl --switch), or stop it"
    )


def _is_claimed(fd: int, use: int) -> bool:
    try:
        return SharedLocks(fd).held_elsewhere(use)
    except OSError:
        return False


def _hold(fd: int, use: int) -> None:
    with suppress(OSError):
        SharedLocks(fd).acquire(use)


def _let_go(fd: int, use: int) -> None:
    with suppress(OSError):
        SharedLocks(fd).release(use)
