"""The tally: what the processes of one server, or of one wrapper, have done for its clients, by export.

A file without a name, made before the first process is forked. Each process that works on a disk has a line of it
(`Tally`), in which it adds up. Metrics are read from there (`TallyReader`), and nothing else is.

- A line belongs to one export for ever. The process that takes it goes on from what former processes have left, so the
  sum of an export's lines never gets less, whoever dies. A process shows by the lock on its line that it lives.
- All numbers are 64 bits and have one writer. A reader sees each of them before or after a change, never in between.
- The head names the rows of a line and their places, so that a later program can read what this one leaves
  (`TallyReader` takes several files). A row that comes to mean something else needs another name.

``contrib/doc/protocols.rst`` has these tables too; a test compares them.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from bisect import bisect_left
from contextlib import suppress
from operator import add
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..system.file_locks import RangeLocks
from ..system.process import closed_on_error
from .counters import BYTES_FETCHED, BYTES_READ, BYTES_WRITTEN, DAMAGED, MISSES, new_counts

COMMANDS = ("READ", "WRITE", "other", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS")
"""By their numbers in the protocol. DISC, which is never answered, leaves its place to unknown commands."""

OTHER = COMMANDS.index("other")

ERRORS = ("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN")
ERROR_NUMBERS = (1, 5, 12, 22, 28, 75, 95, 108)
"""What a client may be answered with, and its numbers in the protocol."""

_FAST, _SLOW = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BOUNDS = (*_FAST, *_SLOW, 10.0)
"""Upper bounds of the buckets of durations, in seconds; one more bucket is for what takes longer."""

_BUCKETS = len(BOUNDS) + 1


class Row(NamedTuple):
    """*places* numbers that each process counts, or has now."""

    name: str
    meaning: str
    places: int = 1


ROWS = (
    Row("export_length", "bytes of the export's name and 1 more; 0: the line has no export yet"),
    Row("durations", "requests by command (8) and bucket of how long they took (20)", len(COMMANDS) * _BUCKETS),
    Row("durations_waited", "the same, of requests that had to wait for blocks", len(COMMANDS) * _BUCKETS),
    Row("nanoseconds", "how long all of both took, by command", len(COMMANDS)),
    Row("errors", "requests answered with an error, by command (8) and error (8)", len(COMMANDS) * len(ERRORS)),
    Row("bytes_read", "bytes that clients have read"),
    Row("bytes_written", "bytes that clients have written"),
    Row("bytes_fetched", "bytes fetched from the origin"),
    Row("misses", "requests that had to wait for the origin"),
    Row("returns", "how often the origin has answered again after it was lost, or could not be reached"),
    Row("deaths", "processes with a client that have died"),
    Row("limited_requests", "requests that were received after the client had to wait because of limits"),
    Row("limited_nanoseconds", "how long clients had to wait because of limits"),
    Row("snapshots", "snapshots that were made"),
    Row("snapshots_failed", "snapshots that were not made"),
    Row("clients", "now: whether the process has a client"),
    Row("limited", "now: whether the client has to wait because of limits"),
    Row("waiting", "now: its requests that wait for blocks"),
    Row("waiting_bytes", "now: their bytes"),
    Row("origin_connected", "now: whether it is connected to the origin"),
    Row("origin_unreachable", "now: whether it has tried in vain to be"),
    Row("snapshotting", "now: whether it makes a snapshot"),
    Row("snapshot_bytes", "now: what is in that snapshot already"),
    Row("checkpoint_nanoseconds", "now: how long a steward's last checkpoint took; 0: it has made none"),
    Row("damaged", "blocks of the cache that were found damaged"),
)

NOW = frozenset(row.name for row in ROWS if row.meaning.startswith("now: "))
"""Rows that mean something as long as the process of the line lives."""

_NOTHING = {row.name: [0] * row.places for row in ROWS}
PLACES: Dict[str, int] = {}
_end = 0
for _row in ROWS:
    PLACES[_row.name] = _end
    _end += _row.places

_NUMBERS = _end
_NUMBER = 8
LINE_SIZE = 8192
"""Bytes of a line: numbers, and from `_NAME_AT` on the export's name."""

