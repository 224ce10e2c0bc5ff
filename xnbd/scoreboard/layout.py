"""Where what lies in the scoreboard: the one table of its fields, from which offsets, names and documents come.
 The scoreboard is a head, and a line for each process (`LINE`, from `LINES_AT` on, `LINE_SIZE` bytes each). All
numbers have the machine's own byte order.

- **A new counter** is one line in `COUNTERS`: it has its place in every line, its sum in `Lines.totals`, and its name
  in the answer to ``--query``.
- **A new field** is one line in `HEAD_FIELDS` or `LINE_FIELDS`.
- Fields are stored with `put`.
- Servers share a scoreboard only if they mean the same by it. The header has `VERSION` and `TABLE`, a checksum of all
  names and formats here, which a new field changes by itself. `VERSION` is for a field that stays and means something
  else.

``contrib/doc/protocols.rst`` has these tables too; a test compares them.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import zlib
from typing import Dict, NamedTuple, Sequence

PROXY, COMPLETE, TARGET = 0, 1, 2
"""Modes of a proxy: some blocks are missing; none is, but the bitmap is still kept; it has become a plain target."""

REACHED, UNREACHABLE, NOT_NEEDED = 1, 2, 0
"""A process and its origin: connected, in vain, never tried."""

SLOW, REFUSED = 3, 4
"""Likewise, of one of several origins: silent or faulty; with another disk."""

GATE, CONTROL, COPYING, SNAPSHOT, COMMAND, SCRUBBING, EVICTING, PASSAGE, ROOM = 0, 1, 2, 3, 4, 5, 6, 8, 9
LINE_LOCKS = 1 << 16
NAME_LOCKS = 1 << 17
"""Locks on bytes of the file.
 `GATE` has the process that closes the gate, `CONTROL` the one that answers the control socket, `COPYING` the one
that copies all blocks, `SCRUBBING` the one that checks them, `EVICTING` the one that keeps the cache below its limit,
`COMMAND` the one that changes what the files mean, and `SNAPSHOT` the one that makes a snapshot. A process takes
`PASSAGE` for a moment, to tell the log that there is no room, or room again, and `ROOM`, to count blocks. It has its
byte from `LINE_LOCKS` on as long as it has that line, and the one from `NAME_LOCKS` on since its id is written there.
"""


class Counter(NamedTuple):
    """Something that each process counts: one number, or a row of *places* numbers, such as a histogram."""

    name: str
    meaning: str
    places: int = 1


class Field(NamedTuple):
    """Numbers and texts of one *format* (`struct`, without padding), aligned to the size of the first of them."""

    name: str
    format: str
    meaning: str


COUNTERS = (
    Counter("requests", "requests answered"),
    Counter("bytes_read", "bytes that clients have read"),
    Counter("bytes_written", "bytes that clients have written"),
    Counter("misses", "requests that had to wait for the origin"),
    Counter("bytes_fetched", "bytes fetched from the origin"),
    Counter("damaged", "blocks of the cache found damaged, which were fetched again if they were read"),
)

_NUMBERS = f"{sum(counter.places for counter in COUNTERS)}Q"

LONGEST_ADDRESS = 16000
"""Bytes of an origin's address."""

ORIGINS = 8
"""As many may hold one disk."""

TROUBLE = 160
"""Bytes of the reason for which an origin cannot be reached."""

# Other versions read the first three too.
HEAD_FIELDS = (
    Field("magic", "8s", "``XNBDSCOR``"),
    Field("version", "I", "version of what the fields mean"),
    Field("table", "I", "CRC-32 of names and formats of all fields"),
    Field("flag", "B", "the gate's flag: a process closes the gate, or has died while it did"),
    Field("mode", "B", "0: proxy, 1: proxy without missing blocks, 2: target"),
    Field("copy_wanted", "B", "whether a copy of all blocks is wanted that no operator waits for"),
    Field("reads_through", "B", "whether the log was told that the cache has no room for fetched blocks"),
    Field("changes", "I", "number of changes of mode and snapshot"),
    Field("generation", "I", "number of changes of the origin's address"),
    Field("lettings", "I", "how often clean blocks were let go: who holds replies that point to some copies them"),
    Field("checkpoints", "dQ", "time of the last checkpoint, in seconds since the boot; number of checkpoints"),
    Field("snapshot", "3I", "process that makes a snapshot; its descriptors of snapshot and bitmap"),
    Field("copy_rate", "Q", "bytes per second of the copy that is wanted; 0: no limit"),
    Field("room", "4Q", "clean blocks that the cache may hold (0: any number); that came, that went; that were let go"),
    Field("snapshot_files", "5Q", "PID namespace of that process; device and inode of both files"),
    Field("command", "IQ16s", "process of the command under way; its PID namespace; the command's name"),
    Field("failure", "I4xQ", "first write-back that failed, of a disk without a state file (``storage/writeback.py``)"),
    Field("address", "II", "CRC-32 and length of the origin's address"),
    Field("address_text", f"{LONGEST_ADDRESS}s", "the origin's address; several ones have blanks between them"),
    Field("origin_troubles", f"{TROUBLE * ORIGINS}s", "of several origins, why each could not be reached last"),
    Field("origin_bytes_before", f"{ORIGINS}Q", "sums of ``origin_bytes`` of all lines when the address was changed"),
)

