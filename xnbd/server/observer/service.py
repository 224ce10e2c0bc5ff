"""What is observed of a server: its one disk."""

from __future__ import annotations

import json
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ...metrics.exposition import Family
from ...proxy.source import ProxySource
from ...proxy.state.view import CacheView, LocalBlocks
from ...scoreboard.layout import TARGET
from ...scoreboard.rates import Rates
from ...scoreboard.scoreboard import Scoreboard
from ...scoreboard.tally import Sums, TallyReader
from ...storage.image import Source
from ...storage.target import reopen
from ..configuration import Configuration
from ..service import Service
from ..steward.query import QueryAnswers
from .disks import Counting, available_bytes, cache_now
from .figures import About, CacheNow, Exposed, families
from .process import Observed
from .wanted import NoSuchExport, Wanted, rounded

_USAGE_TIME = 0.01
"""Seconds of the processor for what processes use, in one answer: enough for some forty new ones, or 500 idle ones."""


class _Asked(NamedTuple):
    """What `QueryAnswers` wants to know."""

    source: Source[Scoreboard]
    scoreboard: Scoreboard
    configuration: Configuration
    expiries: Sequence[Tuple[str, float, float]]
    service: Service
    tally: TallyReader

    def sums(self) -> Sums:
        """What all processes have done."""
        return self.tally.of(self.service.export_name)

    @property
    def limits(self) -> Optional[Rates]:
        """How fast clients may be now, if they can be limited."""
        return self.service.rates


class _Cache(NamedTuple):
    source: ProxySource
    state: CacheView

    @property
    def progress(self) -> LocalBlocks:
        return self.state.progress

    @property
    def written(self) -> Optional[LocalBlocks]:
        return self.state.written


class ObservedService(Observed):
    """The disk of *service*; made in the observer's process. Raises `OSError`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._source = source = service.source
        self._scoreboard = Scoreboard(reopen(service.scoreboard_fd, readonly=True), readonly=True)
        self._view: Optional[CacheView] = None
        self._counting: Optional[Counting] = None
        configuration = service.configuration
        expiries = configuration.expiries()
        cache = None
        if isinstance(source, ProxySource):
            self._view = source.open_view()
            self._counting = Counting(self._view, self._scoreboard)
            cache = _Cache(source, self._view)
        self._about = About("xnbd-server", os.getppid(), configuration.max_clients, expiries)
        tally = TallyReader(service.tally_fds)
        self._asked = _Asked(source, self._scoreboard, configuration, expiries, service, tally)
        self._answers = QueryAnswers(self._asked, cache, _USAGE_TIME)

    def families(self) -> List[Family]:
        exposed = Exposed(
            export=self._service.export_name,
            sums=self._asked.sums(),
            disk_bytes=self._source.size,
            available_bytes=available_bytes(self._source.path),
            write_back_failed=self._source.write_back(self._scoreboard).noted() is not None,
            cache=self._cache_now(),
        )
        return families([exposed], self._about)

    def _cache_now(self) -> Optional[CacheNow]:
        if self._view is None or not isinstance(self._source, ProxySource):
            return None
        return cache_now(self._scoreboard, self._view, self._counting, str(self._source.address))

    def status(self, wanted: Wanted) -> str:
        if wanted.export not in (None, self._service.export_name):
            raise NoSuchExport
        answers = self._answers.answer(wanted.cells, with_usage=wanted.usage, with_durations=wanted.durations)
        answer = {"done": True, **answers}
        for name in {"map", "map_written"} & answer.keys():
            answer[name] = rounded(answer[name])
        return json.dumps(answer) + "\n"

    def work(self) -> None:
        if self._counting is not None:
            self._counting.work()

    def deadline(self) -> Optional[float]:
        if self._counting is None or self._scoreboard.mode == TARGET:
            return None
        return self._counting.due
