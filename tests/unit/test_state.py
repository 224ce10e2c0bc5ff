"""The bitmap of a cache on disk: opened, taken over, recovered, refused; checkpoints; crashes and power failures."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from mounts import small_tmpfs
from power_failure import ORIGIN, Odds, Paused, World, at_every_line, content_of, watching_syncs
from server_process import children_of, run, wait_until
from state_files import DISK, PAGE_BLOCKS, Cache, set_blocks
from test_bitmap import run_processes

from xnbd.errors import ConfigurationError
from xnbd.proxy.state import belonging
from xnbd.proxy.state.checkpoint import ProcessState
from xnbd.proxy.state.copies import Region
from xnbd.proxy.state.files import is_alone
from xnbd.proxy.state.format import BadHeader, Header, Steering, identity, layout_of, pack_header, parse_header
from xnbd.proxy.state.known import is_switched, known_size
from xnbd.proxy.state.opening import open_state
from xnbd.proxy.state.scoreboard_file import MAXIMUM_PROCESSES
from xnbd.proxy.state.shared import SharedState
from xnbd.scoreboard.layout import TARGET, scoreboard_size
from xnbd.storage.bitmap import bitmap_size
from xnbd.storage.blocks import BLOCK, bytes_of
from xnbd.system.file_locks import RangeLocks, do_nothing

MIB = 1 << 20
TIB = 1 << 40


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory: syncs cost nothing there."""
    path = Path(tempfile.mkdtemp(prefix="xnbd-state-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def same_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a cache image stand for the same one after a power failure."""
    monkeypatch.setattr(belonging, "file_number", lambda status: 7)


@pytest.fixture
def cache(scratch: Path) -> Cache:
    (scratch / "cache").mkdir()
    return Cache(scratch / "cache")


def contents(directory: Path) -> Dict[str, Tuple[bytes, int]]:
    """Every file but the cache: its bytes and its inode."""
    return {p.name: (p.read_bytes(), p.stat().st_ino) for p in directory.iterdir() if p.name != "cache"}


def sleeps(pid: int) -> int:
    """How often the process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


# Opening


@pytest.mark.parametrize(
    "blocks", [1, 63, 64, 65, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 1, 4096 * PAGE_BLOCKS + 1]
)
def test_a_new_bitmap_is_empty_and_keeps_its_last_block(scratch: Path, blocks: int) -> None:
    cache = Cache(scratch, blocks * BLOCK - 1)
    shared = cache.open()
    assert cache.bitmap.stat().st_size == bitmap_size(blocks)
    assert set_blocks(shared, blocks) == []
    with closing(shared.open_process()) as process:
        cache.fill(process, blocks - 1, blocks)
        assert process.changed
        process.checkpoint(cache.fd)
        assert not process.changed
    shared.close()
    assert set_blocks(cache.open(boot=2), blocks) == [blocks - 1]


def test_all_space_of_both_files_is_allocated(tmp_path: Path) -> None:
    cache = Cache(tmp_path, TIB)
    cache.open()
    for path in (cache.bitmap, cache.state):
        assert path.stat().st_blocks * 512 >= path.stat().st_size >= TIB // BLOCK // 8


def test_files_that_were_left_alone_are_not_read_at_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one page of the bitmap, its copy and the written map, of a disk as large as there are."""
    cache = Cache(tmp_path, 15 * TIB)
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 7, 9)
        process.written.set(8, 9)
    assert shared.mark_clean(cache.fd)
    shared.close()
    monkeypatch.setattr(Region, "read", None)
    for boot in (1, 2):
        shared = cache.open(boot=boot)
        with closing(shared.open_process()) as process:
            assert [(n in process.bitmap, n in process.written) for n in (7, 8, 9)] == [
                *((True, False), (True, True), (False, False))
            ]
        monkeypatch.undo()
        assert shared.mark_clean(cache.fd)
        shared.close()
        monkeypatch.setattr(Region, "read", None)
    os.utime(cache.bitmap)
    with pytest.raises(TypeError):
        cache.open()


@pytest.mark.parametrize("name", ["bitmap", "bitmap.state"])
def test_files_that_were_changed_after_their_end_are_read(cache: Cache, name: str) -> None:
    """At once: within the tick of the kernel's clock in which they were closed."""
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 0, 3)
    assert shared.mark_clean(cache.fd)
    at = layout_of(DISK).durable if name.endswith("state") else 0
    with (cache.directory / name).open("rb+") as file:
        file.seek(at)
        file.write(b"\xff")
    shared.close()
    with closing(cache.open()) as later:
        assert set_blocks(later, cache.blocks) == [0, 1, 2]


def test_nothing_is_lost_when_all_processes_die(cache: Cache) -> None:
    shared = cache.open()
    process = shared.open_process()
    cache.fill(process, 5, 12)
    process.close()
    shared.close()
    assert set_blocks(cache.open(), cache.blocks) == list(range(5, 12))