LINE_FIELDS = (
    Field("pid", "I", "process id; 0: no process has ever had this line"),
    Field("inside", "B", "whether the process is inside the gate"),
    Field("mode", "B", "the mode in which it works"),
    Field("holding", "I", "0, or another number each time that the process sleeps with replies that point to blocks"),
    Field("coming", "I", "clean blocks that are counted as come and are still on their way"),
    Field("since", "d", "when its client came, in seconds since the boot"),
    Field("counters", _NUMBERS, "all counters, of former processes of this line too"),
    Field(
        "counters_before",
        _NUMBERS,
        "the same when its client came, less what it had done at other processes (modulo 2^64)",
    ),
    Field("origin", "I", "0: no origin needed, 1: connected, 2: unreachable"),
    Field("queue", "IQ", "requests that wait for blocks; their bytes"),
    Field("peer", "64s", "its client"),
    Field("trouble", f"{TROUBLE}s", "why the origin cannot be reached"),
    Field("namespace", "Q", "PID namespace in which the process id counts"),
    Field("identity", "128s", "who its client has proved to be"),
    Field("encryption", "64s", "how its client is encrypted: version, cipher, ``kTLS`` if the kernel does it"),
    Field(
        "origins",
        f"{2 * ORIGINS}I",
        "of several origins: 0: not tried, 1: connected, 2: unreachable, 3: slow, 4: refused; microseconds it takes",
    ),
    Field("origin_bytes", f"{ORIGINS}Q", "bytes that each of several origins has sent, to former processes too"),
)


class Layout:
    """*fields* one behind the other, from 0 up to ``end``: ``at`` has their offsets, ``form`` their formats."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.at: Dict[str, int] = {}
        self.form: Dict[str, struct.Struct] = {}
        end = 0
        for name, form, _ in fields:
            first = struct.calcsize("=" + form.lstrip("0123456789")[0])
            self.at[name] = end = _round_up(end, first)
            self.form[name] = struct.Struct("=" + form)
            end += self.form[name].size
        self.end = end


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


HEAD, LINE = Layout(HEAD_FIELDS), Layout(LINE_FIELDS)


def put(memory: mmap.mmap, at: int, form: struct.Struct, *values: object) -> None:
    """Store *values* in a field: another process reads the old number or the new one, nothing in between.

    `Struct.pack_into` zeroes the field first, and for a moment all processes would see that.
    """
    memory[at : at + form.size] = form.pack(*values)


LINES_AT = _round_up(HEAD.end, 4096)
LINE_SIZE = _round_up(LINE.end, 64)
"""Processors fight over a store in one of their cache's lines: no two processes have the same."""

MAGIC = b"XNBDSCOR"
VERSION = 1
TABLE = zlib.crc32(repr([(name, form) for name, form, _ in HEAD_FIELDS + LINE_FIELDS]).encode())

_HEADER = struct.Struct("=8sII")


class OtherVersion(OSError):
    """Servers of another version have made this scoreboard, or it is none."""

    def __init__(self) -> None:
        super().__init__(errno.EPROTO, "the scoreboard is of another version of xnbd-server")


def scoreboard_size(processes: int) -> int:
    """Bytes of a scoreboard for so many processes."""
    return LINES_AT + processes * LINE_SIZE


def count_lines(fd: int) -> int:
    """For how many processes the scoreboard behind *fd* was made."""
    return (os.fstat(fd).st_size - LINES_AT) // LINE_SIZE


def write_header(fd: int) -> None:
    """Make the zeros in the file behind *fd* a scoreboard."""
    os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, TABLE), 0)


def check_header(fd: int) -> None:
    """Raises `OtherVersion` unless the file behind *fd* is a scoreboard of this version."""
    if os.pread(fd, _HEADER.size, 0) != _HEADER.pack(MAGIC, VERSION, TABLE):
        raise OtherVersion


def create_scoreboard(processes: int) -> int:
    """A descriptor of a new scoreboard that has no name, for at most so many processes of one server."""
    fd = os.memfd_create("xnbd-board")
    os.ftruncate(fd, scoreboard_size(processes))
    write_header(fd)
    return fd
