"""What processes count: a number at each place that the table (`layout.COUNTERS`) has for it."""

from __future__ import annotations

from typing import Dict, List, Tuple, Union

from .layout import COUNTERS


def _places() -> Dict[str, int]:
    places, end = {}, 0
    for counter in COUNTERS:
        places[counter.name] = end
        end += counter.places
    return places


PLACES = _places()
"""The place of each counter, which for a row of numbers is that of the first."""

REQUESTS = PLACES["requests"]
BYTES_READ = PLACES["bytes_read"]
BYTES_WRITTEN = PLACES["bytes_written"]
MISSES = PLACES["misses"]
BYTES_FETCHED = PLACES["bytes_fetched"]


def new_counts() -> List[int]:
    """Room to count in: nothing yet."""
    return [0] * sum(counter.places for counter in COUNTERS)


class Counts(Tuple[int, ...]):
    """What was counted: the number at each place."""

    __slots__ = ()

    def minus(self, other: Counts) -> Counts:
        return Counts(a - b for a, b in zip(self, other))

    def plus(self, other: Counts) -> Counts:
        return Counts(a + b for a, b in zip(self, other))

    def by_name(self) -> Dict[str, Union[int, List[int]]]:
        """Each counter's number, or its row of them."""
        named: Dict[str, Union[int, List[int]]] = {}
        for name, _, places in COUNTERS:
            at = PLACES[name]
            named[name] = self[at] if places == 1 else list(self[at : at + places])
        return named