def test_what_no_checkpoint_covered_is_forgotten_by_a_power_failure(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    shared = cache.open()
    process = shared.open_process()
    cache.fill(process, 0, 3)
    process.checkpoint(cache.fd)
    cache.fill(process, PAGE_BLOCKS - 2, PAGE_BLOCKS + 2)
    process.close()
    shared.close()
    recovered = cache.open(boot=2)
    assert set_blocks(recovered, cache.blocks) == [0, 1, 2]
    assert "recovered after a power failure, 4 blocks forgotten" in caplog.text


def test_a_clean_end_keeps_everything_without_a_recovery(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 7, 9)
    assert shared.mark_clean(cache.fd)
    shared.close()
    caplog.set_level("INFO", "xnbd")
    assert set_blocks(cache.open(boot=2), cache.blocks) == [7, 8]
    assert "resumed" in caplog.text
    assert "recovered" not in caplog.text


def test_a_bitmap_opened_after_a_clean_end_is_not_clean(cache: Cache) -> None:
    shared = cache.open()
    shared.mark_clean(cache.fd)
    shared.close()
    shared = cache.open(boot=2)
    with closing(shared.open_process()) as process:
        process.bitmap.set(1, 2)
    shared.close()
    assert set_blocks(cache.open(boot=3), cache.blocks) == []


def test_only_the_last_server_closes_cleanly(cache: Cache) -> None:
    one, two = cache.open(), cache.open()
    assert not one.mark_clean(cache.fd)
    one.close()
    worker = two.open_process()
    assert not two.mark_clean(cache.fd)
    worker.close()
    assert two.mark_clean(cache.fd)


def test_a_worker_that_opens_after_its_master_has_left_takes_the_mark_back(cache: Cache) -> None:
    shared = cache.open()
    assert shared.mark_clean(cache.fd)
    with closing(shared.open_process()) as process:
        process.bitmap.set(4, 5)
    shared.close()
    assert set_blocks(cache.open(boot=2), cache.blocks) == []


def test_a_bitmap_of_the_c_program_is_taken_over(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "xnbd")
    bitmap = bytearray(bitmap_size(cache.blocks))
    bitmap[0:2] = b"\x05\x80"
    bitmap[-1:] = b"\x00"
    bitmap[4096] = 1
    cache.bitmap.write_bytes(bitmap)
    inode = cache.bitmap.stat().st_ino
    shared = cache.open()
    assert "taken over" in caplog.text
    assert set_blocks(shared, cache.blocks) == [0, 2, 15, PAGE_BLOCKS]
    assert (cache.bitmap.read_bytes(), cache.bitmap.stat().st_ino) == (bytes(bitmap), inode)
    shared.close()
    assert set_blocks(cache.open(boot=2), cache.blocks) == [0, 2, 15, PAGE_BLOCKS]


def test_data_of_a_bitmap_that_is_taken_over_is_synced_before_the_state_file_is_there(cache: Cache) -> None:
    cache.bitmap.write_bytes(bytes(bitmap_size(cache.blocks)))
    synced: List[Tuple[str, bool]] = []
    with watching_syncs(lambda fd, _: synced.append((os.readlink(f"/proc/self/fd/{fd}"), cache.state.exists()))):
        cache.open()
    assert (str(cache.directory / "cache"), False) in synced


def test_what_the_c_program_did_to_a_closed_bitmap_is_believed_if_somebody_vouches_for_it(cache: Cache) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 3, 5)
    shared.mark_clean(cache.fd)
    shared.close()
    bitmap = bytearray(cache.bitmap.read_bytes())
    bitmap[0], bitmap[4096] = 0, 1
    cache.bitmap.write_bytes(bitmap)
    os.pwrite(cache.fd, content_of(PAGE_BLOCKS, 1), PAGE_BLOCKS * BLOCK)
    with pytest.raises(ConfigurationError, match=r"was changed since its proxy has closed it.*--adopt-cache"):
        cache.open()
    cache.open(boot=1, adopt=True).close()
    assert set_blocks(cache.open(boot=2), cache.blocks) == [PAGE_BLOCKS]


def test_clearing_forgets_everything_and_fits_another_disk(cache: Cache) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 3, 5)
        process.checkpoint(cache.fd)
    shared.close()
    cache.disk_size = 5 * BLOCK
    shared = cache.open(clear=True, origin="another")
    assert set_blocks(shared, 5) == []
    assert cache.bitmap.stat().st_size == 8
    shared.close()
    assert set_blocks(cache.open(boot=2, origin="another"), 5) == []


