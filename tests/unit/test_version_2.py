"""State files of version 2, byte by byte as the program before version 3 has written them, under the code of today."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Dict, List

import pytest
from mounts import small_tmpfs
from server_process import run
from state_files import Cache, set_blocks, written_blocks

from xnbd.errors import ConfigurationError
from xnbd.proxy.state import belonging
from xnbd.proxy.state.belonging import ATTRIBUTE
from xnbd.proxy.state.format import layout_of

ORIGIN = "nbd://origin:10809/disk"
SIZE = 5 * 4096 + 100
BLOCKS = 6
STATE_SIZE = 12296

HEADER = (
    "784e42440d0a1a73" "02000000" "00100000" "{flags}000000" "6450000000000000" "00000001000040008000000000000000"
    "17000000" "6e62643a2f2f6f726967696e3a31303830392f6469736b"
)  # fmt: skip
TIE = "0102030405060708090a0b0c0d0e0f100102030405060708000000000000000007"
CLOSED = {
    0: HEADER.format(flags="03"),
    304: TIE,
    352: "000064a7b3b6e00d0500000000000000050000000000000070d6e76fa19795",
}
USED = {0: HEADER.format(flags="02"), 304: TIE, 360: "0500000000000000050000000000000000000000d0b68d1a"}

FILES: Dict[str, Dict[int, str]] = {
    "clean": {**CLOSED, 2048: "03000000000000000300000000000000", 12288: "07"},
    "unclean": {**USED, 2048: "01000000000000000100000000000000", 4096: "01", 12288: "03"},
    "switched": {**USED, 2048: "01000000000000000100000000000000", 2560: "f7df88a901", 12288: "3f"},
}
"""What is not zero, by offset. Made by the code of commit 9ae2edb, in the boot that a `Cache` has as number 1."""

LIVE = {"clean": 0x07, "unclean": 0x07, "switched": 0x3F}


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inode and mounts are those of the files."""
    monkeypatch.setattr(belonging, "file_number", lambda status: 7)
    monkeypatch.setattr(belonging, "mount_of", lambda fd: 5)


def made_by_version_2(directory: Path, which: str) -> Cache:
    cache = Cache(directory, SIZE)
    state = bytearray(STATE_SIZE)
    for offset, data in FILES[which].items():
        octets = bytes.fromhex(data)
        state[offset : offset + len(octets)] = octets
    cache.state.write_bytes(state)
    cache.bitmap.write_bytes(bytes([LIVE[which]]).ljust(8, b"\0"))
    os.setxattr(cache.fd, ATTRIBUTE, b"0102030405060708090a0b0c0d0e0f10.0102030405060708")
    os.utime(cache.fd, ns=(10**18, 10**18))
    return cache


@pytest.mark.parametrize("grown", [0, 1000, layout_of(SIZE).size - STATE_SIZE])
@pytest.mark.parametrize(
    ("which", "boot", "kept", "said"),
    [
        ("clean", 1, [0, 1, 2], "resumed"),
        ("clean", 2, [0, 1, 2], "resumed"),
        ("unclean", 1, [0, 1, 2], "resumed"),
        ("unclean", 2, [0, 1], "recovered after a power failure, 1 block forgotten"),
        ("switched", 2, [0, 1, 2, 3, 4, 5], "recovered after a power failure, 0 blocks forgotten"),
    ],
)
def test_a_file_of_version_2_is_gone_on_with(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    which: str,
    boot: int,
    kept: List[int],
    said: str,
    grown: int,
) -> None:
    """All that is cached counts as written then; so it does if an earlier start has died over this."""
    caplog.set_level("INFO", "xnbd")
    cache = made_by_version_2(tmp_path, which)
    with cache.state.open("ab") as file:
        file.write(b"\xa5" * grown)
    shared = cache.open(boot=boot, origin=ORIGIN)
    assert said in caplog.text
    assert set_blocks(shared, BLOCKS) == written_blocks(shared, BLOCKS) == kept
    assert cache.state.read_bytes()[8] == 3
    assert shared.mark_clean(cache.fd)
    shared.close()
    with closing(cache.open(boot=3, origin=ORIGIN)) as later:
        assert set_blocks(later, BLOCKS) == written_blocks(later, BLOCKS) == kept


def test_there_has_to_be_room_for_the_written_map(tmp_path: Path) -> None:
    """Once there is, nothing is lost."""
    with small_tmpfs(tmp_path / "small", "100K") as directory:
        (tmp_path / "cache").touch()
        (directory / "cache").symlink_to(tmp_path / "cache")
        cache = made_by_version_2(directory, "clean")
        with pytest.raises(ConfigurationError, match="version 2 has to grow to 131080 bytes, and there is no room: "):
            cache.open(origin=ORIGIN)
        assert cache.state.read_bytes()[8] == 2
        run("mount", "-o", "remount,size=10M", directory)
        with closing(cache.open(origin=ORIGIN)) as shared:
            assert set_blocks(shared, BLOCKS) == written_blocks(shared, BLOCKS) == [0, 1, 2]


@pytest.mark.parametrize("size", [STATE_SIZE - 1, layout_of(SIZE).size + 1])
def test_a_file_of_version_2_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    cache = made_by_version_2(tmp_path, "clean")
    os.truncate(cache.state, size)
    with pytest.raises(ConfigurationError, match=f"has {size} bytes, not the {STATE_SIZE} for"):
        cache.open(origin=ORIGIN)
