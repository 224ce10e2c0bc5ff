"""The answer to ``xnbd-bgctl --query`` for people, at 80 columns but for names and errors of others.

What the server does not tell is left out.
"""

from __future__ import annotations

from typing import Any, Callable, Container, Dict, Iterator, List, NamedTuple

from ..access.identity import Identity
from ..control.client import shown
from ..text import counted
from .quantities import duration, limits, percentage, rate, short_count, short_size, size

Message = Dict[str, Any]

_MODES = {"proxy": "proxy", "target": "target", "cow": "copy-on-write target"}


def report(answer: Message) -> List[str]:
    """The lines of the report, but for the map."""
    lines = [title(answer), *sections(answer)]
    if "workers" in answer:
        lines += ["", *_clients(answer["workers"], cache="blocks" in answer)]
    return lines


def sections(answer: Message, without: Container[str] = ()) -> List[str]:
    """The lines between the title and the clients, but for those of some sections."""
    lines = []
    for label, describe in _SECTIONS:
        for text in () if label in without else describe(answer):
            lines.append(labelled(label, text))
            label = ""
    return lines


def labelled(label: str, text: str) -> str:
    """A line of a section."""
    return f"  {label:<12}{text}".rstrip()


def title(answer: Message) -> str:
    """The first line."""
    parts = [_MODES.get(answer.get("mode", ""), shown(answer.get("mode", "")))]
    if "disk_size" in answer:
        bytes_ = f" ({answer['disk_size']:,} bytes)" if answer["disk_size"] >= 1024 else ""
        parts.append(size(answer["disk_size"]) + bytes_)
    if answer.get("readonly"):
        parts.append("read-only")
    return f"{shown(answer.get('name', ''))}: {', '.join(filter(None, parts))}"


def _disk(answer: Message) -> Iterator[str]:
    if answer.get("description"):
        yield shown(answer["description"])


def _server(answer: Message) -> Iterator[str]:
    parts = []
    if "version" in answer:
        parts.append(f"xnbd-server {shown(answer['version'])}")
    if "pid" in answer:
        parts.append(f"process {answer['pid']}")
    if "uptime_seconds" in answer:
        parts.append(f"up {duration(answer['uptime_seconds'])}")
    if parts:
        yield ", ".join(parts)


def _origin(answer: Message) -> Iterator[str]:
    origin = answer.get("origin")
    if not origin:
        return
    places = origin.get("endpoints")
    yield shown(origin.get("address", "")) if not places else f"{len(places)} of the same disk"
    connections = origin.get("connections")
    state = shown(origin.get("state", ""))
    yield f"{state}, {counted(connections, 'connection')}" if connections is not None else state
    if origin.get("error"):
        yield shown(origin["error"])
    if places:
        for place in places:
            yield from _place(place)
    elif origin.get("version"):
        changed = "; ANOTHER ONE IS THERE NOW, what is missing is an error" if origin.get("changed") else ""
        yield f"version {shown(origin['version'])}{changed}"


def _place(place: Message) -> Iterator[str]:
    """One of several origins."""
    yield shown(place["address"])
    parts = [shown(place["state"])]
    if place.get("latency") is not None:
        parts.append(f"{place['latency'] * 1000:.1f} ms")
    if place.get("share") is not None:
        parts.append(f"{percentage(place['share'], 1)} of what has come")
    yield f"  {', '.join(parts)}"
    if place.get("error"):
        yield f"  {shown(place['error'])}"
    if place.get("version"):
        changed = "; ANOTHER ONE IS THERE NOW" if place.get("changed") else ""
        yield f"  version {shown(place['version'])}{changed}"


def _cached(answer: Message) -> Iterator[str]:
    blocks = answer.get("blocks")
    if not blocks:
        return
    total, cached = blocks["total"], blocks["cached"]
    missing = total - cached
    block_size = answer.get("block_size", 4096)
    rest = f", {size(missing * block_size)} missing" if missing else ""
    yield f"{percentage(cached, total)}, {cached:,} of {total:,} blocks{rest}"


def _written(answer: Message) -> Iterator[str]:
    written = answer.get("blocks", {}).get("written")
    if written:
        block_size = answer.get("block_size", 4096)
        yield f"{counted(written, 'block')}, {size(written * block_size)} that only exist here"


def _cache_limit(answer: Message) -> Iterator[str]:
    limit = answer.get("cache_limit")
    if limit:
        used, most = limit["used_bytes"], limit["limit_bytes"]
        yield f"{size(used)} of {size(most)} for what was fetched ({percentage(used, most)})"
        yield f"{size(limit['let_go_bytes'])} let go again so far"


def _requests(answer: Message) -> Iterator[str]:
    counters = answer.get("counters", {})
    if "requests" in counters:
        yield (
            f"{counters['requests']:,}; {size(counters.get('bytes_read', 0))} read, "
            f"{size(counters.get('bytes_written', 0))} written"
        )


def _hits(answer: Message) -> Iterator[str]:
    counters = answer.get("counters", {})
    hits, misses = counters.get("hits"), counters.get("misses")
    if hits is None or misses is None or "blocks" not in answer:
        return
    share = f" ({percentage(hits, hits + misses)})" if hits + misses else ""
    yield f"{hits:,}{share}, {counted(misses, 'miss', 'misses')}"


def _fetched(answer: Message) -> Iterator[str]:
    fetched = answer.get("counters", {}).get("bytes_fetched")
    if fetched is not None and "blocks" in answer:
        yield f"{size(fetched)} from the origin"


