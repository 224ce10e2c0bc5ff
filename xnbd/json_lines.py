"""Log lines for programs: each is one JSON object, and has no byte that is not printable ASCII.

So nothing that a name or a message has in it can end a line, or begin another one. A name
whose bytes are no UTF-8 has them as in text lines, like ``\\udcff``: half a pair of UTF-16 is
something that many readers of JSON refuse.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Dict, Mapping


class JsonFormatter(logging.Formatter):
    """Lines of *program*, with the fields of *subject*, which may change, and of the line itself."""

    is_json = True

    def __init__(self, program: str, subject: Mapping[str, object]) -> None:
        super().__init__()
        self._program = program
        self._subject = subject

    def format(self, record: logging.LogRecord) -> str:
        line: Dict[str, object] = {
            "time": _rfc3339(record.created),
            "level": record.levelname,
            "program": self._program,
            "pid": record.process,
            "message": _writable(record.getMessage()),
        }
        fields = {**self._subject, **getattr(record, "about", {})}
        line.update((name, _plain(value)) for name, value in fields.items())
        if record.exc_info:
            line["traceback"] = _writable(self.formatException(record.exc_info))
        return json.dumps(line)


def _rfc3339(seconds: float) -> str:
    """*seconds* since 1970, UTC, in milliseconds."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milliseconds:03d}Z"


def _plain(value: object) -> object:
    """As JSON has it: numbers stay numbers."""
    return value if isinstance(value, (bool, int, float)) else _writable(str(value))


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
