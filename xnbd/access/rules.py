"""The file of ``--tls-authz``: lines ``IDENTITY EXPORT rw|ro``, of which the first one that fits decides.

Words are separated by spaces. A word with spaces stands in double quotes. A ``#`` at the beginning of a word begins a
comment. What a pattern is, `patterns` says.
"""

from __future__ import annotations

import re
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..errors import ConfigurationError
from ..system.settings_file import read_settings
from ..text import one_line
from .identity import Identity
from .patterns import IdentityPattern, Token, fits, parse_identity, parse_name, parse_pattern

ANONYMOUS = "anonymous"
"""Stands in place of IDENTITY for clients that have proved nothing. No pattern fits these."""

_LARGEST = 4 << 20
_WORD = re.compile(r"""[ \t]*(?:(#.*)|"((?:\\.|[^"\\])*)"(?![^ \t])|((?:\\.|[^ \t"\\])+)(?![^ \t]))""")


class Rule(NamedTuple):
    """A line: whom it is for, None for clients that have proved nothing, and which exports they may open."""

    identity: Optional[IdentityPattern]
    export: Sequence[Token]
    writable: bool


class Selection:
    """Those of the rules that are for one client."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules

    def writable(self, name: str) -> Optional[bool]:
        """Whether the client may write to the export *name*; None if it may not open it."""
        return next((rule.writable for rule in self._rules if fits(rule.export, name)), None)


class Rules(NamedTuple):
    """The rules of the file at *path*."""

    path: str
    lines: Tuple[Rule, ...]

    def select(self, identity: Identity) -> Selection:
        """Those of which a name of *identity* fits."""
        if not identity.names:
            return Selection([rule for rule in self.lines if rule.identity is None])
        names = list(filter(None, map(parse_name, identity.names)))
        return Selection([rule for rule in self.lines if rule.identity and any(map(rule.identity.fits, names))])

    @property
    def know_anonymous(self) -> bool:
        """Whether a client that has proved nothing may open anything."""
        return any(rule.identity is None for rule in self.lines)


def read_rules(path: str) -> Rules:
    """The rules in the file at *path*. Raises `ConfigurationError` if anything in it is wrong, or nothing is in it.

    It is empty for a moment while a shell or an editor writes it: a reload then would lock everybody out.
    """
    rules = parse_rules(read_settings(path, "the rules", _LARGEST), path)
    if not rules.lines:
        raise ConfigurationError(
            f"{path}: there is no rule, so nobody could open anything: expected lines IDENTITY EXPORT rw|ro"
        )
    return rules


def parse_rules(data: bytes, path: str) -> Rules:
    """The rules in *data*, the content of the file at *path*. Raises `ConfigurationError` (``FILE:LINE: ...``)."""
    rules = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            rule = _parse_line(line.removesuffix(b"\r").decode())
        except ValueError as error:
            reason = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ConfigurationError(f"{path}:{number}: {reason}") from None
        if rule is not None:
            rules.append(rule)
    return Rules(path, tuple(rules))


def _parse_line(line: str) -> Optional[Rule]:
    """None for a line without a rule. Raises `ValueError`."""
    words = _split(line)
    if not words:
        return None
    if len(words) != 3:
        raise ValueError(f"expected IDENTITY EXPORT rw|ro, and there are {len(words)} words")
    identity, export, right = words
    if right not in ("rw", "ro"):
        raise ValueError(f"{right!r}: expected rw or ro")
    whom = None if identity == ANONYMOUS else parse_identity(identity)
    return Rule(whom, parse_pattern(export), right == "rw")


def _split(line: str) -> List[str]:
    """The words of *line*. Raises `ValueError`."""
    if not line.replace("\t", " ").isprintable():
        raise ValueError(f"a character that cannot be printed: {one_line(line)}")
    words, at = [], 0
    while line[at:].strip(" \t"):
        word = _WORD.match(line, at)
        if word is None:
            raise ValueError('a double quote or a backslash without its other half (see "quotes" in the manual)')
        if word[1] is not None:
            break
        words.append(word[3] if word[2] is None else word[2])
        at = word.end()
    return words
