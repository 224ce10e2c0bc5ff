"""A running proxy's cache is not served as a disk by itself, nor a disk that is served taken for a cache."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import nbd
import pytest
from caching import BLOCK, CacheFiles, ask, bgctl, connect, hold, kill_server, wait_until_gone
from conftest import MIB, Start, StartWrapper
from launch import Launched, fails, launched, stop_daemon
from mounts import attach, detach
from rawclient import RawClient
from server_process import PYTHON, ROOT, Server, command, run, wait_until
from wrapper_process import Wrapper

from xnbd.scoreboard.layout import HEAD, TARGET
from xnbd.storage.image_use import CACHE, DISK, attempts, try_use_as
from xnbd.system.file_locks import SharedLocks

SIZE = 2 * MIB
MODES = [["--target"], ["--target", "--readonly"], ["--cow-target"]]
TIME = 60.0
"""Seconds for the start of a server that is to fail: it tries for some of them."""


@pytest.fixture
def content() -> bytes:
    return random.Random(8).randbytes(SIZE)


@pytest.fixture
def far(start: Start, tmp_path: Path, content: bytes) -> Server:
    """The origin."""
    path = tmp_path / "origin.img"
    path.write_bytes(content)
    return start("--target", "--readonly", path)


@pytest.fixture
def proxy(start: Start, files: CacheFiles, far: Server) -> Server:
    server: Server = start(*files.arguments(far.uri))
    server.wait_for_log("INFO: serving ")  # the control socket is the last one to be there
    return server


def refused(files: CacheFiles, *arguments: object) -> str:
    status, message = fails(*arguments, "--unix", files.image.parent / "refused", timeout=TIME)
    assert status == 1
    return message


def refuses_target(files: CacheFiles, *mode: str) -> None:
    message = refused(files, *(mode or MODES[0]), files.image)
    assert message == (
        f"xnbd-server: {files.image} is the cache of a running proxy: "
        "switch that one (xnbd-bgctl --switch), or stop it\n"
    )


def refuses_proxy(files: CacheFiles, origin: Server, *options: str) -> None:
    assert f"{files.image} is served as a disk by itself" in refused(files, *files.arguments(origin.uri, *options))


@contextmanager
def disconnecting(client: nbd.NBD) -> Iterator[nbd.NBD]:
    try:
        yield client
    finally:
        client.shutdown()


def is_claimed(path: Path, use: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return SharedLocks(fd).held_elsewhere(use)
    finally:
        os.close(fd)


# Refused


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_running_proxys_cache_is_no_disk(proxy: Server, files: CacheFiles, content: bytes, mode: List[str]) -> None:
    refuses_target(files, *mode)
    with disconnecting(connect(proxy.uri)) as client:
        assert client.pread(SIZE, 0) == content


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_disk_that_is_served_is_no_cache(start: Start, far: Server, files: CacheFiles, mode: List[str]) -> None:
    """Nothing is left of the attempt."""
    files.image.write_bytes(bytes(SIZE))
    start(*mode, files.image)
    refuses_proxy(files, far)
    assert list(files.image.parent.glob("cache.*")) == [files.image]


@pytest.mark.parametrize("options", [[], ["--clear-bitmap"]], ids=str)
def test_a_cache_that_is_served_as_a_disk_is_not_resumed(
    start: Start, proxy: Server, far: Server, files: CacheFiles, options: List[str]
) -> None:
    """Its files stay as they are."""
    proxy.stop()
    start("--target", files.image)
    before = [path.read_bytes() for path in (files.bitmap, files.state)]
    refuses_proxy(files, far, *options)
    assert [path.read_bytes() for path in (files.bitmap, files.state)] == before
    made = [".bitmap", ".board", ".checked", ".img", ".state", ".sums"]
    assert sorted(path.suffix for path in files.image.parent.glob("cache.*")) == made


def test_the_second_of_two_proxies_holds_the_cache_too(
    start: Start, proxy: Server, far: Server, files: CacheFiles, tmp_path: Path
) -> None:
    start(*files.arguments(far.uri, control=tmp_path / "control2"))
    proxy.stop()
    refuses_target(files)


def test_a_proxy_whose_switch_was_refused_is_one_still(proxy: Server, files: CacheFiles) -> None:
    assert "blocks are missing" in bgctl("--switch", files.control, check=False)[2]
    refuses_target(files)


def test_workers_that_have_lost_their_master_hold_the_cache(proxy: Server, files: CacheFiles) -> None:
    pids = hold(proxy.pid)
    os.kill(proxy.pid, signal.SIGKILL)
    proxy.process.wait()
    try:
        refuses_target(files)
    finally:
        for pid in set(pids) - {proxy.pid}:
            os.kill(pid, signal.SIGCONT)
        wait_until_gone(pids)


def test_a_daemon_that_is_refused_fails_and_leaves_no_pid_file(proxy: Server, files: CacheFiles) -> None:
    log, pid_file = files.image.parent / "log", files.image.parent / "pid"
    refuses_target(files, "--target", "--daemonize", "--pidfile", str(pid_file), "--logpath", str(log))
    assert "is the cache of a running proxy" in log.read_text()
    assert not pid_file.exists()


def test_a_proxy_as_a_daemon_is_refused_too(start: Start, far: Server, files: CacheFiles) -> None:
    log, pid_file = files.image.parent / "log", files.image.parent / "pid"
    files.image.write_bytes(bytes(SIZE))
    start("--target", files.image)
    refuses_proxy(files, far, "--daemonize", "--pidfile", str(pid_file), "--logpath", str(log))
    assert "is served as a disk by itself" in log.read_text()
    assert not pid_file.exists()


# Allowed


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("other", MODES, ids=" ".join)
def test_targets_of_all_kinds_share_an_image(start: Start, image: Path, mode: List[str], other: List[str]) -> None:
    servers = [start(*mode, image), start(*other, image)]
    for server in servers:
        with disconnecting(connect(server.uri)) as client:
            assert client.pread(512, 0) == image.read_bytes()[:512]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_cache_is_a_disk_when_its_proxy_is_stopped(
    start: Start, proxy: Server, files: CacheFiles, mode: List[str]
) -> None:
    proxy.stop()
    start(*mode, files.image)


def test_a_cache_is_a_disk_when_its_proxy_is_killed(start: Start, proxy: Server, files: CacheFiles) -> None:
    kill_server(proxy)
    start("--target", files.image)


def test_a_disk_is_a_cache_when_its_target_is_killed(start: Start, far: Server, files: CacheFiles) -> None:
    files.image.write_bytes(bytes(SIZE))
    kill_server(start("--target", files.image))
    start(*files.arguments(far.uri))


def test_a_start_waits_a_moment_for_a_proxy_that_is_ending(image: Path) -> None:
    """Counted in attempts, not in seconds, in which anybody may stand still."""
    fds = [os.open(image, os.O_RDWR) for _ in range(2)]
    assert try_use_as(fds[0], CACHE)
    outcomes = []
    for number, _ in enumerate(attempts()):
        if number == 10:
            os.close(fds[0])
        outcomes.append(try_use_as(fds[1], DISK))
    os.close(fds[1])
    assert outcomes == [False] * 10 + [True] * (len(outcomes) - 10)
    assert len(outcomes) > 20


def test_the_image_is_free_when_the_pid_file_goes(far: Server, files: CacheFiles) -> None:
    pid_file, sock = files.image.parent / "pid", files.image.parent / "daemon"
    options = ["--daemonize", "--pidfile", pid_file, "--unix", sock, "--logpath", files.image.parent / "log"]
    try:
        run(*command(*files.arguments(far.uri, *options)))
        assert is_claimed(files.image, CACHE)
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        wait_until(lambda: not pid_file.exists(), "the pid file's end")
        assert not is_claimed(files.image, CACHE)
    finally:
        stop_daemon(pid_file)


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY], ids=["nothing", "looking"])
def test_a_file_that_cannot_be_locked_is_used_all_the_same(proxy: Server, files: CacheFiles, flags: int) -> None:
    """No file system here refuses locks; descriptors that are good for nothing, or for looking only, do."""
    fd = os.open(files.image, flags)
    try:
        assert try_use_as(fd, CACHE)
        assert try_use_as(fd, DISK) == (flags == os.O_PATH)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_another_programs_lock_on_the_whole_file_is_not_minded(
    start: Start, far: Server, files: CacheFiles, kind: int
) -> None:
    files.image.write_bytes(bytes(SIZE))
    with files.image.open("r+b") as file:
        fcntl.lockf(file, kind)
        server = start("--target", files.image)
        server.stop()
        start(*files.arguments(far.uri))


@pytest.mark.root(reason="loop devices are made by root only")
def test_a_block_device_is_a_disk_or_a_cache(start: Start, far: Server, files: CacheFiles, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(SIZE))
    device = attach(backing)
    try:
        files.image = device
        targets = [start("--target", device), start("--cow-target", "--cow-dir", tmp_path, device)]
        assert f"{device} is served as a disk" in fails(*files.arguments(far.uri), "--unix", tmp_path / "s")[1]
        for target in targets:
            target.stop()
        proxy = start(*files.arguments(far.uri))
        assert f"{device} is the cache" in fails("--target", device, "--unix", tmp_path / "s")[1]
        proxy.stop()
    finally:
        detach(device)


# Switched


Switch = Callable[[Server, CacheFiles], None]


def switch_by_bgctl(proxy: Server, files: CacheFiles) -> None:
    bgctl("--switch", files.control)


def switch_by_signal(proxy: Server, files: CacheFiles) -> None:
    os.kill(proxy.pid, signal.SIGUSR2)
    proxy.wait_for_log("switched to a plain target")


@pytest.mark.parametrize("switch", [switch_by_bgctl, switch_by_signal])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_beside_a_switched_proxy_targets_are_welcome(
    start: Start, proxy: Server, files: CacheFiles, content: bytes, mode: List[str], switch: Switch
) -> None:
    bgctl("--cache-all", files.control)
    switch(proxy, files)
    target = start(*mode, files.image)
    with disconnecting(connect(proxy.uri)) as near, disconnecting(connect(target.uri)) as client:
        near.pwrite(b"near", 0)
        assert client.pread(SIZE, 0) == b"near" + content[4:]


def test_a_switch_holds_for_all_servers_on_the_cache(
    start: Start, proxy: Server, far: Server, files: CacheFiles, tmp_path: Path
) -> None:
    """Also for one that joins them later, as a target does."""
    start(*files.arguments(far.uri, control=tmp_path / "control2"))
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    start("--target", files.image)
    third = start(*files.arguments(far.uri, control=tmp_path / "control3"))
    assert ask(tmp_path / "control3", "query")["mode"] == "target"
    with disconnecting(connect(third.uri)) as client:
        client.pwrite(b"third", 0)
    assert not is_claimed(files.image, CACHE)


def test_a_switched_proxy_that_was_stopped_is_not_started_beside_a_target(
    start: Start, proxy: Server, far: Server, files: CacheFiles
) -> None:
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    target = start("--target", files.image)
    proxy.stop()
    refuses_proxy(files, far)
    target.stop()
    start(*files.arguments(far.uri))
    refuses_target(files)


def test_a_switched_proxy_that_was_killed_is_resumed(
    start: Start, proxy: Server, far: Server, files: CacheFiles
) -> None:
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    kill_server(proxy)
    again = start(*files.arguments(far.uri))
    again.wait_for_log("INFO: serving ")
    assert ask(files.control, "query")["mode"] == "proxy"
    refuses_target(files)


def test_a_switch_that_its_steward_did_not_live_to_tell_of_is_told_by_the_next(
    start: Start, proxy: Server, files: CacheFiles
) -> None:
    """Here by the same: all that it has of a switch is what the scoreboard says."""
    with files.bitmap.with_name(f"{files.bitmap.name}.board").open("r+b") as file:
        file.seek(HEAD.at["mode"])
        file.write(bytes([TARGET]))
    wait_until(lambda: not is_claimed(files.image, CACHE), "the steward to notice")
    start("--target", files.image)


# One client, and the wrapper


def served(tmp_path: Path, *arguments: object) -> Tuple[RawClient, subprocess.Popen[bytes], Path]:
    """A client that a wrapper passes to a server, the server, and its log."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIME)
    log_path = tmp_path / f"{theirs.fileno()}.one.log"
    with theirs, open(log_path, "wb") as log:
        line = command("--connected-fd", theirs.fileno(), *arguments)
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=log, pass_fds=[theirs.fileno()])
    return RawClient(ours), process, log_path


