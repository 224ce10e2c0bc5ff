"""Zeros, holes and extents in real files, on the file system of the tests and on a tmpfs.

A tmpfs punches holes but cannot zero a range otherwise than by writing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from xnbd.storage import space
from xnbd.storage.extents import file_extents

KIB = 1 << 10
MIB = 1 << 20

Operation = Callable[[int, int, int], None]


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    on_tmpfs = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="xnbd-test-"))
    yield on_tmpfs
    shutil.rmtree(on_tmpfs)


@pytest.fixture
def tmpfs_file() -> Iterator[int]:
    """1 MiB of noise on a tmpfs."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(b"\xa5" * MIB)
        file.flush()
        yield file.fileno()


@pytest.fixture
def fd(directory: Path) -> Iterator[int]:
    """A file of 1 MiB and 3 bytes without holes."""
    path = directory / "file"
    path.write_bytes(b"\xa5" * (MIB + 3))
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def blocks(fd: int) -> int:
    """Bytes that the file takes on the disk."""
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


def extents(fd: int, offset: int, length: int) -> List[Tuple[int, bool]]:
    return [(extent.length, extent.hole) for extent in file_extents(fd, offset, length)]


RANGES = [(0, MIB + 3), (1, 1), (4095, 4098), (5000, 300_001), (8 * KIB, 64 * KIB), (MIB, 3)]


@pytest.mark.parametrize("operation", [space.punch_hole, space.discard, space.write_zero_bytes])
@pytest.mark.parametrize("offset, length", RANGES)
def test_zeros_are_exact_to_the_byte(fd: int, operation: Operation, offset: int, length: int) -> None:
    operation(fd, offset, length)
    assert os.pread(fd, 2 * MIB, 0) == b"\xa5" * offset + bytes(length) + b"\xa5" * (MIB + 3 - offset - length)


@pytest.mark.parametrize("offset, length", RANGES)
def test_zero_range_is_exact_to_the_byte_or_not_supported(fd: int, offset: int, length: int) -> None:
    before = os.pread(fd, 2 * MIB, 0)
    try:
        space.zero_range(fd, offset, length)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        assert os.pread(fd, 2 * MIB, 0) == before
    else:
        assert os.pread(fd, 2 * MIB, 0) == before[:offset] + bytes(length) + before[offset + length :]


def test_zero_range_is_not_supported_on_tmpfs(tmpfs_file: int) -> None:
    with pytest.raises(OSError) as caught:
        space.zero_range(tmpfs_file, 0, MIB)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert os.pread(tmpfs_file, 2 * MIB, 0) == b"\xa5" * MIB


@pytest.mark.parametrize("operation", [space.punch_hole, space.discard])
def test_space_is_given_back(fd: int, operation: Operation) -> None:
    before = blocks(fd)
    operation(fd, 100, 512 * KIB)
    assert blocks(fd) <= before - 500 * KIB


def test_written_zeros_stay_allocated(fd: int) -> None:
    before = blocks(fd)
    space.write_zero_bytes(fd, 0, MIB)
    assert blocks(fd) >= before


def test_zeros_never_make_a_file_longer(fd: int) -> None:
    space.punch_hole(fd, MIB, 3)
    assert os.fstat(fd).st_size == MIB + 3


def test_work_longer_than_a_step_is_done_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xa5" * (300 * KIB))
    monkeypatch.setattr(space, "STEP", 64 * KIB)
    with path.open("r+b") as file:
        space.punch_hole(file.fileno(), 10_001, 250_000)
    assert path.read_bytes() == b"\xa5" * 10_001 + bytes(250_000) + b"\xa5" * (300 * KIB - 260_001)


def test_short_writes_are_continued(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 1)
    with (tmp_path / "file").open("w+b") as file:
        space.write_all(file.fileno(), memoryview(data), 7)
        assert os.pread(file.fileno(), 4 * MIB, 0) == bytes(7) + data


def test_full_device_is_an_error_of_write_all() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:
        space.write_all(full.fileno(), memoryview(b"data"), 0)
    assert caught.value.errno == errno.ENOSPC


def test_size_of_a_file(fd: int) -> None:
    assert space.device_size(fd) == MIB + 3


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_what_has_no_size_is_refused(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            space.device_size(descriptor)
    finally:
        os.close(descriptor)
    assert caught.value.errno == errno.ENODEV


def test_a_file_without_holes_is_one_extent(fd: int) -> None:
    assert extents(fd, 0, MIB + 3) == [(MIB + 3, False)]
    assert extents(fd, 5, 7) == [(7, False)]


def test_extents_tell_data_from_holes(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.ftruncate(fd, MIB)
    os.pwrite(fd, b"\xa5" * 64 * KIB, 128 * KIB)
    assert extents(fd, 0, MIB) == [(128 * KIB, True), (64 * KIB, False), (832 * KIB, True)]
    assert extents(fd, 130 * KIB, 10) == [(10, False)]
    assert extents(fd, 128 * KIB - 1, 3) == [(1, True), (2, False)]
    assert extents(fd, 192 * KIB - 1, 3) == [(1, False), (2, True)]


def test_a_sparse_file_is_one_hole(directory: Path) -> None:
    with (directory / "sparse").open("w+b") as file:
        file.truncate(1 << 40)
        assert extents(file.fileno(), 0, 1 << 40) == [(1 << 40, True)]
        assert extents(file.fileno(), (1 << 40) - 1, 1) == [(1, True)]


def test_beyond_the_end_of_the_file_is_a_hole(fd: int) -> None:
    assert extents(fd, 0, 2 * MIB)[-1][1]
    assert sum(length for length, _ in extents(fd, 0, 2 * MIB)) == 2 * MIB
    assert extents(fd, 3 * MIB, 10) == [(10, True)]


def test_no_bytes_have_no_extents(fd: int) -> None:
    assert extents(fd, 0, 0) == []
