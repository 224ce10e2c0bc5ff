"""From what is known of some exports to families of metrics: their names, and what they mean.

``contrib/doc/operations.rst`` explains each of them; a test compares the names. A new one is a line in
`_OF_EXPORTS` or `_OF_CACHES`.
"""

from __future__ import annotations

import sys
from time import time
from typing import Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from ... import __version__
from ...metrics.exposition import Family, Histogram, Labels, Number
from ...scoreboard.lines import clock
from ...scoreboard.tally import BOUNDS, COMMANDS, ERRORS, Sums
from ...system.usage import began


class OriginNow(NamedTuple):
    """One of several origins: seconds to an answer, None where nobody knows; bytes of use."""

    address: str
    up: bool
    latency: Optional[float]
    sent: int


class LimitNow(NamedTuple):
    """A cache that has a limit: bytes of what was fetched, at most and now, and what was let go again so far."""

    limit: int
    used: int
    let_go: int


class CacheNow(NamedTuple):
    """A proxy's cache; None where nobody knows. *origins* are there if there are several."""

    cached_bytes: Optional[int]
    dirty_pages: Optional[int]
    checkpoint_age: Optional[float]
    copying: bool
    copied_bytes: int
    reads_through: bool
    origins: Sequence[OriginNow] = ()
    written_bytes: Optional[int] = None
    limit: Optional[LimitNow] = None


class Exposed(NamedTuple):
    """One export: what its processes have done, and what there is to know of its disk; None where nobody knows."""

    export: str
    sums: Sums
    disk_bytes: Optional[int]
    available_bytes: Optional[int]
    write_back_failed: Optional[bool]
    cache: Optional[CacheNow]


class About:
    """The program that is asked, process *pid*; *expiries* as of `Configuration.expiries`. Raises `OSError`."""

    def __init__(self, program: str, pid: int, max_clients: int, expiries: Sequence[Tuple[str, float, float]]) -> None:
        self.program = program
        self.pid = pid
        self.max_clients = max_clients
        self.expiries = expiries
        self._began = began(pid)

    @property
    def uptime(self) -> float:
        """Seconds since the process began, whatever programs it has been since."""
        return clock() - self._began

    @property
    def started(self) -> float:
        """When that was, in seconds since 1970, as the time of day is now."""
        return round(time() - self.uptime, 1)


Sample = Tuple[Labels, Union[Number, Histogram]]
Values = Iterable[Sample]


class _Spec(NamedTuple):
    """A family: *values* of one export, by further labels."""

    name: str
    kind: str
    help: str
    values: Callable[[Exposed], Values]
    unit: str = ""


def families(exports: Sequence[Exposed], about: About) -> List[Family]:
    """Everything, in a lasting order."""
    caches = [exposed for exposed in exports if exposed.cache is not None or exposed.sums["misses"]]  # or had one once
    found = [*_of_program(about), *_collect(_OF_EXPORTS, exports), *_collect(_OF_CACHES, caches)]
    return [family for family in found if family.samples]


def _collect(specs: Sequence[_Spec], exports: Sequence[Exposed]) -> Iterable[Family]:
    for name, kind, help_text, values, unit in specs:
        samples: List[Sample] = [
            ((("export", exposed.export), *labels), value) for exposed in exports for labels, value in values(exposed)
        ]
        yield Family(name, kind, help_text, samples, unit)


def _of_program(about: About) -> List[Family]:
    now = time()
    build = (("version", __version__), ("program", about.program), ("python", sys.version.split()[0]))
    return [
        Family("xnbd_build", "info", "The program that is asked.", [(build, 1)]),
        Family(
            "xnbd_start_time_seconds",
            "gauge",
            "When it was started, in seconds since 1970; an upgrade is no start.",
            [((), about.started)],
            "seconds",
        ),
        Family("xnbd_clients_limit", "gauge", "Clients that are served at once at most.", [((), about.max_clients)]),
        Family(
            "xnbd_tls_certificate_expiry_seconds",
            "gauge",
            "Seconds until the certificates in this file are valid no more; negative since then.",
            [((("file", path),), when - now) for path, when, _ in about.expiries],
            "seconds",
        ),
    ]


def _one(row: str) -> Callable[[Exposed], Values]:
    return lambda exposed: [((), exposed.sums[row])]


def _known(value: Callable[[Exposed], Optional[Number]]) -> Callable[[Exposed], Values]:
    def values(exposed: Exposed) -> Values:
        number = value(exposed)
        return [] if number is None else [((), int(number) if isinstance(number, bool) else number)]

    return values