def test_a_server_for_one_client_is_refused_the_cache(proxy: Server, files: CacheFiles, tmp_path: Path) -> None:
    client, process, log_path = served(tmp_path, "--target", files.image)
    with client:
        assert client.closed()
    assert process.wait(TIME) == 1
    assert "is the cache of a running proxy" in log_path.read_text()


def test_proxies_for_one_client_each_share_the_cache_and_keep_targets_away(
    far: Server, files: CacheFiles, content: bytes, tmp_path: Path
) -> None:
    both = [served(tmp_path, *files.arguments(far.uri)) for _ in range(2)]
    for client, _, _ in both:
        assert client.read(BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]
    refuses_target(files)
    for client, process, _ in both:
        client.sock.close()
        assert process.wait(TIME) == 0
    assert not is_claimed(files.image, CACHE)


def test_a_proxy_for_one_client_that_was_switched_lets_targets_in(
    start: Start, far: Server, files: CacheFiles, tmp_path: Path
) -> None:
    client, process, _ = served(tmp_path, *files.arguments(far.uri))
    with client:
        assert client.works()
        bgctl("--force", "--switch", files.control)
        start("--target", files.image)
        assert client.works()
    assert process.wait(TIME) == 0


def test_inetd_s_server_is_refused_the_cache(proxy: Server, files: CacheFiles, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    log = tmp_path / "inetd.log"
    with theirs:
        line = command("--inetd", "--target", "--logpath", log, files.image)
        process = subprocess.Popen(line, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL)
    ours.settimeout(TIME)
    with RawClient(ours) as client:
        assert client.closed()
    assert process.wait(TIME) == 1
    assert "is the cache of a running proxy" in log.read_text()


def test_a_wrapper_is_told_at_once_that_a_target_is_a_running_proxys_cache(
    start_wrapper: StartWrapper, proxy: Server, files: CacheFiles, image: Path
) -> None:
    wrapper: Wrapper = start_wrapper("--imgfile", image)
    assert "is the cache of a running proxy" in wrapper.refuses("--add-target", "cache", files.image)
    assert list(wrapper.listed()) == [image.name]


def test_a_wrappers_client_gets_no_cache_of_a_proxy_that_was_started_later(
    start: Start, start_wrapper: StartWrapper, far: Server, files: CacheFiles, content: bytes
) -> None:
    files.image.write_bytes(bytes(SIZE))
    wrapper: Wrapper = start_wrapper("--imgfile", files.image)
    start(*files.arguments(far.uri)).wait_for_log("INFO: serving ")
    assert run("nbdinfo", wrapper.uri("cache.img"), check=False)[0]
    wrapper.wait_for_log("export 'cache.img' cannot be served: ")
    assert f"{files.image} is the cache of a running proxy: switch that one" in wrapper.log()
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    with wrapper.client("cache.img") as client:
        assert client.read(0, SIZE) == content


def test_a_wrappers_proxies_come_and_go_and_are_switched_beside_targets(
    start: Start, start_wrapper: StartWrapper, far: Server, files: CacheFiles, content: bytes
) -> None:
    wrapper: Wrapper = start_wrapper()
    wrapper.ctl("--add-proxy", "far", far.uri, files.image, files.bitmap, files.control)
    with wrapper.client("far") as first, wrapper.client("far") as second:
        assert first.read(0, BLOCK) == second.read(0, BLOCK) == content[:BLOCK]
        refuses_target(files)
        wrapper.ctl("--bgctl-cache-all", "far")
        wrapper.ctl("--bgctl-switch", "far")
        target = start("--target", files.image)
        with wrapper.client("far") as third, disconnecting(connect(target.uri)) as client:
            assert third.write(0, b"third") == 0
            assert first.read(0, 5) == client.pread(5, 0) == b"third"


# At the same time


def outcome(server: Launched) -> str:
    """``serving``, ``refused``, or nothing yet."""
    if " INFO: serving " in server.log():
        return "serving"
    return "refused" if server.process.poll() == 1 else ""


def test_of_a_proxy_and_a_target_that_start_at_once_one_serves(far: Server, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(6):
        files = CacheFiles(tmp_path, f"round{number}")
        files.image.write_bytes(bytes(SIZE))
        lines = {"target": ["--target", str(files.image)], "proxy": files.arguments(far.uri)}
        with ExitStack() as stack:
            servers: List[Launched] = []
            for name in rng.sample(sorted(lines), 2):
                log, sock = tmp_path / f"{name}{number}.log", tmp_path / f"{name}{number}.sock"
                line = command(*lines[name], "--spare-workers", "1", "--unix", sock)
                servers.append(stack.enter_context(launched(line, log)))
                time.sleep(rng.choice([0, rng.uniform(0, 0.2)]))
            wait_until(lambda: all(outcome(server) for server in servers), "the outcome", TIME)  # noqa: B023
            assert sorted(map(outcome, servers)) == ["refused", "serving"], [server.log() for server in servers]


def test_claims_of_two_kinds_never_hold_at_once(tmp_path: Path, seed: int) -> None:
    """Four processes claim and let go as fast as they can; each shows in shared memory what it holds."""
    (tmp_path / "image").write_bytes(bytes(1))
    (tmp_path / "shown").write_bytes(bytes(4))
    line = [PYTHON, "-W", "error", "-c", CLAIMER, str(tmp_path / "image"), str(tmp_path / "shown")]
    processes = [
        subprocess.Popen([*line, str(number), str(seed + number)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        for number in range(4)
    ]
    try:
        assert [process.wait(TIME) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait()


CLAIMER = """
import mmap, os, random, sys
from xnbd.scoreboard.layout import HEAD, TARGET
from xnbd.storage.image_use import CACHE, DISK, attempts, try_use_as

number, rng = int(sys.argv[3]), random.Random(int(sys.argv[4]))
use, others = (CACHE, (1, 3)) if number % 2 == 0 else (DISK, (0, 2))
with open(sys.argv[2], "r+b") as file:
    shown = mmap.mmap(file.fileno(), 4)
for _ in range(2000):
    fd = os.open(sys.argv[1], os.O_RDONLY)
    if try_use_as(fd, use):
        shown[number] = 1
        for _ in range(rng.randrange(50)):
            if any(shown[other] for other in others):
                sys.exit(1)
        shown[number] = 0
    os.close(fd)
"""
