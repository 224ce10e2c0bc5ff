"""Which blocks of a disk are local: one bit a block, shared by every process that maps the file.

The layout is that of the C xNBD: little-endian 64-bit words, least significant bit
first, the length rounded up to whole words, no header. As bytes: block *n* is bit
``n % 8`` of byte ``n // 8``. Bits beyond the last block count nowhere.

Setting a bit, or taking it away, rewrites its byte, so whoever does that holds the
lock of that byte (`system.file_locks`); looking needs no lock, and what it finds unset
may be set a moment later.
"""

from __future__ import annotations

import mmap
import re
import sys
from typing import Iterator, List, Tuple

from .blocks import BLOCKS_PER_BYTE, block_start, touched

_WORD = 8
_NOT_EMPTY = re.compile(rb"[^\x00]")
_NOT_FULL = re.compile(rb"[^\xff]")
_POPULATION = bytes(bin(value).count("1") for value in range(256))


def bitmap_size(blocks: int) -> int:
    """Bytes of the bitmap of so many blocks."""
    return -(-blocks // (_WORD * BLOCKS_PER_BYTE)) * _WORD


def count_bits(octets: bytes) -> int:
    """How many bits are set; quick where most bytes are all set or all clear."""
    mixed = octets.translate(None, b"\xff\x00")
    return 8 * octets.count(b"\xff") + _count_mixed(mixed) if mixed else 8 * octets.count(b"\xff")


def _ones(word: int) -> int:
    return word.bit_count() if sys.version_info >= (3, 10) else bin(word).count("1")


def _count_mixed(octets: bytes) -> int:
    if sys.version_info >= (3, 10):
        return int.from_bytes(octets, "little").bit_count()
    return sum(octets.translate(_POPULATION))


def _beyond(blocks: int) -> int:
    """A mask of the bits in the bitmap's last word that speak for no block."""
    used = (blocks - 1) % (_WORD * BLOCKS_PER_BYTE) + 1
    return (1 << 64) - (1 << used)


def count_beyond(last_word: bytes, blocks: int) -> int:
    """How many of the bits that speak for no block are set, which count nowhere."""
    return bin(int.from_bytes(last_word, "little") & _beyond(blocks)).count("1")


_COUNTED_AT_ONCE = 1 << 20
"""Bytes of a bitmap that are copied to be counted: the one of 16 TiB has 512 MiB."""


class Bitmap:
    """The bitmap of *blocks* blocks in the file behind *fd*, where `bitmap_size` bytes have to be *at* this offset.

    ``octets`` is the mapping itself, for those to whom a whole byte tells enough.
    The mapping duplicates *fd*, which stays the caller's; it has *spare* bytes more. With
    *readonly* no bit can be set.
    """

    def __init__(self, fd: int, blocks: int, spare: int = 0, *, at: int = 0, readonly: bool = False) -> None:
        self.blocks = blocks
        rights = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        self.octets = mmap.mmap(fd, bitmap_size(blocks) + spare, prot=rights, offset=at)

    def __contains__(self, block: int) -> bool:
        return bool(self.octets[block >> 3] >> (block & 7) & 1)

    def all_set(self, first: int, end: int) -> bool:
        """Whether every block from *first* up to *end* is set."""
        return self._next_change(first, end, True) == end

    def first_missing(self, first: int) -> int:
        """The first block from *first* on that is not set; ``blocks`` if there is none."""
        return self._next_change(first, self.blocks, True)

    def any_set(self, first: int, end: int) -> bool:
        """Whether some block from *first* up to *end* is set."""
        return self._next_change(first, end, False) != end

    def set(self, first: int, end: int) -> None:
        """Set the bits of these blocks. The caller holds the lock of their bytes."""
        octets = self.octets
        start, stop = first >> 3, end >> 3
        if end - first == 1:
            octets[start] |= 1 << (first & 7)
            return
        head, tail = 0xFF << (first & 7) & 0xFF, (1 << (end & 7)) - 1
        if start == stop:
            octets[start] |= head & tail
            return
        octets[start] |= head
        octets[start + 1 : stop] = b"\xff" * (stop - start - 1)
        if tail:
            octets[stop] |= tail

    def clear(self, first: int, end: int) -> None:
        """Take the bits of these blocks back. The caller holds the lock of their bytes, and nobody reads a block."""
        octets = self.octets
        start, stop = first >> 3, end >> 3
        head, tail = (1 << (first & 7)) - 1, 0xFF << (end & 7) & 0xFF
        if start == stop:
            octets[start] &= head | tail
            return
        octets[start] &= head
        octets[start + 1 : stop] = bytes(stop - start - 1)
        if end & 7:
            octets[stop] &= tail

    def runs(self, first: int, end: int) -> Iterator[Tuple[int, int, bool]]:
        """The blocks from *first* up to *end* as runs of equal bits: first, end, whether set."""
        while first < end:
            state = first in self
            stop = self._next_change(first, end, state)
            if stop > first:  # else another process has just set the bit
                yield first, stop, state
            first = stop

    def parts(self, offset: int, length: int) -> Iterator[Tuple[int, int, bool]]:
        """*length* bytes at *offset* by whether the bits of their blocks are set: offset, length, whether set."""
        stop = offset + length
        for first, end, state in self.runs(*touched(offset, length)):
            at = max(offset, block_start(first))
            yield at, min(stop, block_start(end)) - at, state

    def count(self) -> int:
        """How many blocks are set."""
        size, step = bitmap_size(self.blocks), _COUNTED_AT_ONCE
        count = sum(count_bits(self.octets[at : min(at + step, size)]) for at in range(0, size, step))
        return count - count_beyond(self.octets[size - _WORD : size], self.blocks)

    def shares(self, cells: int) -> List[float]:
        """Which share of the blocks is set, in each of *cells* parts of the disk; 1 only if all of them are."""
        edges = [self.blocks * cell // cells for cell in range(cells + 1)]
        return [self._share(first, end) for first, end in zip(edges, edges[1:])]

    def _share(self, first: int, end: int) -> float:
        if self.all_set(first, end):
            return 1.0
        word = int.from_bytes(self.octets[first >> 3 : (end + 7) >> 3], "little") >> (first & 7)
        return min(_ones(word & ((1 << (end - first)) - 1)) / (end - first), 0.999)

    def _next_change(self, first: int, end: int, state: bool) -> int:
        """The first block from *first* on that is not *state*, at most *end*."""
        if first >= end:
            return end
        octets = self.octets
        flip = 0xFF if state else 0
        rest = (octets[first >> 3] ^ flip) >> (first & 7)
        if rest:
            return min(end, first + _lowest_bit(rest))
        different = (_NOT_FULL if state else _NOT_EMPTY).search(octets, (first >> 3) + 1, (end + 7) >> 3)
        if different is None:
            return end
        byte = different.start()
        return min(end, (byte << 3) + _lowest_bit(octets[byte] ^ flip))


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1
