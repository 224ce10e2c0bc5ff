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
DAMAGED = PLACES["damaged"]


_LARGEST = (1 << 64) - 1


def new_counts() -> List[int]:
    """Room to count in: nothing yet."""
    return [0] * sum(counter.places for counter in COUNTERS)


def wrapped(counts: Counts) -> Counts:
    """As a scoreboard can hold them: a client that has come from another process may have done more than this one."""
    return Counts(number & _LARGEST for number in counts)


class Counts(Tuple[int, ...]):
    """What was counted: the number at each place."""

    __slots__ = ()

    def minus(self, other: Counts) -> Counts:
        return Counts(a - b for a, b in zip(self, other))

    def plus(self, other: Counts) -> Counts:
        return Counts(a + b for a, b in zip(self, other))

    @classmethod
    def named(cls, numbers: Dict[str, Union[int, List[int]]]) -> Counts:
        """What `by_name` has told, perhaps in a program that counts more or less than this one. Raises `ValueError`."""
        counts = new_counts()
        for name, _, places in COUNTERS:
            number = numbers.get(name, 0)
            row = number if isinstance(number, list) else [number]
            if not all(isinstance(number, int) for number in row):
                raise ValueError(f"{name} is no number")
            counts[PLACES[name] : PLACES[name] + places] = (row + [0] * places)[:places]
        return wrapped(cls(counts))

    def by_name(self) -> Dict[str, Union[int, List[int]]]:
        """Each counter's number, or its row of them."""
        named: Dict[str, Union[int, List[int]]] = {}
        for name, _, places in COUNTERS:
            at = PLACES[name]
            named[name] = self[at] if places == 1 else list(self[at : at + places])
        return named