def test_a_symbolic_link_leads_to_the_state_file_beside_the_bitmap(cache: Cache, scratch: Path) -> None:
    cache.open().close()
    link = scratch / "link"
    link.symlink_to(cache.bitmap)
    open_state(str(link), cache.fd, disk_size=DISK, origin=ORIGIN, clear=True).close()
    assert link.is_symlink()
    assert not (scratch / "link.state").exists()


def test_a_long_identity_is_kept_by_its_hash(cache: Cache) -> None:
    cache.open(origin="o" * 500).close()
    cache.open(origin="o" * 500).close()
    with pytest.raises(ConfigurationError, match="is of the origin"):
        cache.open(origin="o" * 501)


def test_servers_that_start_at_once_agree(cache: Cache) -> None:
    """On nothing, on a C program's bitmap, and after a power failure: every bit any of them sets is there."""
    for boot in range(1, 31):
        if boot % 3 == 1:
            cache.bitmap.unlink(missing_ok=True)
            os.ftruncate(cache.fd, 0)
            os.ftruncate(cache.fd, DISK)
        if boot % 3 != 0:
            cache.forget()

        def serve(boot: int, number: int) -> None:
            shared = cache.open(boot=boot)
            process = shared.open_process()
            fills = RangeLocks(process.fd)
            fills.acquire(0, 1, do_nothing)
            cache.fill(process, number, number + 1)
            fills.release(0, 1)
            process.checkpoint(cache.fd)

        run_processes([partial(serve, boot, number) for number in range(6)])
        shared = cache.open(boot=boot + 1)
        assert set(range(6)) <= set(set_blocks(shared, cache.blocks))
        shared.close()
        assert {path.name for path in cache.directory.iterdir() if "boot" not in path.name} == {
            "cache",
            "bitmap",
            "bitmap.state",
            "bitmap.board",
            "bitmap.sums",
            "bitmap.checked",
        }


# Refusals


def corrupt(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def other_version(cache: Cache) -> None:
    corrupt(cache.state, 8, b"\x07\0\0\0")


def damage(cache: Cache) -> None:
    corrupt(cache.state, 30, b"!")


def no_state_file(cache: Cache) -> None:
    corrupt(cache.state, 0, b"JUNK")


def short_state(cache: Cache) -> None:
    os.truncate(cache.state, cache.state.stat().st_size - 8)


def empty_state(cache: Cache) -> None:
    os.truncate(cache.state, 0)


def long_bitmap(cache: Cache) -> None:
    os.truncate(cache.bitmap, cache.bitmap.stat().st_size + 8)


def lost_bitmap(cache: Cache) -> None:
    cache.bitmap.unlink()


def foreign_bitmap(cache: Cache) -> None:
    cache.state.unlink()
    long_bitmap(cache)


def other_size(cache: Cache) -> None:
    cache.disk_size += 1


def no_change(_cache: Cache) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "origin", "message"),
    [
        (other_version, ORIGIN, "version 7"),
        (damage, ORIGIN, "checksum"),
        (no_state_file, ORIGIN, "is not the state file"),
        (short_state, ORIGIN, "bytes, not the"),
        (empty_state, ORIGIN, "is not the state file"),
        (long_bitmap, ORIGIN, "bytes, not the"),
        (foreign_bitmap, ORIGIN, "bytes, not the"),
        (lost_bitmap, ORIGIN, "is gone"),
        (other_size, ORIGIN, "is of a disk of"),
        (no_change, "nbd://other\n", r"is of the origin 'nbd://origin:10809/disk', not of 'nbd://other\\n'"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_as_it_is(
    cache: Cache, change: Callable[[Cache], None], origin: str, message: str
) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 0, 40)
        process.checkpoint(cache.fd)
        cache.fill(process, PAGE_BLOCKS, PAGE_BLOCKS + 1)
    shared.close()
    change(cache)
    cache.boot_id_file(2)
    before = contents(cache.directory)
    for boot in (1, 2):
        with pytest.raises(ConfigurationError, match=message) as refusal:
            cache.open(boot=boot, origin=origin)
        assert "--clear-bitmap" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert contents(cache.directory) == before
    assert set_blocks(cache.open(origin=origin, clear=True), cache.blocks) == []


@pytest.mark.parametrize("clear", [False, True])
def test_what_is_no_regular_file_is_refused(cache: Cache, clear: bool) -> None:
    os.mkfifo(cache.state)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        cache.open(clear=clear)


def test_files_in_use_are_not_cleared(cache: Cache) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 0, 40)
    cache.boot_id_file(2)
    before = contents(cache.directory)
    with pytest.raises(ConfigurationError, match="in use: stop its servers"):
        cache.open(clear=True)
    with pytest.raises(ConfigurationError, match="in use on another machine"):
        cache.open(boot=2)
    assert contents(cache.directory) == before


