"""Checksums of the blocks that were fetched: the file ``CACHE_BITMAP_IMAGE.sums``, and one process's use of it.

======================  ==========================================================
offset                  content
======================  ==========================================================
0                       header, 512 bytes, little-endian: `HEADER_FIELDS`, and the
                        CRC-32 of all that precedes (4 bytes)
2048                    1 if sums were written that no checkpoint has synced yet
2049                    1 while a checkpoint syncs them
2056                    number of the last checkpoint that succeeded in this session,
                        as in the state file, 8 bytes of the machine's endianness
65536                   zero map: which blocks are zeros, without a sum; as the bitmap
then, at a unit's start  table: the XXH3-64 of each block, 8 bytes each of the
                        machine's own endianness; the file ends with it, and is
                        cut to that at a start if it is longer
======================  ==========================================================

The file is sparse. A sum is written under the lock of its block, after the data and
before the bit, and synced by the checkpoint that saves the bit. A sum speaks for its
block while the block is local and not written by clients. A sum of 0 is none: then the
block is right only if it is all zeros and on the zero map. So a local block whose sum
has been lost counts as damaged, never as right. The last block of the disk may be
shorter, and so is what its sum is of.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from array import array
from typing import Callable, List, NamedTuple, Sequence

from xxhash import xxh3_64_intdigest

from ...storage import space
from ...storage.bitmap import Bitmap, bitmap_size
from ...storage.blocks import BLOCK, steps
from ...storage.image import Buffer
from .belonging import NO_ID, NO_SESSION
from .format import NUMBER, PAGE, BadHeader, Fields, Layout

MAGIC = b"xNBD\r\n\x1ax"
VERSION = 1
HEADER_FIELDS: Fields = (
    ("magic", "8s"),
    ("version", "I"),
    ("block size", "I"),
    ("disk size", "Q"),
    ("id", "16s"),
    ("session", "8s"),
)
_HEADER = struct.Struct("<" + "".join(kind for _, kind in HEADER_FIELDS))
_CHECKSUM = struct.Struct("<I")
HEADER_SIZE = 512

_DIRTY, _CLAIMED = 2048, 2049
NUMBER_AT = 2056
_UNIT = 1 << 16
SUM_SIZE = 8
_ZEROS_AT = _UNIT

RUN = 64
"""Blocks that are summed up at once."""

_SLICES = [slice(at, at + BLOCK) for at in range(0, RUN * BLOCK, BLOCK)]
_PACK_ONE = struct.Struct("Q").pack
NO_SUM = bytes(SUM_SIZE)
ZERO_SUM = _PACK_ONE(xxh3_64_intdigest(bytes(BLOCK)))
_ZERO_SUMS = ZERO_SUM * (1 << 12)


class SumsHeader(NamedTuple):
    """What ties the sums to a cache: *id* and *session* as in `belonging.Tie`."""

    disk_size: int
    id: bytes = NO_ID
    session: bytes = NO_SESSION


def pack_sums_header(header: SumsHeader) -> bytes:
    packed = _HEADER.pack(MAGIC, VERSION, BLOCK, header.disk_size, header.id, header.session)
    return (packed + _CHECKSUM.pack(zlib.crc32(packed))).ljust(HEADER_SIZE, b"\0")


def parse_sums_header(data: bytes) -> SumsHeader:
    """Raises `BadHeader`."""
    if len(data) != HEADER_SIZE or not data.startswith(MAGIC):
        raise BadHeader("is no file of checksums")
    if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
        raise BadHeader("is damaged: its header has a wrong checksum")
    _, version, block_size, disk_size, id_, session = _HEADER.unpack_from(data)
    if (version, block_size) != (VERSION, BLOCK):
        raise BadHeader(f"has version {version}, which this program does not know")
    return SumsHeader(disk_size, id_, session)


def table_at(blocks: int) -> int:
    return -(-(_ZEROS_AT + bitmap_size(blocks)) // _UNIT) * _UNIT


def sums_size(blocks: int) -> int:
    """Bytes of the file, most of them holes."""
    return table_at(blocks) + SUM_SIZE * blocks


def sums_of(data: Buffer) -> bytes:
    """Of whole blocks one behind the other, of which the last may be shorter; as they stand in the table."""
    if len(data) == BLOCK:
        return _PACK_ONE(xxh3_64_intdigest(data))
    count, rest = divmod(len(data), BLOCK)
    if count <= RUN and not rest:
        return sums_of_each([data[block] for block in _SLICES[:count]])
    return sums_of_each([data[at : at + BLOCK] for at in range(0, len(data), BLOCK)])


def sums_of_each(blocks: Sequence[Buffer]) -> bytes:
    """Of blocks that lie apart; as they stand in the table."""
    return array("Q", map(xxh3_64_intdigest, blocks)).tobytes()


class BlockSums:
    """The sums of the disk of *layout* for this process, in the file behind *fd*, which it owns from now on."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.fd = fd
        self._blocks = layout.blocks
        self._disk_size = layout.disk_size
        self._table = table_at(layout.blocks)
        self._head = mmap.mmap(fd, PAGE)

    # Who has filled blocks, and holds their locks

    def note(self, first: int, sums: bytes) -> None:
        """The blocks from *first* on have these sums; their bits are yet to be set. Raises `OSError`."""
        if os.pwrite(self.fd, sums, self._table + SUM_SIZE * first) != len(sums):
            self._write(sums, first)
        self._head[_DIRTY] = 1

    def note_zeros(self, first: int, end: int) -> None:
        """These blocks are zeros, perhaps many of them: where the table is a hole it stays one. Raises `OSError`."""
        if end == self._blocks and self._disk_size % BLOCK:
            end -= 1
            self._write(sums_of(bytes(self._disk_size % BLOCK)), end)
        if first < end:
            at = self._table + SUM_SIZE * first
            if _is_hole(self.fd, at, SUM_SIZE * (end - first)):
                self._map_zeros(first, end)
            else:
                for step, count in steps(first, end - first, len(_ZERO_SUMS) // SUM_SIZE):
                    self._write(_ZERO_SUMS[: SUM_SIZE * count], step)
        self._head[_DIRTY] = 1

    def _write(self, sums: bytes, first: int) -> None:
        space.write_all(self.fd, memoryview(sums), self._table + SUM_SIZE * first)

    def _map_zeros(self, first: int, end: int) -> None:
        start, stop = first >> 3, (end + 7) >> 3
        octets = bytearray(stop - start)
        octets[1:-1] = b"\xff" * (len(octets) - 2)
        octets[0] |= 0xFF << (first & 7) & 0xFF
        octets[-1] |= 0xFF >> (-end & 7)
        if len(octets) == 1:
            octets[0] = 0xFF << (first & 7) & 0xFF >> (-end & 7)
        for at in {0, len(octets) - 1}:
            octets[at] |= os.pread(self.fd, 1, _ZEROS_AT + start + at)[0]
        space.write_all(self.fd, memoryview(octets), _ZEROS_AT + start)

    # Who looks

    def misfits(self, first: int, sums: bytes) -> List[int]:
        """Which blocks from *first* on do not have these *sums*, or have none. Raises `OSError`."""
        stored = os.pread(self.fd, len(sums), self._table + SUM_SIZE * first)
        if stored == sums:
            return []
        stored = stored.ljust(len(sums), b"\0")
        misfits = []
        for block, at in enumerate(range(0, len(sums), SUM_SIZE), first):
            found, wanted = sums[at : at + SUM_SIZE], stored[at : at + SUM_SIZE]
            if found != wanted and (wanted != NO_SUM or not self._is_zero(block, found)):
                misfits.append(block)
        return misfits

    def are_zeros(self, first: int, end: int) -> bool:
        """Whether all of these blocks came as zeros. Raises `OSError`."""
        for step, count in steps(first, end - first, len(_ZERO_SUMS) // SUM_SIZE):
            zeros = _ZERO_SUMS[: SUM_SIZE * count]
            stored = os.pread(self.fd, len(zeros), self._table + SUM_SIZE * step)
            if stored != zeros and (any(stored) or not self._are_mapped(step, step + count)):
                return False
        return True

    def _are_mapped(self, first: int, end: int) -> bool:
        octets = os.pread(self.fd, ((end + 7) >> 3) - (first >> 3), _ZEROS_AT + (first >> 3))
        wanted = (1 << (end - first)) - 1
        return int.from_bytes(octets, "little") >> (first & 7) & wanted == wanted

    def _is_zero(self, block: int, found: bytes) -> bool:
        """Whether *block*, which has no sum, is zeros, and known to be."""
        octet = os.pread(self.fd, 1, _ZEROS_AT + (block >> 3))
        return found == ZERO_SUM and bool(octet) and bool(octet[0] >> (block & 7) & 1)

    # Checkpoints

    def sync(self, sync: Callable[[int], None]) -> None:
        """Make all sums durable that were noted, by *sync* and only if there are any; one process does it at a time."""
        head = self._head
        if head[_DIRTY] or head[_CLAIMED]:
            head[_CLAIMED] = 1
            head[_DIRTY] = 0
            sync(self.fd)
            head[_CLAIMED] = 0

    def note_checkpoint(self, number: int) -> None:
        """The checkpoint with that number has succeeded, so that an older copy of the state file is known as one."""
        NUMBER.pack_into(self._head, NUMBER_AT, number)

    def close(self) -> None:
        self._head.close()
        os.close(self.fd)


def _is_hole(fd: int, at: int, length: int) -> bool:
    try:
        return os.lseek(fd, at, os.SEEK_DATA) >= at + length
    except OSError:  # there is no data behind it
        return True


class Integrity:
    """What one process needs to know that clean blocks are right: their *sums*, and the *checked* ones.

    A block is checked if its data is known to be as it came, or was written by a client,
    since the first of the servers that run now was started. All processes share that map
    (``CACHE_BITMAP_IMAGE.checked``). Its bits are set with the lock of their byte held,
    after those of the bitmap, and taken away before them.
    """

    def __init__(self, sums_fd: int, checked_fd: int, layout: Layout) -> None:
        """Owns both descriptors from now on."""
        self.sums = BlockSums(sums_fd, layout)
        self._checked_fd = checked_fd
        self.checked = Bitmap(checked_fd, layout.blocks, spare=layout.pages)

    def close(self) -> None:
        self.sums.close()
        self.checked.octets.close()
        os.close(self._checked_fd)
