"""Patterns for names: of clients, and of disks.

``*`` stands for any characters and ``?`` for one. A backslash takes the next character literally; two hexadecimal
digits behind it are a byte of UTF-8 (RFC 4514).

A client chooses what is in its certificate, as far as its CA lets it. So a pattern is never laid over the text of a
subject. Both are taken apart first: the ``*`` of ``CN=*`` ends where that part of the subject ends, and a comma in a
name begins no new part. Other names are taken as they are. A name with a character that cannot be printed fits no
pattern.
"""

from __future__ import annotations

import re
from typing import Callable, List, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

KINDS = ("dns:", "uri:", "email:", "psk:", "uid:")

_SUBJECT = "subject"
_PAIRS = re.compile(r"(?:\\[0-9a-fA-F]{2})+")
_UID = re.compile(r"[\d*?]+")
_TYPE = re.compile(r"([A-Za-z*?][\w*?-]*|[\d.*?]+)=")
_CAPITALS = ("CN", "L", "ST", "O", "OU", "C", "STREET", "DC", "UID")
"""Types of attributes that have a short name in RFC 4514."""


class Sign:
    """What a character means that is not meant literally."""


MANY, ONE, _COMMA, _PLUS = Sign(), Sign(), Sign(), Sign()

Token = Union[str, Sign]
"""One character, or a sign."""

_IN_NAMES: Mapping[str, Sign] = {",": _COMMA, "+": _PLUS}
_IN_PATTERNS: Mapping[str, Sign] = {"*": MANY, "?": ONE}

Item = TypeVar("Item")
Pattern = TypeVar("Pattern")


class Part(NamedTuple):
    """One attribute of a subject; *joined* to the one before by a ``+``. Names that are no subjects are one part."""

    joined: bool
    tokens: Sequence[Token]


_ANY_PARTS = Part(False, [MANY])


class Name(NamedTuple):
    """One proved name of a client: its *kind*, one of `KINDS` or a subject, and what it is made of."""

    kind: str
    parts: Sequence[Part]


class IdentityPattern(NamedTuple):
    """A pattern for names of one *kind*, or for all of them if that is None."""

    kind: Optional[str]
    parts: Sequence[Part]

    def fits(self, name: Name) -> bool:
        if self.kind is None:
            return True
        return self.kind == name.kind and _fits(self.parts, name.parts, _ANY_PARTS, _fits_part)


def parse_name(text: str) -> Optional[Name]:
    """The name *text* of an `Identity`; None if it is one that no pattern may fit."""
    kind = _kind(text)
    try:
        parts = [Part(False, list(_without_case(kind, text)))] if kind else _split(_tokens(text, _IN_NAMES))
    except ValueError:
        return None
    printable = all(isinstance(token, str) and token.isprintable() for part in parts for token in part.tokens)
    return Name(kind or _SUBJECT, parts) if printable and text else None


def parse_identity(text: str) -> IdentityPattern:
    """Raises `ValueError` for what can fit no client, with a text that says why."""
    if text == "*":
        return IdentityPattern(None, ())
    kind = _kind(text)
    if kind is None and "=" not in text:
        raise ValueError(
            f"{text!r} is no identity: expected a subject like CN=alice,O=Example, "
            f"or one of {' '.join(KINDS)} with a name behind it, or anonymous, or *"
        )
    if kind is None:
        return IdentityPattern(_SUBJECT, _parse_subject(text))
    if kind == "uid:" and not _UID.fullmatch(text, len(kind)):
        raise ValueError(f"{text!r}: expected the number of a user")
    return IdentityPattern(kind, [Part(False, parse_pattern(_without_case(kind, text)))])


def parse_pattern(text: str) -> List[Token]:
    """A pattern for a name that is no client's. Raises `ValueError`."""
    return _tokens(text, _IN_PATTERNS)


def fits(pattern: Sequence[Token], text: str) -> bool:
    return _fits(pattern, text, MANY, _fits_token)


def _kind(text: str) -> Optional[str]:
    return next((kind for kind in KINDS if text.startswith(kind)), None)


def _without_case(kind: Optional[str], text: str) -> str:
    """What stands behind *kind*; the case of letters means nothing in the DNS."""
    rest = text[len(kind or "") :]
    return rest.lower() if kind == "dns:" else rest


def _parse_subject(text: str) -> List[Part]:
    parts = _split(_tokens(text, {**_IN_NAMES, **_IN_PATTERNS}))
    for part in parts:
        shown = "".join(_shown(token) for token in part.tokens)
        found = _TYPE.match(shown)
        if found is None and shown != "*":
            raise ValueError(f"{shown!r} is no part of a subject like CN=alice,O=Example")
        if found and found[1] not in _CAPITALS and found[1].upper() in _CAPITALS:
            raise ValueError(f"{found[1]}= never fits: write {found[1].upper()}=")
    return parts


def _shown(token: Token) -> str:
    return token if isinstance(token, str) else "*" if token is MANY else "?"


def _tokens(text: str, signs: Mapping[str, Sign]) -> List[Token]:
    """The characters of *text*, or what they mean. Raises `ValueError`."""
    found: List[Token] = []
    at = 0
    while at < len(text):
        pairs = _PAIRS.match(text, at)
        if pairs:
            found += bytes.fromhex(pairs[0].replace("\\", "")).decode()
            at = pairs.end()
        elif text[at] == "\\":
            if at + 1 == len(text):
                raise ValueError("a backslash stands at the end")
            found.append(text[at + 1])
            at += 2
        else:
            found.append(signs.get(text[at], text[at]))
            at += 1
    return found


def _split(tokens: Sequence[Token]) -> List[Part]:
    """The parts of a subject."""
    parts: List[Part] = []
    joined, start = False, 0
    for at, token in enumerate(tokens):
        if token in (_COMMA, _PLUS):
            parts.append(Part(joined, tokens[start:at]))
            joined, start = token is _PLUS, at + 1
    return [*parts, Part(joined, tokens[start:])]


def _fits_part(pattern: Part, part: Part) -> bool:
    return pattern.joined == part.joined and _fits(pattern.tokens, part.tokens, MANY, _fits_token)


def _fits_token(pattern: Token, token: Token) -> bool:
    return pattern is ONE or pattern == token


def _fits(
    pattern: Sequence[Pattern], items: Sequence[Item], many: Pattern, fits_one: Callable[[Pattern, Item], bool]
) -> bool:
    """Whether *items* are what *pattern* says, in which *many* stands for any number of items.

    The time is at most the product of both lengths, whatever a client's name is made of.
    """
    at = in_pattern = 0
    star, retry = -1, 0
    while at < len(items):
        if in_pattern < len(pattern) and pattern[in_pattern] == many:
            star, retry = in_pattern, at
            in_pattern += 1
        elif in_pattern < len(pattern) and fits_one(pattern[in_pattern], items[at]):
            in_pattern += 1
            at += 1
        elif star >= 0:
            retry += 1
            at, in_pattern = retry, star + 1
        else:
            return False
    return all(rest == many for rest in pattern[in_pattern:])
