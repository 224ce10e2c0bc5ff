"""Texts by the columns that they take on a terminal, and lines with a style."""

from __future__ import annotations

from typing import NamedTuple

PLAIN, BOLD, DIM, SELECTED = "", "\x1b[1m", "\x1b[2m", "\x1b[7m"


class Styled(NamedTuple):
    """A line of the screen."""

    text: str
    style: str = PLAIN


def width_of(text: str) -> int:
    """The columns that *text* takes: letters of some scripts take two, and accents of their own none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """*text*, cut to what *columns* hold; a tilde stands for what is missing."""
    if width_of(text) <= columns:
        return text
    while text and width_of(text) > columns - 1:
        text = text[: max(len(text) - max(1, (width_of(text) - columns) // 2), 0)]
    return f"{text}~"[: max(0, columns)]


def pad(text: str, columns: int) -> str:
    """*text* in exactly so many columns."""
    text = fit(text, columns)
    return text + " " * (columns - width_of(text))