def _of_cache(value: Callable[[CacheNow], Optional[Number]]) -> Callable[[Exposed], Values]:
    return _known(lambda exposed: None if exposed.cache is None else value(exposed.cache))


def _of_origins(value: Callable[[OriginNow], Optional[Number]]) -> Callable[[Exposed], Values]:
    def values(exposed: Exposed) -> Values:
        for origin in exposed.cache.origins if exposed.cache is not None else ():
            number = value(origin)
            if number is not None:
                yield (("origin", origin.address),), int(number) if isinstance(number, bool) else number

    return values


def _of_limit(value: Callable[[LimitNow], Number]) -> Callable[[Exposed], Values]:
    return _of_cache(lambda cache: None if cache.limit is None else value(cache.limit))


def _command(place: int) -> Tuple[str, str]:
    return "command", COMMANDS[place].lower()


def _requests(exposed: Exposed) -> Values:
    for place in range(len(COMMANDS)):
        yield (_command(place),), sum(exposed.sums.durations(place)[0])


_ALWAYS = {("READ", "EIO"), ("WRITE", "EIO"), ("WRITE", "ENOSPC"), ("FLUSH", "EIO")}
"""Errors that are told before there is one, so that the first one shows as an increase."""


def _errors(exposed: Exposed) -> Values:
    for place, command in enumerate(COMMANDS):
        for error, count in zip(ERRORS, exposed.sums.refusals(place)):
            if count or (command, error) in _ALWAYS:
                yield (_command(place), ("errno", error)), count


def _durations(exposed: Exposed) -> Values:
    for place in range(len(COMMANDS)):
        buckets, total = exposed.sums.durations(place)
        if any(buckets):
            yield (_command(place),), Histogram(BOUNDS, buckets, total)


def _bytes(exposed: Exposed) -> Values:
    for direction in ("read", "written"):
        yield (("direction", direction),), exposed.sums[f"bytes_{direction}"]


def _snapshots(exposed: Exposed) -> Values:
    for outcome, row in (("made", "snapshots"), ("failed", "snapshots_failed")):
        yield (("outcome", outcome),), exposed.sums[row]


def _hits(exposed: Exposed) -> Values:
    return [((), exposed.sums.hits)]


def _limited_seconds(exposed: Exposed) -> Values:
    return [((), exposed.sums["limited_nanoseconds"] / 1e9)]


def _checkpoint_duration(exposed: Exposed) -> Values:
    nanoseconds = exposed.sums["checkpoint_nanoseconds"]
    return [((), nanoseconds / 1e9)] if nanoseconds else []


_OF_EXPORTS = (
    _Spec("xnbd_requests", "counter", "Requests answered, with errors too.", _requests),
    _Spec("xnbd_request_errors", "counter", "Requests answered with an error.", _errors),
    _Spec(
        "xnbd_request_duration_seconds",
        "histogram",
        "From the receipt of a request by the server to the departure of its reply to the kernel. Requests that are "
        "received together count from when all were received until all replies had left; one that waits for the "
        "origin, or for its turn behind such a one, counts for itself. Commands that were never used are left out.",
        _durations,
        "seconds",
    ),
    _Spec("xnbd_bytes", "counter", "Bytes that clients have read and written.", _bytes),
    _Spec("xnbd_clients", "gauge", "Clients that are connected.", _one("clients")),
    _Spec("xnbd_waiting_requests", "gauge", "Requests that wait for blocks from the origin.", _one("waiting")),
    _Spec("xnbd_waiting_bytes", "gauge", "Memory that they hold, in bytes.", _one("waiting_bytes"), "bytes"),
    _Spec("xnbd_limited_clients", "gauge", "Clients that have to wait now because of limits.", _one("limited")),
    _Spec(
        "xnbd_limited_requests",
        "counter",
        "Requests that were received later than the client had sent them, perhaps, because of limits.",
        _one("limited_requests"),
    ),
    _Spec(
        "xnbd_limited_seconds",
        "counter",
        "How long clients had to wait because of limits, all of them together.",
        _limited_seconds,
        "seconds",
    ),
    _Spec("xnbd_worker_deaths", "counter", "Processes with a client that died: each lost its client.", _one("deaths")),
    _Spec("xnbd_disk_bytes", "gauge", "Size of the disk.", _known(lambda exposed: exposed.disk_bytes), "bytes"),
    _Spec(
        "xnbd_storage_available_bytes",
        "gauge",
        "Space that is left on the file system of the image or cache.",
        _known(lambda exposed: exposed.available_bytes),
        "bytes",
    ),
    _Spec(
        "xnbd_write_back_failed",
        "gauge",
        "1 since the kernel could not write something to the disk: every flush fails until a restart.",
        _known(lambda exposed: exposed.write_back_failed),
    ),
    _Spec("xnbd_snapshots", "counter", "Snapshots that were wanted: made, or failed.", _snapshots),
    _Spec("xnbd_snapshot_running", "gauge", "1 while a snapshot is made.", _one("snapshotting")),
    _Spec("xnbd_snapshot_bytes", "gauge", "Bytes of it that are done already.", _one("snapshot_bytes"), "bytes"),
)

