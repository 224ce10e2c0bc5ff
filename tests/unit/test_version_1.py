"""State files of version 1, byte by byte as release 0.5.0 has written them, under the code of today."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Dict, List

import pytest
from power_failure import ORIGIN
from state_files import Cache, set_blocks, written_blocks

from xnbd.errors import ConfigurationError
from xnbd.proxy.state.belonging import ATTRIBUTE
from xnbd.proxy.state.format import Steering, identity
from xnbd.proxy.state.known import is_switched, known_size

SIZE = 5 * 4096 + 100
BLOCKS = 6
STATE_SIZE = 12296
MOVED = "nbd://moved:1/disk"

HEADER = (
    "784e42440d0a1a73" "01000000" "00100000" "{flags}000000" "6450000000000000" "00000001000040008000000000000000"
    "11000000" "6e62643a2f2f6f726967696e2f6469736b"
)  # fmt: skip
CLOSED = {0: HEADER.format(flags="01"), 304: "d5dfdd77", 2048: "02000000000000000200000000000000"}
USED = {**CLOSED, 0: HEADER.format(flags="00"), 304: "ec598e5b"}

FILES: Dict[str, Dict[int, str]] = {
    "clean": {**CLOSED, 12288: "07"},
    "unclean": {**USED, 2048: "01000000000000000100000000000000", 4096: "01", 12288: "03"},
    "switched": {**USED, 2560: "f7df88a90100000000000000", 12288: "3f"},
    "moved": {**CLOSED, 2560: "786b155900000000120000006e62643a2f2f6d6f7665643a312f6469736b", 12288: "07"},
}
"""What is not zero, by offset. Made by the code of commit 791ddb4, in the boot that a `Cache` has as number 1."""

LIVE = {"clean": 0x07, "unclean": 0x07, "switched": 0x3F, "moved": 0x07}


def written_by_0_5_0(directory: Path, which: str) -> Cache:
    cache = Cache(directory, SIZE)
    state = bytearray(STATE_SIZE)
    for offset, data in FILES[which].items():
        octets = bytes.fromhex(data)
        state[offset : offset + len(octets)] = octets
    cache.state.write_bytes(state)
    cache.bitmap.write_bytes(bytes([LIVE[which]]).ljust(8, b"\0"))
    return cache


@pytest.mark.parametrize(
    ("which", "boot", "kept", "said"),
    [
        ("clean", 1, [0, 1, 2], "resumed"),
        ("clean", 2, [0, 1, 2], "resumed"),
        ("unclean", 1, [0, 1, 2], "resumed"),
        ("unclean", 2, [0, 1], "recovered after a power failure, 1 block forgotten"),
        ("switched", 1, [0, 1, 2, 3, 4, 5], "resumed"),
        ("switched", 2, [0, 1, 2, 3, 4, 5], "recovered after a power failure, 0 blocks forgotten"),
        ("moved", 2, [0, 1, 2], "resumed"),
    ],
)
def test_a_file_of_version_1_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str, boot: int, kept: List[int], said: str
) -> None:
    """And it has version 3 then, in which all of it counts as written, and counts in every later boot."""
    caplog.set_level("INFO", "xnbd")
    cache = written_by_0_5_0(tmp_path, which)
    assert known_size(str(cache.bitmap)) == SIZE
    shared = cache.open(boot=boot)
    assert said in caplog.text
    assert set_blocks(shared, BLOCKS) == kept
    assert shared.steering == Steering(address=MOVED if which == "moved" else "")
    assert cache.state.read_bytes()[8] == 3
    assert written_blocks(shared, BLOCKS) == kept
    assert os.getxattr(cache.fd, ATTRIBUTE)
    assert shared.mark_clean(cache.fd)
    shared.close()
    with closing(cache.open(boot=3)) as later:
        assert set_blocks(later, BLOCKS) == written_blocks(later, BLOCKS) == kept


@pytest.mark.parametrize("origin", [ORIGIN, MOVED])
def test_a_moved_origin_of_version_1_may_be_named_by_either_address(tmp_path: Path, origin: str) -> None:
    with closing(written_by_0_5_0(tmp_path, "moved").open(origin=origin)):
        pass
    assert (tmp_path / "bitmap.state").read_bytes()[48:].startswith(identity(ORIGIN))


def test_a_switch_of_version_1_is_known(tmp_path: Path) -> None:
    cache = written_by_0_5_0(tmp_path, "switched")
    assert is_switched(str(cache.bitmap))
    cache.open().close()
    assert not is_switched(str(cache.bitmap))


@pytest.mark.parametrize(
    ("which", "live", "boot", "refusal"),
    [
        ("clean", 0x0F, 2, "has 1 block that its copy in .* has not, and lacks 0"),
        ("clean", 0x06, 1, "has 0 blocks that its copy in .* has not, and lacks 1"),
        ("unclean", 0x05, 1, "has 1 block that its copy in .* has not, and lacks 1"),
        ("switched", 0x1F, 1, "by force with 1 block missing"),
    ],
)
def test_a_bitmap_that_contradicts_a_file_of_version_1_is_refused(
    tmp_path: Path, which: str, live: int, boot: int, refusal: str
) -> None:
    cache = written_by_0_5_0(tmp_path, which)
    if which == "switched":  # by force: the durable copy says so too
        with cache.state.open("rb+") as file:
            file.seek(12288)
            file.write(bytes([live]))
    cache.bitmap.write_bytes(bytes([live]).ljust(8, b"\0"))
    before = cache.state.read_bytes(), cache.bitmap.read_bytes()
    with pytest.raises(ConfigurationError, match=refusal):
        cache.open(boot=boot)
    assert (cache.state.read_bytes(), cache.bitmap.read_bytes()) == before