def test_a_directory_that_is_not_there_is_named(cache: Cache) -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/bitmap .*No such file"):
        open_state("/nowhere/bitmap", cache.fd, disk_size=DISK, origin=ORIGIN)


# The format


def test_headers_of_version_1_stay_readable() -> None:
    """These bytes were written by the first release; they must never have to change."""
    packed = bytes.fromhex(
        "784e42440d0a1a73" "01000000" "00100000" "01000000" "0000000001000000"
        "00112233445566778899aabbccddeeff" "04000000" "6469736b"
    ).ljust(304, b"\0") + bytes.fromhex("f123194d")  # fmt: skip
    header = Header(1 << 32, b"disk", bytes.fromhex("00112233445566778899aabbccddeeff"), clean=True, version=1)
    assert parse_header(packed.ljust(512, b"\0")) == header


def test_a_header_with_any_bit_flipped_is_refused(seed: int) -> None:
    packed = pack_header(Header(123456, b"an origin", bytes(range(16)), clean=False))
    for position in random.Random(seed).sample(range(308 * 8), 300):
        flipped = bytearray(packed)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(BadHeader):
            parse_header(bytes(flipped))


# Checkpoints


def test_a_checkpoint_costs_what_has_changed_and_not_what_the_disk_has(tmp_path: Path) -> None:
    """Of a disk of 1 TiB, bytes passed by system calls and pages touched in mappings."""
    cache = Cache(tmp_path, TIB)
    with closing(cache.open().open_process()) as process:
        for block in (0, cache.blocks - 1):
            cache.fill(process, block, block + 1)
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            before = bytes_passed()
            process.checkpoint(cache.fd)
            after = bytes_passed()
            assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults < 100
            assert after["rchar"] - before["rchar"] < 4096
            assert 4096 <= after["wchar"] - before["wchar"] < 2 * 4096


def bytes_passed() -> Dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", Path("/proc/thread-self/io").read_text())}


def test_a_checkpoint_saves_everything_of_a_large_disk_in_parts(scratch: Path) -> None:
    cache = Cache(scratch, TIB)
    shared = cache.open()
    with closing(shared.open_process()) as process:
        process.bitmap.set(0, cache.blocks)
        process.checkpoint(cache.fd)
        assert not process.changed
    layout = layout_of(TIB)
    with cache.state.open("rb") as file:
        file.seek(layout.durable)
        assert file.read(layout.bitmap_size) == b"\xff" * layout.bitmap_size


def test_a_checkpoint_that_began_while_another_one_waited_serves_both(cache: Cache) -> None:
    """Eight come while the lock is held: the first of them works for all."""
    shared = cache.open()
    gate = os.open(cache.state, os.O_RDWR)
    RangeLocks(gate).acquire(1, 1, do_nothing)
    ready, ready_writer = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if not pid:
            try:
                process = shared.open_process()
                os.write(ready_writer, b"x")
                process.checkpoint(cache.fd)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    for _ in children:
        os.read(ready, 1)
    for pid in children:
        slept = sleeps(pid)
        wait_until(lambda pid=pid, slept=slept: sleeps(pid) > slept + 2, "a process that waits for the lock")
    RangeLocks(gate).release(1, 1)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
    begun = int.from_bytes(os.pread(gate, 8, 2048), "little")
    assert begun == int.from_bytes(os.pread(gate, 8, 2056), "little") == 1


def test_a_checkpoint_that_had_begun_before_serves_nobody_else(cache: Cache) -> None:
    """Number 5 was under way when the call came: it may have looked at the page before the bit was set."""
    shared = cache.open()
    gate = os.open(cache.state, os.O_RDWR)
    RangeLocks(gate).acquire(1, 1, do_nothing)
    os.pwrite(gate, (5).to_bytes(8, sys.byteorder), 2048)
    process = shared.open_process()
    cache.fill(process, 3, 4)

    def finish_number_5() -> None:
        os.pwrite(gate, (5).to_bytes(8, sys.byteorder), 2056)
        RangeLocks(gate).release(1, 1)

    process.checkpoint(cache.fd, finish_number_5)
    assert not process.changed
    process.close()
    shared.close()
    assert set_blocks(cache.open(boot=2), cache.blocks) == [3]


def test_whoever_waits_for_a_checkpoint_may_give_up(cache: Cache) -> None:
    def give_up() -> None:
        raise TimeoutError

    with closing(cache.open().open_process()) as process:
        gate = os.open(cache.state, os.O_RDWR)
        RangeLocks(gate).acquire(1, 1, do_nothing)
        with pytest.raises(TimeoutError):
            process.checkpoint(cache.fd, give_up)
        RangeLocks(gate).release(1, 1)
        process.checkpoint(cache.fd)


@pytest.mark.parametrize("filler_first", [True, False])
def test_a_fill_and_a_checkpoint_may_interrupt_each_other_at_any_two_lines(cache: Cache, filler_first: bool) -> None:
    """A third process that sees the bit, or comes when the fill is done, and flushes, finds it durable."""
    shared = cache.open()
    filler, flusher, third = (shared.open_process() for _ in range(3))
    fills = RangeLocks(filler.fd)
    durable = layout_of(DISK).durable
    turns = itertools.count()

    def one_turn(fill_line: int, flush_line: int) -> Tuple[bool, bool]:
        block = next(turns) * 8

        def fill() -> None:
            assert fills.try_acquire(block // 8, 1)
            filler.bitmap.set(block, block + 1)
            fills.release(block // 8, 1)

        def check_durable() -> None:
            third.checkpoint(cache.fd)
            with cache.state.open("rb") as file:
                file.seek(durable + block // 8)
                assert file.read(1) == b"\x01", (fill_line, flush_line)

        def flush() -> None:
            flusher.checkpoint(cache.fd)

        if filler_first:
            filling = Paused(fill, fill_line)
            flushing = Paused(flush, flush_line)
            filling.finish()
            flushing.finish()
        else:
            flushing = Paused(flush, flush_line)
            filling = Paused(fill, fill_line)
            flushing.finish()
            if block in third.bitmap:
                check_durable()
            filling.finish()
        check_durable()
        return filling.reached, flushing.reached

    fill_line, reached = 0, True
    while reached:
        fill_line += 1
        flush_line, in_flush = 0, True
        while in_flush:
            flush_line += 1
            reached, in_flush = one_turn(fill_line, flush_line)
    assert fill_line > 10


# Dying


@pytest.mark.usefixtures("same_inodes")
def test_a_process_may_die_at_any_line_of_a_write_and_a_flush(cache: Cache, scratch: Path) -> None:
    """Another one lives on: all that it sees and flushes afterwards survives a power failure."""
    shared = cache.open()
    survivor = shared.open_process()
    block, line, died = 0, 0, True
    while died:
        line += 1
        died = die_at_line(cache, shared, block, line)
        fills = RangeLocks(survivor.fd)
        assert fills.try_acquire(*bytes_of(block, block + 2))
        fills.release(*bytes_of(block, block + 2))
        if line % 2:
            survivor.checkpoint(cache.fd)
        else:
            cache.fill(survivor, block + 3, block + 4)
            survivor.checkpoint(cache.fd)
        seen = [n for first, end, is_set in survivor.bitmap.runs(0, cache.blocks) if is_set for n in range(first, end)]
        after = cache.after_power_failure(scratch / "after")
        recovered = after.open(boot=2)
        assert set_blocks(recovered, cache.blocks) == seen
        recovered.close()
        os.close(after.fd)
        shutil.rmtree(after.directory)
        block += 8
    assert line > 40
    assert block in survivor.bitmap or block - 8 in survivor.bitmap


def die_at_line(cache: Cache, shared: SharedState, block: int, line: int) -> bool:
    """Fill a block and flush, in a process that kills itself before the given line; False if it came to the end."""
    pid = os.fork()
    if not pid:
        countdown = iter(range(line, 0, -1))

        def die_in_time() -> None:
            if next(countdown) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            process = shared.open_process()
            fills = RangeLocks(process.fd)
            with at_every_line(die_in_time):
                fills.acquire(*bytes_of(block, block + 1), do_nothing)
                cache.fill(process, block, block + 1)
                fills.release(*bytes_of(block, block + 1))
                process.checkpoint(cache.fd)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.usefixtures("same_inodes")
@pytest.mark.parametrize("start", ["new", "taken over", "recovered", "resumed", "cleared"])
def test_a_server_may_die_at_any_line_of_its_start(cache: Cache, scratch: Path, seed: int, start: str) -> None:
    """One line in three, others in the next run."""
    boot = 2 if start == "recovered" else 1
    if start == "taken over":
        cache.bitmap.write_bytes(b"\x03".ljust(bitmap_size(cache.blocks), b"\0"))
    elif start != "new":
        shared = cache.open()
        with closing(shared.open_process()) as process:
            cache.fill(process, 0, 2)
            process.checkpoint(cache.fd)
            cache.fill(process, 2, 3)
        shared.close()
    allowed: Dict[str, List[List[int]]] = {
        "new": [[]],
        "taken over": [[0, 1]],
        "recovered": [[0, 1]],
        "resumed": [[0, 1, 2]],
        "cleared": [[0, 1, 2], []],
    }
    line, died = -(seed % 3), True
    while died:
        line += 3
        again = cache.after_power_failure(scratch / "again")
        died = die_while_opening(again, boot, start == "cleared", line)
        shared = again.open(boot=boot)
        found = set_blocks(shared, cache.blocks)
        shared.close()
        assert found in allowed[start]
        assert not list(again.directory.glob("*.new"))
        os.close(again.fd)
        shutil.rmtree(again.directory)
    assert line > 50


def die_while_opening(cache: Cache, boot: int, clear: bool, line: int) -> bool:
    pid = os.fork()
    if not pid:
        countdown = iter(range(line, 0, -1))

        def die_in_time() -> None:
            if next(countdown, 0) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with at_every_line(die_in_time):
                cache.open(boot=boot, clear=clear)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


HAMMERED = 512


@pytest.mark.usefixtures("same_inodes")
def test_no_bit_is_lost_and_none_is_without_data_when_processes_are_killed_at_random(
    cache: Cache, scratch: Path, seed: int
) -> None:
    """Two servers of three processes each fill, overwrite and flush; processes and whole servers are killed."""
    rng = random.Random(seed)
    hammer = Hammer(cache)
    servers = [hammer.spawn_server(rng.random()) for _ in range(2)]
    try:
        until = time.monotonic() + 60
        for turn in itertools.count():
            enough = sum(hammer.answered[:]) > HAMMERED // 4 and any(hammer.flushed[:])
            if (turn >= 250 and enough) or time.monotonic() > until:
                break
            number = rng.randrange(2)
            workers = children_of(servers[number])
            if workers and rng.random() < 0.8:
                kill_one(rng.choice(workers))
            else:
                os.kill(servers[number], signal.SIGKILL)
                os.waitpid(servers[number], 0)
                servers[number] = hammer.spawn_server(rng.random())
            time.sleep(rng.random() * 0.02)
    finally:
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    wait_until(lambda: unused(cache), "the end of all workers")
    shared = cache.open()
    live = set_blocks(shared, cache.blocks)
    assert {n for n in range(HAMMERED) if hammer.answered[n]} <= set(live)
    for block in live:
        content = os.pread(cache.fd, BLOCK, block * BLOCK)
        assert content[:4] == block.to_bytes(4, "little"), f"block {block} is set without data"
    assert len(live) > HAMMERED // 4
    shared.close()
    after = cache.after_power_failure(scratch / "after")
    assert {n for n in range(HAMMERED) if hammer.flushed[n]} <= set(set_blocks(after.open(boot=2), cache.blocks))
    assert any(hammer.flushed[:])
    assert not hammer.failed[0]


def unused(cache: Cache) -> bool:
    fd = os.open(cache.state, os.O_RDWR)
    try:
        return is_alone(fd)
    finally:
        os.close(fd)


def kill_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Hammer:
    """Processes that fill, overwrite and flush blocks, and note what they were told in memory that outlives them."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.answered, self.flushed = mmap.mmap(-1, HAMMERED), mmap.mmap(-1, HAMMERED)
        self.failed = mmap.mmap(-1, 1)

    def spawn_server(self, chance: float) -> int:
        """A process that keeps three others at work."""
        pid = os.fork()
        if pid:
            return pid
        try:
            server, shared = os.getpid(), self._cache.open()
            dice = random.Random(chance)
            for count in itertools.count():
                if count >= 3:
                    os.wait()
                number = dice.random()
                if not os.fork():
                    self._work(server, shared.open_process(), random.Random(number))
                    break
        except BaseException:
            self.failed[0] = 1
            traceback.print_exc()
        finally:
            os._exit(1)

    def _work(self, server: int, process: ProcessState, dice: random.Random) -> None:
        """Go on until the server is gone."""
        cache, fills = self._cache, RangeLocks(process.fd)
        while os.getppid() == server:
            block = dice.randrange(HAMMERED)
            if dice.random() < 0.1:
                self._flush(process)
            elif block in process.bitmap:
                os.pwrite(cache.fd, content_of(block, 2), block * BLOCK)
                self.answered[block] = 1
            elif fills.try_acquire(*bytes_of(block, block + 1)):
                cache.fill(process, block, block + 1)
                fills.release(*bytes_of(block, block + 1))
                self.answered[block] = 1

    def _flush(self, process: ProcessState) -> None:
        promised = self.answered[:]
        process.checkpoint(self._cache.fd)
        for block in range(HAMMERED):
            if promised[block]:
                self.flushed[block] = 1


# Errors

SCOREBOARD = scoreboard_size(MAXIMUM_PROCESSES) >> 10
"""KiB of the scoreboard, which is there as long as the files are in use."""


@pytest.mark.parametrize("start", ["new", "taken over", "cleared"])
def test_files_for_which_there_is_no_space_are_not_made(scratch: Path, start: str) -> None:
    cache = Cache(scratch, 4096 * MIB)
    with small_tmpfs(scratch / "small", f"{160 + SCOREBOARD * (start == 'cleared')}k") as directory:
        cache.bitmap = directory / "bitmap"
        if start == "cleared":
            cache.disk_size = MIB
            cache.open().close()
            cache.disk_size = 4096 * MIB
        elif start == "taken over":
            cache.bitmap.touch()
            os.truncate(cache.bitmap, bitmap_size(cache.blocks))
        before = contents(directory)
        with pytest.raises(ConfigurationError, match="No space left"):
            cache.open(clear=start == "cleared")
        assert contents(directory) == before


def test_a_full_file_system_neither_kills_nor_stops_who_sets_bits(scratch: Path) -> None:
    cache = Cache(scratch, 4096 * MIB)
    with small_tmpfs(scratch / "small", f"{500 + SCOREBOARD}k") as directory:
        cache.bitmap = directory / "bitmap"
        shared = cache.open()
        fill_up(directory / "rest")

        def work() -> None:
            process = shared.open_process()
            process.bitmap.set(0, cache.blocks)
            process.checkpoint(cache.fd)
            process.close()
            assert shared.mark_clean(cache.fd)

        run_processes([work])
        shared.close()
        with closing(cache.open(boot=2).open_process()) as process:
            assert process.bitmap.all_set(0, cache.blocks)


def fill_up(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


LIFE = """
import os, sys
from xnbd.errors import ConfigurationError
from xnbd.proxy.state.opening import open_state

def attempt(action):
    try:
        return action()
    except (OSError, ConfigurationError) as error:
        print("failed:", error)
        return action()

directory, size, boot_id_path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cache = os.open(directory + "/cache", os.O_RDWR)
shared = attempt(lambda: open_state(
    directory + "/bitmap", cache, disk_size=size, origin="nbd://origin/disk", boot_id_path=boot_id_path))
process = attempt(shared.open_process)
for block in (1, 32768):
    process.bitmap.set(block, block + 1)
    attempt(lambda: process.checkpoint(cache))
process.close()
try:
    print("clean:", attempt(lambda: shared.mark_clean(cache)))
except OSError as error:
    print("clean:", error)
"""


@pytest.mark.parametrize(
    ("call", "error"),
    [("pwrite64", "ENOSPC"), ("fsync", "EIO"), ("fallocate", "ENOSPC"), ("rename", "EIO")],
)
def test_any_system_call_may_fail_once_and_the_next_attempt_succeeds(scratch: Path, call: str, error: str) -> None:
    """A whole life of the files under strace, which lets the first, second, third ... call fail."""
    number, injected = 0, True
    while injected:
        number += 1
        directory = scratch / str(number)
        directory.mkdir()
        cache = Cache(directory)
        trace = scratch / "trace"
        inject = f"inject={call}:error={error}:when={number}"
        _, output, _ = run(
            "strace", "-f", "-o", trace, "-e", f"trace={call}", "-e", inject,
            sys.executable, "-c", LIFE, directory, DISK, cache.boot_id_file(1),
        )  # fmt: skip
        injected = "INJECTED" in trace.read_text()
        failed, end = output.count("failed:"), output.splitlines()[-1]
        assert failed == injected or (call == "fallocate" and not failed)  # what has its space already needs none
        assert end == "clean: True" or (call == "fsync" and end.startswith("clean: [Errno 5] write-back failed"))
        assert set_blocks(cache.open(boot=2), cache.blocks) == [1, PAGE_BLOCKS]
        os.close(cache.fd)
    assert number > 2


@contextmanager
def cache_sync_fails_once(cache: Cache) -> Iterator[None]:
    failures = [OSError(errno.EIO, "it is told once")]

    def fail(fd: int) -> None:
        if fd == cache.fd and failures:
            raise failures.pop()

    with watching_syncs(lambda _fd, _whole: None, fail):
        yield
    assert not failures


def test_a_failure_that_only_the_next_start_hears_of_has_it_go_back_to_the_last_checkpoint(cache: Cache) -> None:
    shared = cache.open()
    with closing(shared.open_process()) as process:
        cache.fill(process, 1, 2)
        process.checkpoint(cache.fd)
        cache.fill(process, PAGE_BLOCKS, PAGE_BLOCKS + 2)
    shared.close()
    with cache_sync_fails_once(cache):
        shared = cache.open()
    assert set_blocks(shared, cache.blocks) == [1]
    assert shared.mark_clean(cache.fd)


def test_a_bitmap_of_a_c_xnbd_whose_cache_cannot_be_synced_is_not_believed_later(cache: Cache) -> None:
    cache.bitmap.write_bytes(b"\1".ljust(bitmap_size(cache.blocks), b"\0"))
    with cache_sync_fails_once(cache), pytest.raises(ConfigurationError, match="write-back failed at"):
        cache.open()
    with closing(cache.open()) as shared:
        assert set_blocks(shared, cache.blocks) == []


LIFE_ON_A_FAILING_DISK = """
import os, sys
from xnbd.errors import ConfigurationError
from xnbd.proxy.state.opening import open_state

directory, size, boot_id_path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
cache = os.open(directory + "/cache", os.O_RDWR)
failed = False

def attempt(action):
    global failed
    try:
        action()
    except OSError:
        failed = True
        return False
    assert not failed, "a sync has failed, and then one succeeded"
    return True

def start():
    return open_state(
        directory + "/bitmap", cache, disk_size=size, origin="nbd://origin/disk", boot_id_path=boot_id_path)

try:
    shared = start()
except ConfigurationError:
    shared = start()
processes, flushed = [shared.open_process(), shared.open_process()], []
for number in range(10):
    block, process = number % 3 * 32768 + number, processes[number % 2]
    process.bitmap.set(block, block + 1)
    if attempt(lambda: process.checkpoint(cache)):
        flushed.append(block)
for process in processes:
    process.close()
attempt(lambda: shared.mark_clean(cache))
shared.close()
print(failed, *flushed)
"""


def test_after_any_sync_that_fails_no_other_succeeds_before_the_next_start(scratch: Path) -> None:
    """The same with a sync that fails: the first, second, third ... one. The next start finds what was flushed."""
    number, injected, sticky = 0, True, 0
    while injected:
        number += 1
        directory = scratch / str(number)
        directory.mkdir()
        cache = Cache(directory, 4 * DISK)
        trace = scratch / "trace"
        inject = f"inject=fdatasync:error=EIO:when={number}"
        _, output, _ = run(
            "strace", "-f", "-o", trace, "-e", "trace=fdatasync", "-e", inject,
            sys.executable, "-c", LIFE_ON_A_FAILING_DISK, directory, 4 * DISK, cache.boot_id_file(1),
        )  # fmt: skip
        injected = "INJECTED" in trace.read_text()
        failed, *flushed = output.split()
        sticky += failed == "True"
        again = cache.open()
        assert set(map(int, flushed)) <= set(set_blocks(again, cache.blocks))
        assert again.mark_clean(cache.fd)
        again.close()
        os.close(cache.fd)
    assert sticky > 20


# Power failures


@pytest.mark.usefixtures("same_inodes")
@pytest.mark.parametrize("round_number", range(2))
def test_no_power_failure_leaves_a_bit_without_data_or_forgets_what_was_flushed(
    scratch: Path, seed: int, round_number: int
) -> None:
    rng = random.Random(f"{seed} {round_number}")
    blocks = [*range(11), *range(PAGE_BLOCKS - 9, PAGE_BLOCKS + 3)]
    odds = Odds(intrusion=0.02, power_failure=0.006, power_failure_in_flush=0.06, failed_sync=0.15)
    world = World(scratch, DISK, blocks, rng, odds)
    world.run(400)
    assert world.failures > 100
    assert world.failed_syncs > 3


def test_size_of_a_disk_is_known_from_its_state_file_alone(tmp_path: Path) -> None:
    assert known_size(str(tmp_path / "bitmap")) is None
    (tmp_path / "bitmap.state").write_bytes(pack_header(Header(12345, identity("x"), bytes(16), clean=True)))
    assert known_size(str(tmp_path / "bitmap")) == 12345
    (tmp_path / "bitmap.state").write_bytes(b"something else")
    assert known_size(str(tmp_path / "bitmap")) is None


def test_a_switch_is_known_from_the_scoreboard_while_servers_run_and_later_from_the_state_file(cache: Cache) -> None:
    bitmap = str(cache.bitmap)
    assert not is_switched(bitmap)
    shared = cache.open()
    shared.steer(Steering(switched=True))  # that comes first, and the switch may fail yet
    assert not is_switched(bitmap)
    with closing(shared.open_scoreboard()) as scoreboard:
        scoreboard.mode = TARGET
    assert is_switched(bitmap)
    shared.close()
    assert is_switched(bitmap)


@pytest.mark.parametrize("clean", [False, True])
def test_a_switch_that_whoever_began_it_did_not_live_to_see_is_none(cache: Cache, clean: bool) -> None:
    shared = cache.open()
    shared.steer(Steering(switched=True, address="nbd://moved:1/"))
    if clean:
        assert shared.mark_clean(cache.fd)
    shared.close()
    with closing(cache.open()) as again:
        assert again.steering == Steering(address="nbd://moved:1/")


def test_files_that_cannot_be_used_tell_of_no_switch(cache: Cache) -> None:
    shared = cache.open()
    for damage in (b"", None):
        scoreboard = Path(f"{cache.bitmap}.board")
        scoreboard.unlink() if damage is None else scoreboard.write_bytes(damage)
        assert not is_switched(str(cache.bitmap))
    shared.close()
    cache.state.unlink()
    cache.state.mkdir()
    assert not is_switched(str(cache.bitmap))
