"""Which version of the origin's disk is cached: the section of the state file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

import pytest

from xnbd.proxy.state.versions import (
    VERSIONS,
    VERSIONS_SIZE,
    Version,
    Versions,
    pack_versions,
    parse_versions,
)


@pytest.fixture
def state_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "state", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 16)
    yield fd
    os.close(fd)


def test_the_first_version_counts(state_fd: int) -> None:
    versions = Versions(state_fd)
    assert versions.of("a") is None
    assert versions.agree("a", "one") == "one"
    assert versions.agree("a", "two") == "one"
    assert versions.agree("b", "three") == "three"
    assert Versions(state_fd).agree("a", "four") == "one"
    versions.replace("a", "five")
    assert versions.agree("a", "six") == "five"


def test_a_change_is_news_once_for_all(state_fd: int) -> None:
    one, other = Versions(state_fd), Versions(state_fd)
    assert not one.note_change("a", changed=True)
    one.agree("a", "x")
    assert not one.note_change("a", changed=False)
    assert one.note_change("a", changed=True)
    assert not other.note_change("a", changed=True)
    known = other.of("a")
    assert known is not None
    assert known.changed
    assert other.note_change("a", changed=False)
    assert not one.note_change("a", changed=False)


def test_nothing_else_in_the_file_is_touched(state_fd: int) -> None:
    os.pwrite(state_fd, b"x" * VERSIONS, 0)
    os.pwrite(state_fd, b"x" * (1 << 15), 4096)
    versions = Versions(state_fd)
    assert versions.of("a") is None
    versions.agree("a", "one")
    assert os.pread(state_fd, VERSIONS, 0) == b"x" * VERSIONS
    assert os.pread(state_fd, 4096 - VERSIONS - VERSIONS_SIZE, VERSIONS + VERSIONS_SIZE).strip(b"\0") == b""
    assert os.pread(state_fd, 1 << 15, 4096) == b"x" * (1 << 15)


def test_the_places_that_were_noted_last_are_kept() -> None:
    versions = [Version(f"{number:016x}", "v" * 200) for number in range(9)]
    assert parse_versions(pack_versions(versions)) == versions[5:]


def test_a_damaged_section_says_nothing() -> None:
    section = pack_versions([Version("a", "one")])
    assert len(section) == VERSIONS_SIZE
    assert parse_versions(section) == [Version("a", "one")]
    for at in range(20):
        damaged = bytearray(section)
        damaged[at] ^= 1
        assert parse_versions(bytes(damaged)) == []
    for length in range(20):
        assert parse_versions(section[:length]) == []
    assert parse_versions(bytes(VERSIONS_SIZE)) == []
    assert parse_versions(b"\xff" * VERSIONS_SIZE) == []
