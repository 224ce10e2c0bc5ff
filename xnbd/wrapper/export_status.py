"""What ``/status`` of a wrapper tells of one export; names are those of a server's answer."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Protocol

from ..proxy.state.view import CacheView
from ..scoreboard.lines import Line
from ..scoreboard.place import COPYING_PEER
from ..scoreboard.scoreboard import Scoreboard
from ..scoreboard.tally import COMMANDS
from ..server.observer.figures import CacheNow, Exposed
from ..server.observer.wanted import rounded
from ..server.steward.progress import Rate
from ..server.steward.query import client_figures
from ..storage.blocks import BLOCK
from .exports import ProxyExport, StoredExport

Message = Dict[str, Any]


class SeenCache(Protocol):
    """The files of a proxy export, as far as they are there."""

    view: Optional[CacheView]
    scoreboard: Optional[Scoreboard]
    copy_rate: Rate

    def now(self) -> CacheNow:
        """What is known."""


def status(exposed: Exposed, export: Optional[StoredExport]) -> Message:
    """What is told of every export. *export* is None if it was removed and has clients yet."""
    sums, cache = exposed.sums, exposed.cache
    requests = sum(sum(sums.durations(place)[0]) for place in range(len(COMMANDS)))
    counters = {name: sums[name] for name in ("bytes_read", "bytes_written", "misses", "bytes_fetched")}
    told: Message = {
        "mode": None if export is None else export.mode,
        "disk_size": exposed.disk_bytes,
        "clients": sums["clients"],
        "counters": {"requests": requests, **counters, "hits": sums.hits},
        "write_back_failed": exposed.write_back_failed,
    }
    if cache is not None:
        unreachable, connected = sums["origin_unreachable"], sums["origin_connected"]
        told["origin"] = {
            "state": "unreachable" if unreachable else "connected" if connected else "idle",
            "connections": connected,
        }
        told["cached_bytes"] = cache.cached_bytes
        told["written_bytes"] = cache.written_bytes
        told["queue"] = {"requests": sums["waiting"], "bytes": sums["waiting_bytes"]}
    return told


def with_cache(told: Message, export: ProxyExport, cache: SeenCache, cells: Optional[int]) -> Message:
    """What is *told* of a proxy export, and what its files tell: clients, origin, copy, and a map of *cells* parts."""
    view, board, now = cache.view, cache.scoreboard, cache.now()
    lines: List[Line] = [] if board is None else board.lines.living()
    address = "" if board is None else board.origin.address
    error = next((line.trouble for line in lines if line.trouble), None)
    more: Message = {
        "origin": {**told["origin"], "address": address or str(export.origin), "error": error},
        "workers": [client_figures(line) for line in lines if line.peer not in ("", COPYING_PEER)],
        "checkpoint": {"dirty_pages": now.dirty_pages, "seconds_since_last": now.checkpoint_age},
    }
    if view is None:
        return {**told, **more}
    progress = view.progress
    if now.cached_bytes is not None:
        more["block_size"] = BLOCK
        more["blocks"] = {"total": progress.blocks, "cached": progress.blocks - progress.missing()}
        if now.written_bytes is not None:
            more["blocks"]["written"] = now.written_bytes // BLOCK
    if not now.copying:
        cache.copy_rate = Rate()
    elif now.cached_bytes is not None:
        rate = cache.copy_rate.of(now.cached_bytes)
        more["cache_all"] = {"copied_bytes": now.cached_bytes, "total_bytes": progress.size, "rate": rate}
    if cells is not None:
        more["map"] = rounded(progress.shares(cells))
    return {**told, **more}
