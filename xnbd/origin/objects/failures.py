"""What obstore's exceptions mean, and what is told of them: one line without what a server has sent.

A server's message may quote what a request was signed with, and where it was redirected to.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from .credentials import missing_files


class Kind(Enum):
    """*PASSING*: asking again may help. *REFUSED*: it will not. *CHANGED*: another object is there."""

    PASSING = 1
    REFUSED = 2
    CHANGED = 3


class Failure(NamedTuple):
    """Why a call has come to nothing."""

    kind: Kind
    text: str


OUT_OF_RANGE = Failure(Kind.CHANGED, "it has no such bytes: it is shorter than it was, or empty")
NO_CREDENTIALS = "there are no credentials: neither in the environment, nor in files, nor of an instance"

_ADVICE = {
    401: ": wrong credentials, or none",
    403: ": wrong credentials, or no right to it",
    404: ": there is no such object",
}
_STATUS = re.compile(r"status code: (\d{3})([ A-Za-z-]*)")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_METADATA = re.compile(r"//(169\.254\.|metadata\.google|\[?fd00:ec2)")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)")
_PRESENTED = re.compile(r"presented: \[([^\]]*)")
_NAME = re.compile(r'(?:DnsName|IpAddress)\((?:\\")?([\w.*:-]+)')
_MOST_NAMES = 5
_QUERY = re.compile(r"\?\S*|//[^/\s]*@")
_PASSING_STATUS = (408, 425, 429)

_REFUSED_CLASSES = (
    "PermissionDeniedError",
    "UnauthenticatedError",
    "FileNotFoundError",
    "InvalidPathError",
    "ValueError",
)
_CERTIFICATES = {
    "UnknownIssuer": "is not of an authority that is trusted here (SSL_CERT_FILE may name a file with that authority)",
    "Expired": "has expired",
    "NotValidYet": "is not valid yet (or the clock is wrong)",
    "Revoked": "is revoked",
    "CaUsedAsEndEntity": "is that of an authority: the server needs one of its own",
}
_SETTINGS = (
    (
        "Missing SecretAccessKey",
        "a key without its secret: AWS_SECRET_ACCESS_KEY is missing, in the environment or the profile",
    ),
    (
        "Missing AccessKeyId",
        "a secret without its key: AWS_ACCESS_KEY_ID is missing, in the environment or the profile",
    ),
    (
        "Account must be specified",
        "whose container? Say az://CONTAINER/KEY?account=NAME, or set AZURE_STORAGE_ACCOUNT_NAME",
    ),
)
"""Parts of what obstore says of settings that it cannot use, and what to do."""

_WORDS = (
    (re.compile(r"TooManyRedirects"), Kind.REFUSED, "it redirects again and again"),
    (re.compile(r"BareRedirect"), Kind.REFUSED, "it redirects without saying where to: is the region the right one?"),
    (re.compile(r"BadScheme"), Kind.REFUSED, "it leads from https to http, which would not be encrypted"),
    (re.compile(r"InvalidContentType|InvalidMessage"), Kind.PASSING, "it speaks no TLS there"),
    (re.compile(r"TimedOut|kind: Timeout"), Kind.PASSING, "no answer in time"),
    (re.compile(r'lookup address information: ([^"]*)'), Kind.PASSING, r"its name cannot be looked up: \1"),
    (re.compile(r'message: "([^"]*)"'), Kind.PASSING, r"\1"),
    (re.compile(r"(Requested \S+, got \S+)"), Kind.PASSING, r"it sent other bytes than were asked for: \1"),
    (re.compile(r"CONTENT_RANGE"), Kind.PASSING, "it does not tell which bytes it sent (Content-Range)"),
    (re.compile(r"IncompleteMessage|IncompleteBody|UnexpectedEof"), Kind.PASSING, "it closed the connection too early"),
)
"""Parts of the long text in which obstore tells the details, and what they mean; the first one counts."""


def failure_of(error: BaseException) -> Failure:
    """What *error*, which a call of obstore has raised, means."""
    text = str(error)
    names = [cls.__name__ for cls in type(error).__mro__]
    if "PreconditionError" in names:
        return Failure(Kind.CHANGED, "it is not the object any more that was cached")
    if "NotSupportedError" in names:
        return Failure(Kind.REFUSED, "it answers a range of bytes with the whole object: it cannot be read in parts")
    if _METADATA.search(text.partition("\n")[0]):
        return Failure(Kind.REFUSED, "; ".join([NO_CREDENTIALS, *missing_files()]))
    status = _STATUS.search(text)
    if status:
        return _of_status(int(status[1]), status[2], text)
    certificate = _CERTIFICATE.search(text)
    if certificate:
        return Failure(Kind.REFUSED, f"its certificate {_of_certificate(certificate[1], text)}")
    for pattern, kind, words in _WORDS:
        match = pattern.search(text)
        if match:
            return Failure(kind, match.expand(words) if "\\" in words else words)
    refused = any(name in names for name in _REFUSED_CLASSES)
    return Failure(Kind.REFUSED if refused else Kind.PASSING, _QUERY.sub("…", text.partition("\n")[0][:200]))


def refusal_of_settings(error: Exception) -> str:
    """What to do about *error*, which obstore has raised when it was to open a store."""
    told = str(error).partition("\n")[0]
    return next((words for part, words in _SETTINGS if part in told), told)


def _of_certificate(name: str, text: str) -> str:
    """What is wrong with it by rustls' *name* for that; some names have a longer form, in which more is told."""
    name = name[: -len("Context")] if name.endswith("Context") else name
    if name == "NotValidForName":
        presented = _PRESENTED.search(text)
        names = _NAME.findall(presented[1])[:_MOST_NAMES] if presented else []
        return f"is for {', '.join(names) or 'another name'}, and not for the host of the address"
    return _CERTIFICATES.get(name, f"is not trusted: {name}")


def _of_status(status: int, reason: str, text: str) -> Failure:
    code = _CODE.search(text)
    told = f"HTTP status {status}{reason.rstrip()}{f', {code[1]}' if code else ''}"
    if status == 416:
        return OUT_OF_RANGE
    passing = status >= 500 or status in _PASSING_STATUS
    return Failure(Kind.PASSING if passing else Kind.REFUSED, told + _ADVICE.get(status, ""))