_OF_CACHES = (
    _Spec("xnbd_cache_hits", "counter", "Requests that had not to wait for the origin.", _hits),
    _Spec("xnbd_cache_misses", "counter", "Requests that had to.", _one("misses")),
    _Spec(
        "xnbd_cached_bytes",
        "gauge",
        "Bytes of the disk that are local, as of the last count: a moment ago, of a large disk perhaps a minute.",
        _of_cache(lambda cache: cache.cached_bytes),
        "bytes",
    ),
    _Spec(
        "xnbd_written_bytes",
        "gauge",
        "Bytes of the disk that clients have written, and that are in the cache only, as of the last count.",
        _of_cache(lambda cache: cache.written_bytes),
        "bytes",
    ),
    _Spec("xnbd_cache_damaged_blocks", "counter", "Blocks of the cache that were found damaged.", _one("damaged")),
    _Spec(
        "xnbd_cache_reads_through",
        "gauge",
        "1 while the cache has no room for what is fetched, so that it goes to clients and is not kept.",
        _of_cache(lambda cache: cache.reads_through),
    ),
    _Spec(
        "xnbd_cache_limit_bytes",
        "gauge",
        "Bytes of what was fetched that the cache may hold (--cache-limit).",
        _of_limit(lambda limit: limit.limit),
        "bytes",
    ),
    _Spec(
        "xnbd_cache_clean_bytes", "gauge", "Bytes of it that it holds.", _of_limit(lambda limit: limit.used), "bytes"
    ),
    _Spec(
        "xnbd_cache_let_go_bytes",
        "counter",
        "Bytes of it that were let go again since the first server of the cache was started.",
        _of_limit(lambda limit: limit.let_go),
        "bytes",
    ),
    _Spec("xnbd_origin_bytes", "counter", "Bytes fetched from the origin.", _one("bytes_fetched")),
    _Spec(
        "xnbd_origin_up",
        "gauge",
        "0 while a process tries in vain to reach the origin. 1 says that none does: it is reached, or was not needed.",
        _known(lambda exposed: not exposed.sums["origin_unreachable"]),
    ),
    _Spec("xnbd_origin_connections", "gauge", "Processes connected to the origin.", _one("origin_connected")),
    _Spec(
        "xnbd_origin_reconnects",
        "counter",
        "How often a process had an answer again after the origin was lost, or could not be reached.",
        _one("returns"),
    ),
    _Spec(
        "xnbd_origin_endpoint_up",
        "gauge",
        "Of several origins: 0 while a process finds this one unreachable, slow, or with another disk.",
        _of_origins(lambda origin: origin.up),
    ),
    _Spec(
        "xnbd_origin_endpoint_latency_seconds",
        "gauge",
        "Of several origins: how long an answer of this one takes.",
        _of_origins(lambda origin: origin.latency),
        "seconds",
    ),
    _Spec(
        "xnbd_origin_endpoint_bytes",
        "counter",
        "Of several origins: bytes that have come from this one and were of use.",
        _of_origins(lambda origin: origin.sent),
    ),
    _Spec(
        "xnbd_checkpoint_age_seconds",
        "gauge",
        "Seconds since the last checkpoint. There is none while nothing is new.",
        _of_cache(lambda cache: cache.checkpoint_age),
        "seconds",
    ),
    _Spec(
        "xnbd_checkpoint_duration_seconds",
        "gauge",
        "How long the last checkpoint of this server took.",
        _checkpoint_duration,
        "seconds",
    ),
    _Spec(
        "xnbd_checkpoint_pending_pages",
        "gauge",
        "Pages of the bitmap that the next checkpoint has to save; 0: all is durable.",
        _of_cache(lambda cache: cache.dirty_pages),
    ),
    _Spec("xnbd_copy_running", "gauge", "1 while all blocks are copied.", _of_cache(lambda cache: cache.copying)),
    _Spec(
        "xnbd_copy_bytes",
        "gauge",
        "Bytes that the copy under way has fetched.",
        _of_cache(lambda cache: cache.copied_bytes),
        "bytes",
    ),
)
