"""Byte ranges as blocks: which blocks a range touches, and which it covers.

A block is `BLOCK` bytes, the unit that is local or not. Ranges of blocks are
half-open: *first* is in, *end* is not. The last block of a disk may be shorter.
"""

from __future__ import annotations

from typing import Iterator, Tuple

BLOCK = 4096
BLOCK_SHIFT = 12

BLOCKS_PER_BYTE = 8
"""A byte of the bitmap speaks for so many blocks; it is the unit of locking."""


def block_count(size: int) -> int:
    """Blocks of a disk of *size* bytes."""
    return -(-size // BLOCK)


def touched(offset: int, length: int) -> Tuple[int, int]:
    """First and end of the blocks in which *length* bytes at *offset* lie."""
    return offset >> BLOCK_SHIFT, (offset + length + BLOCK - 1) >> BLOCK_SHIFT


def covered(offset: int, length: int, size: int) -> Tuple[int, int]:
    """First and end of the blocks of which the range leaves no byte out; *first* >= *end* if there are none.

    On a disk of *size* bytes the last block is covered by what reaches the disk's end.
    """
    stop = offset + length
    end = block_count(size) if stop == size else stop >> BLOCK_SHIFT
    return (offset + BLOCK - 1) >> BLOCK_SHIFT, end


def block_start(block: int) -> int:
    return block << BLOCK_SHIFT


def block_stop(block: int, size: int) -> int:
    """Where *block* ends, on a disk of *size* bytes."""
    return min((block + 1) << BLOCK_SHIFT, size)


def bytes_of(first: int, end: int) -> Tuple[int, int]:
    """First byte, and number of bytes, of a bitmap that speak for these blocks."""
    start = first // BLOCKS_PER_BYTE
    return start, -(-end // BLOCKS_PER_BYTE) - start


def steps(offset: int, length: int, step: int) -> Iterator[Tuple[int, int]]:
    """*length* bytes at *offset* as pieces that end at multiples of *step*: offset and length of each."""
    stop = offset + length
    while offset < stop:
        count = min(stop, (offset // step + 1) * step) - offset
        yield offset, count
        offset += count
