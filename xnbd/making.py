"""Files that this program makes: for its own user only, unless the operator has said otherwise.

A lock that is shared needs the right to read only, so other users who may read a file
could stop who wants it for himself. What stands at a name already is nobody's new
file, and is neither followed nor taken.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Container, List, Optional, Tuple

OWNER_ONLY = 0o600
WIDEST = 0o666

_TRIES = 10

_modes: List[int] = [OWNER_ONLY]
_owners: List[Optional[Tuple[int, int]]] = [None]


def file_mode() -> int:
    return _modes[0]


def set_file_mode(mode: int) -> None:
    """Have files that are made from now on, by this process and those it forks, get *mode*, whatever the umask is."""
    _modes[0] = mode


def set_owner(owner: Optional[Tuple[int, int]]) -> None:
    """Have files and sockets that are made from now on belong to this user and group; None: to who makes them."""
    _owners[0] = owner


def give(fd: int) -> None:
    """Let the file behind *fd*, which this process has just made, belong to whom such files are to belong."""
    owner = _owners[0]
    if owner is not None:
        os.fchown(fd, *owner)


def give_socket(path: str) -> None:
    """Do the same for the socket that stands at *path*, and for nothing that was put in its place."""
    owner = _owners[0]
    if owner is None:
        return
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISSOCK(status.st_mode) and status.st_nlink == 1:
            os.chown(f"/proc/self/fd/{fd}", *owner)
    finally:
        os.close(fd)


def make_file(path: str, flags: int = os.O_RDWR) -> int:
    """A descriptor of the new file at *path*. Raises `FileExistsError` if anything stands there."""
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, OWNER_ONLY)
    give(fd)
    if _modes[0] != OWNER_ONLY:
        os.fchmod(fd, _modes[0])
    return fd


def open_or_make(path: str, flags: int) -> int:
    """A descriptor of the file at *path*, made if there is none; no symbolic link is followed. Raises `OSError`."""
    while True:
        try:
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        try:
            return make_file(path, flags)
        except FileExistsError:
            pass  # since a moment ago


def make_afresh(path: str) -> int:
    """A descriptor of the new file at *path*; what stands there, which a crash may have left, goes first.

    Raises `OSError`, for instance if that is another user's in a directory like ``/tmp``.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(FileExistsError):
            return make_file(path)
    raise FileExistsError(errno.EEXIST, "somebody makes it again and again", path)


def is_at(path: str, fd: int) -> bool:
    """Whether the file behind *fd* stands at *path* still: it has not been replaced, renamed or removed."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def is_own_file(status: os.stat_result, owners: Container[int]) -> bool:
    """Whether a file is what this program makes: regular, of one name, of one of *owners*, root or this user."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and _is_trusted(status.st_uid, owners)


def _is_trusted(uid: int, owners: Container[int]) -> bool:
    return uid in (0, os.geteuid()) or uid in owners