def _damaged(answer: Message) -> Iterator[str]:
    damaged = answer.get("counters", {}).get("damaged")
    if damaged:
        yield f"{counted(damaged, 'block')} of the cache found so, and fetched again when read (the log tells more)"


def _waiting(answer: Message) -> Iterator[str]:
    queue = answer.get("queue")
    if not queue:
        return
    requests = counted(queue["requests"], "request")
    most = _limit(queue.get("requests_limit"), lambda limit: f"{limit:,}")
    yield f"{requests}, {most}; {size(queue['bytes'])} of buffers, {_limit(queue.get('bytes_limit'), size)}"
    if queue.get("memory_limit") is not None:
        yield f"at most {size(queue['memory_limit'])} for each client, by the memory that is free"


def _limit(limit: Any, show: Callable[[Any], str]) -> str:
    return f"at most {show(limit)}" if limit else "no limit"


def _limits(answer: Message) -> Iterator[str]:
    told = answer.get("limits")
    if told and any(told.get(name) for name in ("rate", "iops", "rate_total", "iops_total")):
        yield from limits(told)


def _not_durable(answer: Message) -> Iterator[str]:
    failure = answer.get("write_back_failure")
    if not failure:
        return
    yield f"write-back failed {duration(failure['seconds_since'])} ago: {shown(failure['error'])}"
    yield "no FLUSH succeeds until the server is restarted"


def _warnings(answer: Message) -> Iterator[str]:
    yield from map(shown, answer.get("warnings", ()))


def _checkpoint(answer: Message) -> Iterator[str]:
    checkpoint = answer.get("checkpoint")
    if not checkpoint or answer.get("write_back_failure"):
        return
    parts = []
    if "dirty_pages" in checkpoint:
        dirty = checkpoint["dirty_pages"]
        parts.append(f"{counted(dirty, 'page')} not durable yet" if dirty else "all is durable")
    if "completed" in checkpoint:
        parts.append(f"{checkpoint['completed']:,} done")
    if checkpoint.get("seconds_since_last") is not None:
        parts.append(f"last one {duration(checkpoint['seconds_since_last'])} ago")
    yield ", ".join(parts)


def _cache_all(answer: Message) -> Iterator[str]:
    copy = answer.get("cache_all")
    if not copy:
        return
    copied, total, speed = copy["copied_bytes"], copy["total_bytes"], copy.get("rate")
    yield f"{percentage(copied, total)}, {size(copied)} of {size(total)}, process {copy['pid']}"
    if speed is not None:
        yield f"{rate(speed)}, {duration((total - copied) / speed)} left" if speed > 0 else "waiting"


_SECTIONS = [
    ("disk", _disk),
    ("server", _server),
    ("origin", _origin),
    ("cached", _cached),
    ("written", _written),
    ("cache limit", _cache_limit),
    ("fetched", _fetched),
    ("damaged", _damaged),
    ("hits", _hits),
    ("requests", _requests),
    ("waiting", _waiting),
    ("limits", _limits),
    ("warning", _warnings),
    ("not durable", _not_durable),
    ("checkpoint", _checkpoint),
    ("cache-all", _cache_all),
]


# Clients


class _Column(NamedTuple):
    heading: str
    show: Callable[[Message], str]
    needs: str
    of_cache: bool = False


def _hit_share(worker: Message) -> str:
    hits, misses = worker.get("hits", 0), worker.get("misses", 0)
    return percentage(hits, hits + misses).replace(" ", "") if hits + misses else "-"


def _tls(encryption: str) -> str:
    """The version, and whether the kernel encrypts."""
    words = encryption.split()
    return " ".join([words[0].replace("TLSv", ""), *(["kTLS"] if "kTLS" in words else [])])


_COLUMNS = [
    _Column("PID", lambda worker: str(worker["pid"]), "pid"),
    _Column("AGE", lambda worker: duration(worker["connected_seconds"]), "connected_seconds"),
    _Column("REQS", lambda worker: short_count(worker["requests"]), "requests"),
    _Column("READ", lambda worker: short_size(worker["bytes_read"]), "bytes_read"),
    _Column("WRITE", lambda worker: short_size(worker["bytes_written"]), "bytes_written"),
    _Column("HITS", _hit_share, "hits", True),
    _Column("FETCH", lambda worker: short_size(worker["bytes_fetched"]), "bytes_fetched", True),
    _Column("WAIT", lambda worker: short_count(worker["queued_requests"]), "queued_requests", True),
    _Column("CPU", lambda worker: f"{worker['cpu_percent']:.0f}%", "cpu_percent"),
    _Column("TLS", lambda worker: _tls(worker["encryption"]), "encryption"),
    _Column("MEM", lambda worker: short_size(worker["memory_bytes"]), "memory_bytes"),
]


def client_name(worker: Message) -> str:
    """The client's address, and who it has proved to be."""
    identity = worker.get("identity")
    return Identity((identity,) if identity else ()).at(worker.get("client", ""))


def _clients(workers: List[Message], *, cache: bool) -> List[str]:
    """A table, the client's address last: that may be long. Without *cache* nothing is said of one."""
    if not workers:
        return ["No clients."]
    columns = [
        column
        for column in _COLUMNS
        if (cache or not column.of_cache) and any(worker.get(column.needs) is not None for worker in workers)
    ]
    rows = [[column.heading for column in columns]]
    for worker in workers:
        rows.append([column.show(worker) if worker.get(column.needs) is not None else "-" for column in columns])
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    names = ["CLIENT", *(shown(client_name(worker)) for worker in workers)]
    table = [
        " ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), name]) for row, name in zip(rows, names)
    ]
    return [f"{counted(len(workers), 'client')}:", *table]
