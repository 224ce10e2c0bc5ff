"""``contrib/doc/protocols.rst`` says where in the files on disk lies what: as the code has it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from xnbd.proxy.state import format as state_format
from xnbd.proxy.state.belonging import ATTRIBUTE, SESSION_SIZE
from xnbd.proxy.state.format import HEADER_FIELDS, TIE_FIELDS, TIMES_FIELDS, layout_of
from xnbd.proxy.state.versions import VERSIONS, VERSIONS_SIZE
from xnbd.storage.writeback import RECORD_SIZE
from xnbd.wrapper import database

TEXT = Path(__file__).parents[2].joinpath("contrib/doc/protocols.rst").read_text()


def section(title: str) -> str:
    start = TEXT.index(f"\n{title}\n===")
    following = re.search(r"\n\n\n.*\n===", TEXT[start + 1 :])
    return TEXT[start : start + 1 + following.start()] if following else TEXT[start:]


STATE_FILE = section("The state file")


def test_every_field_of_the_header_is_there_with_its_place_and_version() -> None:
    told = re.findall(r"^(\d+) +(\d+) +([123]) +(.+)$", STATE_FILE, re.MULTILINE)
    at, wanted = 0, []
    for version, fields in (("1", HEADER_FIELDS), ("2", TIE_FIELDS), ("3", TIMES_FIELDS)):
        for name, kind in fields:
            wanted.append((at, struct.calcsize(f"<{kind}"), version, name))
            at += struct.calcsize(f"<{kind}")
    assert [(int(offset), int(size), version) for offset, size, version, _ in told] == [row[:3] for row in wanted]
    for (*_, text), (*_, name) in zip(told, wanted):
        assert text.startswith(name)
    end_of_1, tie = (
        struct.calcsize("<" + "".join(kind for _, kind in fields)) for fields in (HEADER_FIELDS, TIE_FIELDS)
    )
    ends = f"at {end_of_1} in version 1, at {end_of_1 + tie} in version 2, at {at} in version {state_format.VERSION}"
    assert ends in " ".join(STATE_FILE.split())


def test_the_parts_of_the_state_file_are_where_it_says() -> None:
    told = re.findall(r"^(\d+) {10,}(\d+) {2,}", STATE_FILE, re.MULTILINE)
    assert [(int(offset), int(size)) for offset, size in told] == [
        (0, state_format.HEADER_SIZE),
        (VERSIONS, VERSIONS_SIZE),
        (state_format.BEGUN, state_format.NUMBER.size),
        (state_format.SUCCEEDED, state_format.NUMBER.size),
        (state_format.FAILURE, RECORD_SIZE),
        (state_format.SHOWN, SESSION_SIZE),
        (state_format.STEERING, state_format.STEERING_SIZE),
    ]
    layout = layout_of(1 << 40)
    assert layout.dirty == state_format.PAGE == 4096
    assert layout.claimed % 4096 == layout.durable % 4096 == 0
    assert layout.former_size == layout.durable + layout.bitmap_size
    assert layout.exposed % 65536 == layout.written % 65536 == layout.sums % 4096 == 0
    assert layout.size == layout.written + layout.bitmap_size


def test_names_and_versions_are_there() -> None:
    assert f"``{ATTRIBUTE}``" in STATE_FILE
    assert f"It has version {state_format.VERSION} since" in STATE_FILE
    assert f'{{"version": {database.VERSION}, "images":' in section("The wrapper's database")
