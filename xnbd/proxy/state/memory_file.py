"""Files beside the bitmap that are memory: shared by the servers that run, and worth nothing without them.

The first server that uses a cache makes them anew. Their space is kept when the last
one ends, for on a full file system there may be no other for the next.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from ...errors import ConfigurationError
from ...logs import log
from ...making import file_mode, is_own_file
from ...storage import space
from ...storage.space import NO_SPACE
from ...system.process import closed_on_error
from . import files
from .entry import Entry


class MemoryFile:
    """The file of *size* bytes whose name is that of the bitmap of *entry* and *suffix*; its state file is open."""

    def __init__(self, entry: Entry, suffix: str, size: int, state_fd: int) -> None:
        self._entry = entry
        self.path = entry.path + suffix
        self._size = size
        self._owners = {*entry.owners, os.fstat(state_fd).st_uid}

    def join(self) -> int:
        """A descriptor of the file of the servers that use the cache. Raises `ConfigurationError`."""
        try:
            fd = files.open_regular(self.path)
        except FileNotFoundError:
            raise ConfigurationError(
                f"{self.path} is gone, which the servers that use {self._entry.path} share: stop them all first"
            ) from None
        with closed_on_error(fd):
            if not self._is_own(fd) or os.fstat(fd).st_size != self._size:
                raise ConfigurationError(
                    f"{self.path} is not the one that the servers that use {self._entry.path} share: "
                    "stop them all first"
                )
        return fd

    def make(self) -> int:
        """A descriptor of the file, all zeros; a former one's space is used again.

        Without space it is one without a name, which other servers cannot share.
        """
        with suppress(OSError, ConfigurationError):
            return self._clear_former()
        try:
            fd = files.make_new(self.path)
            with closed_on_error(fd):
                files.allocate(fd, self._size)
            return fd
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            files.remove_strange(self.path)
            told = "no space for %s: until the next start no other server can use %s too"
            log.warning(told, self.path, self._entry.path)
            return self._make_nameless()

    def _make_nameless(self) -> int:
        fd = os.memfd_create("xnbd-memory")
        os.ftruncate(fd, self._size)
        return fd

    def _clear_former(self) -> int:
        """Also of another version. Raises `OSError` or `ConfigurationError` if there is none to be used."""
        fd = files.open_regular(self.path)
        with closed_on_error(fd):
            if not self._is_own(fd):
                raise ConfigurationError(f"{self.path} is no file of this program's")
            files.allocate(fd, self._size)
            os.ftruncate(fd, self._size)
            self._wipe(fd)
            os.fchmod(fd, file_mode())
        return fd

    def _wipe(self, fd: int) -> None:
        """Zeros, at once where the file system can: the file of a large disk is large."""
        try:
            space.zero_range(fd, 0, self._size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            files.clear(fd, self._size)

    def _is_own(self, fd: int) -> bool:
        """Whether the file is ours, and not another user's who may write into the directory."""
        return is_own_file(os.fstat(fd), self._owners)
