"""What all processes of one disk share besides its blocks: the gate, the mode, a line for each of them.

Servers of a proxy keep the scoreboard beside the cache's bitmap, so that those started
separately share it too; others have one that ends with them. Nothing in it has to
outlive the last of them.

**The gate** makes a moment in which no request is half done. A process shows in its
own line when it works on requests (`Place.enter`) and takes that back before it
sleeps. Whoever needs the moment (`Scoreboard.closed`) raises a flag and waits until
everybody is outside; who comes meanwhile waits. That costs two stores and a look for
every batch, and needs no system call. A dead process is told by the lock on its
line, which goes with it; so is the one that had raised the flag.

**Process ids** mean something in one PID namespace only, and there as long as the
process lives. A line has the namespace beside the id, and a second lock that is taken
when both are written: `Scoreboard.wake_all` signals nobody else.

**Commands** that change what the files mean are one at a time (`Scoreboard.begin_command`).
The scoreboard says which one is under way. If that stands there and nobody has the lock,
its process has died in the middle, and a steward has to make scoreboard and files agree.

======  ========================================================================
offset  content, of the machine's own endianness
======  ========================================================================
0       the gate's flag (1 byte)
1       mode (1 byte): `PROXY`, `COMPLETE`, `TARGET`
3       whether a copy of all blocks is wanted that no operator waits for (1 byte)
4       generation of the origin's address (4 bytes)
8       time of the last checkpoint, in seconds since the boot (double)
16      checkpoints (8 bytes)
24      process that makes a snapshot, its descriptors of snapshot and bitmap (4 bytes each)
40      bytes per second of that copy, 0 for any number (8 bytes)
48      number of changes of mode and snapshot (4 bytes)
60      whether what is fetched finds no room in the cache (1 byte)
64      CRC-32, length (4 bytes each) and text of the origin's address
16128   of the snapshot's process the PID namespace, of its two files device and inode (8 bytes each)
16256   process of the command under way (4 bytes), its PID namespace (8 bytes), the command's name (16 bytes)
16368   first write-back that failed, of a disk without a state file: `writeback.Record`
16384   lines of `LINE` bytes, see `_LINE`
======  ========================================================================
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
import zlib
from contextlib import contextmanager, suppress
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

from ..system.file_locks import RangeLocks, do_nothing
from ..system.process import pid_namespace

PROXY, COMPLETE, TARGET = 0, 1, 2
"""Modes of a proxy: some blocks are missing; none is, but the bitmap is still kept; it has become a plain target."""

LINE = 256
_LINES_AT = 16384

_FLAG, _MODE, _COPY_WANTED, _GENERATION, _CHECKPOINTS, _SNAPSHOT_AT, _CHANGES, _ADDRESS = 0, 1, 3, 4, 8, 24, 48, 64
_SNAPSHOT = struct.Struct("=III")
_COPY_RATE = 40
_READS_THROUGH = 60
_RATE = struct.Struct("=Q")
_U32 = struct.Struct("=I")
_CHECKPOINT = struct.Struct("=dQ")
_TEXT = struct.Struct("=II")
_SNAPSHOT_FILES_AT, _COMMAND_AT, FAILURE = 16128, 16256, 16368
_SNAPSHOT_FILES = struct.Struct("=5Q")
_COMMAND = struct.Struct("=IQ16s")
_LONGEST_ADDRESS = _SNAPSHOT_FILES_AT - _ADDRESS - _TEXT.size

_LINE = struct.Struct("=IxB2xd5Q5QIIQ64s")
_INSIDE, _OWN_MODE = 4, 5
_COUNTERS = struct.Struct("=5Q")
_QUEUE = struct.Struct("=IQ")
_COUNTERS_AT, _BASE_AT, _ORIGIN_AT, _QUEUE_AT, _PEER_AT = 16, 56, 96, 100, 112
_PEER = struct.Struct("=64s")
_TROUBLE_AT = 176
_TROUBLE = struct.Struct("=72s")
_NAMESPACE_AT = 248
_NAMESPACE = struct.Struct("=Q")

GATE, CONTROL, COPYING, SNAPSHOT, COMMAND, PASSAGE = 0, 1, 2, 3, 4, 8
_LINES = 1 << 16
_NAMED = 1 << 17
"""Locks on bytes of the file.

