#!/usr/bin/env python3
"""Which of the tests that have failed may be tried again: those in tests/known_flaky.txt, and only if no other failed.

Usage: known_flaky.py LASTFAILED

LASTFAILED is the file in which pytest notes what has failed. Prints a line for each
of these tests, with its reason; the exit status is 1 if one is not in the list.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Dict, List

LIST = Path(__file__).resolve().parent.parent / "tests" / "known_flaky.txt"


def read_list(text: str) -> Dict[str, str]:
    """The reasons, under the tests' names; ValueError for a line without a reason."""
    reasons = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        test, _, reason = line.partition("  ")
        if not reason.strip():
            raise ValueError(f"no reason is given: {line}")
        reasons[test] = reason.strip()
    return reasons


def name_of(test: str) -> str:
    """The name in the list of pytest's *test*: no directories, no parameters."""
    return test.rpartition("/")[2].partition("[")[0]


def main(arguments: List[str]) -> int:
    reasons = read_list(LIST.read_text())
    failed = json.loads(Path(arguments[0]).read_text())
    for test in failed:
        print(f"  {test}: {reasons.get(name_of(test), 'not in tests/known_flaky.txt, so not tried again')}")
    return 0 if all(name_of(test) in reasons for test in failed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
