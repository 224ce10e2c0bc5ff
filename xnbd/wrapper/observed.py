"""What is observed of a wrapper: all its exports, those without clients too."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from time import monotonic
from typing import Dict, List, Optional, Sequence, Tuple

from .. import __version__
from ..errors import ConfigurationError
from ..metrics.exposition import Family
from ..proxy.state.format import SCOREBOARD_SUFFIX
from ..proxy.state.view import CacheView, view_of
from ..scoreboard.scoreboard import Scoreboard
from ..scoreboard.tally import Sums, TallyReader, durations_by_command
from ..server.configuration import Configuration
from ..server.observer.disks import IDLE, Counting, available_bytes, cache_now
from ..server.observer.figures import About, CacheNow, Exposed, families
from ..server.observer.process import Observed
from ..server.observer.wanted import NoSuchExport, Wanted
from ..server.steward.progress import Rate
from ..storage.target import usable_size
from .database import Database
from .export_status import Message, status, with_cache
from .exports import ProxyExport, StoredExport

_SIZE_VALID = 10.0


class _Cache:
    """The files of one proxy export, as far as they are there."""

    def __init__(self, export: ProxyExport) -> None:
        self._path = os.path.realpath(export.bitmap_path)
        self._origin = str(export.origin)
        self.view: Optional[CacheView] = None
        self.counting: Optional[Counting] = None
        self.copy_rate = Rate()
        self.scoreboard: Optional[Scoreboard] = None

    def look(self) -> None:
        """Go on with the files that are there now."""
        board = self._path + SCOREBOARD_SUFFIX
        if self.view is not None and not (self.view.is_at(self._path) and _is_at(self.scoreboard, board)):
            self.close()
        if self.view is None:
            self.view = view_of(self._path)
            self.scoreboard = _scoreboard_at(board)
            if self.view is not None:
                self.counting = Counting(self.view, self.scoreboard)

    def now(self) -> CacheNow:
        return cache_now(self.scoreboard, self.view, self.counting, self._origin)

    def close(self) -> None:
        for what in (self.view, self.scoreboard):
            if what is not None:
                what.close()
        self.view = self.counting = self.scoreboard = None


def _is_at(scoreboard: Optional[Scoreboard], path: str) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return scoreboard is None
    return scoreboard is not None and os.path.samestat(os.fstat(scoreboard.fd), found)


def _scoreboard_at(path: str) -> Optional[Scoreboard]:
    with suppress(OSError, ValueError):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return Scoreboard(os.open(path, flags), readonly=True)
    return None


class ObservedWrapper(Observed):
    """The exports of *database*; made in the observer's process. Raises `OSError`."""

    def __init__(self, database: Database, tallies: Sequence[int], configuration: Configuration) -> None:
        self._database = database
        self._tally = TallyReader(tallies)
        self._configuration = configuration
        self._about = About("xnbd-wrapper", os.getppid(), configuration.max_clients, configuration.expiries())
        self._caches: Dict[ProxyExport, _Cache] = {}
        self._sizes: Dict[str, Tuple[float, Optional[int]]] = {}
        self._work_at = 0.0

    def families(self) -> List[Family]:
        return families(self._exposed(), self._about)

    def _exports(self) -> Dict[str, StoredExport]:
        try:
            exports = self._database.current()
        except ConfigurationError:
            exports = self._database.exports
        for export in [export for export in self._caches if export not in exports.values()]:
            self._caches.pop(export).close()
        return exports

    def _exposed(self) -> List[Exposed]:
        """Of an export that was removed, too, as long as it has clients."""
        sums, exports = self._tally.read(), self._exports()
        exposed = [self._expose(name, export, sums.pop(name, Sums())) for name, export in exports.items()]
        return [*exposed, *(Exposed(name, left, None, None, None, None) for name, left in sums.items() if left.alive)]

    def _expose(self, name: str, export: StoredExport, sums: Sums) -> Exposed:
        free = available_bytes(export.image_path)
        if not isinstance(export, ProxyExport):
            return Exposed(name, sums, self._size(export.image_path), free, None, None)
        cache = self._cache(export)
        view = cache.view
        if view is None:
            return Exposed(name, sums, None, free, None, cache.now())
        return Exposed(name, sums, view.progress.size, free, view.write_back_failed(), cache.now())

    def _cache(self, export: ProxyExport) -> _Cache:
        cache = self._caches.get(export)
        if cache is None:
            cache = self._caches[export] = _Cache(export)
        cache.look()
        return cache

    def _size(self, path: str) -> Optional[int]:
        """Bytes of the disk image at *path*, which may have grown since it was looked at last."""
        until, size = self._sizes.get(path, (0.0, None))
        if monotonic() >= until:
            size = None
            with suppress(OSError, ConfigurationError):
                size = usable_size(path, readonly=True)
            self._sizes[path] = monotonic() + _SIZE_VALID, size
        return size

    def status(self, wanted: Wanted) -> str:
        exposed = self._exposed()
        exports = self._database.exports
        if wanted.export is not None:
            found = next((one for one in exposed if one.export == wanted.export), None)
            if found is None:
                raise NoSuchExport
            return json.dumps({"done": True, **self._detail(found, exports.get(found.export), wanted)}) + "\n"
        about: Message = {
            "done": True,
            "mode": "wrapper",
            "pid": self._about.pid,
            "version": __version__,
            "uptime_seconds": self._about.uptime,
            "configuration": self._configuration.figures(),
        }
        if wanted.durations:
            about["durations"] = durations_by_command(one.sums for one in exposed)
        disks = {one.export: status(one, exports.get(one.export)) for one in exposed}
        return json.dumps({**about, "exports": disks}) + "\n"

    def _detail(self, exposed: Exposed, export: Optional[StoredExport], wanted: Wanted) -> Message:
        cache = self._caches.get(export) if isinstance(export, ProxyExport) else None
        about: Message = {
            "name": exposed.export,
            "version": __version__,
            "uptime_seconds": self._about.uptime,
            **status(exposed, export),
        }
        if isinstance(export, ProxyExport) and cache is not None:
            about = with_cache(about, export, cache, wanted.cells)
        if wanted.durations:
            about["durations"] = durations_by_command([exposed.sums])
        return about

    # Counting what is local

    def work(self) -> None:
        """One step of the count that has waited for longest."""
        began = monotonic()
        counting = min(self._countings(), key=lambda counting: counting.due, default=None)
        if counting is not None and counting.due <= began:
            counting.work()
        now = monotonic()
        self._work_at = now + IDLE * (now - began)

    def _countings(self) -> List[Counting]:
        return [cache.counting for cache in self._caches.values() if cache.counting is not None]

    def deadline(self) -> Optional[float]:
        due = min((counting.due for counting in self._countings()), default=None)
        return None if due is None else max(due, self._work_at)
