"""Tables of what fits into a width, sorted by one of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Generic, Iterable, List, Optional, Sequence, Tuple, TypeVar

from .cells import pad, width_of

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """Numbers in *width* columns. Rows are sorted by *key*; where not all columns fit, those of a low *rank* do."""

    heading: str
    width: int
    rank: int
    key: Callable[[Row], Optional[float]]
    show: Callable[[float], str]


class Table(Generic[Row]):
    """A name, which takes what is left, and *columns*."""

    def __init__(
        self, heading: str, name: Callable[[Row], str], columns: Sequence[Column[Row]], sorted_by: str = ""
    ) -> None:
        """Sorted by the column with the heading *sorted_by*, or by the name."""
        self._heading = heading
        self._name = name
        self._columns = columns
        self._headings = [heading, *(column.heading for column in columns)]
        self._sorted_by = sorted_by or heading
        self._is_reversed = False

    def sort_by_next(self, step: int) -> None:
        """Sort by another column, *step* further to the right."""
        place = self._headings.index(self._sorted_by) + step
        self._sorted_by = self._headings[place % len(self._headings)]
        self._is_reversed = False

    def reverse(self) -> None:
        """Sort the other way round."""
        self._is_reversed = not self._is_reversed

    def sorted(self, rows: Iterable[Row]) -> List[Row]:
        """By name, or the largest number first; rows without one come last."""
        column = next((column for column in self._columns if column.heading == self._sorted_by), None)
        by_name = sorted(rows, key=self._name, reverse=self._is_reversed and column is None)
        if column is None:
            return by_name
        key, sign = column.key, 1 if self._is_reversed else -1

        def place(row: Row) -> Tuple[bool, float]:
            number = key(row)
            return number is None, sign * (number or 0.0)

        return sorted(by_name, key=place)

    @property
    def order(self) -> str:
        """What it is sorted by."""
        return f"{self._sorted_by}{', reversed' if self._is_reversed else ''}"

    def layout(self, rows: Iterable[Row], width: int, longest: int) -> Layout[Row]:
        """For lines of *width* columns, names of which take *longest* at most: what fits of the other columns."""
        names = max((width_of(self._name(row)) for row in rows), default=0)
        names = min(max(len(self._heading), min(names, longest)), width)
        chosen, free = [], width - names
        for column in sorted(self._columns, key=lambda column: column.rank):
            if column.width + 1 <= free:
                chosen.append(column)
                free -= column.width + 1
        return Layout(self._heading, self._name, names, [column for column in self._columns if column in chosen], free)


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """A table at one width: *names* columns for the name, then *columns*; so much is *free* behind them."""

    name_heading: str
    name: Callable[[Row], str]
    names: int
    columns: Sequence[Column[Row]]
    free: int

    def heading(self) -> str:
        return self._joined(self.name_heading, [column.heading for column in self.columns])

    def line(self, row: Row) -> str:
        numbers = [(column, column.key(row)) for column in self.columns]
        return self._joined(self.name(row), ["-" if key is None else column.show(key) for column, key in numbers])

    def remark(self, row: Row, text: str) -> str:
        """*text* in place of the numbers of *row*."""
        return f"{pad(self.name(row), self.names)} {text}"

    def _joined(self, name: str, cells: Sequence[str]) -> str:
        return " ".join([pad(name, self.names), *(cell.rjust(c.width) for c, cell in zip(self.columns, cells))])