_NAME_AT = 4096
_LONGEST_NAME = LINE_SIZE - _NAME_AT
_LINES_AT = 4096
_MAGIC = b"XNBDTALY"
_HEADER = struct.Struct("=8sI")
_UNUSED = 64
"""Lines without an export in a row after which there are no more."""

_READ, _WRITTEN, _FETCHED, _MISSES, _DAMAGED = (
    PLACES[name] for name in ("bytes_read", "bytes_written", "bytes_fetched", "misses", "damaged")
)

_DURATIONS, _NANOSECONDS, _ERRORS = PLACES["durations"], PLACES["nanoseconds"], PLACES["errors"]
_WAITED = PLACES["durations_waited"] - PLACES["durations"]


def _describe() -> bytes:
    rows = {row.name: [PLACES[row.name], row.places] for row in ROWS}
    return json.dumps({"line": LINE_SIZE, "name_at": _NAME_AT, "rows": rows}).encode()


def create_tally(processes: int) -> int:
    """A descriptor of a new tally with lines for so many processes; only lines that are used take memory."""
    description = _describe()
    assert _HEADER.size + len(description) <= _LINES_AT
    fd = os.memfd_create("xnbd-tally")
    with closed_on_error(fd):
        os.ftruncate(fd, _LINES_AT + processes * LINE_SIZE)
        os.pwrite(fd, _HEADER.pack(_MAGIC, len(description)) + description, 0)
    return fd


def is_same_tally(fd: int) -> bool:
    """Whether the file behind *fd* is a tally in which this program can go on."""
    wanted = _HEADER.pack(_MAGIC, len(_describe())) + _describe()
    return os.pread(fd, len(wanted), 0) == wanted


def inherited_tallies(former: Sequence[int], processes: int) -> Tuple[int, ...]:
    """What former programs have counted goes on to be told, also where this one counts in another way."""
    if former and is_same_tally(former[0]):
        return tuple(former)
    return create_tally(processes), *former


def place_of_command(command: int) -> int:
    """Where a row has the number *command* of the protocol."""
    return command if 0 <= command < len(COMMANDS) else OTHER


