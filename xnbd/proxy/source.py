"""A disk that lives elsewhere, before it is opened: files and settings that all its processes share."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, NamedTuple, Optional

from ..origin.base import OriginAddress
from ..scoreboard.layout import TARGET
from ..scoreboard.room import Room
from ..scoreboard.scoreboard import Scoreboard
from ..storage import image_use, space
from ..storage.image import Identity, Image, Source, file_identity
from ..storage.target import TargetImage, reopen
from ..storage.writeback import WriteBack
from ..system.kept import Kept
from .image import ProxyImage
from .origin_link import Patience, Whereabouts
from .state.checkpoint import ProcessState
from .state.format import Steering
from .state.shared import SharedState
from .state.use_map import UseMap
from .state.versions import Version
from .state.view import CacheView
from .verification import Verify

if TYPE_CHECKING:
    from .evictor import Evictor


class ProxySettings(NamedTuple):
    """What does not change while the server runs; *size*, *readahead* and *fetch_size* (`Fetcher`) in bytes."""

    path: str
    size: int
    readonly: bool
    address: OriginAddress
    patience: Patience
    readahead: int
    fetch_size: Optional[int] = None
    verify: Verify = Verify.FIRST


class ProxySource(Source[Scoreboard]):
    """The cache image behind *cache_fd* with its bitmap, before a disk that lives elsewhere.

    ``witness`` is a second description of the image, as old, which every process syncs
    once; *cache_fd* is the master's, to hear at its end what they have died of.
    """

    mode = "proxy"

    def __init__(
        self, cache_fd: int, state: SharedState, settings: ProxySettings, witness: Optional[int] = None
    ) -> None:
        self._cache_fd = cache_fd
        self.witness = reopen(cache_fd, readonly=False) if witness is None else witness
        self._state = state
        self._settings = settings
        self._is_disk = False
        self.address = settings.address
        self.patience = settings.patience
        self.path = settings.path
        self.name = os.path.basename(settings.path)
        self.size = settings.size
        self.readonly = settings.readonly
        self.description = self.describe(state.steering.address or str(settings.address))

    def pack(self, kept: Kept) -> Dict[str, Any]:
        fds = {"cache": kept(self._cache_fd), "witness": kept(self.witness)}
        return {**fds, "size": self.size, "state": self._state.pack(kept)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], settings: ProxySettings) -> ProxySource:
        """The disk as the master's program before had it. Raises `ConfigurationError` like `SharedState.unpack`."""
        state = SharedState.unpack(packed["state"], settings.size)
        return cls(packed["cache"], state, settings, packed["witness"])

    def describe(self, address: str) -> str:
        """The disk while its origin is at *address*."""
        return f"proxy of {address}, cached in {self.name}"

    def open(self, scoreboard: Scoreboard) -> Image:
        if scoreboard.mode == TARGET:
            self.follow_switch(scoreboard)
            fd, sync = reopen(self._cache_fd, readonly=False), self.write_back(scoreboard).sync
            return TargetImage(fd, self.size, readonly=self.readonly, sync=sync)
        return self.open_proxy(scoreboard)

    def open_proxy(self, scoreboard: Scoreboard) -> ProxyImage:
        """The disk as long as it is a proxy."""
        settings = self._settings
        cache = TargetImage(reopen(self._cache_fd, readonly=False), self.size, readonly=False)
        state = self.open_state()
        state.write_back.witness = self.witness
        use_map = self._state.open_use_map()
        make = ProxyImage if use_map is None else _limited(scoreboard.room, use_map)
        return make(
            cache,
            state,
            Whereabouts(scoreboard, settings.address),
            settings.patience,
            readonly=settings.readonly,
            readahead=settings.readahead,
            fetch_size=settings.fetch_size,
            verify=settings.verify,
            name=self.name,
        )

    def is_whole(self, scoreboard: Scoreboard) -> bool:
        return scoreboard.mode == TARGET

    def length(self) -> int:
        return space.device_size(self._cache_fd)

    def identity(self) -> Identity:
        return file_identity(self._cache_fd)

    def allocated(self) -> int:
        return os.fstat(self._cache_fd).st_blocks * 512

    @property
    def scoreboard_fd(self) -> int:
        return self._state.scoreboard_fd

    def open_state(self) -> ProcessState:
        """The bitmap for a process that serves nobody. Called after the fork; raises `OSError`."""
        return self._state.open_process()

    def open_evictor(self, scoreboard: Scoreboard) -> Optional[Evictor]:
        """Who keeps the cache below its limit, if it has one, for a process that serves nobody. Raises `OSError`."""
        use_map = self._state.open_use_map()
        if use_map is None:
            return None
        from .evictor import Evictor

        state = self.open_state()
        state.write_back.witness = self.witness
        return Evictor(reopen(self._cache_fd, readonly=False), self.size, state, scoreboard, use_map)

    def open_view(self) -> CacheView:
        """The bitmap for a process that only looks. Called after the fork; raises `OSError`."""
        return self._state.open_view()

    def write_back(self, scoreboard: Scoreboard) -> WriteBack:
        return WriteBack(self._state.failures, self._cache_fd, self.witness)

    @property
    def steering(self) -> Steering:
        """With what servers of another day would begin. Raises `OSError`."""
        return self._state.steering

    def steer(self, steering: Steering) -> None:
        """Have servers of another day begin with *steering*; raises like `SharedState.steer`."""
        self._state.steer(steering)

    def agree_on_version(self, address: OriginAddress, version: str) -> str:
        """The version that counts for the disk at *address*: *version* if none was noted. Raises `OSError`."""
        return self._state.agree_on_version(address.place, version) if version else version

    def version_at(self, address: OriginAddress) -> Optional[Version]:
        """What is noted of the disk at *address*."""
        return self._state.version_of(address.place)

    def follow_switch(self, scoreboard: Scoreboard) -> None:
        """Once the server is a plain target, have other servers know: for any of its processes, at any time."""
        if not self._is_disk and scoreboard.mode == TARGET:
            image_use.turn_into_disk(self._cache_fd)
            self._is_disk = True

    def flush(self, scoreboard: Scoreboard) -> None:
        """Called when the workers are gone: everything is durable, and marked so unless others use the files."""
        self.follow_switch(scoreboard)
        self._state.mark_clean(self._cache_fd)

    def close(self) -> None:
        os.close(self._cache_fd)
        os.close(self.witness)
        self._state.close()


def _limited(room: Room, use_map: UseMap) -> Callable[..., ProxyImage]:
    """What makes the disk of a cache that has a limit."""
    from .limited import LimitedImage

    return partial(LimitedImage, room, use_map)
