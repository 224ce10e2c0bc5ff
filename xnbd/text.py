"""Text that came from elsewhere, made fit for a line; words for numbers."""

from __future__ import annotations

_UNITS = ("", "K", "M", "G", "T")


def one_line(text: str) -> str:
    """*text* in one line, without what a terminal or a reader of logs might obey: names come from other people."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_option(octets: int) -> str:
    """A number of bytes as options take it, exactly: ``20M``."""
    unit = 0
    while octets and not octets % 1024 and unit < len(_UNITS) - 1:
        octets, unit = octets // 1024, unit + 1
    return f"{octets}{_UNITS[unit]}"


def is_writable(text: str) -> bool:
    """Whether *text* has bytes: those of a name that is no UTF-8 count, halves of a UTF-16 pair do not."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def counted(count: int, one: str, several: str = "") -> str:
    """``1 client``, ``1,234 clients``; *several* is for words that do not just get an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