def _reopen(fd: int, flags: int) -> int:
    """A description of its own: the locks of a process end with it."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


class Tally:
    """One process's line for *export*, in the file behind *fd*; made in that process, after the fork."""

    def __init__(self, fd: int, export: str) -> None:
        """Raises `OSError`, also if all lines are taken."""
        self._fd = _reopen(fd, os.O_RDWR)
        with closed_on_error(self._fd):
            self._map = mmap.mmap(self._fd, 0)
            at = self._take(export.encode("utf-8", "surrogateescape")[: _LONGEST_NAME - 1])
        self.numbers = memoryview(self._map)[at : at + _NUMBERS * _NUMBER].cast("Q")
        """The line's numbers, by `PLACES`."""
        for name in NOW:
            self.tell(name, 0)
        self.begin(new_counts())

    def _take(self, name: bytes) -> int:
        """The offset of a line that is this process's from now on."""
        locks = RangeLocks(self._fd)
        for at in range(_LINES_AT, len(self._map), LINE_SIZE):
            if self._name_at(at) not in (None, name) or not locks.try_acquire(at, 1):
                continue
            found = self._name_at(at)
            if found is None:
                self._map[at + _NAME_AT : at + _NAME_AT + len(name)] = name
                self._map[at : at + _NUMBER] = struct.pack("=Q", len(name) + 1)
            if found in (None, name):
                return at
            locks.release(at, 1)
        raise OSError("more processes have been there than can be counted")

    def _name_at(self, at: int) -> Optional[bytes]:
        return _name_at(self._map, at, _NAME_AT)

    def begin(self, counts: Sequence[int]) -> None:
        """From now on what *counts* (see `counters`) grow by is added."""
        numbers = self.numbers
        self._read = numbers[_READ] - counts[BYTES_READ]
        self._written = numbers[_WRITTEN] - counts[BYTES_WRITTEN]
        self._fetched = numbers[_FETCHED] - counts[BYTES_FETCHED]
        self._misses = numbers[_MISSES] - counts[MISSES]
        self._damaged = numbers[_DAMAGED] - counts[DAMAGED]
        self._seen = counts[MISSES], counts[BYTES_FETCHED], counts[DAMAGED]

    def follow(self, counts: Sequence[int]) -> None:
        """Publish what *counts* have grown by."""
        numbers = self.numbers
        numbers[_READ] = counts[BYTES_READ] + self._read
        numbers[_WRITTEN] = counts[BYTES_WRITTEN] + self._written
        seen = counts[MISSES], counts[BYTES_FETCHED], counts[DAMAGED]
        if seen != self._seen:
            self._seen = seen
            numbers[_MISSES] = seen[0] + self._misses
            numbers[_FETCHED] = seen[1] + self._fetched
            numbers[_DAMAGED] = seen[2] + self._damaged

    def answered(self, reads: int, writes: int, seconds: float) -> None:
        """So many READs and WRITEs took so long, all of them, and had not to wait for blocks."""
        numbers, bucket = self.numbers, _DURATIONS + bisect_left(BOUNDS, seconds)
        if reads:
            numbers[bucket] += reads
            numbers[_NANOSECONDS] += int(seconds * 1e9) * reads
        if writes:
            numbers[bucket + _BUCKETS] += writes
            numbers[_NANOSECONDS + 1] += int(seconds * 1e9) * writes

    def answered_some(self, command: int, count: int, seconds: float, *, waited: bool) -> None:
        """*count* requests took so long, each of them; *waited*: for blocks."""
        numbers, place = self.numbers, place_of_command(command)
        row = _DURATIONS + _WAITED if waited else _DURATIONS
        numbers[row + place * _BUCKETS + bisect_left(BOUNDS, seconds)] += count
        numbers[_NANOSECONDS + place] += int(seconds * 1e9) * count

    def refused(self, command: int, error: int) -> None:
        """A request was answered with the *error* of the protocol."""
        number = ERROR_NUMBERS.index(error) if error in ERROR_NUMBERS else ERRORS.index("EIO")
        self.numbers[_ERRORS + place_of_command(command) * len(ERRORS) + number] += 1

    def count(self, name: str, more: int = 1) -> None:
        """So many *more* of the row *name*."""
        self.numbers[PLACES[name]] += more

    def tell(self, name: str, number: int) -> None:
        """The row *name*, one of `NOW`, is *number*."""
        self.numbers[PLACES[name]] = number

    def outlive_exec(self) -> None:
        """The line stays this process's, whatever program it becomes."""
        os.set_inheritable(self._fd, True)

    def close(self) -> None:
        """The line is free for the next process."""
        self.numbers.release()
        with suppress(BufferError):
            self._map.close()
        os.close(self._fd)


def _name_at(memory: mmap.mmap, at: int, name_at: int) -> Optional[bytes]:
    """The export of the line at *at*; None: it has none yet."""
    (length,) = struct.unpack_from("=Q", memory, at)
    return memory[at + name_at : at + name_at + length - 1] if length else None


