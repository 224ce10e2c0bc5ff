"""Logs of ``--log-format json``."""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List

Line = Dict[str, Any]

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def parse_log(text: str) -> List[Line]:
    """Each line of *text*, which has to be JSON with all that each line has."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert _TIME.fullmatch(line["time"]), line
        assert line["level"] in _LEVELS and line["program"].startswith("xnbd-"), line
        assert isinstance(line["pid"], int) and isinstance(line["message"], str), line
    return lines


def with_words(text: str, words: str) -> List[Line]:
    """Those of the lines whose message has these *words*."""
    return [line for line in parse_log(text) if words in line["message"]]
