"""A proxy of an image in Ceph that changes: never a mix of two versions.

Ceph tells nobody who only reads that a snapshot is removed. What was in it reads then as zeros, or as what was
written since if no snapshot is left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from typing import Iterator

import pytest
from caching import BLOCK, CacheFiles, Reading, ask, bgctl, connect, query
from conftest import MIB, Start
from model import read_all
from proxies import program
from server_process import Server, wait_until
from shared_ceph import POOL, Image, SharedCeph

SIZE = 13 * MIB + 1234
HOLE, HOLE_END = 4 * MIB, 8 * MIB
"""The second object of the image is not there."""

CHANGED = "THE DISK THERE HAS CHANGED"


@pytest.fixture(scope="module")
def disk() -> bytes:
    noise = random.Random(24).randbytes(SIZE)
    return noise[:HOLE] + bytes(HOLE_END - HOLE) + noise[HOLE_END:]


def are_the_disks(files: CacheFiles, disk: bytes) -> bool:
    """Whether all that is cached is what the snapshot has."""
    with files.image.open("rb") as cache:
        blocks = {at * BLOCK: os.pread(cache.fileno(), BLOCK, at * BLOCK) for at in files.cached()}
    return all(data[: SIZE - at] == disk[at : at + BLOCK] for at, data in blocks.items())


def test_a_removed_snapshot_is_an_error_for_what_is_missing_and_never_zeros(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes
) -> None:
    """Its data is gone at once where the image was written to since, and the cluster sends zeros for that."""
    image = ceph.make(disk)
    image.write(b"n" * MIB, 0)
    image.write(b"n" * MIB, HOLE_END)
    proxy = start(*files.arguments(image.uri(), "--readahead", "0"))
    client, other = connect(proxy.uri), connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert client.pread(BLOCK, HOLE) == bytes(BLOCK)
    client.pwrite(b"w" * 100, MIB)
    image.remove_snap()
    proxy.expected_errors = [CHANGED]
    assert Reading(client, HOLE_END, BLOCK).wait() == 5
    assert Reading(other, HOLE + MIB, BLOCK).wait() == 5
    assert client.pread(BLOCK, BLOCK) == disk[BLOCK : 2 * BLOCK]
    assert client.pread(100, MIB) == b"w" * 100
    assert query(files.control)["origin"]["changed"] is True
    assert "the origin has another disk now" in bgctl("--cache-all", files.control, check=False)[2]
    assert proxy.log().count(CHANGED) == 1
    assert "the image has no snapshot snap" in proxy.log()
    assert HOLE_END // BLOCK not in files.cached()


def test_another_snapshot_of_the_same_name_is_another_disk(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes
) -> None:
    image = ceph.make(disk)
    proxy = start(*files.arguments(image.uri(), "--readahead", "0"))
    assert "snapshot " in bgctl("--query", files.control)[1]
    connect(proxy.uri).pread(1, 0)
    proxy.stop()
    image.remove_snap()
    image.write(b"n" * BLOCK, 2 * MIB)
    image.snap("snap")
    again = start(*files.arguments(image.uri()))
    again.expected_errors = [CHANGED]
    client = connect(again.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert Reading(client, 2 * MIB, BLOCK).wait() == 5
    assert "was image " in ask(files.control, "reconnect", uri=image.uri())["error"]
    again.stop()
    adopted = start(*files.arguments(image.uri(), "--adopt-cache"))
    assert connect(adopted.uri).pread(BLOCK, 2 * MIB) == b"n" * BLOCK


def test_an_image_in_the_trash_is_gone_and_comes_back_as_the_same(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes
) -> None:
    image = ceph.make(disk)
    identity = image.rbd("info", "--format", "json", image.name).partition('"id":"')[2].partition('"')[0]
    proxy = start(*files.arguments(image.uri(), "--readahead", "0"))
    proxy.expected_errors = [CHANGED]
    client = connect(proxy.uri)
    image.rbd("trash", "mv", image.name)
    assert Reading(client, HOLE, BLOCK).wait() == 5
    image.rbd("trash", "restore", identity)
    wait_until(lambda: Reading(client, HOLE, BLOCK).wait() == 0, "the image")
    proxy.wait_for_log("the disk there is the one again that is cached")
    assert read_all(client) == disk


def test_of_an_image_without_a_snapshot_a_warning_tells_and_a_change_is_seen_at_a_start(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes
) -> None:
    image = ceph.make(disk)
    proxy = start(*files.arguments(image.uri(""), "--readahead", "0"))
    proxy.wait_for_log("an image without a snapshot may change under the cache")
    assert connect(proxy.uri).pread(BLOCK, 0) == disk[:BLOCK]
    assert "may change under the cache" in bgctl("--query", files.control)[1]
    proxy.stop()
    elsewhere = start(*files.arguments(image.uri("")), env={"TZ": "Asia/Tokyo"})
    assert connect(elsewhere.uri).pread(BLOCK, MIB) == disk[MIB : MIB + BLOCK]
    elsewhere.stop()

    def is_noted() -> bool:
        image.write(b"n" * BLOCK, 2 * MIB)
        again = start(*files.arguments(image.uri("")))
        again.expected_errors = [CHANGED]
        told = Reading(connect(again.uri), 3 * MIB, BLOCK).wait()
        again.stop()
        return told == 5

    image.rbd("config", "image", "set", image.name, "rbd_mtime_update_interval", "1")  # not every minute only
    wait_until(is_noted, "a later time of the last write")


def test_zeros_that_a_parent_no_longer_has_are_not_believed(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes
) -> None:
    """A clone's parent is flattened and loses its own parent: who has the clone open does not notice."""
    grand = ceph.make(disk)
    parent = grand.clone()
    parent.snap("snap")
    child = parent.clone()
    child.snap("snap")
    proxy = start(*files.arguments(child.uri(), "--readahead", "0"))
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    parent.rbd("flatten", parent.name)
    grand.rbd("snap", "unprotect", f"{grand.name}@snap")
    grand.rbd("snap", "purge", grand.name)
    grand.rbd("rm", grand.name)
    assert read_all(client) == disk
    bgctl("--cache-all", files.control)


