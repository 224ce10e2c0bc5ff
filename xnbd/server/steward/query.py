"""What ``xnbd-bgctl --query`` is told (``xnbd-bgctl(8)``, section CONTROL SOCKET PROTOCOL)."""

from __future__ import annotations

import math
import os
from datetime import datetime, timedelta, timezone
from time import time
from typing import Any, List, Optional, Protocol, Sequence, Tuple

from ... import __version__
from ...control.requests import Message, flag_argument, integer_argument
from ...control.server import CommandTable, Reply
from ...origin.address import members_of, parse_origin
from ...proxy.source import ProxySource
from ...scoreboard.counters import MISSES, REQUESTS, Counts
from ...scoreboard.layout import REACHED, TARGET, UNREACHABLE
from ...scoreboard.lines import Line, clock
from ...scoreboard.place import COPYING_PEER
from ...scoreboard.rates import Rates
from ...scoreboard.scoreboard import Scoreboard
from ...scoreboard.tally import Sums, durations_by_command
from ...storage.blocks import BLOCK
from ...storage.image import Source
from ...system.usage import UsageMeter, began
from ..configuration import Configuration
from ..session.memory import share
from .duty import Cache, Context, Duty
from .origin_figures import OriginFigures
from .progress import Rate

_MAXIMUM_CELLS = 1 << 16


class Query(Duty):
    """Answers what operators want to know; *cache* is a proxy's."""

    def __init__(self, context: Context, cache: Optional[Cache]) -> None:
        self._cache = cache
        self._answers = QueryAnswers(context, cache)

    def commands(self) -> CommandTable:
        return {"query": self._query}

    def _query(self, request: Message) -> Reply:
        cells = integer_argument(request, "map", 1, _MAXIMUM_CELLS)
        durations, usage = flag_argument(request, "durations"), flag_argument(request, "usage", default=True)
        if self._cache is not None:
            yield from self._cache.count()
        yield {"done": True, **self._answers.answer(cells, with_usage=usage, with_durations=durations)}


class HowMuch(Protocol):
    """How much of a disk is local, as `steward.progress.Progress` tells."""

    blocks: int
    size: int

    def missing(self) -> int:
        """Blocks that are not."""

    def cached_bytes(self) -> int:
        """Bytes that are."""

    def shares(self, cells: int) -> List[float]:
        """Of each of at most *cells* parts."""


class Marks(Protocol):
    """What is not durable yet."""

    def dirty_pages(self) -> int:
        """Pages of the bitmap that the next checkpoint has to save."""


class AskedCache(Protocol):
    """What there is to ask about a proxy's cache."""

    @property
    def source(self) -> ProxySource:
        """The disk."""

    @property
    def state(self) -> Marks:
        """Its bitmap."""

    @property
    def progress(self) -> HowMuch:
        """How much of it is local."""

    @property
    def written(self) -> Optional[HowMuch]:
        """How much of it clients have written, if that is counted."""


class Asked(Protocol):
    """What there is to ask about any disk."""

    @property
    def source(self) -> Source[Scoreboard]:
        """The disk."""

    @property
    def scoreboard(self) -> Scoreboard:
        """What its processes tell."""

    @property
    def configuration(self) -> Configuration:
        """By which it is served now."""

    @property
    def limits(self) -> Optional[Rates]:
        """How fast clients may be now, if they can be limited."""

    @property
    def expiries(self) -> Sequence[Tuple[str, float, float]]:
        """As of `Configuration.expiries`."""

    def sums(self) -> Optional[Sums]:
        """What all processes of the server have done, if it counts that for metrics."""


