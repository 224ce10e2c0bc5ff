"""A bitmap's files that are there already: what contradicts itself, and what fails on the way, has less believed."""

from __future__ import annotations

import errno
import os
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from power_failure import watching_syncs
from state_files import PAGE_BLOCKS, Cache, set_blocks

from xnbd.errors import ConfigurationError
from xnbd.proxy.state import copies, files
from xnbd.proxy.state.format import NO_BOOT, Steering, layout_of
from xnbd.storage import space

SIZE = 64 * 4096


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path, SIZE)


@contextmanager
def syncs_fail(cache: Cache, which: Callable[[str], bool], times: int = 1) -> Iterator[None]:
    """The first syncs of the files whose names are *which*, so many *times*."""
    left = [OSError(errno.EIO, "it is told once")] * times

    def fail(fd: int) -> None:
        if left and which(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))):
            raise left.pop()

    with watching_syncs(lambda _fd, _whole: None, fail):
        yield
    assert not left


def use(cache: Cache, *, clean: bool) -> None:
    """Blocks 0 and 1 are durable; without a *clean* end block 2 is not."""
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 0, 2)
        process.checkpoint(cache.fd)
        if not clean:
            cache.fill(process, 2, 3)
    if clean:
        assert shared.mark_clean(cache.fd)
    shared.close()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def test_two_copies_that_agree_on_what_was_not_noted_are_refused(cache: Cache) -> None:
    use(cache, clean=True)
    overwrite(cache.bitmap, 0, b"\x0f")
    overwrite(cache.state, layout_of(SIZE).durable, b"\x0f")
    with pytest.raises(ConfigurationError, match=r"were changed since they were closed.*--adopt-cache"):
        cache.open()
    with closing(cache.open(adopt=True)) as shared:
        assert set_blocks(shared, cache.blocks) == [0, 1, 2, 3]


def test_a_live_bitmap_that_is_about_to_be_replaced_does_not_excuse_a_forced_switch(cache: Cache) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 0, 2)
        process.checkpoint(cache.fd)
    assert shared.mark_clean(cache.fd)
    shared.steer(Steering(switched=True))
    shared.close()
    Path(f"{cache.bitmap}.board").unlink()
    overwrite(cache.bitmap, 0, b"\xff" * 8)
    with pytest.raises(ConfigurationError, match="by force with 62 blocks missing"):
        cache.open()


@pytest.mark.parametrize("boot", [1, 2])
def test_a_failure_that_is_heard_at_the_start_is_one_of_the_facts(
    cache: Cache, caplog: pytest.LogCaptureFixture, boot: int
) -> None:
    use(cache, clean=False)
    with syncs_fail(cache, lambda name: name == "cache"):
        shared = cache.open(boot=boot)
    assert "recovered after a failed write-back (Input/output error), 1 block forgotten" in caplog.text
    assert set_blocks(shared, cache.blocks) == [0, 1]
    assert shared.mark_clean(cache.fd)
    shared.close()


def test_a_failed_sync_of_the_mark_is_noted(cache: Cache) -> None:
    cache.bitmap.write_bytes(bytes(8))
    with syncs_fail_from_second(cache), pytest.raises(ConfigurationError, match="write-back failed at"):
        cache.open()
    with cache.state.open("rb") as file:
        assert files.read_failure(file.fileno()) is not None


@contextmanager
def syncs_fail_from_second(cache: Cache) -> Iterator[None]:
    """The second sync of the cache image, which is the mark's when a bitmap is taken over."""
    seen = iter([False, True])
    with syncs_fail(cache, lambda name: name == "cache" and next(seen, False)):
        yield


def test_a_live_bitmap_that_could_not_be_written_in_a_recovery_is_written_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are clean in memory after the failure, with older ones on the disk."""
    use(cache, clean=False)
    with cache.state.open("rb+") as state:
        files.failure_record(state.fileno()).note(errno.EIO)
    with syncs_fail(cache, lambda name: name == "bitmap"), pytest.raises(ConfigurationError, match="it is told once"):
        cache.open()
    written: List[str] = []
    write_all = space.write_all

    def noting(fd: int, data: memoryview, offset: int) -> None:
        written.append(os.readlink(f"/proc/self/fd/{fd}"))
        write_all(fd, data, offset)

    monkeypatch.setattr(space, "write_all", noting)
    cache.open().close()
    assert str(cache.bitmap) in written


def test_a_failure_from_the_making_of_the_files_does_not_keep_the_next_start_from_finishing_it(cache: Cache) -> None:
    with closing(cache.open()):
        pass
    with cache.state.open("rb+") as state:
        header = files.read_header(state.fileno())
        files.put_header(state.fileno(), header._replace(boot_id=NO_BOOT))
        files.failure_record(state.fileno()).note(errno.EIO)
    cache.bitmap.unlink()
    with closing(cache.open()) as shared:
        assert set_blocks(shared, cache.blocks) == []


def test_a_comparison_tells_which_copy_has_more_and_whether_marks_explain_it(tmp_path: Path) -> None:
    disk = Cache(tmp_path, 2 * PAGE_BLOCKS * 4096)
    with closing(disk.open()):
        pass
    layout = layout_of(disk.disk_size)
    with disk.bitmap.open("rb+") as live, disk.state.open("rb+") as state:
        fds = live.fileno(), state.fileno()
        assert copies.compare(*fds, layout, told=False)[:3] == (0, 0, True)
        os.pwrite(fds[0], b"\x07", 4096)
        assert copies.compare(*fds, layout, told=False)[:3] == (3, 0, False)
        os.pwrite(fds[1], b"\x01", layout.dirty + 1)
        assert copies.compare(*fds, layout, told=False)[:3] == (3, 0, True)
        os.pwrite(fds[1], b"\x08", layout.durable + 4096)
        assert copies.compare(*fds, layout, told=False)[:3] == (3, 1, False)