# What is written after the last snapshot is gone


@pytest.fixture
def image(ceph: SharedCeph, disk: bytes) -> Image:
    return ceph.make(disk)


@pytest.fixture
def proxy(start: Start, files: CacheFiles, image: Image) -> Iterator[Server]:
    """Nothing but the image's snapshot is ever in its cache."""
    proxy = start(*files.arguments(image.uri(), "--readahead", "0"))
    proxy.expected_errors = [CHANGED]
    yield proxy


@pytest.mark.parametrize("anew", [False, True])
def test_what_is_written_after_the_last_snapshot_is_gone_is_not_its_content(
    proxy: Server, files: CacheFiles, image: Image, disk: bytes, anew: bool
) -> None:
    """For two processes that have the image open; and if the snapshot is made anew, with the same name."""
    client, other = connect(proxy.uri), connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert other.pread(BLOCK, MIB) == disk[MIB : MIB + BLOCK]
    image.remove_snap()
    image.write(b"N" * MIB, HOLE_END)
    image.write(b"N" * MIB, HOLE)
    if anew:
        image.snap("snap")
    assert Reading(client, HOLE_END, BLOCK).wait() == 5
    assert Reading(other, HOLE, BLOCK).wait() == 5
    assert Reading(other, 2 * MIB, BLOCK).wait() == 5, "it was not written, but its disk is gone"
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert proxy.log().count(CHANGED) == 1
    assert are_the_disks(files, disk)