`CONTROL` has who answers the control socket, `COPYING` who copies all blocks, `COMMAND`
who changes what the files mean, and `SNAPSHOT` who makes a snapshot: without it what
the scoreboard says of one is a dead process's. `PASSAGE` is taken for a moment, by who tells
the log that there is no room, or room again. A process has its byte from `_LINES` on as
long as it has that line, and the one from `_NAMED` on since its id is written there.
"""

_UNUSED = 64
"""Lines without a process in a row after which there are no more: the first free one is always taken."""

_SETTLE = 1e-3
"""Seconds after which a store of one processor is seen by all others, many times over."""

_LONGEST_NAP = 1e-3

REACHED, UNREACHABLE, NOT_NEEDED = 1, 2, 0
"""A process and its origin: connected, in vain, never tried."""


def clock() -> float:
    """Seconds since the boot, sleep included: the same for all processes, whatever is done to the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Counts(NamedTuple):
    """Requests answered; bytes read, written, and fetched from the origin; requests that had to wait for it."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    misses: int = 0
    bytes_fetched: int = 0

    def minus(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, other)))

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other)))


REQUESTS, BYTES_READ, BYTES_WRITTEN, MISSES, BYTES_FETCHED = range(5)
"""Places in `Counts`."""


class SnapshotPlace(NamedTuple):
    """Where the snapshot is made: a process, its descriptors of snapshot and bitmap, and what tells that they are it.

    *files* has device and inode of the one, then of the other.
    """

    pid: int
    output: int
    bitmap: int
    namespace: int = 0
    files: Tuple[int, int, int, int] = (0, 0, 0, 0)


class Line(NamedTuple):
    """What one process tells: its client, *since* when (as of `clock`), and the *counts* since then."""

    pid: int
    mode: int
    since: float
    counts: Counts
    origin: int
    queued_requests: int
    queued_bytes: int
    peer: str
    trouble: str
    namespace: int


class Scoreboard:
    """The scoreboard in the file behind *fd*, which this process has opened, after the fork, and this object owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self._count = (len(self._map) - _LINES_AT) // LINE
        self._locks = RangeLocks(fd)
        self.namespace = pid_namespace()

    @property
    def mode(self) -> int:
        return self._map[_MODE]

    @mode.setter
    def mode(self, mode: int) -> None:
        self._map[_MODE] = mode
        self._note_change()

    def note_complete(self) -> bool:
        """No block is missing: `PROXY` becomes `COMPLETE`. False if it does not, for somebody switches, or has."""
        if not self._locks.try_acquire(GATE, 1):
            return False
        try:
            if self.mode != PROXY:
                return False
            self.mode = COMPLETE
            return True
        finally:
            self._locks.release(GATE, 1)

    @property
    def changes(self) -> bytes:
        """Another number whenever mode or snapshot are others."""
        return self._map[_CHANGES : _CHANGES + 4]

    def _note_change(self) -> None:
        _count_change(self._map)

    @property
    def snapshot(self) -> Optional[SnapshotPlace]:
        """Where one is made."""
        pid, output, bitmap = _SNAPSHOT.unpack_from(self._map, _SNAPSHOT_AT)
        if not pid:
            return None
        namespace, *files = _SNAPSHOT_FILES.unpack_from(self._map, _SNAPSHOT_FILES_AT)
        return SnapshotPlace(pid, output, bitmap, namespace, tuple(files))

    @property
    def wanted_copy(self) -> Optional[int]:
        """Bytes per second (0: as fast as it goes) of a copy of all blocks that no operator waits for; None: none."""
        return int(_RATE.unpack_from(self._map, _COPY_RATE)[0]) if self._map[_COPY_WANTED] else None

    @wanted_copy.setter
    def wanted_copy(self, rate: Optional[int]) -> None:
        self._map[_COPY_WANTED] = 0
        if rate is not None:
            _RATE.pack_into(self._map, _COPY_RATE, rate)
            self._map[_COPY_WANTED] = 1

    @property
    def reads_through(self) -> bool:
        """Whether the log was told that what is fetched finds no room in the cache (`storage.passage`)."""
        return bool(self._map[_READS_THROUGH])

    def change_reads_through(self, told: bool) -> bool:
        """Whether it is this process that has changed it, and now tells the log."""
        if self.reads_through == told:
            return False
        try:
            if not self._locks.try_acquire(PASSAGE, 1):
                return False
            changed = self.reads_through != told
            self._map[_READS_THROUGH] = told
            self._locks.release(PASSAGE, 1)
        except OSError:
            return False  # a lock that fails: another process tells
        return changed

    def begin_snapshot(self, place: SnapshotPlace) -> None:
        """From now on old blocks are kept; the gate is closed, and this process has the lock `SNAPSHOT`."""
        _SNAPSHOT_FILES.pack_into(self._map, _SNAPSHOT_FILES_AT, place.namespace, *place.files)
        _SNAPSHOT.pack_into(self._map, _SNAPSHOT_AT, place.pid, place.output, place.bitmap)
        self._note_change()

    def end_snapshot(self) -> None:
        if self.snapshot:
            _SNAPSHOT.pack_into(self._map, _SNAPSHOT_AT, 0, 0, 0)
            self._note_change()

    def end_dead_snapshot(self) -> bool:
        """End what a process that is no more has begun; tells whether there was such a thing."""
        if not self.snapshot or not self.try_lock(SNAPSHOT):
            return False
        try:
            found = self.snapshot is not None
            self.end_snapshot()
        finally:
            self.unlock(SNAPSHOT)
        return found

    def begin_command(self, name: str) -> bool:
        """Take the turn of the command *name*, unless another process has it; the same process must not ask twice."""
        if not self.try_lock(COMMAND):
            return False
        _COMMAND.pack_into(self._map, _COMMAND_AT, os.getpid(), self.namespace, name.encode())
        return True

    def end_command(self, *, whole: bool) -> None:
        """Unless it is *whole*, scoreboard and files may not agree, and that stays noted."""
        if whole:
            _COMMAND.pack_into(self._map, _COMMAND_AT, 0, 0, b"")
        self.unlock(COMMAND)

    @property
    def command(self) -> str:
        """The command that is under way, or was when its process died, and that process; empty for none."""
        pid, namespace, name = _COMMAND.unpack_from(self._map, _COMMAND_AT)
        if not pid:
            return ""
        elsewhere = "" if namespace == self.namespace else " of another PID namespace (container)"
        return f"{_text(name)} by process {pid}{elsewhere}"

    @property
    def generation(self) -> int:
        return int(_U32.unpack_from(self._map, _GENERATION)[0])

    @property
    def address(self) -> str:
        """The origin's address; empty if none is noted, or not to its end."""
        return self.whole_address() or ""

    @address.setter
    def address(self, address: str) -> None:
        text = address.encode("utf-8", "surrogateescape")
        if len(text) > _LONGEST_ADDRESS:
            raise ValueError("address too long")
        self._map[_ADDRESS : _ADDRESS + _TEXT.size + len(text)] = _TEXT.pack(zlib.crc32(text), len(text)) + text
        _U32.pack_into(self._map, _GENERATION, (self.generation + 1) & 0xFFFFFFFF)

    def whole_address(self) -> Optional[str]:
        """The origin's address, empty if none is noted; None if who noted it died before the end."""
        checksum, length = _TEXT.unpack_from(self._map, _ADDRESS)
        start = _ADDRESS + _TEXT.size
        text = self._map[start : start + min(length, _LONGEST_ADDRESS)]
        return text.decode("utf-8", "surrogateescape") if zlib.crc32(text) == checksum else None

    def note_checkpoint(self) -> None:
        _, count = _CHECKPOINT.unpack_from(self._map, _CHECKPOINTS)
        _CHECKPOINT.pack_into(self._map, _CHECKPOINTS, clock(), count + 1)

    def checkpoints(self) -> tuple[int, Optional[float]]:
        """How many there were, and when the last one was (as of `clock`)."""
        when, count = _CHECKPOINT.unpack_from(self._map, _CHECKPOINTS)
        return count, when or None

    def take_place(self) -> Place:
        """A line for this process. Raises `OSError` if all are taken."""
        for number in range(self._count):
            if self._locks.try_acquire(_LINES + number, 1):
                place = Place(self._map, _LINES_AT + number * LINE, self._locks, self.namespace)
                self._locks.try_acquire(_NAMED + number, 1)  # who is not named is not woken
                return place
        raise OSError(f"more than {self._count} processes use this disk")

    def lines(self) -> List[Line]:
        """What all living processes tell."""
        return [self._read_line(at) for number, at in self._used_lines() if self._is_alive(number)]

    def totals(self) -> Counts:
        """What all processes have counted, dead ones too."""
        total = Counts()
        for _, at in self._used_lines():
            total = total.plus(Counts(*_COUNTERS.unpack_from(self._map, at + _COUNTERS_AT)))
        return total

    def _used_lines(self) -> Iterator[tuple[int, int]]:
        unused = 0
        for number in range(self._count):
            at = _LINES_AT + number * LINE
            if self._map[at : at + 4] != b"\0\0\0\0":
                unused = 0
                yield number, at
            elif (unused := unused + 1) == _UNUSED:
                return

    def _is_alive(self, number: int) -> bool:
        return self._locks.held_by_server(_LINES + number, 1)

    def _read_line(self, at: int) -> Line:
        pid, mode, since, *fields = _LINE.unpack_from(self._map, at)
        counts, before = Counts(*fields[:5]), Counts(*fields[5:10])
        (trouble,) = _TROUBLE.unpack_from(self._map, at + _TROUBLE_AT)
        origin, requests, buffered, peer = fields[10:]
        counts = counts.minus(before)
        (namespace,) = _NAMESPACE.unpack_from(self._map, at + _NAMESPACE_AT)
        return Line(pid, mode, since, counts, origin, requests, buffered, _text(peer), _text(trouble), namespace)

    def wake_all(self) -> None:
        """Send SIGUSR2 to all processes that have a line and are of this one's PID namespace.

        Where the system or its owner's rights do not allow that, one finds out when its client wants something.
        """
        for number, at in self._used_lines():
            (pid,) = _U32.unpack_from(self._map, at)
            with suppress(OSError):
                handle = os.pidfd_open(pid)
                try:
                    if self._is_named(number, at, pid):  # so *handle* is of the process that lives there
                        signal.pidfd_send_signal(handle, signal.SIGUSR2)
                finally:
                    os.close(handle)

    def _is_named(self, number: int, at: int, pid: int) -> bool:
        """Whether the line's process is alive, and is *pid* in this namespace."""
        if not self.namespace or self.namespace != _NAMESPACE.unpack_from(self._map, at + _NAMESPACE_AT)[0]:
            return False
        return pid == _U32.unpack_from(self._map, at)[0] and self._locks.held_elsewhere(_NAMED + number, 1)

    @contextmanager
    def closed(self, timeout: float, on_wait: Callable[[], None] = do_nothing) -> Iterator[None]:
        """Hold everybody outside. Raises `TimeoutError` if somebody does not come out in *timeout* seconds."""
        until = time.monotonic() + timeout
        while not self._locks.try_acquire(GATE, 1):
            _nap(until, on_wait, "somebody else holds the gate")
        try:
            if self._map[_FLAG]:
                _count_change(self._map)  # which the dead process that has raised it perhaps had yet to do
            self._map[_FLAG] = 1
            time.sleep(_SETTLE)
            for number, at in self._used_lines():
                while self._map[at + _INSIDE] and self._is_alive(number):
                    _nap(until, on_wait, f"process {_U32.unpack_from(self._map, at)[0]} is busy")
            yield
        finally:
            self._map[_FLAG] = 0
            self._locks.release(GATE, 1)

    def try_lock(self, what: int) -> bool:
        """Take one of the locks but `GATE` for as long as this process lives; False if another has it."""
        return self._locks.try_acquire(what, 1)

    def is_locked(self, what: int) -> bool:
        """Whether another process has the lock; to look does not keep anybody from taking it."""
        return self._locks.held_elsewhere(what, 1)

    def unlock(self, what: int) -> None:
        self._locks.release(what, 1)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


