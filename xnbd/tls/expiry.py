"""Until when the certificates and revocation lists of a file are valid.

``ssl`` tells that of verified peers only, so the two fields are looked up in the DER here (RFC 5280, sections 4.1 and
5.1). The files are the operator's, and OpenSSL has accepted them before; of what is not understood all the same nothing
is said.
"""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Iterator, List, NamedTuple, Sequence, Tuple

_PEM = re.compile(r"-----BEGIN (CERTIFICATE|X509 CRL)-----(.*?)-----END \1-----", re.DOTALL)
_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0x17, 0x18
_TIMES = (_UTC_TIME, _GENERALIZED_TIME)

SOON = timedelta(days=30)
"""The operator hears of what expires within this time."""


class Expiry(NamedTuple):
    """Something in the file *path* is valid until *when*, of which the operator hears *notice* before."""

    path: str
    when: datetime
    notice: timedelta = SOON

    def days_left(self, now: datetime) -> int:
        """Whole days; negative for what is over."""
        return (self.when - now).days


OURS_AS_SERVER = "clients are refused, or refuse the server"
OURS_AS_CLIENT = "the origin is refused, or refuses this proxy"


def warnings(valid: Sequence[Expiry], meaning: str = OURS_AS_SERVER) -> List[str]:
    """A line for each file in which something has expired, of which *meaning* tells what it means, or soon will."""
    now = datetime.now(timezone.utc)
    return [_warning(expiry, now, meaning) for expiry in first_of_each_file(valid) if expiry.when - now < expiry.notice]


def first_of_each_file(valid: Sequence[Expiry]) -> List[Expiry]:
    """What is over first in each file: one with a chain has several certificates."""
    return list({expiry.path: expiry for expiry in sorted(valid, key=lambda e: e.when, reverse=True)}.values())


def _warning(expiry: Expiry, now: datetime, meaning: str) -> str:
    days = expiry.days_left(now)
    day = expiry.when.strftime("%Y-%m-%d")
    if days < 0:
        return f"{expiry.path} has expired on {day}: {meaning}"
    return f"{expiry.path} expires on {day}, in {days} days"


def expiries(path: str, text: str) -> List[Expiry]:
    """Of all certificates and revocation lists of the PEM *text*, which the file *path* has."""
    found = []
    for kind, body in _PEM.findall(text):
        with suppress(ValueError):
            is_list = kind == "X509 CRL"
            begin, end = _validity(base64.b64decode(body), is_list=is_list)
            found.append(Expiry(path, end, min(SOON, (end - begin) / 4) if is_list else SOON))
    return found


def _validity(der: bytes, *, is_list: bool) -> Sequence[datetime]:
    """The two times in the validity of a certificate, or a list's update and next update, which it may lack.

    Lists are made anew all the time, many each week: the operator hears of them in the last quarter of that.
    """
    (_, outer), *_ = _elements(der)
    (_, body), *_ = _elements(outer)
    fields = list(_elements(body))
    if is_list:  # [version], signature, issuer, this update, [next update], ...
        return [_time(tag, value) for tag, value in fields if tag in _TIMES]
    for tag, value in fields:  # [version], serial number, signature, issuer, validity, ...
        if tag == _SEQUENCE and value and value[0] in _TIMES:
            return [_time(*element) for element in _elements(value)]
    return []


def _elements(der: bytes) -> Iterator[Tuple[int, bytes]]:
    """Tag and content of each element in *der*."""
    position = 0
    while position + 2 <= len(der):
        tag, length = der[position], der[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[position : position + size], "big")
            position += size
        yield tag, der[position : position + length]
        position += length


def _time(tag: int, value: bytes) -> datetime:
    """A UTCTime has two digits of the year, from 1950 to 2049 (RFC 5280, section 4.1.2.5.1)."""
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)