def test_nor_is_it_for_a_copy_and_a_read_ahead_that_are_under_way(
    start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    proxy = start(*files.arguments(image.uri()))
    proxy.expected_errors = [CHANGED]
    client = connect(proxy.uri)
    copy = subprocess.Popen(
        program("--limit-rate", "512K", "--cache-all", files.control), stderr=subprocess.PIPE, text=True
    )
    with copy:
        wait_until(files.cached, "the first copied blocks")
        assert client.pread(MIB, 0) == disk[:MIB]
        reading = Reading(client, MIB, MIB)
        (worker,) = proxy.busy_workers()
        os.kill(worker, signal.SIGSTOP)
        image.remove_snap()
        image.write(b"N" * (SIZE // BLOCK * BLOCK - HOLE), HOLE)
        os.kill(worker, signal.SIGCONT)
        assert Reading(client, HOLE_END, MIB).wait() == 5
        assert reading.wait() == 5 or reading.content() == disk[MIB : 2 * MIB]
        assert copy.wait(60) == 1
        assert copy.stderr and "the origin has another disk now" in copy.stderr.read()
    assert are_the_disks(files, disk)


def test_what_is_written_to_an_image_that_was_cloned_from_is_not_the_clones(
    ceph: SharedCeph, start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    """Once the clone is flattened, which the process that has it open does not notice."""
    clone = image.clone()
    clone.snap("snap")
    proxy = start(*files.arguments(clone.uri(), "--readahead", "0"))
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    clone.rbd("flatten", clone.name)
    image.rbd("snap", "unprotect", f"{image.name}@snap")
    image.remove_snap()
    image.write(b"N" * (HOLE_END - HOLE), HOLE)
    image.write(b"N" * MIB, HOLE_END)
    assert client.pread(2 * MIB, HOLE) == bytes(2 * MIB)
    assert read_all(client) == disk
    assert are_the_disks(files, disk)


def test_a_removed_snapshot_stays_as_long_as_it_has_clones(
    start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    """It is in the trash meanwhile. Clones have it, and it is an error by its former name."""
    clone = image.clone("--rbd-default-clone-format", "2", protect=False)
    clone.snap("snap")
    client = connect(start(*files.arguments(clone.uri(), "--readahead", "0")).uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    image.remove_snap()
    image.write(b"N" * MIB, HOLE_END)
    assert read_all(client) == disk


def test_a_clone_may_stand_on_an_image_in_a_namespace(
    ceph: SharedCeph, start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    """And that one on an image that is in none: the snapshots of both are checked where they are."""
    space, version_2 = f"{POOL}/{image.name}", ("--rbd-default-clone-format", "2")
    clone = Image(ceph, f"{image.name}-clone")
    ceph.run("rbd", "namespace", "create", space)
    ceph.run("rbd", "clone", *version_2, f"{image.name}@snap", f"{space}/between")
    ceph.run("rbd", "snap", "create", f"{space}/between@snap")
    ceph.run("rbd", "clone", *version_2, f"{space}/between@snap", clone.name)
    clone.snap("snap")
    client = connect(start(*files.arguments(clone.uri(), "--readahead", "0")).uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    clone.rbd("flatten", clone.name)
    ceph.run("rbd", "snap", "rm", f"{space}/between@snap")
    assert read_all(client) == disk


def test_a_rollback_of_the_image_and_a_new_name_of_the_snapshot_change_nothing(
    proxy: Server, image: Image, disk: bytes
) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    image.write(b"N" * MIB, HOLE_END)
    image.rbd("snap", "rollback", f"{image.name}@snap")
    image.write(b"N" * MIB, HOLE)
    image.rbd("snap", "rename", f"{image.name}@snap", f"{image.name}@other")
    assert read_all(client) == disk


def test_a_write_to_an_image_without_a_snapshot_is_an_error_once_the_cluster_has_noted_it(
    start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    image.rbd("config", "image", "set", image.name, "rbd_mtime_update_interval", "1")  # not every minute only
    proxy = start(*files.arguments(image.uri(""), "--readahead", "0"))
    proxy.expected_errors = [CHANGED]
    client = connect(proxy.uri)
    places = iter(range(0, HOLE, MIB // 8))

    def is_noticed() -> bool:
        image.write(b"N" * BLOCK, SIZE // BLOCK * BLOCK - BLOCK)
        return Reading(client, next(places), BLOCK).wait() == 5

    assert client.pread(BLOCK, next(places)) == disk[:BLOCK]
    wait_until(is_noticed, "an error")
