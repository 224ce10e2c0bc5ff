"""The table of the scoreboard's fields: what comes from it, and that one line in it is enough."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence

import pytest

from xnbd.proxy.state.scoreboard_file import MAXIMUM_PROCESSES
from xnbd.scoreboard.counters import PLACES
from xnbd.scoreboard.layout import (
    COUNTERS,
    HEAD,
    HEAD_FIELDS,
    LINE,
    LINE_FIELDS,
    LINE_LOCKS,
    LINE_SIZE,
    LINES_AT,
    MAGIC,
    Field,
    Layout,
    OtherVersion,
    create_scoreboard,
    scoreboard_size,
)
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.storage.target import reopen

ROOT = Path(__file__).resolve().parents[2]
TABLES = [(HEAD, HEAD_FIELDS), (LINE, LINE_FIELDS)]
SAY_ITS_SIZE = ["doc/operations.rst", "man/xnbd-server.8"]


@pytest.mark.parametrize(("layout", "fields"), TABLES, ids=["head", "line"])
def test_fields_lie_one_behind_the_other_each_aligned_to_its_first_number(
    layout: Layout, fields: Sequence[Field]
) -> None:
    end = 0
    for field in fields:
        at, size = layout.at[field.name], struct.calcsize(f"={field.format}")
        assert end <= at < end + 8
        assert at % struct.calcsize("=" + field.format.lstrip("0123456789")[0]) == 0
        end = at + size
    assert layout.end == end


def test_head_and_lines_have_room_and_no_lock_on_a_line_is_one_on_the_head() -> None:
    assert HEAD.end <= LINES_AT < LINE_LOCKS
    assert LINE.end <= LINE_SIZE
    assert scoreboard_size(3) == LINES_AT + 3 * LINE_SIZE


def test_documents_say_how_much_room_it_takes() -> None:
    room = f"{math.ceil(scoreboard_size(MAXIMUM_PROCESSES) / (1 << 20) * 10) / 10} MiB"
    assert [page for page in SAY_ITS_SIZE if room not in (ROOT / "contrib" / page).read_text()] == []


def test_every_counter_has_its_places() -> None:
    numbers = LINE.form["counters"].size // 8
    taken = [PLACES[name] + number for name, _, places in COUNTERS for number in range(places)]
    assert taken == list(range(numbers))


def test_a_file_that_is_no_scoreboard_of_this_version_is_refused_and_closed() -> None:
    fd = create_scoreboard(1)
    Scoreboard(reopen(fd, readonly=False)).close()
    for change in (b"x", b"\0" * 8, MAGIC[:7] + b"?"):
        os.pwrite(fd, change, 0)
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(OtherVersion):
            Scoreboard(reopen(fd, readonly=False))
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        os.pwrite(fd, MAGIC, 0)
    os.close(fd)


# One line


TRY = """
import json, os, sys
from xnbd.proxy.state.scoreboard_file import MAXIMUM_PROCESSES
from xnbd.scoreboard.counters import PLACES
from xnbd.scoreboard.layout import LINE, create_scoreboard
from xnbd.scoreboard.scoreboard import Scoreboard
fd = create_scoreboard(4)
place, scoreboard = Scoreboard(fd).take_place(), Scoreboard(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
place.counts[PLACES["errors"]] += 5
place.counts[PLACES["latency"] + 2] += 7
place.counts[PLACES["requests"]] += 1
place.tell()
(line,) = scoreboard.lines.living()
told = line.counts.by_name(), scoreboard.lines.totals().by_name(), LINE.form["colour"].size
try:
    Scoreboard(os.dup(int(sys.argv[1])))
    print(json.dumps([*told, "joined"]))
except OSError as error:
    print(json.dumps([*told, error.strerror]))
"""


def test_a_new_counter_or_field_is_one_line_and_makes_another_version(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "xnbd", tmp_path / "xnbd", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "xnbd/scoreboard/layout.py"
    text = table.read_text()
    for begin, line in (
        ("COUNTERS = (\n", 'Counter("errors", "requests that failed"), Counter("latency", "of requests", 4),\n'),
        ("LINE_FIELDS = (\n", 'Field("colour", "I", "of the process"),\n'),
    ):
        assert text.count(begin) == 1
        text = text.replace(begin, begin + line)
    table.write_text(text)
    fd = create_scoreboard(4)
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(fd)], cwd=tmp_path, pass_fds=[fd], capture_output=True, check=True
    )
    os.close(fd)
    line, totals, size, outcome = json.loads(done.stdout)
    assert (line["errors"], line["latency"], line["requests"]) == (5, [0, 0, 7, 0], 1)
    assert (totals, size) == (line, 4)
    assert outcome == "the scoreboard is of another version of xnbd-server"


# Documents


def documented(layout: Layout, fields: Sequence[Field]) -> List[str]:
    """The lines of a table in ``protocols.rst``."""
    rows = [(str(layout.at[name]), name, form, meaning) for name, form, meaning in fields]
    return table_of(("offset", "field", "format", "content"), rows)


def documented_counters() -> List[str]:
    rows = [(str(8 * PLACES[name]), name, str(places), meaning) for name, meaning, places in COUNTERS]
    return table_of(("offset", "counter", "numbers", "content"), rows)


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
    return [rule, lines[0], rule, *lines[1:], rule]


@pytest.mark.parametrize("expected", [*(documented(*table) for table in TABLES), documented_counters()])
def test_the_documents_have_the_table(expected: List[str]) -> None:
    text = (ROOT / "contrib/doc/protocols.rst").read_text()
    assert "\n".join(["", *expected, ""]) in text, "put this into protocols.rst:\n" + "\n".join(expected)


@pytest.mark.parametrize("size", [f"{LINES_AT:,}", f"{LINE_SIZE} bytes"])
def test_the_documents_have_the_sizes(size: str) -> None:
    text = (ROOT / "contrib/doc/protocols.rst").read_text()
    assert size in text[text.index("\nThe scoreboard\n") : text.index("\nThe wrapper's database\n")]