class Sums:
    """What the processes of one export have done, and have now; *alive*: whether one of them lives."""

    def __init__(self) -> None:
        self.alive = False
        self._rows: Dict[str, List[int]] = {}

    def include(self, rows: Dict[str, List[int]]) -> None:
        for name, numbers in rows.items():
            before = self._rows.get(name)
            self._rows[name] = numbers if before is None else list(map(add, before, numbers))

    def __getitem__(self, name: str) -> int:
        """The one number of the row *name*."""
        return self.row(name)[0]

    def row(self, name: str) -> Sequence[int]:
        nothing = _NOTHING[name]
        numbers = self._rows.get(name, nothing)
        return numbers if len(numbers) == len(nothing) else (numbers + nothing)[: len(nothing)]

    def durations(self, command: int) -> Tuple[List[int], float]:
        """Of the requests of one command: how many there are in each bucket, and the sum in seconds."""
        places = slice(command * _BUCKETS, (command + 1) * _BUCKETS)
        buckets = map(add, self.row("durations")[places], self.row("durations_waited")[places])
        return list(buckets), self.row("nanoseconds")[command] / 1e9

    @property
    def hits(self) -> int:
        """Requests that had not to wait for blocks."""
        return sum(self.row("durations"))

    def refusals(self, command: int) -> Sequence[int]:
        """The requests of one command that were answered with an error, by error."""
        return self.row("errors")[command * len(ERRORS) : (command + 1) * len(ERRORS)]


def durations_by_command(sums: Iterable[Sums]) -> Dict[str, Any]:
    """How many requests there are in each bucket, all *sums* together, as operators are told.

    *bounds* are in seconds, and one bucket has none. Commands that were never used are left out.
    """
    every = list(sums)
    buckets = {
        command.lower(): [sum(numbers) for numbers in zip(*(each.durations(place)[0] for each in every))]
        for place, command in enumerate(COMMANDS)
    }
    return {"bounds": list(BOUNDS), **{command: numbers for command, numbers in buckets.items() if any(numbers)}}


class TallyReader:
    """Reads a tally, and those that former programs of the same server have left; writes nothing."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Raises `OSError`."""
        self._files = [_File(fd) for fd in fds]

    def read(self) -> Dict[str, Sums]:
        """By export."""
        sums: Dict[str, Sums] = {}
        for file in self._files:
            file.read(sums)
        return sums

    def of(self, export: str) -> Sums:
        """Those of one export."""
        return self.read().get(export, Sums())


class _File:
    """One tally."""

    def __init__(self, fd: int) -> None:
        self._fd = _reopen(fd, os.O_RDONLY)
        with closed_on_error(self._fd):
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
            magic, length = _HEADER.unpack_from(self._map)
            if magic != _MAGIC:
                raise OSError("this is no tally")
            description = json.loads(self._map[_HEADER.size : _HEADER.size + length])
        self._line, self._name_at = description["line"], description["name_at"]
        self._rows: Dict[str, List[int]] = description["rows"]
        self._form = struct.Struct(f"<{max(at + places for at, places in self._rows.values())}Q")
        self._locks = RangeLocks(self._fd)

    def read(self, sums: Dict[str, Sums]) -> None:
        """Add to *sums*. Each line is one large number to be added: its parts have room to spare."""
        size, all_lines, living = self._form.size, {}, {}  # type: int, Dict[bytes, int], Dict[bytes, int]
        for at, name in self._used():
            line = int.from_bytes(self._map[at : at + size], "little")
            all_lines[name] = all_lines.get(name, 0) + line
            if self._locks.held_by_server(at, 1):
                living[name] = living.get(name, 0) + line
        for name, total in all_lines.items():
            export = sums.setdefault(name.decode("utf-8", "surrogateescape"), Sums())
            export.alive = export.alive or name in living
            ever, now = self._unpack(total), self._unpack(living.get(name, 0))
            export.include({row: now[row] if row in NOW else numbers for row, numbers in ever.items()})

    def _unpack(self, total: int) -> Dict[str, List[int]]:
        numbers = self._form.unpack(total.to_bytes(self._form.size, "little"))
        return {row: list(numbers[at : at + places]) for row, (at, places) in self._rows.items()}

    def _used(self) -> Iterator[Tuple[int, bytes]]:
        """Lines that have an export: their offsets, and its name."""
        unused = 0
        for at in range(_LINES_AT, len(self._map), self._line):
            name = _name_at(self._map, at, self._name_at)
            if name is not None:
                unused = 0
                yield at, name
            elif (unused := unused + 1) == _UNUSED:
                return
