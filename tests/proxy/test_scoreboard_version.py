"""Servers of two versions on one cache.

The second one refuses while the first one runs. Once that is gone the scoreboard is made anew in its place.
"""

from __future__ import annotations

import random
import shlex
import shutil
from pathlib import Path
from typing import List

import pytest
from caching import CacheFiles, connect
from conftest import MIB, Start
from launch import fails
from server_process import PYTHON, ROOT, Server

from xnbd.scoreboard.layout import VERSION

CONTENT = random.Random(3).randbytes(MIB)


@pytest.fixture
def far(start: Start, tmp_path: Path) -> Server:
    path = tmp_path / "origin.img"
    path.write_bytes(CONTENT)
    return start("--target", "--readonly", path)


@pytest.fixture
def next_version(tmp_path: Path) -> List[str]:
    """What turns the command line of this xnbd-server into one of a made-up next version."""
    tree = tmp_path / "next"
    for part in ("bin", "xnbd"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    layout = tree / "xnbd/scoreboard/layout.py"
    text = layout.read_text()
    assert text.count(f"\nVERSION = {VERSION}\n") == 1
    layout.write_text(text.replace(f"\nVERSION = {VERSION}\n", f"\nVERSION = {VERSION + 1}\n"))
    program = f"{shlex.quote(PYTHON)} {shlex.quote(str(tree / 'bin/xnbd-server'))}"
    return ["sh", "-c", f'shift 3; exec {program} "$@"']


def board_of(files: CacheFiles) -> Path:
    return files.bitmap.with_name(f"{files.bitmap.name}.board")


@pytest.mark.parametrize("newer", ["first", "second"])
def test_a_cache_in_use_by_another_version_is_refused_and_taken_once_that_is_gone(
    start: Start, files: CacheFiles, far: Server, next_version: List[str], newer: str
) -> None:
    prefixes: List[List[str]] = [next_version, []] if newer == "first" else [[], next_version]
    first = start(*files.arguments(far.uri), prefix=prefixes[0])
    paths = (files.image, files.bitmap, files.state)
    before = [path.read_bytes() for path in paths]
    other = files.image.parent / "other"
    assert fails(*files.arguments(far.uri, control=f"{other}.ctl"), "--unix", other, prefix=prefixes[1]) == (
        1,
        f"xnbd-server: cache bitmap {files.bitmap} is in use by another version of xnbd-server: stop that one first\n",
    )
    assert [path.read_bytes() for path in paths] == before
    client = connect(first.uri)
    assert client.pread(MIB, 0) == CONTENT
    client.shutdown()
    first.stop()
    inode = board_of(files).stat().st_ino
    second = start(*files.arguments(far.uri), prefix=prefixes[1])
    assert connect(second.uri).pread(MIB, 0) == CONTENT
    second.stop()
    assert files.is_clean()
    assert board_of(files).stat().st_ino == inode


@pytest.mark.parametrize("former", [b"", b"\0\1" * 9000, b"\2" * 3 * MIB], ids=["empty", "short", "long"])
def test_whatever_nobody_uses_becomes_a_scoreboard_in_its_place(
    start: Start, files: CacheFiles, far: Server, former: bytes
) -> None:
    """Its space may be all that there is; that of 0.5.0 has no version."""
    start(*files.arguments(far.uri)).stop()
    board = board_of(files)
    size = board.stat().st_size
    board.write_bytes(former)
    inode = board.stat().st_ino
    start(*files.arguments(far.uri)).stop()
    assert files.is_clean()
    found = board.stat()
    assert (found.st_ino, found.st_size, found.st_blocks * 512 >= size) == (inode, size, True)
