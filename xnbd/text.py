"""Text that came from elsewhere, made fit for a line; words for numbers."""

from __future__ import annotations


def one_line(text: str) -> str:
    """*text* in one line, without what a terminal or a reader of logs might obey: names come from other people."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