def _count_change(memory: mmap.mmap) -> None:
    (number,) = _U32.unpack_from(memory, _CHANGES)
    _U32.pack_into(memory, _CHANGES, (number + 1) & 0xFFFFFFFF)


def _nap(until: float, on_wait: Callable[[], None], reason: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(reason)
    on_wait()
    time.sleep(_LONGEST_NAP / 10)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("utf-8", "replace")


class Place:
    """This process's line, and its way through the gate. Begins outside, without a client."""

    def __init__(self, memory: mmap.mmap, at: int, locks: RangeLocks, namespace: int) -> None:
        self._map = memory
        self._inside = at + _INSIDE
        self._at = at
        self._locks = locks
        self.inside = False
        self.counts: List[int] = list(_COUNTERS.unpack_from(memory, at + _COUNTERS_AT))
        """What `tell` publishes; goes on from what an earlier process in this line has counted."""
        memory[self._inside] = 0
        self.tell_origin(NOT_NEEDED, "")
        self.welcome("")
        _NAMESPACE.pack_into(memory, at + _NAMESPACE_AT, namespace)
        _U32.pack_into(memory, at, os.getpid())

    @property
    def changes(self) -> bytes:
        """Another number whenever mode or snapshot are others."""
        return self._map[_CHANGES : _CHANGES + 4]

    def disturbed(self, changes: bytes) -> bool:
        """Whether who is inside has to leave: for somebody who closes the gate, or since there are other *changes*."""
        memory = self._map
        return bool(memory[_FLAG]) or memory[_CHANGES : _CHANGES + 4] != changes

    def tell_mode(self, mode: int) -> None:
        """This process works in *mode* now."""
        self._map[self._at + _OWN_MODE] = mode

    def enter(self) -> None:
        """From now on until `leave` the gate cannot be closed.

        Waits while it is, and calls nobody meanwhile: this happens in the middle of sends.
        """
        self._map[self._inside] = 1
        self.inside = True
        if self._map[_FLAG]:
            self._wait_outside()

    def leave(self) -> None:
        self._map[self._inside] = 0
        self.inside = False

    def _wait_outside(self) -> None:
        while self._map[_FLAG]:
            self._map[self._inside] = 0
            if self._locks.try_acquire(GATE, 1):  # whoever had raised the flag is dead
                _count_change(self._map)  # it may have changed something and told nobody yet
                self._map[_FLAG] = 0
                self._locks.release(GATE, 1)
            else:
                time.sleep(_LONGEST_NAP / 10)
            self._map[self._inside] = 1

    def welcome(self, peer: str) -> None:
        """The client is *peer* from now on; empty for none."""
        memory, at = self._map, self._at
        struct.pack_into("=d", memory, at + 8, clock())
        _COUNTERS.pack_into(memory, at + _BASE_AT, *self.counts)
        _QUEUE.pack_into(memory, at + _QUEUE_AT, 0, 0)
        _PEER.pack_into(memory, at + _PEER_AT, peer.encode()[: _PEER.size])

    def tell(self) -> None:
        _COUNTERS.pack_into(self._map, self._at + _COUNTERS_AT, *self.counts)

    def tell_queue(self, requests: int, buffered: int) -> None:
        _QUEUE.pack_into(self._map, self._at + _QUEUE_AT, requests, buffered)

    def tell_origin(self, health: int, trouble: str) -> None:
        _U32.pack_into(self._map, self._at + _ORIGIN_AT, health)
        text = trouble.encode("utf-8", "backslashreplace")
        _TROUBLE.pack_into(self._map, self._at + _TROUBLE_AT, text[: _TROUBLE.size])


def scoreboard_size(processes: int) -> int:
    """Bytes of a scoreboard for so many processes."""
    return _LINES_AT + processes * LINE


def create_scoreboard(processes: int) -> int:
    """A descriptor of a new scoreboard that has no name, for at most so many processes of one server."""
    fd = os.memfd_create("xnbd-board")
    os.ftruncate(fd, scoreboard_size(processes))
    return fd
