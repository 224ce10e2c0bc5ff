"""Other users of the computer: what they may read, lock, or put in the way of a server's files."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, ContextManager, Dict, Iterator, List

import nbd
import pytest
from caching import CacheFiles, bgctl, connect
from conftest import MIB, Start, StartWrapper
from launch import fails
from server_process import STOP_TIME, Server

from xnbd.proxy.state.format import CHECKPOINT, OPENING, USERS
from xnbd.storage.image_use import BITMAPS, CACHE, DISK, FAILED

Lock = Callable[[Path, int], ContextManager[None]]

SIZE = MIB
OPEN_UMASK = ["sh", "-c", 'umask 0; exec "$@"', "sh"]
NOBODY = 65534


@pytest.fixture
def far(start: Start, tmp_path: Path) -> Server:
    """The origin."""
    directory = tmp_path / "far"
    directory.mkdir()
    path = directory / "origin.img"
    path.write_bytes(b"o" * SIZE)
    return start("--target", "--readonly", path)


def modes(directory: Path) -> Dict[str, int]:
    """Permissions of the regular files, without what marks a bitmap of ours (the sticky bit)."""
    found = {path.name: path.stat().st_mode for path in directory.iterdir()}
    return {name: stat.S_IMODE(mode) & 0o777 for name, mode in found.items() if stat.S_ISREG(mode)}


# What is made


@pytest.mark.parametrize(
    "options, mode", [([], 0o600), (["--file-mode", "0640"], 0o640), (["--file-mode", "666"], 0o666)]
)
def test_all_that_a_proxy_makes_has_the_mode_that_was_asked_for(
    start: Start, far: Server, tmp_path: Path, options: List[str], mode: int
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    files = CacheFiles(made)
    options = [*options, "--pidfile", str(made / "pid"), "--logpath", str(made / "log")]
    server = start(*files.arguments(far.uri, *options), prefix=OPEN_UMASK)
    beside = [f"cache.bitmap{suffix}" for suffix in (".state", ".board", ".sums", ".checked")]
    assert modes(made) == dict.fromkeys(["cache.img", "cache.bitmap", *beside, "pid", "log"], mode)
    server.stop()


def test_an_image_that_is_made_is_for_its_owner_only(start: Start, tmp_path: Path) -> None:
    start("--target", "--create", "1M", tmp_path / "new.img", prefix=OPEN_UMASK)
    assert stat.S_IMODE((tmp_path / "new.img").stat().st_mode) == 0o600


def test_the_database_of_a_wrapper_is_for_its_owner_only(start_wrapper: StartWrapper) -> None:
    wrapper = start_wrapper()
    assert stat.S_IMODE(wrapper.database.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "0400", "0700", "0611", "abc", "10600"])
def test_a_mode_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    status, message = fails("--target", "--file-mode", text or "0", tmp_path / "x")
    assert (status, "expected permissions from 0600 to 0666" in message) == (2, True)


def test_files_that_exist_keep_their_mode(start: Start, far: Server, files: CacheFiles) -> None:
    start(*files.arguments(far.uri)).stop()
    paths = (files.image, files.bitmap, files.state)
    for path in paths:
        path.chmod(0o640)
    start(*files.arguments(far.uri)).stop()
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o640] * 3


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_snapshot_is_read_by_who_may_read_the_image(start: Start, image: Path, tmp_path: Path, mode: int) -> None:
    image.chmod(mode)
    os.chown(image, -1, NOBODY)
    start("--target", image, "--control", tmp_path / "control")
    bgctl("--snapshot", tmp_path / "control")
    (snapshot,) = tmp_path.glob("disk.img.snapshot.*")
    assert (stat.S_IMODE(snapshot.stat().st_mode), snapshot.stat().st_gid) == (mode, NOBODY)


# What stands in the way


def obstacles(path: Path, victim: Path, kind: str) -> None:
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "another user's":
        path.write_bytes(b"trap")
        os.chown(path, NOBODY, NOBODY)
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "another user's", "fifo"])
def test_what_others_have_put_in_the_way_is_neither_used_nor_followed(
    start: Start, far: Server, files: CacheFiles, tmp_path: Path, kind: str
) -> None:
    names = [f"cache.bitmap{end}" for end in (".new", ".state.new", ".sums", ".checked", ".board")]
    victims = [tmp_path / f"victim{number}" for number in range(len(names))]
    for name, victim in zip(names, victims):
        victim.write_bytes(b"v" * 5000)
        obstacles(files.image.parent / name, victim, kind)
    server = start(*files.arguments(far.uri))
    assert bytes(connect(server.uri).pread(SIZE, 0)) == b"o" * SIZE
    for name in names[2:]:
        made = (files.image.parent / name).lstat()
        assert (stat.S_ISREG(made.st_mode), made.st_uid, made.st_nlink) == (True, os.geteuid(), 1)
    server.stop()
    assert {victim.read_bytes() for victim in victims} == {b"v" * 5000}
    assert files.is_clean()


def test_what_cannot_be_removed_is_named(far: Server, files: CacheFiles) -> None:
    path = files.image.parent / "cache.bitmap.state.new"
    path.mkdir()
    status, message = fails(*files.arguments(far.uri), "--unix", files.image.parent / "s.sock")
    assert (status, f"{path} is in the way" in message) == (1, True)


# Locks of who may read only


@contextmanager
def shared_lock(path: Path, start: int, length: int = 1) -> Iterator[None]:
    """As any user can hold who may read the file; this process here."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH, length, start)
        yield
    finally:
        os.close(fd)


