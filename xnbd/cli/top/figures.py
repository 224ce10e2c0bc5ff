"""From a server's answers to ``query`` to how fast it is now. Pure.

A rate is what has been counted since the answer before. Percentiles and hits are those of the last `WINDOW` seconds:
in one second alone there may be few requests.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ...control.client import shown
from ..query_report import client_name

Message = Dict[str, Any]

WINDOW = 10.0

_COUNTERS = ("bytes_read", "bytes_written", "requests", "hits", "misses", "bytes_fetched")
_SHORTEST = 0.5
"""A rate needs this part of an interval: of less it would be a guess."""


class Sample(NamedTuple):
    """What one answer has counted, *at* a time in seconds. Clients are known by process and address."""

    at: float
    counters: Dict[str, int]
    durations: Optional[Message]
    clients: Dict[Tuple[int, str], Message]


class ClientFigures(NamedTuple):
    """One client of *server*: bytes and requests a second; None of one that was with another process before."""

    server: str
    name: str
    read: Optional[float]
    written: Optional[float]
    requests: Optional[float]
    hits: Optional[float]
    waiting: int
    seconds: float


class Figures(NamedTuple):
    """Of one server. Rates are bytes and requests a second; None is what it does not tell, or what did not happen.

    *took* has the percentiles of each command in seconds.
    """

    read: Optional[float]
    written: Optional[float]
    requests: Optional[float]
    fetched: Optional[float]
    hits: Optional[float]
    p50: Optional[float]
    p99: Optional[float]
    took: Dict[str, Tuple[Optional[float], Optional[float]]]
    cached: Optional[float]
    waiting: Optional[int]
    clients: List[ClientFigures]


def sample(at: float, answer: Message) -> Sample:
    """Raises KeyError, TypeError or ValueError for an answer that makes no sense."""
    return Sample(
        at,
        {name: int(answer["counters"][name]) for name in _COUNTERS},
        answer.get("durations"),
        {(int(worker["pid"]), str(worker["client"])): worker for worker in answer["workers"]},
    )


class History:
    """The answers of one server, called *label*, that its figures are made of; *interval* is that between them."""

    answer: Optional[Message] = None
    """The last one."""

    def __init__(self, label: str, interval: float) -> None:
        self._label = label
        self._interval = interval
        self._samples: Deque[Sample] = deque()

    def add(self, at: float, answer: Message) -> Figures:
        """*answer* came *at* that time: what is known then. Raises like `sample`."""
        new = sample(at, answer)
        if self._samples and _went_back(self._samples[-1], new):
            self._samples.clear()
        self.answer = answer
        self._samples.append(new)
        while len(self._samples) > 2 and at - self._samples[1].at >= WINDOW:
            self._samples.popleft()
        return self._figures(answer, new)

    def clear(self) -> None:
        """What comes next has nothing to do with what was."""
        self._samples.clear()
        self.answer = None

    def _figures(self, answer: Message, new: Sample) -> Figures:
        first, before = self._samples[0], self._before()
        rates = {name: _rate(name, before, new) for name in _COUNTERS}
        p50, p99 = _percentiles(_added_up(first, new), new)
        has_cache = "blocks" in answer
        return Figures(
            read=rates["bytes_read"],
            written=rates["bytes_written"],
            requests=rates["requests"],
            fetched=rates["bytes_fetched"] if has_cache else None,
            hits=_hits(first.counters, new.counters) if has_cache else None,
            p50=p50,
            p99=p99,
            took={name: _percentiles(buckets, new) for name, buckets in _changes(first, new).items()},
            cached=_cached(answer),
            waiting=answer["queue"]["requests"] if "queue" in answer else None,
            clients=[_client(self._label, key, before, new, has_cache=has_cache) for key in new.clients],
        )

    def _before(self) -> Optional[Sample]:
        """The sample that rates count from; older ones need not know clients any more."""
        latest = self._samples[-1].at - _SHORTEST * self._interval
        places = [place for place, one in enumerate(self._samples) if one.at <= latest]
        if not places:
            return None
        for place in places[:-1]:
            self._samples[place] = self._samples[place]._replace(clients={})
        return self._samples[places[-1]]


def _went_back(old: Sample, new: Sample) -> bool:
    """Whether another server answers there now."""
    if any(new.counters[name] < old.counters[name] for name in _COUNTERS):
        return True
    return any(count < 0 for buckets in _changes(old, new).values() for count in buckets)


def _rate(name: str, old: Optional[Sample], new: Sample) -> Optional[float]:
    return None if old is None else (new.counters[name] - old.counters[name]) / (new.at - old.at)


def _hits(old: Message, new: Message) -> Optional[float]:
    hits, misses = new["hits"] - old["hits"], new["misses"] - old["misses"]
    return max(0, hits) / (max(0, hits) + misses) if hits + misses > 0 else None


def _cached(answer: Message) -> Optional[float]:
    blocks = answer.get("blocks")
    return blocks["cached"] / blocks["total"] if blocks else None


def _client(
    label: str, key: Tuple[int, str], before: Optional[Sample], new: Sample, *, has_cache: bool
) -> ClientFigures:
    told = new.clients[key]
    old: Optional[Message] = None if before is None else before.clients.get(key)
    seconds, since = told["connected_seconds"], 0.0 if before is None else new.at - before.at
    if old is None and seconds <= since:
        old = dict.fromkeys(_COUNTERS, 0)

    def rate(name: str) -> Optional[float]:
        return None if old is None or not since else max(0, told[name] - old[name]) / since

    return ClientFigures(
        label,
        shown(client_name(told)),
        rate("bytes_read"),
        rate("bytes_written"),
        rate("requests"),
        _hits(old, told) if old is not None and has_cache else None,
        told["queued_requests"],
        seconds,
    )


# How long requests took


def _changes(old: Sample, new: Sample) -> Dict[str, List[int]]:
    """By command, how many requests there are more in each bucket."""
    if not new.durations:
        return {}
    before = old.durations or {}
    return {
        name: [count - least for count, least in zip(counts, before.get(name) or [0] * len(counts))]
        for name, counts in new.durations.items()
        if name != "bounds"
    }


def _added_up(old: Sample, new: Sample) -> List[int]:
    return [sum(counts) for counts in zip(*_changes(old, new).values())]


def _percentiles(buckets: Sequence[int], new: Sample) -> Tuple[Optional[float], Optional[float]]:
    bounds = (new.durations or {}).get("bounds", [])
    return quantile(bounds, buckets, 0.5), quantile(bounds, buckets, 0.99)


def quantile(bounds: Sequence[float], buckets: Sequence[int], part: float) -> Optional[float]:
    """Seconds that *part* of the requests did not exceed, as exactly as buckets tell; at most the last of *bounds*."""
    rank, below = part * sum(buckets), 0
    if not rank:
        return None
    for number, count in enumerate(buckets):
        if count and below + count >= rank:
            if number >= len(bounds):
                break
            low = bounds[number - 1] if number else 0.0
            return low + (bounds[number] - low) * (rank - below) / count
        below += count
    return bounds[-1]
