"""The files of a bitmap in the hands of a server's master, from their opening to their end."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any, Dict, Mapping, Optional, Tuple

from ...errors import ConfigurationError
from ...scoreboard.scoreboard import Scoreboard
from ...storage.target import reopen
from ...storage.writeback import WriteBack, WriteBackFailed
from ...system.kept import Kept
from ...system.process import closed_on_error
from . import belonging, copies, files, mending
from .checkpoint import ProcessState
from .files import LEAVING_TIME
from .format import (
    SUFFIX,
    VERSION,
    BadHeader,
    Header,
    Layout,
    Steering,
    Times,
    layout_of,
    pack_header,
    parse_header,
)
from .known import was_switched
from .pages import checked_size
from .sums import Integrity
from .use_map import UseMap
from .versions import Version, Versions
from .view import CacheView


class SharedState:
    """The files as the master holds them, opened again by every process that sets bits.

    They are in use, and neither cleared nor marked as closed cleanly, until the last
    process of the last server is gone, or its master has called `mark_clean`.
    """

    def __init__(
        self,
        path: str,
        fds: Tuple[int, int, int, int, int],
        layout: Layout,
        header: Header,
        use_fd: Optional[int] = None,
    ) -> None:
        self._path = path
        self._bitmap_fd, self._state_fd, self.scoreboard_fd, self._sums_fd, self._checked_fd = fds
        self._layout = layout
        self._header = header
        self._use_fd = use_fd
        self.failures = files.failure_record(self._state_fd)
        self.write_back = WriteBack(self.failures)

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of the master."""
        fds = [kept(fd) for fd in (self._bitmap_fd, self._state_fd, self.scoreboard_fd)]
        integrity = [kept(fd) for fd in (self._sums_fd, self._checked_fd)]
        used = {} if self._use_fd is None else {"used": kept(self._use_fd)}
        header = pack_header(self._header).hex()
        return {"path": self._path, "fds": fds, "integrity": integrity, "header": header, **used}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], disk_size: int) -> SharedState:
        """The files as the master's program before had them, whose locks go on.

        Raises `ConfigurationError` if this program does not understand them.
        """
        bitmap_fd, state_fd, scoreboard_fd = packed["fds"]
        layout = layout_of(disk_size)
        try:
            version = files.read_header(state_fd).version
            header = parse_header(bytes.fromhex(packed["header"]))
        except BadHeader as error:
            raise ConfigurationError(f"{packed['path']}{SUFFIX} {error}") from None
        if version != VERSION:
            raise ConfigurationError(f"{packed['path']}{SUFFIX} has version {version}, which only a restart can read")
        if os.fstat(bitmap_fd).st_size != layout.bitmap_size:
            raise ConfigurationError(f"the bitmap {packed['path']} is of another format")
        if "integrity" not in packed:
            raise ConfigurationError(f"the server keeps no checksums of {packed['path']}, which only a restart can add")
        if os.fstat(packed["integrity"][1]).st_size != checked_size(layout):
            raise ConfigurationError(f"the map of checked blocks of {packed['path']} is of another format")
        fds = (bitmap_fd, state_fd, scoreboard_fd, *packed["integrity"])
        return cls(packed["path"], fds, layout, header, packed.get("used"))

    def open_process(self) -> ProcessState:
        """The bitmap for this process. Called after the fork; raises `OSError`."""
        process, state_fd = self._open()
        try:
            files.become_user(state_fd)
            if files.read_header(state_fd).clean:  # the master was quicker to leave than this process to come
                with files.opening(state_fd):
                    files.write_header(state_fd, self._header)
        except BaseException:
            process.close()
            raise
        return process

    def open_view(self) -> CacheView:
        """The bitmap for a process that only looks. Called after the fork; raises `OSError`."""
        bitmap_fd = reopen(self._bitmap_fd, readonly=True)
        with closed_on_error(bitmap_fd):
            return CacheView(bitmap_fd, reopen(self._state_fd, readonly=True), self._layout)

    def open_scoreboard(self) -> Scoreboard:
        """The scoreboard for this process. Called after the fork; raises `OSError`."""
        return Scoreboard(reopen(self.scoreboard_fd, readonly=False))

    def open_use_map(self) -> Optional[UseMap]:
        """When what was used, for this process, if the cache has a limit. Called after the fork; raises `OSError`."""
        if self._use_fd is None:
            return None
        fd = reopen(self._use_fd, readonly=False)
        try:
            return UseMap(fd, self._layout.disk_size)
        finally:
            os.close(fd)

    def steer(self, steering: Steering) -> None:
        """Have servers of another day begin with *steering*. Raises `OSError`; `ValueError` as `pack_steering`."""
        state_fd = reopen(self._state_fd, readonly=False)  # this process's own: the lock has to end with it
        try:
            with files.opening(state_fd):
                files.write_steering(state_fd, steering)
        finally:
            os.close(state_fd)

    def agree_on_version(self, place: str, version: str, *, anew: bool = False) -> str:
        """As `Versions.agree`; *anew*: as `Versions.replace`. Raises `OSError`."""
        state_fd = reopen(self._state_fd, readonly=False)
        try:
            versions = Versions(state_fd)
            if anew:
                versions.replace(place, version)
            return versions.agree(place, version)
        finally:
            os.close(state_fd)

    def version_of(self, place: str) -> Optional[Version]:
        """What is noted of the disk at *place*."""
        return Versions(self._state_fd).of(place)

    @property
    def steering(self) -> Steering:
        return files.read_steering(self._state_fd)

    def mark_clean(self, cache_fd: int) -> bool:
        """Make everything durable, and mark the files as closed cleanly unless another server uses them.

        For the master, when its workers are gone; tells whether they were marked.
        Raises `OSError`, and then they are not: `WriteBackFailed` if any write-back has failed.
        """
        try:
            self._checkpoint(cache_fd)  # while others need not wait: it may take long
            with files.opening(self._state_fd):
                return self._close_if_alone(cache_fd)
        except WriteBackFailed:
            self.write_back.keep()
            raise

    def _close_if_alone(self, cache_fd: int) -> bool:
        try:
            alone = files.is_alone(self._state_fd)
            self._checkpoint(cache_fd, last=alone)
            if alone:
                closed = Times(bitmap=files.stamp(self._bitmap_fd))
                self.write_back.sync(self._bitmap_fd, metadata=True)
                self.write_back.sync(cache_fd, metadata=True)  # its mark and its time of change, too
                self._forget_broken_switch()
                mending.end_exposure(self._state_fd, self._layout)
                files.write_closed_header(self._state_fd, self._closed_header(cache_fd)._replace(closed=closed))
        except WriteBackFailed:
            files.put_header(self._state_fd, self._header)
            raise
        finally:
            files.leave(self._state_fd)
        return alone

    def _checkpoint(self, cache_fd: int, *, last: bool = False) -> None:
        """The *last* one vouches for all of the bitmap."""
        with closing(self._open()[0]) as process:
            for _ in process.pages.look_at_all() if last else ():
                pass
            process.checkpoint(cache_fd, timeout=LEAVING_TIME)

    def _closed_header(self, cache_fd: int) -> Header:
        tie = self._header.tie._replace(
            previous=belonging.NO_SESSION,
            changed=belonging.place_of(cache_fd).changed,
            checksum=copies.checksum(self._bitmap_fd, self._layout, 0),
        )
        return self._header._replace(clean=True, tie=tie)

    def _forget_broken_switch(self) -> None:
        """Before the scoreboard goes, which tells of it."""
        steering = self.steering
        if steering.switched and not was_switched(self._path, self._state_fd, self._header.boot_id):
            files.write_steering(self._state_fd, steering._replace(switched=False))

    def _open(self) -> Tuple[ProcessState, int]:
        """The files once more, and the descriptor of the state file among them."""
        bitmap_fd = reopen(self._bitmap_fd, readonly=False)
        with closed_on_error(bitmap_fd):
            state_fd = reopen(self._state_fd, readonly=False)
            with closed_on_error(state_fd):
                return ProcessState(bitmap_fd, state_fd, self._layout, self._open_integrity()), state_fd

    def _open_integrity(self) -> Integrity:
        sums_fd = reopen(self._sums_fd, readonly=False)
        with closed_on_error(sums_fd):
            checked_fd = reopen(self._checked_fd, readonly=False)
            with closed_on_error(checked_fd):
                return Integrity(sums_fd, checked_fd, self._layout)

    def close(self) -> None:
        fds = (self._bitmap_fd, self._state_fd, self.scoreboard_fd, self._sums_fd, self._checked_fd, self._use_fd)
        for fd in fds:
            if fd is not None:
                os.close(fd)
