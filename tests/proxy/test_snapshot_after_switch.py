"""Snapshots of what was started as a proxy: refused before the switch, and a target's after it.

Clients from before the switch, from after it, and of other servers on the same cache
are all in them. `test_snapshot` has what is common to all disks.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from conftest import MIB, Start
from mounts import loop_mount, small_tmpfs
from proxies import BLOCK, DISK, Proxy, make_disk
from rawclient import WRITE, pack_request
from server_process import Server, children_of, is_alive, kill_all, run, state_of, title_of, wait_until
from snapshots import Taken, bgctl_command, held_snapshot, snapshots_of, take_by_command, take_by_signal
from stamps import DISK_SIZE, UNTOUCHED, check_cut, noise_disk, writers

Take = Callable[[Proxy], Taken]


def by_signal(proxy: Proxy) -> Taken:
    return take_by_signal(proxy.server, proxy.cache)


def by_command(proxy: Proxy) -> Taken:
    return take_by_command(proxy.control)


either_way = pytest.mark.parametrize("take", [by_signal, by_command])


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files cannot be cloned, so that snapshots are copies."""
    with small_tmpfs(tmp_path / "fs", "64M") as directory:
        yield directory


@pytest.fixture
def reflinks(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files can be cloned."""
    with loop_mount(tmp_path / "xfs", "xfs", 512) as directory:
        yield directory


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    """What the origin has."""
    return make_disk(tmp_path).read_bytes()


@pytest.fixture
def origin(start: Start, disk: bytes, tmp_path: Path) -> Server:
    return start("--target", "--readonly", tmp_path / "origin.img")


@pytest.fixture
def proxy(start: Start, tmpfs: Path, origin: Server) -> Iterator[Proxy]:
    """One that is not switched, and misses everything."""
    proxy = Proxy(start, tmpfs, origin.uri)
    yield proxy
    proxy.server.stop()


@pytest.fixture
def switched(proxy: Proxy) -> Proxy:
    switch(proxy)
    return proxy


@pytest.fixture
def other(start: Start, tmpfs: Path, switched: Proxy, origin: Server) -> Iterator[Proxy]:
    """A second server on the same cache, which finds it switched."""
    other = Proxy(start, tmpfs, origin.uri)
    yield other
    other.server.stop()


def switch(proxy: Proxy) -> None:
    proxy.bgctl("--cache-all")
    proxy.bgctl("--switch")


# When there are snapshots


def test_before_the_switch_both_ways_are_refused(proxy: Proxy) -> None:
    proxy.bgctl("--cache-all")
    os.kill(proxy.server.pid, signal.SIGUSR1)
    proxy.server.wait_for_log("WARNING: SIGUSR1: a proxy has no snapshots before it is switched")
    assert proxy.refused("--snapshot").startswith("a proxy has no snapshots before it is switched")
    assert snapshots_of(proxy.cache) == []


@either_way
def test_after_the_switch_both_ways_work(switched: Proxy, disk: bytes, take: Take) -> None:
    path = take(switched).path
    assert path.name.startswith("cache.img.snapshot.")
    assert path.read_bytes() == disk


@either_way
def test_after_a_switch_by_signal_both_ways_work(proxy: Proxy, disk: bytes, take: Take) -> None:
    proxy.bgctl("--cache-all")
    os.kill(proxy.server.pid, signal.SIGUSR2)
    proxy.server.wait_for_log("switched to a plain target")
    assert take(proxy).path.read_bytes() == disk


@either_way
def test_after_a_switch_by_another_server_both_ways_work(
    start: Start, tmpfs: Path, proxy: Proxy, origin: Server, disk: bytes, take: Take
) -> None:
    other = Proxy(start, tmpfs, origin.uri)
    switch(proxy)
    assert take(other).path.read_bytes() == disk
    other.server.stop()


def test_a_proxy_that_is_started_again_after_the_switch_refuses(
    start: Start, tmpfs: Path, switched: Proxy, origin: Server
) -> None:
    switched.server.stop()
    again = Proxy(start, tmpfs, origin.uri)
    assert again.refused("--snapshot").startswith("a proxy has no snapshots before it is switched")
    again.server.stop()


def test_after_a_switch_by_force_what_is_missing_is_zeros(proxy: Proxy, disk: bytes) -> None:
    with proxy.raw() as client:
        client.read(0, MIB)
        proxy.wait_for_cached(256)
        proxy.bgctl("--force", "--switch")
        assert client.write(2 * MIB, b"new") == 0
    expected = bytearray(disk[:MIB] + bytes(DISK - MIB))
    expected[2 * MIB : 2 * MIB + 3] = b"new"
    assert by_command(proxy).path.read_bytes() == expected


def test_a_readonly_proxy_has_them(start: Start, tmpfs: Path, origin: Server, disk: bytes) -> None:
    proxy = Proxy(start, tmpfs, origin.uri, "--readonly")
    switch(proxy)
    assert by_command(proxy).path.read_bytes() == disk
    proxy.server.stop()


# What is in them


@either_way
def test_of_a_cache_file_larger_than_the_disk_it_is_the_disk(
    start: Start, tmpfs: Path, origin: Server, disk: bytes, take: Take
) -> None:
    check_larger_cache(start, tmpfs, origin, disk, take)


def test_a_clone_of_a_cache_file_larger_than_the_disk_is_the_disk(
    start: Start, reflinks: Path, origin: Server, disk: bytes
) -> None:
    check_larger_cache(start, reflinks, origin, disk, by_command)


def check_larger_cache(start: Start, directory: Path, origin: Server, disk: bytes, take: Take) -> None:
    (directory / "cache.img").write_bytes(b"x" * (DISK + MIB))
    proxy = Proxy(start, directory, origin.uri, "--clear-bitmap")
    switch(proxy)
    assert take(proxy).path.read_bytes() == disk
    proxy.server.stop()


def test_a_sparse_cache_larger_than_what_is_free_stays_sparse(start: Start, tmp_path: Path, tmpfs: Path) -> None:
    image = tmp_path / "sparse.img"
    with open(image, "wb") as file:
        file.truncate(256 * MIB)
        file.seek(100 * MIB)
        file.write(b"data" * BLOCK)
    far = start("--target", "--readonly", image)
    proxy = Proxy(start, tmpfs, far.uri)
    switch(proxy)
    path = by_command(proxy).path
    assert path.stat().st_blocks <= proxy.cache.stat().st_blocks
    run("cmp", image, path)
    proxy.server.stop()


def test_what_clients_of_all_ages_write_while_the_copy_runs_is_not_in_it(
    proxy: Proxy, disk: bytes, start: Start, tmpfs: Path, origin: Server
) -> None:
    """From before the switch and idle since, from before and at work since, after it, in the middle; of two servers."""
    other = Proxy(start, tmpfs, origin.uri)
    with ExitStack() as stack:
        clients = [stack.enter_context(server.raw()) for server in (proxy, other) for _ in range(2)]
        switch(proxy)
        for client in clients[::2]:
            assert client.read(MIB, 4) == disk[MIB : MIB + 4]
        clients += [stack.enter_context(server.raw()) for server in (proxy, other)]
        with held_snapshot(proxy.server) as held:
            held.let_workers_keep(2048)
            clients += [stack.enter_context(server.raw()) for server in (proxy, other)]
            for number, client in enumerate(clients):
                assert client.write(MIB + number * 100_000, b"new" * 1000) == 0
            held.go_on()
            wait_until(lambda: snapshots_of(proxy.cache), "the snapshot")
        assert snapshots_of(proxy.cache)[0].read_bytes() == disk
        assert clients[0].read(MIB + 700_000, 3) == b"new"
    other.server.stop()


def test_a_long_write_that_is_under_way_since_before_the_switch_ends_at_the_snapshot(proxy: Proxy, disk: bytes) -> None:
    """Of one that is not answered, there may be the beginning."""
    length = 2 * MIB
    message = pack_request(WRITE, 0, length) + b"w" * length
    with proxy.raw() as client:
        client.send(message[:MIB])
        switch(proxy)
        with held_snapshot(proxy.server) as held:
            held.let_workers_keep(2048)
            client.send(message[MIB:])
            held.go_on()
            assert client.simple_reply()[0] == 0
            wait_until(lambda: snapshots_of(proxy.cache), "the snapshot")
        assert client.read(0, length) == b"w" * length
    data = snapshots_of(proxy.cache)[0].read_bytes()
    begun = len(data) - len(data.lstrip(b"w"))
    assert begun < MIB
    assert data == b"w" * begun + disk[begun:]


# Under load


EARLY, LATE = ["small", "odd", "sweep"], ["large", "zeroing", "bursts"]


@pytest.mark.parametrize("kind", ["xfs", "tmpfs"])
def test_every_snapshot_is_a_consistent_cut_through_clients_from_before_and_after_the_switch(
    start: Start, tmp_path: Path, kind: str
) -> None:
    mounted: Any = small_tmpfs(tmp_path / "fs", "512M") if kind == "tmpfs" else loop_mount(tmp_path / "fs", kind, 512)
    with mounted as directory:
        original = noise_disk(tmp_path / "origin.img")
        far = start("--target", "--readonly", tmp_path / "origin.img")
        servers = [Proxy(start, directory, far.uri) for _ in range(2)]
        with writers(servers[0].uri, tmp_path, EARLY) as early:
            switch(servers[1])
            far.stop()
            taken = [by_command(servers[0])]
            with writers(servers[1].uri, tmp_path, LATE) as late:
                taken += [by_signal(servers[0]), by_command(servers[1])]
                late.stop()
            early.stop()
        for snapshot in taken:
            data = snapshot.path.read_bytes()
            assert len(data) == DISK_SIZE
            assert data[UNTOUCHED] == original[UNTOUCHED]
            histories = early.histories + (late.histories if snapshot is not taken[0] else [])
            check_cut(data, histories, snapshot.asked_at, snapshot.there_at)
        for server in servers:
            server.server.stop()


# Several servers on one cache


def test_two_servers_that_are_asked_make_theirs_one_after_the_other(switched: Proxy, other: Proxy, disk: bytes) -> None:
    with held_snapshot(switched.server) as held:
        asking = subprocess.Popen(bgctl_command("--snapshot", other.control), stdout=-1, stderr=-1)
        wait_until(lambda: "making a snapshot" in titles_below(other.steward()), "the second one's process")
        held.let_workers_keep(2048)
        with other.raw() as client:
            assert client.write(MIB, b"new") == 0
        assert asking.poll() is None
        held.go_on()
        out, err = asking.communicate(timeout=60)
    assert err == b""
    wait_until(lambda: len(snapshots_of(switched.cache)) == 2, "both snapshots")
    second = Path(os.fsdecode(out).rstrip("\n"))
    (first,) = set(snapshots_of(switched.cache)) - {second}
    assert first.read_bytes() == disk
    assert second.read_bytes() == switched.cache.read_bytes() != disk


def titles_below(pid: int) -> str:
    return " ".join(map(title_of, children_of(pid)))


@pytest.mark.parametrize("event", ["comes", "leaves"])
def test_a_server_that_comes_or_leaves_does_not_end_another_one_s_snapshot(
    start: Start, tmpfs: Path, switched: Proxy, other: Proxy, origin: Server, disk: bytes, event: str
) -> None:
    with switched.raw() as client:
        with held_snapshot(switched.server) as held:
            held.let_workers_keep(2048)
            if event == "comes":
                newcomer = Proxy(start, tmpfs, origin.uri)
                newcomer.query()
            else:
                assert other.server.stop() == 0
            assert client.write(MIB, b"new") == 0
            held.go_on()
            wait_until(lambda: snapshots_of(switched.cache), "the snapshot")
        assert snapshots_of(switched.cache)[0].read_bytes() == disk
    if event == "comes":
        newcomer.server.stop()


def test_the_snapshot_of_a_server_that_is_killed_is_ended_by_another(
    switched: Proxy, other: Proxy, disk: bytes
) -> None:
    """Or its workers would go on keeping old blocks in a file that has no name."""
    before = free(other.cache)
    with other.raw() as client:
        with held_snapshot(switched.server) as held:
            snapshotter, stewards = held.snapshotter, [switched.steward(), other.steward()]
            held.let_workers_keep(2048)
            assert client.write(MIB, b"n" * MIB) == 0
            for steward in stewards:  # the one would end the snapshot, and the other is not to be the first
                os.kill(steward, signal.SIGSTOP)
            wait_until(lambda: [*map(state_of, stewards)] == ["T", "T"], "the stewards to stand still")
            os.kill(snapshotter, signal.SIGKILL)
            kill_all(switched.server.pid)
            wait_until(lambda: not is_alive(snapshotter), "the end of the snapshotting process")
            held.go_on()
            with other.raw() as newcomer:
                assert newcomer.write(3 * MIB, b"new") == 0
            os.kill(stewards[1], signal.SIGCONT)
        wait_until(lambda: free(other.cache) >= before - MIB // 2, "the space")
        assert client.write(0, b"after") == 0
        assert snapshots_of(other.cache) == []
        path = by_command(other).path
        assert path.read_bytes() == client.read(0, DISK)


def free(path: Path) -> int:
    status = os.statvfs(path.parent)
    return status.f_bavail * status.f_frsize
