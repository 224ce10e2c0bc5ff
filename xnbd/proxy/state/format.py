"""The file ``CACHE_BITMAP_IMAGE.state``: where in it lies what, and its header in bytes.

======================  ==========================================================
offset                  content
======================  ==========================================================
0                       header, 512 bytes: one sector, so that no power failure can
                        leave half of one
1024                    versions of the origin's disk, optional: `proxy.state.versions`
2048, 2056              numbers of the checkpoint begun last and of the last one
                        that succeeded, 8 bytes each, of the machine's own endianness
2064                    the first write-back that failed, 16 bytes: `writeback.Record`
2304                    the session that the cache image is known to bear, 8 bytes
2560                    what was changed while servers ran: `Steering`
4096                    dirty map: one byte for every page of the live bitmap
then, at a page's start  map of the pages in the hands of a checkpoint, likewise
then, at a page's start  durable copy of the bitmap; before version 3 the file ends
                        with it
then, at a unit's start  exposed map, likewise: `proxy.state.written`
then, at a page's start  CRC-32 of each page of the written map, 4 bytes each
then, at a unit's start  written map: which blocks clients have written, as the bitmap;
                        the file ends with it
======================  ==========================================================

A page has 4,096 bytes, whatever the machine thinks, and a unit 65,536: no machine maps a
file from anywhere else. Numbers, dirty map and the map of a checkpoint's pages mean
something while one system runs, the rest for good. Any byte but 0 is a mark.

The header, little-endian: `HEADER_FIELDS` (flag 1: closed cleanly, 2: the cache image
bears its mark; a boot id of zeros: the bitmap is yet to be made; the origin as `identity`
makes it), from version 2 on `TIE_FIELDS`, what is known of the cache image
(`belonging.Tie`), from version 3 on `TIMES_FIELDS` (`Times`), and in the end the CRC-32
of all that precedes (4 bytes).

Locks on bytes of this file (`system.file_locks`): `OPENING` by whoever opens, creates or
closes the files, `CHECKPOINT` during a checkpoint, `LOOKING` by who mends a page that was
damaged, for a moment `FAILURE` by who logs a failure, and by every process that may set
bits one byte picked at random from `USERS`: who can lock all of those is alone.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from typing import Callable, Dict, NamedTuple, Optional, Tuple

from ...storage.bitmap import bitmap_size
from ...storage.blocks import BLOCK, block_count
from .belonging import NO_TIE, Tie

SUFFIX = ".state"
SCOREBOARD_SUFFIX = ".board"
SUMS_SUFFIX = ".sums"
CHECKED_SUFFIX = ".checked"
USE_MAP_SUFFIX = ".used"
"""What is appended to the name of the bitmap."""

PAGE = 4096
PAGE_SHIFT = 15
"""A page of the bitmap speaks for 2 to this power blocks."""

OPENING = 0
CHECKPOINT = 1
LOOKING = 2
USERS = 1 << 32
USERS_COUNT = 1 << 60

BEGUN = 2048
SUCCEEDED = 2056
FAILURE = 2064
NUMBER = struct.Struct("Q")
SHOWN = 2304
STEERING = 2560
STEERING_SIZE = PAGE - STEERING

MAGIC = b"xNBD\r\n\x1as"
VERSION = 3
HEADER_SIZE = 512
NO_BOOT = bytes(16)

_CLEAN, _MARKED = 1, 2
_PREFIX = struct.Struct("<8sI")
Fields = Tuple[Tuple[str, str], ...]
"""Names, and types as in `struct`; ``contrib/doc/protocols.rst`` has them all."""

HEADER_FIELDS: Fields = (
    ("magic", "8s"),
    ("version", "I"),
    ("block size", "I"),
    ("flags", "I"),
    ("disk size", "Q"),
    ("boot id", "16s"),
    ("length of the origin", "I"),
    ("origin", "256s"),
)
TIE_FIELDS: Fields = (
    ("id", "16s"),
    ("session", "8s"),
    ("previous session", "8s"),
    ("number", "Q"),
    ("size", "Q"),
    ("changed", "q"),
    ("cache mount", "Q"),
    ("state mount", "Q"),
    ("checksum of the bitmap", "I"),
)
"""From version 2 on."""

TIMES_FIELDS: Fields = (("bitmap closed", "q"), ("state closed", "q"))
"""From version 3 on."""


def _struct_of(fields: Fields) -> struct.Struct:
    return struct.Struct("<" + "".join(kind for _, kind in fields))


_HEADER = _struct_of(HEADER_FIELDS)
_TIE = _struct_of(TIE_FIELDS)
_TIMES = _struct_of(TIMES_FIELDS)
_CHECKSUM = struct.Struct("<I")
SUM = _CHECKSUM
"""Of a page of the written map."""

_ORIGIN_SIZE = 256
_UNIT = 1 << 16


class Layout(NamedTuple):
    """Offsets in the state file of a disk of ``disk_size`` bytes; ``size`` is the file's, ``former_size`` before 3.

    The bitmap has ``bitmap_size`` bytes on so many ``pages``.
    """

    disk_size: int
    blocks: int
    bitmap_size: int
    pages: int
    dirty: int
    claimed: int
    durable: int
    former_size: int
    exposed: int
    sums: int
    written: int
    size: int

    @property
    def dirty_end(self) -> int:
        """Where the dirty map ends: what follows until the next map speaks for no page."""
        return self.dirty + self.pages

    @property
    def claimed_end(self) -> int:
        """Likewise."""
        return self.claimed + self.pages

    def count_marks(self, head: mmap.mmap) -> int:
        """Of the state file that begins with *head*: pages of the bitmap that the next checkpoint has to save."""
        marks = head[self.dirty : self.dirty_end] + head[self.claimed : self.claimed_end]
        return len(marks) - marks.count(0)


def layout_of(disk_size: int) -> Layout:
    blocks = block_count(disk_size)
    length = bitmap_size(blocks)
    pages = -(-length // PAGE)
    map_size = _whole(pages, PAGE)
    durable = PAGE + 2 * map_size
    exposed = _whole(durable + length, _UNIT)
    sums = exposed + map_size
    written = _whole(sums + SUM.size * pages, _UNIT)
    return Layout(
        disk_size=disk_size,
        blocks=blocks,
        bitmap_size=length,
        pages=pages,
        dirty=PAGE,
        claimed=PAGE + map_size,
        durable=durable,
        former_size=durable + length,
        exposed=exposed,
        sums=sums,
        written=written,
        size=written + length,
    )


def _whole(length: int, unit: int) -> int:
    return -(-length // unit) * unit


class Times(NamedTuple):
    """When bitmap and state file were changed last, in ns since the epoch; 0: not known, or not closed cleanly."""

    bitmap: int = 0
    state: int = 0


class Header(NamedTuple):
    """What does not change with every block; *origin* as `identity` makes it, *tie* to the cache image.

    *version* is that of the file from which it was read.
    """

    disk_size: int
    origin: bytes
    boot_id: bytes
    clean: bool
    block_size: int = BLOCK
    tie: Tie = NO_TIE
    closed: Times = Times()
    version: int = VERSION


_STEERING = struct.Struct("<III")
_STEERING_CHECKED = struct.Struct("<II")


class Steering(NamedTuple):
    """Whether the proxy was *switched* to a plain target, and where its origin has moved; empty: nowhere.

    Little-endian: CRC-32 of all that follows, switched (0 or 1), length of the
    address (4 bytes each), address. Anything else there means that nothing was changed.
    """

    switched: bool = False
    address: str = ""


LONGEST_ADDRESS = STEERING_SIZE - _STEERING.size


def pack_steering(steering: Steering) -> bytes:
    """Raises `ValueError` if the address is longer than `LONGEST_ADDRESS` bytes."""
    address = steering.address.encode("utf-8", "surrogateescape")
    if len(address) > LONGEST_ADDRESS:
        raise ValueError(f"the address has more than {LONGEST_ADDRESS} bytes")
    checked = _STEERING_CHECKED.pack(steering.switched, len(address)) + address
    return _CHECKSUM.pack(zlib.crc32(checked)) + checked


def parse_steering(data: bytes) -> Steering:
    if len(data) < _STEERING.size:
        return Steering()
    checksum, switched, length = _STEERING.unpack_from(data)
    end = _STEERING.size + min(length, LONGEST_ADDRESS)
    if zlib.crc32(data[_CHECKSUM.size : end]) != checksum:
        return Steering()
    return Steering(bool(switched), data[_STEERING.size : end].decode("utf-8", "surrogateescape"))


class BadHeader(Exception):
    """These bytes are no header that this program can read; the message says why."""


class UnknownVersion(BadHeader):
    """A program that is newer has written them."""


def identity(origin: str) -> bytes:
    """The origin's identity in the header's space: itself, or if it is long its beginning and its hash."""
    text = origin.encode("utf-8", "surrogateescape")
    if len(text) <= _ORIGIN_SIZE:
        return text
    return text[:160] + b" sha256:" + hashlib.sha256(text).hexdigest().encode()


def readable(origin: bytes) -> str:
    """An origin's identity for a message: one line, whatever it contains."""
    return repr(origin.decode("utf-8", "backslashreplace"))


