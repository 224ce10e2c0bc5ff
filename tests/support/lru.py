"""A trace of reads like those of real clients, and how many of them an ideal cache has."""

from __future__ import annotations

import random
from collections import OrderedDict
from itertools import accumulate
from typing import List, Tuple

BLOCK = 4096
PIECE = 64

Read = Tuple[int, int]
"""The first block, and how many."""


def trace(rng: random.Random, pieces: int, length: int) -> List[Read]:
    """*length* reads of a disk of *pieces* times 256 KiB: the n-th most popular place has one of n parts (Zipf's law).

    Places are files of 4 KiB to 128 KiB, which lie anywhere. Now and then what is popular changes a little, and
    something is read that nobody wants again.
    """
    places = [_place(rng, pieces) for _ in range(4 * pieces)]
    weights = list(accumulate(1 / rank for rank in range(1, len(places) + 1)))
    reads: List[Read] = []
    while len(reads) < length:
        if rng.random() < 0.01:
            one, other = rng.randrange(50), rng.randrange(len(places))
            places[one], places[other] = places[other], places[one]
        if rng.random() < 0.1:
            reads.append(_place(rng, pieces))
        else:
            reads += rng.choices(places, cum_weights=weights)
    return reads


def _place(rng: random.Random, pieces: int) -> Read:
    count = rng.choice((1, 2, 4, 8, 16, 32))
    return rng.randrange(pieces * PIECE // count) * count, count


def ideal_hits(reads: List[Read], blocks: int) -> int:
    """Of how many *reads* all blocks are in a cache of so many that drops what was used the longest time ago."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for first, count in reads:
        wanted = range(first, first + count)
        hits += all(block in cache for block in wanted)
        for block in wanted:
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits
