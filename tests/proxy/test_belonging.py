"""Cache image, bitmap and state file belong together, and are believed only as far as they agree."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, Sequence

import nbd
import pytest
from caching import BLOCK, CacheFiles, bgctl, connect, kill_server, query
from conftest import MIB, Start
from launch import fails
from mounts import attach, detach, plain_ramfs, unmount
from server_process import Server, run

from xnbd.proxy.state.belonging import ATTRIBUTE
from xnbd.proxy.state.format import layout_of

SIZE = MIB + 5 * BLOCK
BLOCKS = SIZE // BLOCK
TIME = 60.0
WRITTEN = b"written here" * 1000
AT = 300_000
"""Where clients write what the origin does not have."""

root_only = pytest.mark.root(reason="mounts are made by root only")


@pytest.fixture
def content() -> bytes:
    return random.Random(11).randbytes(SIZE)


@pytest.fixture
def far(start: Start, tmp_path: Path, content: bytes) -> Server:
    """The origin."""
    path = tmp_path / "origin.img"
    path.write_bytes(content)
    return start("--target", "--readonly", path)


def expected(content: bytes) -> bytes:
    """The disk as clients of `used` have left it."""
    return content[:AT] + WRITTEN + content[AT + len(WRITTEN) :]


def write_and_read(server: Server) -> None:
    """Have every block cached, some of them written by a client, and all of it durable."""
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    client.pread(SIZE, 0)
    client.flush()
    client.shutdown()


def use(start: Start, files: CacheFiles, far: Server) -> None:
    server = start(*files.arguments(far.uri))
    write_and_read(server)
    server.stop()
    assert files.is_clean()


@pytest.fixture
def used(start: Start, files: CacheFiles, far: Server) -> CacheFiles:
    """Files of a proxy that was stopped in good order when every block was cached."""
    use(start, files, far)
    return files


def snapshot_of(files: CacheFiles) -> Dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (files.image, files.bitmap, files.state) if path.exists()}


def refused(files: CacheFiles, far: Server, *options: str) -> str:
    """The one line with which a proxy does not start; nothing is changed."""
    before = snapshot_of(files)
    status, line = fails(*files.arguments(far.uri, *options), "--unix", files.image.parent / "refused", timeout=TIME)
    assert status == 1
    assert snapshot_of(files) == before
    return line


def serves(start: Start, files: CacheFiles, far: Server, disk: bytes, *options: str) -> Server:
    server = start(*files.arguments(far.uri, *options))
    client = connect(server.uri)
    assert client.pread(SIZE, 0) == disk
    client.shutdown()
    return server


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def error_of(action: Callable[[], object]) -> int:
    """The errno with which libnbd fails; 0 if it does not."""
    try:
        action()
    except nbd.Error as error:
        return error.errnum or 0
    return 0


# Another cache image


def empty(files: CacheFiles) -> None:
    os.truncate(files.image, 0)


def shorten(files: CacheFiles) -> None:
    os.truncate(files.image, SIZE // 2)


def lose(files: CacheFiles) -> None:
    files.image.unlink()


def empty_and_lengthen(files: CacheFiles) -> None:
    os.truncate(files.image, 0)
    os.truncate(files.image, SIZE)


def make_anew(files: CacheFiles) -> None:
    files.image.unlink()
    files.image.touch()
    os.truncate(files.image, SIZE)


def copy_without_attributes(files: CacheFiles) -> None:
    run("cp", files.image, files.image.with_suffix(".copy"))
    run("mv", files.image.with_suffix(".copy"), files.image)


def change(files: CacheFiles) -> None:
    overwrite(files.image, SIZE // 2, b"something else")


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (empty, "is empty"),
        (shorten, f"has {SIZE // 2} bytes of {SIZE}"),
        (lose, "is gone"),
        (empty_and_lengthen, "was changed since its proxy has closed it"),
        (make_anew, "its mark is missing"),
        (copy_without_attributes, "its mark is missing"),
        (change, "was changed since its proxy has closed it"),
    ],
)
def test_another_cache_image_is_refused(
    used: CacheFiles, far: Server, do: Callable[[CacheFiles], None], reason: str
) -> None:
    do(used)
    line = refused(used, far)
    assert reason in line
    assert "--clear-bitmap" in line


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("cp -a", "stopped"),
        ("cp -a", "killed"),
        ("cp -a over it", "stopped"),
        ("cp -a over it", "killed"),
        ("cp over it", "stopped"),
    ],
)
def test_an_older_copy_of_the_cache_image_is_refused(
    start: Start, files: CacheFiles, far: Server, how: str, end: str
) -> None:
    """What is written over the image of a killed proxy, without attributes, is left out: nothing shows that."""
    start(*files.arguments(far.uri)).stop()
    older = files.image.with_suffix(".older")
    run("cp", "-a", files.image, older)
    server = start(*files.arguments(far.uri))
    write_and_read(server)
    server.stop() if end == "stopped" else kill_server(server)
    if how == "cp -a":
        files.image.unlink()
    run("cp", *(["-a"] if "-a" in how else []), older, files.image)
    line = refused(files, far)
    assert "older copy" in line or "was changed since" in line or "another file" in line
    assert "--adopt-cache" in line


def test_an_older_copy_of_the_state_file_is_refused(start: Start, files: CacheFiles, far: Server) -> None:
    start(*files.arguments(far.uri)).stop()
    older = files.state.read_bytes()
    use(start, files, far)
    files.state.write_bytes(older)
    assert "one of them is an older copy" in refused(files, far)


def test_an_older_copy_of_a_killed_proxys_state_file_is_refused(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    """With the bitmap of then, too. Who believes the bitmap has all that was written."""
    server = start(*files.arguments(far.uri))
    client = connect(server.uri)
    client.pwrite(b"first", 0)
    client.flush()
    older = files.state.read_bytes(), files.bitmap.read_bytes()
    client.pwrite(b"second", 200 * BLOCK)
    client.flush()
    bitmap = files.bitmap.read_bytes()
    kill_server(server)
    files.state.write_bytes(older[0])
    assert "is an older copy, of before the last checkpoint of the servers that died" in refused(files, far)
    files.bitmap.write_bytes(older[1])
    assert "is an older copy, of before the last checkpoint" in refused(files, far)
    files.bitmap.write_bytes(bitmap)
    disk = bytearray(content)
    disk[:5], disk[200 * BLOCK : 200 * BLOCK + 6] = b"first", b"second"
    serves(start, files, far, bytes(disk), "--adopt-cache")


def test_marks_for_pages_that_do_not_exist_are_passed_over(used: CacheFiles, start: Start, far: Server) -> None:
    """What lies between the maps of a state file may be damaged as all else."""
    layout = layout_of(SIZE)
    overwrite(used.state, layout.dirty_end, b"x" * (layout.claimed - layout.dirty_end))
    overwrite(used.state, layout.claimed_end, b"x" * (layout.durable - layout.claimed_end))
    proxy = start(*used.arguments(far.uri))
    assert query(used.control)["checkpoint"]["dirty_pages"] == 0
    write_and_read(proxy)
    proxy.stop()
    assert used.is_clean()


def test_an_older_copy_of_the_bitmap_is_repaired(start: Start, files: CacheFiles, far: Server, content: bytes) -> None:
    start(*files.arguments(far.uri)).stop()
    older = files.bitmap.read_bytes()
    use(start, files, far)
    files.bitmap.write_bytes(older)
    server = serves(start, files, far, expected(content))
    assert "repaired from its copy in the state file" in server.log()


def test_another_bitmaps_cache_image_is_refused(used: CacheFiles, start: Start, far: Server, tmp_path: Path) -> None:
    other = CacheFiles(tmp_path, "other")
    use(start, other, far)
    status = used.image.stat()
    os.utime(other.image, ns=(status.st_mtime_ns, status.st_mtime_ns))
    other.image.rename(used.image)
    assert "is the cache of another bitmap" in refused(used, far)


def test_a_cache_image_that_is_lost_while_nothing_is_cached_is_made_anew(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    start(*files.arguments(far.uri)).stop()
    files.image.unlink()
    serves(start, files, far, content)


# The same, elsewhere


def copy_all(files: CacheFiles, directory: Path, *options: str) -> CacheFiles:
    directory.mkdir(exist_ok=True)
    run("cp", *options, files.image, files.bitmap, files.state, directory)
    return CacheFiles(directory)


def test_files_copied_with_their_attributes_are_believed_and_the_originals_too(
    used: CacheFiles, start: Start, far: Server, content: bytes, tmp_path: Path
) -> None:
    serves(start, copy_all(used, tmp_path / "copy", "-a"), far, expected(content))
    serves(start, used, far, expected(content))


def test_files_restored_from_a_plain_backup_are_believed_if_somebody_says_so(
    used: CacheFiles, start: Start, far: Server, content: bytes, tmp_path: Path
) -> None:
    backup = copy_all(used, tmp_path / "copy")
    assert "--adopt-cache" in refused(backup, far)
    server = serves(start, backup, far, expected(content), "--adopt-cache")
    server.stop()
    far.stop()
    serves(start, backup, far, expected(content))


def test_a_killed_proxys_files_are_believed_where_they_are_but_no_copy_of_them(
    start: Start, files: CacheFiles, far: Server, content: bytes, tmp_path: Path
) -> None:
    server = start(*files.arguments(far.uri))
    write_and_read(server)
    kill_server(server)
    copied = copy_all(files, tmp_path / "copy", "-a")
    assert "is another file than the cache of this bitmap" in refused(copied, far)
    serves(start, copied, far, expected(content), "--adopt-cache")
    serves(start, files, far, expected(content))


def test_adopting_and_clearing_exclude_each_other(files: CacheFiles, far: Server) -> None:
    status, line = fails(*files.arguments(far.uri, "--adopt-cache", "--clear-bitmap"))
    assert status == 2
    assert "--adopt-cache" in line


@root_only
def test_without_attributes_inode_and_time_tell(start: Start, far: Server, content: bytes, tmp_path: Path) -> None:
    with plain_ramfs(tmp_path / "plain") as directory:
        files = CacheFiles(directory)
        use(start, files, far)
        with pytest.raises(OSError, match="not supported"):
            os.getxattr(files.image, ATTRIBUTE)
        serves(start, files, far, expected(content)).stop()
        state = files.state.rename(directory / "kept")
        assert "is gone, which" in refused(files, far)
        state.rename(files.state)
        serves(start, copy_all(files, directory / "copy", "-a"), far, expected(content)).stop()
        copy_without_attributes(files)
        assert "is another file than the cache" in refused(files, far)


# A cache image that is shortened while it is in use


@pytest.fixture
def shortened(start: Start, files: CacheFiles, far: Server) -> Server:
    """A proxy whose cache has lost its second half, of which not all was there."""
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    server.wait_for_log("INFO: serving ")
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    client.pread(64 * BLOCK, SIZE - 64 * BLOCK)
    client.shutdown()
    os.truncate(files.image, SIZE // 2)
    server.expected_errors += ["cannot make the cache durable", "cannot write to the cache image", "EIO", "shrunk"]
    return server


def test_nobody_lengthens_a_shortened_cache(shortened: Server, files: CacheFiles) -> None:
    client = connect(shortened.uri)
    for action in (
        lambda: client.pread(BLOCK, SIZE - BLOCK),
        lambda: client.pread(BLOCK, SIZE // 2 + 16 * BLOCK),
        lambda: client.pread(BLOCK, 0),
        lambda: client.pwrite(bytes(BLOCK), SIZE - BLOCK),
        lambda: client.pwrite(bytes(BLOCK), BLOCK),
        lambda: client.pwrite(bytes(BLOCK), SIZE // 2 + 16 * BLOCK),
        lambda: client.zero(8 * BLOCK, SIZE - 16 * BLOCK),
        lambda: client.trim(8 * BLOCK, SIZE - 16 * BLOCK),
        client.flush,
    ):
        assert error_of(action) != 0
        assert files.image.stat().st_size == SIZE // 2
    assert client.pread(len(WRITTEN), AT) == WRITTEN
    client.shutdown()


def test_a_shortened_cache_is_not_filled_switched_or_closed_as_if_it_were_whole(
    shortened: Server, files: CacheFiles, far: Server
) -> None:
    status, _, line = bgctl("--cache-all", files.control, check=False)
    assert status == 1
    assert line.count("\n") == 1
    for options in ([], ["--force"]):
        status, _, line = bgctl(*options, "--switch", files.control, check=False)
        assert status == 1
        assert "missing" in line or "shrunk" in line
    assert files.image.stat().st_size == SIZE // 2
    assert query(files.control)["mode"] == "proxy"
    shortened.stop()
    assert not files.is_clean()
    assert f"has {SIZE // 2} bytes of {SIZE}" in refused(files, far)


def test_a_full_cache_that_was_shortened_is_not_switched(start: Start, files: CacheFiles, far: Server) -> None:
    server = start(*files.arguments(far.uri))
    server.wait_for_log("INFO: serving ")
    write_and_read(server)
    os.truncate(files.image, SIZE // 2)
    server.expected_errors.append("shrunk")
    _, _, line = bgctl("--switch", files.control, check=False)
    assert "the cache cannot be made durable: the cache image has shrunk; nothing was changed" in line
    server.stop()


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_there_is_no_snapshot_of_an_image_that_has_shrunk(start: Start, tmp_path: Path, image: Path, mode: str) -> None:
    control = tmp_path / "control"
    start(mode, "--control", control, image).wait_for_log("INFO: serving ")
    os.truncate(image, MIB)
    status, _, line = bgctl("--snapshot", control, check=False)
    assert status == 1
    assert "no snapshot: the " in line
    assert "image has shrunk" in line
    assert not list(tmp_path.glob("*.snapshot.*"))


# Files named by mistake


def test_an_image_beside_the_empty_bitmap_of_a_c_xnbd_is_not_overwritten(
    files: CacheFiles, start: Start, far: Server
) -> None:
    files.image.write_bytes(b"precious" * (SIZE // 8))
    files.bitmap.write_bytes(bytes(layout_of(SIZE).bitmap_size))
    line = refused(files, far)
    assert f"{files.bitmap} has no cached block, but the cache image holds data" in line
    assert files.image.read_bytes() == b"precious" * (SIZE // 8)
    start(*files.arguments(far.uri, "--clear-bitmap")).stop()


def test_a_mistyped_bitmap_is_not_begun_afresh(
    used: CacheFiles, start: Start, far: Server, content: bytes, tmp_path: Path
) -> None:
    right, used.bitmap = used.bitmap, tmp_path / "cache.bitmpa"
    line = refused(used, far)
    assert f"there is no {used.bitmap}, but the cache image holds data" in line
    assert not list(tmp_path.glob("*bitmpa*"))
    used.bitmap = right
    serves(start, used, far, expected(content))


@pytest.mark.parametrize("size", [SIZE // 2, SIZE, 2 * SIZE])
def test_an_image_given_as_the_cache_is_not_overwritten(files: CacheFiles, far: Server, size: int) -> None:
    files.image.write_bytes(random.Random(1).randbytes(size))
    assert "the cache image holds data" in refused(files, far)


@pytest.mark.parametrize("size", [SIZE // 2, SIZE])
def test_an_image_given_as_the_bitmap_is_not_replaced(files: CacheFiles, far: Server, size: int) -> None:
    files.bitmap.write_bytes(random.Random(1).randbytes(size))
    files.image.touch()
    os.truncate(files.image, SIZE)
    assert "bytes, not the" in refused(files, far)
    line = refused_to_clear(files, far)
    assert f"{files.bitmap} has {size} bytes and is no bitmap" in line


def refused_to_clear(files: CacheFiles, far: Server) -> str:
    before = files.bitmap.read_bytes()
    status, line = fails(*files.arguments(far.uri, "--clear-bitmap"), "--unix", files.image.parent / "s", timeout=TIME)
    assert status == 1
    assert files.bitmap.read_bytes() == before
    return line


def test_cache_and_bitmap_that_are_exchanged_are_refused(used: CacheFiles, far: Server) -> None:
    used.image, used.bitmap = used.bitmap, used.image
    assert f"{used.image} is the bitmap of a cache" in refused(used, far)
    refused_to_clear(used, far)


@pytest.mark.parametrize("kind", ["nothing", "empty", "short", "holes", "zeros", "allocated"])
def test_a_new_cache_needs_no_option(start: Start, files: CacheFiles, far: Server, content: bytes, kind: str) -> None:
    if kind != "nothing":
        files.image.touch()
    if kind in ("short", "holes"):
        os.truncate(files.image, SIZE if kind == "holes" else BLOCK)
    elif kind == "zeros":
        files.image.write_bytes(bytes(SIZE))
    elif kind == "allocated":
        with files.image.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
    serves(start, files, far, content)


def test_two_proxies_with_different_bitmaps_do_not_share_a_cache(
    start: Start, files: CacheFiles, far: Server, content: bytes, tmp_path: Path
) -> None:
    server = start(*files.arguments(far.uri))
    first, files.bitmap = files.bitmap, tmp_path / "another"
    in_a_container = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"] if os.geteuid() == 0 else []

    def refusal(number: int, *options: str, prefix: Sequence[str] = ()) -> str:
        where = files.arguments(far.uri, *options, control=tmp_path / f"control{number}")
        return fails(*where, "--unix", tmp_path / f"refused{number}", prefix=prefix, timeout=TIME)[1]

    before = snapshot_of(files)
    with ThreadPoolExecutor() as pool:  # each tries for some seconds
        lines = [
            pool.submit(refusal, 1),
            pool.submit(refusal, 2, "--clear-bitmap"),
            pool.submit(refusal, 3, "--adopt-cache"),
            pool.submit(refusal, 4, prefix=in_a_container),
        ]
        for line in lines:
            assert "is the cache of a running proxy with another bitmap" in line.result()
    assert snapshot_of(files) == before
    files.bitmap = first
    files.control = tmp_path / "control2"
    serves(start, files, far, content)
    assert server.process.poll() is None


def test_a_longer_lock_hides_no_claim(start: Start, files: CacheFiles, far: Server, tmp_path: Path) -> None:
    """The kernel names the lock that was there first."""
    with files.image.open("w+b") as file:
        file.truncate(SIZE)
        fcntl.lockf(file, fcntl.LOCK_SH)
        start(*files.arguments(far.uri))

        def refusal(mode: str) -> str:
            return fails(mode, files.image, "--unix", tmp_path / f"refused{mode}", timeout=TIME)[1]

        with ThreadPoolExecutor() as pool:  # each tries for some seconds
            lines = [pool.submit(refusal, mode) for mode in ("--target", "--cow-target")]
            files.bitmap = tmp_path / "another"
            assert "with another bitmap" in refused(files, far)
            for line in lines:
                assert "is the cache of a running proxy" in line.result()


# A bitmap that is not as it was left


def test_a_bitmap_that_was_changed_after_a_clean_end_is_repaired(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    client.shutdown()
    server.stop()
    before = files.bitmap.read_bytes()
    overwrite(files.bitmap, 0, b"\xff" * 4)
    server = serves(start, files, far, expected(content))
    assert "repaired from its copy in the state file" in server.log()
    assert before != files.bitmap.read_bytes()


def test_a_durable_copy_that_was_changed_after_a_clean_end_is_repaired(
    used: CacheFiles, start: Start, far: Server, content: bytes
) -> None:
    overwrite(used.state, layout_of(SIZE).durable, b"\0" * 8)
    far.stop()
    serves(start, used, far, expected(content))


def test_bitmap_and_copy_that_are_both_changed_are_refused(
    used: CacheFiles, start: Start, far: Server, content: bytes
) -> None:
    overwrite(used.state, layout_of(SIZE).durable, b"\0" * 8)
    overwrite(used.bitmap, 8, b"\0")
    line = refused(used, far)
    assert f"{used.bitmap} has 64 blocks that its copy in {used.state} has not, and lacks 8" in line
    assert "--adopt-cache" in line


def test_a_bitmap_of_a_killed_proxy_that_was_changed_is_mended_when_it_is_used(
    start: Start, files: CacheFiles, far: Server, content: bytes
) -> None:
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    client = connect(server.uri)
    client.pwrite(WRITTEN, AT)
    client.flush()
    client.shutdown()
    kill_server(server)
    overwrite(files.bitmap, 0, b"\xff" * 4)
    server = start(*files.arguments(far.uri))
    assert connect(server.uri).pread(SIZE, 0) == expected(content)
    server.wait_for_log("from byte 0 of the disk on, was damaged since its servers died, and was mended")


def test_a_deleted_state_file_makes_no_bitmap_of_the_c_program(
    used: CacheFiles, start: Start, far: Server, content: bytes
) -> None:
    used.state.unlink()
    line = refused(used, far)
    assert f"{used.state} is gone, which {used.bitmap} had" in line
    assert not used.state.exists()
    far.stop()
    far = start("--target", "--readonly", far.log_path.parent / "origin.img")
    serves(start, used, far, expected(content), "--adopt-cache")


def damage_header(files: CacheFiles) -> None:
    overwrite(files.state, 100, b"\xff")


def clear_header(files: CacheFiles) -> None:
    overwrite(files.state, 0, bytes(512))


def shorten_state(files: CacheFiles) -> None:
    os.truncate(files.state, 2048)


@pytest.mark.parametrize("harm", [damage_header, clear_header, shorten_state])
def test_a_damaged_state_file_is_refused_with_what_loses_nothing(
    used: CacheFiles, start: Start, far: Server, content: bytes, harm: Callable[[CacheFiles], None]
) -> None:
    """Also of a proxy that was killed. What the line says is done word by word."""
    kill_server(start(*used.arguments(far.uri)))
    harm(used)
    for option in ((), ("--adopt-cache",)):
        line = refused(used, far, *option)
        assert str(used.state) in line
        assert "; move it away, and start with --adopt-cache once" in line
        assert "(--clear-bitmap starts afresh, and forgets what clients have written)" in line
    used.state.rename(used.state.with_suffix(".damaged"))
    serves(start, used, far, expected(content), "--adopt-cache").stop()
    far.stop()
    serves(start, used, far, expected(content), "--origin-timeout", "1")


def test_a_state_file_of_a_newer_program_is_not_to_be_moved_away(used: CacheFiles, far: Server) -> None:
    overwrite(used.state, 8, struct.pack("<I", 9))
    line = refused(used, far)
    assert "has version 9, which this program does not know: start the newer xnbd-server" in line
    assert "move" not in line


def test_bits_beyond_the_last_block_count_nowhere(start: Start, files: CacheFiles, far: Server) -> None:
    """As a C xNBD may have left them."""
    files.image.touch()
    os.truncate(files.image, SIZE)
    length = layout_of(SIZE).bitmap_size
    files.bitmap.write_bytes(bytes(length - 8) + b"\xff" * 8)
    beyond = 8 * length - BLOCKS
    assert 0 < beyond < 64
    start(*files.arguments(far.uri)).wait_for_log("INFO: serving ")
    blocks = query(files.control)["blocks"]
    assert blocks["cached"] == 64 - beyond
    assert "blocks are missing" in bgctl("--switch", files.control, check=False)[2]


def test_files_of_version_1_are_opened_and_become_version_3(
    used: CacheFiles, start: Start, far: Server, content: bytes
) -> None:
    header = used.state.read_bytes()[:512]
    one = header[:8] + struct.pack("<I", 1) + header[12:16] + struct.pack("<I", header[16] & 1) + header[20:304]
    overwrite(used.state, 0, (one + struct.pack("<I", zlib.crc32(one))).ljust(512, b"\0"))
    os.removexattr(used.image, ATTRIBUTE)
    serves(start, used, far, expected(content)).stop()
    current = used.state.read_bytes()
    assert current[8:12] == struct.pack("<I", 3)
    overwrite(used.state, 0, (one + struct.pack("<I", zlib.crc32(one))).ljust(512, b"\0"))
    assert "is known to a newer state file" in refused(used, far)
    used.state.write_bytes(current)
    change(used)
    assert "was changed since" in refused(used, far)


# File systems that go away


EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2


@root_only
def test_what_a_file_system_had_not_written_is_not_believed_when_it_comes_back(
    start: Start, far: Server, content: bytes, tmp_path: Path
) -> None:
    """Bits are on the disk whose data is not: the bitmap lies on a file system that stays, and so does the boot."""
    directory, backing = tmp_path / "disk", tmp_path / "backing"
    directory.mkdir()
    with backing.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", backing)
    device = attach(backing)
    files = CacheFiles(tmp_path)
    files.image = directory / "cache.img"
    try:
        run("mount", device, directory)
        server = start(*files.arguments(far.uri, "--readahead", "0"))
        server.expected_errors += ["cannot make the cache durable", "cannot write", "Input/output"]
        client = connect(server.uri)
        client.pwrite(WRITTEN, AT)
        client.flush()
        steward = next(pid for pid in server.workers() if "steward" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(steward, signal.SIGSTOP)  # it would make the rest durable
        client.pread(SIZE // 4, SIZE // 2)
        fd = os.open(directory, os.O_RDONLY)
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        os.close(fd)
        kill_server(server)
        unmount(directory, device)
        run("mount", device, directory)
        server = serves(start, files, far, expected(content))
        assert "recovered, for its servers died and the mount is another one than theirs" in server.log()
        server.stop()
        unmount(directory, device)
    finally:
        run("umount", "-l", directory, check=False)
        detach(device)


@root_only
def test_a_container_that_is_started_anew_after_a_kill_has_all_that_was_flushed(
    start: Start, far: Server, content: bytes, tmp_path: Path
) -> None:
    """A mount of its own each time; without the kill nothing is doubted."""
    store, view = tmp_path / "store", tmp_path / "view"
    store.mkdir()
    view.mkdir()
    files = CacheFiles(view)
    for end, log in ((kill_server, "recovered, for its servers died"), (Server.stop, "resumed")):
        run("mount", "--bind", store, view)
        try:
            server = start(*files.arguments(far.uri))
            write_and_read(server)
            end(server)
        finally:
            run("umount", view)
        run("mount", "--bind", store, view)
        try:
            far_log = serves(start, files, far, expected(content))
            assert log in far_log.log()
            far_log.stop()
        finally:
            run("umount", view)