class QueryAnswers:
    """The answers of one process, which the master has forked."""

    def __init__(self, context: Asked, cache: Optional[AskedCache], most: float = math.inf) -> None:
        """*most* is as for `UsageMeter`."""
        self._context = context
        self._source = context.source
        self._scoreboard = context.scoreboard
        self._cache = cache
        self._master = os.getppid()
        self._began = began(self._master)
        self._meter = UsageMeter(most)
        self._copier: Optional[int] = None
        self._copy_rate = Rate()

    def answer(self, cells: Optional[int], *, with_usage: bool = True, with_durations: bool = False) -> Message:
        """Everything; the map of a proxy gets *cells* if that is not None.

        After the switch it is a target, and nothing is told of an origin and a cache.
        """
        source, lines, totals = self._source, self._scoreboard.lines.living(), self._scoreboard.lines.totals()
        switched = self._scoreboard.mode == TARGET
        near = [line for line in lines if line.namespace == self._scoreboard.namespace]
        usage = self._meter.usage([line.pid for line in near]) if with_usage else {}
        answer: Message = {
            "mode": "target" if switched else source.mode,
            "name": source.name,
            "description": self._description(),
            "pid": self._master,
            "version": __version__,
            "uptime_seconds": clock() - self._began,
            "readonly": source.readonly,
            "configuration": self._context.configuration.figures(),
            "limits": self._limits(),
            "warnings": self._warnings(switched=switched),
            "disk_size": source.size,
            "block_size": BLOCK,
            "write_back_failure": self._write_back_failure(),
            "counters": _counters(totals),
            "workers": [
                client_figures(line, usage.get(line.pid) if line in near else None)
                for line in lines
                if line.peer not in ("", COPYING_PEER)
            ],
        }
        if with_durations:
            sums = self._context.sums()
            answer["durations"] = None if sums is None else durations_by_command([sums])
            answer["limited_clients"] = None if sums is None else sums["limited"]
        if self._cache is not None and not switched:
            progress = self._cache.progress
            answer["queue"] = self._queue(lines)
            answer["blocks"] = self._blocks(progress, self._cache.written)
            answer["origin"] = self._origin(self._cache.source, lines)
            answer["checkpoint"] = self._checkpoint(self._cache.state.dirty_pages())
            answer["cache_all"] = self._copy(lines, progress)
            answer["cache_limit"] = self._cache_limit()
            if cells is not None:
                answer["map"] = progress.shares(cells)
                if self._cache.written is not None:
                    answer["map_written"] = self._cache.written.shares(cells)
        return answer

    def _blocks(self, cached: HowMuch, written: Optional[HowMuch]) -> Message:
        blocks = {"total": cached.blocks, "cached": cached.blocks - cached.missing()}
        return blocks if written is None else {**blocks, "written": written.blocks - written.missing()}

    def _cache_limit(self) -> Optional[Message]:
        room = self._scoreboard.room
        if not room.limit:
            return None
        return {
            "limit_bytes": room.limit * BLOCK,
            "used_bytes": min(room.used, room.limit) * BLOCK,
            "let_go_bytes": room.has_let_go * BLOCK,
        }

    def _limits(self) -> Optional[Message]:
        limits = self._context.limits
        return None if limits is None else limits._asdict()

    def _warnings(self, *, switched: bool) -> List[str]:
        """What the operator should do something about before it is too late."""
        found = self._server_warnings() + self._image_warnings()
        if isinstance(self._source, ProxySource) and not switched:
            found += parse_origin(self._origin_address(self._source)).warnings()
        return found

    def _image_warnings(self) -> List[str]:
        length, size = self._source.length(), self._source.size
        if length >= size:
            return []
        return [
            f"{self._source.name} has shrunk to {length:,} of {size:,} bytes: what lay behind is lost. "
            "Do not lengthen it: stop the server, and restore a backup"
        ]

    def _server_warnings(self) -> List[str]:
        if not self._context.expiries:
            return []
        from ...tls.expiry import Expiry, warnings

        return warnings(
            [
                Expiry(path, datetime.fromtimestamp(when, timezone.utc), timedelta(seconds=notice))
                for path, when, notice in self._context.expiries
            ]
        )

    def _description(self) -> str:
        source = self._source
        if not isinstance(source, ProxySource):
            return source.description
        if self._scoreboard.mode == TARGET:
            return f"disk image {source.name}, a proxy's cache until the switch"
        return source.describe(self._origin_address(source))

    def _origin_address(self, source: ProxySource) -> str:
        return self._scoreboard.origin.address or str(source.address)

    def _write_back_failure(self) -> Optional[Message]:
        failure = self._source.write_back(self._scoreboard).noted()
        if failure is None:
            return None
        return {
            "errno": failure.number,
            "error": os.strerror(failure.number),
            "seconds_since": max(0.0, time() - failure.when),
        }

    def _queue(self, lines: List[Line]) -> Message:
        limits = self._context.configuration.queue_limits
        return {
            "requests": sum(line.queued_requests for line in lines),
            "requests_limit": limits.requests,
            "bytes": sum(line.queued_bytes for line in lines),
            "bytes_limit": limits.buffered,
            "memory_limit": share(),
        }

    def _origin(self, proxy: ProxySource, lines: List[Line]) -> Message:
        connected = sum(line.origin == REACHED for line in lines)
        places = members_of(parse_origin(self._origin_address(proxy)))
        noted = [proxy.version_at(place) for place in places]
        unreachable = any(line.origin == UNREACHABLE for line in lines)
        answer: Message = {
            "address": self._origin_address(proxy),
            "state": "unreachable" if unreachable else "connected" if connected else "idle",
            "error": next((line.trouble for line in lines if line.trouble), None),
            "connections": connected,
            "version": noted[0].version if noted[0] else None,
            "changed": all(version is not None and version.changed for version in noted),
        }
        if len(places) > 1:
            answer["endpoints"] = OriginFigures(self._scoreboard, lines).of(places, noted)
        return answer

    def _checkpoint(self, dirty_pages: int) -> Message:
        count, last = self._scoreboard.checkpoints()
        return {
            "dirty_pages": dirty_pages,
            "completed": count,
            "seconds_since_last": None if last is None else max(0.0, clock() - last),
        }

    def _copy(self, lines: List[Line], progress: HowMuch) -> Optional[Message]:
        pid = next((line.pid for line in lines if line.peer == COPYING_PEER), None)
        if pid != self._copier:
            self._copier, self._copy_rate = pid, Rate()
        if pid is None:
            return None
        cached = progress.cached_bytes()
        return {
            "pid": pid,
            "copied_bytes": cached,
            "total_bytes": progress.size,
            "rate": self._copy_rate.of(cached),
        }


def _counters(counts: Counts) -> Message:
    return {**counts.by_name(), "hits": max(0, counts[REQUESTS] - counts[MISSES])}


def client_figures(line: Line, usage: Any = None) -> Message:
    """What is told of the client of one process, which uses so much memory and processor."""
    about: Message = {
        "pid": line.pid,
        "client": line.peer,
        "identity": line.identity or None,
        "encryption": line.encryption or None,
        "connected_seconds": max(0.0, clock() - line.since),
        **_counters(line.counts),
        "queued_requests": line.queued_requests,
        "queued_bytes": line.queued_bytes,
    }
    if usage is not None:
        about.update(usage._asdict())
    return about