@contextmanager
def nameless_lock(path: Path, start: int, length: int = 1) -> Iterator[None]:
    """One of an open file, whose holder the system does not tell."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("lock", [shared_lock, nameless_lock])
@pytest.mark.parametrize("byte", [OPENING, CHECKPOINT, USERS + 7])
def test_a_strangers_lock_on_the_state_file_does_not_keep_a_server_from_its_end(
    start: Start, far: Server, files: CacheFiles, byte: int, lock: Lock
) -> None:
    server = start(*files.arguments(far.uri))
    server.expected_errors += ["the last flush failed: .* which has a shared lock", "cannot make the cache durable"]
    with lock(files.state, byte):
        server.process.terminate()
        server.process.wait(STOP_TIME)
        assert f"process {os.getpid()} (" in server.log().partition("the last flush failed")[2]
    assert not files.is_clean()
    start(*files.arguments(far.uri)).stop()
    assert files.is_clean()


def test_a_flush_that_a_strangers_lock_holds_up_fails_and_the_log_tells_who_it_is(
    start: Start, far: Server, files: CacheFiles
) -> None:
    server = start(*files.arguments(far.uri))
    server.expected_errors += ["which has a shared lock, as no server does: end that"]
    client = connect(server.uri)
    with shared_lock(files.state, CHECKPOINT):
        with pytest.raises(nbd.Error):
            client.flush()
        server.wait_for_log(f"is kept from this server by process {os.getpid()} (")
    client.pwrite(b"n" * 4096, 0, nbd.CMD_FLAG_FUA)


@pytest.mark.parametrize("byte", [OPENING, USERS + 7])
def test_a_start_that_a_strangers_lock_holds_up_is_refused(
    start: Start, far: Server, files: CacheFiles, byte: int
) -> None:
    start(*files.arguments(far.uri)).stop()
    with shared_lock(files.state, byte):
        status, message = fails(*files.arguments(far.uri), "--unix", files.image.parent / "s.sock")
    assert (status, f"{files.state} is kept from this server by process {os.getpid()} (" in message) == (1, True)


def test_reads_and_writes_that_a_strangers_lock_holds_up_fail_and_the_log_tells_who_it_is(
    start: Start, far: Server, files: CacheFiles
) -> None:
    server = start(*files.arguments(far.uri, "--readahead", "0"))
    server.expected_errors += ["which has a shared lock, as no server does: end that"]
    client = connect(server.uri)
    with shared_lock(files.bitmap, 2, 1):
        with pytest.raises(nbd.Error):
            client.pread(4096, 17 * 4096)
        with pytest.raises(nbd.Error):
            client.pwrite(b"n" * 4096, 16 * 4096)
        assert bytes(client.pread(4096, 0)) == b"o" * 4096
    assert f"is kept from this server by process {os.getpid()} (" in server.log()
    client.pwrite(b"n" * 4096, 16 * 4096)
    assert bytes(client.pread(8192, 16 * 4096)) == b"n" * 4096 + b"o" * 4096


@pytest.mark.parametrize("lock", [shared_lock, nameless_lock])
def test_who_keeps_an_image_from_being_served_as_a_disk_is_named(image: Path, tmp_path: Path, lock: Lock) -> None:
    """It looks like the lock of a proxy, far behind the image's end."""
    with lock(image, CACHE):
        status, message = fails("--target", image, "--unix", tmp_path / "s.sock")
    assert (status, f"is locked by process {os.getpid()} (" in message) == (1, True)


@pytest.mark.parametrize("byte", [DISK, BITMAPS + 7])
def test_who_keeps_a_cache_from_being_used_is_named(start: Start, far: Server, files: CacheFiles, byte: int) -> None:
    """It looks like the lock of a target, or of a proxy with another bitmap."""
    start(*files.arguments(far.uri)).stop()
    with shared_lock(files.image, byte):
        status, message = fails(*files.arguments(far.uri), "--unix", files.image.parent / "s.sock")
    assert (status, f"is locked by process {os.getpid()} (" in message) == (1, True)


@pytest.mark.parametrize("lock", [shared_lock, nameless_lock])
def test_who_may_only_read_an_image_cannot_say_that_its_write_back_has_failed(
    start: Start, image: Path, lock: Lock
) -> None:
    """Servers tell each other so by a lock far behind the image's end, after which no FLUSH succeeds."""
    client = connect(start("--target", image).uri)
    with lock(image, FAILED):
        client.pwrite(b"n" * 4096, 0, nbd.CMD_FLAG_FUA)
        client.flush()