def pack_header(header: Header) -> bytes:
    """The header in the current version, padded to its whole sector."""
    packed = _HEADER.pack(
        MAGIC,
        VERSION,
        header.block_size,
        _CLEAN * header.clean | _MARKED * header.tie.marked,
        header.disk_size,
        header.boot_id,
        len(header.origin),
        header.origin,
    )
    id_, session, previous, _, *numbers = header.tie
    packed += _TIE.pack(id_, session, previous, *numbers) + _TIMES.pack(*header.closed)
    return (packed + _CHECKSUM.pack(zlib.crc32(packed))).ljust(HEADER_SIZE, b"\0")


def parse_header(data: bytes) -> Header:
    """The header of any version there has been. Raises `BadHeader`."""
    if len(data) != HEADER_SIZE or not data.startswith(MAGIC):
        raise BadHeader("is not the state file of a cache bitmap")
    version = _PREFIX.unpack_from(data)[1]
    parse: Optional[Callable[[bytes], Header]] = _PARSERS.get(version)
    if parse is None:
        raise UnknownVersion(f"has version {version}, which this program does not know")
    return parse(data)


def _parse_version_1(data: bytes) -> Header:
    return _parse(data, _HEADER.size)


def _parse_version_2(data: bytes) -> Header:
    return _with_tie(data, _parse(data, _HEADER.size + _TIE.size))


def _parse_version_3(data: bytes) -> Header:
    header = _with_tie(data, _parse(data, _HEADER.size + _TIE.size + _TIMES.size))
    return header._replace(closed=Times(*_TIMES.unpack_from(data, _HEADER.size + _TIE.size)))


def _with_tie(data: bytes, header: Header) -> Header:
    flags = _HEADER.unpack_from(data)[3]
    id_, session, previous, *numbers = _TIE.unpack_from(data, _HEADER.size)
    return header._replace(tie=Tie(id_, session, previous, bool(flags & _MARKED), *numbers))


def _parse(data: bytes, size: int) -> Header:
    """What all versions begin with; *size* bytes are followed by their checksum."""
    if _CHECKSUM.unpack_from(data, size)[0] != zlib.crc32(data[:size]):
        raise BadHeader("is damaged: its checksum is wrong")
    _, version, block_size, flags, disk_size, boot_id, length, origin = _HEADER.unpack_from(data)
    return Header(disk_size, origin[:length], boot_id, bool(flags & _CLEAN), block_size, version=version)


_PARSERS: Dict[int, Callable[[bytes], Header]] = {1: _parse_version_1, 2: _parse_version_2, 3: _parse_version_3}
"""One for every version ever released: files of all of them stay readable."""
