"""A picture of which parts of a disk are cached."""

from __future__ import annotations

from typing import List, Sequence

from .quantities import size

ROWS = 8
_LABEL = 10
LEAST_COLUMNS = _LABEL + 13
_UNICODE = ("·", "░", "▒", "▓", "█")
_ASCII = (".", "-", "+", "*", "#")
"""Nothing, three kinds of something, everything."""


def cells_for(columns: int, rows: int = ROWS) -> int:
    """How many parts a picture in a terminal of that width has."""
    return rows * _row_length(columns)


def draw(parts: Sequence[float], disk_size: int, columns: int, encoding: str) -> List[str]:
    """The picture's lines and its legend; each of *parts* says how much of it is cached, from 0 to 1."""
    shades = _shades(encoding)
    length = _row_length(columns)
    lines = []
    for start in range(0, len(parts), length):
        cells = "".join(_shade(part, shades) for part in parts[start : start + length])
        lines.append(f"{size(disk_size * start // len(parts)):>{_LABEL}} |{cells}|")
    each = size(max(1, disk_size // max(1, len(parts))))
    nothing, low, middle, high, whole = shades
    legend = f"{each} a character:  {nothing} nothing  {low}{middle}{high} a part  {whole} all"
    lines.append(" " * (_LABEL + 2) + legend)
    return lines


def strip(parts: Sequence[float], encoding: str) -> str:
    """A picture of one line without a legend."""
    shades = _shades(encoding)
    return "".join(_shade(part, shades) for part in parts)


def coarser(parts: Sequence[float], cells: int) -> List[float]:
    """The same in at most *cells* parts. Only nothing is 0, and only everything is 1."""
    cells = min(cells, len(parts))
    bounds = [len(parts) * cell // cells for cell in range(cells + 1)]
    return [_together(parts[first:end]) for first, end in zip(bounds, bounds[1:])]


def _together(parts: Sequence[float]) -> float:
    if min(parts) == max(parts):
        return parts[0]
    return min(max(sum(parts) / len(parts), 0.001), 0.999)


def _shades(encoding: str) -> Sequence[str]:
    return _UNICODE if _can_show("".join(_UNICODE), encoding) else _ASCII


def _row_length(columns: int) -> int:
    return max(10, columns - _LABEL - 3)


def _shade(part: float, shades: Sequence[str]) -> str:
    """Only nothing looks empty, and only everything looks full."""
    if part <= 0:
        return shades[0]
    return shades[4] if part >= 1 else shades[1 + min(2, int(part * 3))]


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
