"""xnbd-bgctl --upgrade: the running server becomes another program, and its clients do not notice.

The long form is ``XNBD_UPGRADES=100 XNBD_IDLE=1000``, and in ``contrib/soak``.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from caching import ask, connect, query
from certificates import Certificates
from conftest import MIB, Start, unexpected_lines
from injection import injected
from launch import serving, stop_daemon
from model import Model, read_all
from notify_socket import listening
from proxies import Proxy, bgctl, refused
from rawclient import FLUSH, READ, RawClient, pack_request
from relay import Relay
from release_0_5_0 import ANSWERS, REFUSAL, ask_old
from server_process import (
    PYTHON,
    ROOT,
    Server,
    children_of,
    command,
    is_alive,
    run,
    state_of,
    title_of,
    wait_until,
)
from snapshots import bgctl_command
from stamps import check_cut, noise_disk, writers
from tls_client import tls_client
from upgrades import IDLE, UPGRADES, build, upgrade, upgrading

from xnbd import __version__
from xnbd.scoreboard.layout import VERSION

pytestmark = pytest.mark.timeout(120 + 10 * UPGRADES)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "ctl"


@pytest.fixture
def target(start: Start, image: Path, control: Path) -> Server:
    return start("--target", "--control", control, image)


def negotiated(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


def workers_of(server: Server) -> Dict[str, List[int]]:
    """Children of the master by what they are."""
    kinds: Dict[str, List[int]] = {"steward": [], "spare": [], "worker": [], "other": []}
    for pid in server.workers():
        role = title_of(pid).removeprefix("xnbd-server: ").split(" ")[0]
        kinds[role if role in kinds else "other"].append(pid)
    return kinds


# What stays, and what is new


def test_master_sockets_and_clients_stay_and_all_other_processes_are_new(target: Server, control: Path) -> None:
    with negotiated(target) as client:
        assert client.write(0, b"before") == 0
        before = set(target.workers())
        outcome = upgrade(control)
        assert (outcome.old, outcome.new, outcome.moved, outcome.rest) == (__version__, __version__, 1, "")
        assert client.read(0, 6) == b"before"
        wait_until(lambda: not before & set(target.workers()), "the end of all old processes")
        assert target.process.poll() is None
        assert len(workers_of(target)["steward"]) == 1
    with negotiated(target) as another:
        assert another.read(0, 6) == b"before"
    target.wait_for_log(f"upgraded, {__version__} -> {__version__}: 1 client moved")


def test_a_check_changes_nothing(target: Server, control: Path) -> None:
    wait_until(lambda: len(workers_of(target)["spare"]) >= 4, "all workers")
    before = target.workers()
    line = bgctl("--upgrade", "--check", control)
    assert line == f"{__version__} -> {__version__} is possible, with 0 clients; nothing was changed\n"
    assert target.workers() == before


def test_connections_that_have_said_nothing_stay(target: Server, control: Path) -> None:
    silent = [RawClient(target.connect()) for _ in range(20)]
    upgrade(control)
    for client in silent:
        with client:
            client.negotiate()
            assert len(client.read(0, 512)) == 512


def test_descriptors_and_processes_do_not_pile_up(target: Server, control: Path) -> None:
    def settled() -> bool:
        kinds = workers_of(target)
        return not kinds["other"] and len(kinds["steward"]) == 1 and len(kinds["spare"]) >= 4

    with negotiated(target) as client:
        numbers = set()
        for _ in range(5):
            upgrade(control)
            wait_until(settled, "one steward and spare workers")
            numbers.add(sum(1 for _ in Path(f"/proc/{target.pid}/fd").iterdir()))
            assert len(client.read(0, 512)) == 512
        assert len(numbers) == 1


def test_the_pid_file_stays_locked_and_is_removed_at_the_end(start: Start, image: Path, tmp_path: Path) -> None:
    control, pid_file = tmp_path / "ctl", tmp_path / "pid"
    server = start("--target", "--control", control, "--pidfile", pid_file, image)
    upgrade(control)
    assert int(pid_file.read_text()) == server.pid
    words = command("--target", "--pidfile", pid_file, "--unix", tmp_path / "other", image)
    assert "held by a running server" in run(*words, check=False)[2]
    assert server.stop() == 0
    assert not pid_file.exists()
    assert not control.exists()
    assert not server.socket.exists()


def test_relative_paths_are_those_of_the_start(image: Path, tmp_path: Path) -> None:
    """A daemon's working directory is another one; this one's is gone."""
    where, program = tmp_path / "there", tmp_path / "links" / "xnbd-server"
    where.mkdir()
    program.parent.mkdir()
    (where / "disk.img").write_bytes(image.read_bytes())
    words = ["--target", "--control", "ctl", "--unix", "sock", "--pidfile", "pid", "--logpath", "log", "disk.img"]
    run("sh", "-c", f'cd {where} && exec "$@"', "sh", *command("--daemonize", *words))
    try:
        upgrade(where / "ctl")
        upgrade(where / "ctl")
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.connect(str(where / "sock"))
            assert RawClient(sock).negotiate().read(0, 512) == image.read_bytes()[:512]
        assert not unexpected_lines((where / "log").read_text(), [])
    finally:
        stop_daemon(where / "pid")


def test_a_working_directory_that_is_gone_does_no_harm(image: Path, tmp_path: Path) -> None:
    where, control = tmp_path / "there", tmp_path / "ctl"
    where.mkdir()
    words = ("--target", "--control", control, "--unix", tmp_path / "sock", image)
    with serving(tmp_path / "log", *words, cwd=where):
        where.rmdir()
        assert upgrade(control).new == __version__


def test_systemd_hears_that_the_next_program_is_ready(image: Path, tmp_path: Path, start: Start) -> None:
    with listening(str(tmp_path / "notify")) as manager:
        server = start("--target", "--control", tmp_path / "ctl", image, env=manager.environment)
        manager.wait_for("READY=1")
        began = time.monotonic()
        upgrade(tmp_path / "ctl")
        manager.wait_for("READY=1", 2)
        manager.wait_for("STATUS=clients: 0", 2)
        told = [message.split("\n") for message in manager.heard if not message.startswith("STATUS")]
        assert [words[0] for words in told] == ["READY=1", "RELOADING=1", "READY=1"]
        assert began <= int(told[1][1].partition("MONOTONIC_USEC=")[2]) / 1e6 <= time.monotonic()
        with injected(server.pid, "execve:error=ENOMEM"):
            refused("--upgrade", tmp_path / "ctl")
        manager.wait_for("READY=1", 3)
        assert manager.senders == {server.pid}


@pytest.mark.parametrize("daemon", [False, True])
def test_the_watchdog_is_told_on_and_on(image: Path, tmp_path: Path, daemon: bool) -> None:
    """A daemon is watched, too: its manager knows it from ``MAINPID``."""
    control, pid_file = tmp_path / "ctl", tmp_path / "pid"
    words = ["--target", "--control", control, "--unix", tmp_path / "sock", "--pidfile", pid_file, image]
    with listening(str(tmp_path / "notify")) as manager:
        env = {**os.environ, **manager.environment, "WATCHDOG_USEC": "200000"}
        shell = 'export WATCHDOG_PID=$$; exec "$@"'
        line = ["sh", "-c", shell, "sh", *command(*(["--daemonize"] if daemon else []), *words)]
        with subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL):
            wait_until(pid_file.exists, "the pid file")
            try:
                manager.wait_for("WATCHDOG=1")
                upgrade(control)
                told = manager.listen().count("WATCHDOG=1")
                manager.wait_for("WATCHDOG=1", told + 3)
            finally:
                stop_daemon(pid_file)


# Which program


def test_the_program_is_executed_as_it_was_started(image: Path, tmp_path: Path) -> None:
    """By its first line, which may lead to another interpreter by now, or by an interpreter that was named."""
    program = build(tmp_path / "tree", "7.0")
    control, path = tmp_path / "ctl", tmp_path / "sock"
    words = ["--target", "--control", str(control), "--unix", str(path), str(image)]
    for start_with in ([str(program)], [PYTHON, "-W", "error", "-s", str(program)]):
        with subprocess.Popen([*start_with, *words], stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(control.exists, "the control socket")
                first_line = program.read_text().splitlines()[0]
                marked = program.read_text().replace(first_line, f"{first_line} -s", 1)
                program.write_text(marked)
                assert upgrade(control).new == "7.0"
            finally:
                process.terminate()
        program.write_text(marked.replace(f"{first_line} -s", first_line, 1))


def test_files_that_were_replaced_in_place_are_the_next_program(image: Path, tmp_path: Path) -> None:
    """As ``pip install --upgrade`` does it."""
    program, control = build(tmp_path / "tree", "7.0"), tmp_path / "ctl"
    words = ["--target", "--control", str(control), "--unix", str(tmp_path / "sock"), str(image)]
    with subprocess.Popen([program, *words], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(control.exists, "the control socket")
            init = tmp_path / "tree/xnbd/__init__.py"
            init.write_text(init.read_text().replace("7.0", "7.1"))
            outcome = upgrade(control)
            assert (outcome.old, outcome.new) == ("7.0", "7.1")
        finally:
            process.terminate()


def test_two_versions_become_each_other_and_back(target: Server, control: Path, tmp_path: Path, image: Path) -> None:
    later, former = build(tmp_path / "later", "99.1"), build(tmp_path / "former", "99.0")
    with negotiated(target) as client:
        assert client.write(0, b"before") == 0
        seen = [upgrade(control, "--program", program)[:3] for program in (later, former, later)]
        seen.append(upgrade(control)[:3])
        versions = [(__version__, "99.1"), ("99.1", "99.0"), ("99.0", "99.1"), ("99.1", "99.1")]
        assert [told[:2] for told in seen] == versions
        assert {told[2] for told in seen} <= {1, 2}  # another old worker may have been the quickest to take the client
        assert client.read(0, 6) == b"before"


# Refusals, after which all is as it was


@pytest.fixture
def unchanged(target: Server, control: Path) -> Any:
    """A client that goes on, with all processes that there were."""
    with negotiated(target) as client:
        wait_until(lambda: len(workers_of(target)["spare"]) >= 4, "all workers")
        before = target.workers()
        yield
        assert target.workers() == before
        assert len(client.read(0, 512)) == 512


NEXT_SCOREBOARD = ("scoreboard/layout.py", f"\nVERSION = {VERSION}\n", f"\nVERSION = {VERSION + 1}\n")
NEXT_FORMAT = ("server/upgrade/estate.py", "\nFORMAT = 1\n", "\nFORMAT = 2\n")
SLOW = ("cli/taking_over.py", "\nimport json\n", "\nimport json\nimport time\n\ntime.sleep(1)\n")
NO_OPTION = ("cli/server.py", "  --control PATH ", "  --steer PATH   ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([NEXT_SCOREBOARD], f"the scoreboard of 99.0 is another one than that of {__version__}"),
        ([NEXT_FORMAT], f"what version {__version__} leaves has format 1, this program knows 2"),
        ([NO_OPTION], "--control"),
        ([("server/worker.py", "from __future__ import annotations\n", "import nothing_of_the_kind\n")], "No module"),
        ([("cli/taking_over.py", "def take_over(", "def take over(")], "SyntaxError"),
    ],
    ids=["scoreboard", "estate", "option", "import", "syntax"],
)
@pytest.mark.usefixtures("unchanged")
def test_a_program_that_cannot_go_on_changes_nothing(
    control: Path, tmp_path: Path, changes: List[tuple[str, str, str]], reason: str
) -> None:
    program = build(tmp_path / "next", "99.0", *changes)
    for options in (["--check"], []):
        line = refused("--upgrade", *options, "--program", program, control)
        assert line.startswith(f"{program} cannot go on with this server, which stays as it is: ")
        assert reason in line


@pytest.mark.usefixtures("unchanged")
def test_what_is_no_program_changes_nothing(control: Path, tmp_path: Path, image: Path) -> None:
    older = tmp_path / "older"
    older.write_text(f"#!/bin/sh\necho '{REFUSAL}' >&2\nexit 2\n")
    older.chmod(0o755)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    assert "no program" in refused("--upgrade", "--program", tmp_path / "none", control)
    assert "Permission denied" in refused("--upgrade", "--program", image, control)
    assert f"stays as it is: {REFUSAL}" in refused("--upgrade", "--program", older, control)
    assert "exit status 3" in refused("--upgrade", "--program", silent, control)
    assert "stays as it is: " in refused("--upgrade", "--program", "/bin/true", control)


@pytest.mark.usefixtures("unchanged")
def test_an_exec_that_fails_changes_nothing(target: Server, control: Path) -> None:
    with injected(target.pid, "execve:error=ENOMEM"):
        assert refused("--upgrade", control).endswith("cannot be executed: Cannot allocate memory; nothing has changed")
    with injected(target.pid, "memfd_create:error=EMFILE"):
        assert "Too many open files" in refused("--upgrade", control)
    target.expected_errors.append("a command failed in the master")


@pytest.mark.usefixtures("unchanged")
def test_no_process_for_the_check_changes_nothing(target: Server, control: Path) -> None:
    target.expected_errors.append("a command failed in the master")
    with injected(target.pid, "clone,clone3:error=EAGAIN"):
        assert "cannot do that now" in refused("--upgrade", control)


@pytest.mark.parametrize("mode", ["target", "proxy"])
@pytest.mark.parametrize("options", [(), ("--check",)])
def test_the_release_that_has_no_upgrades_is_told_of_in_one_line(
    control: Path, mode: str, options: Tuple[str, ...]
) -> None:
    command = bgctl_command("--upgrade", *options, control)
    line = "xnbd-bgctl: the server is of a version that cannot be upgraded: restart it\n"
    assert ask_old(control, ANSWERS[mode], command) == (1, line)


def test_a_server_of_one_client_is_not_upgraded(start: Start, tmp_path: Path) -> None:
    """Neither is the client that another program serves."""
    origin = tmp_path / "origin.img"
    origin.write_bytes(bytes(MIB))
    far = start("--target", origin)
    control = tmp_path / "ctl"
    ours, theirs = socket.socketpair()
    files = (tmp_path / "cache", tmp_path / "bitmap", control)
    words = command("--proxy", "--connected-fd", theirs.fileno(), far.uri, *files)
    with ours, subprocess.Popen(words, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL) as process:
        theirs.close()
        wait_until(control.exists, "the control socket")
        assert "xnbd-wrapper" in refused("--upgrade", control)
        ours.close()
        assert process.wait() == 0


def is_checked(server: Server) -> bool:
    """Whether the next program's check runs."""
    return any("--take-over-check" in title_of(pid) for pid in server.workers())


@contextmanager
def slow_upgrade(server: Server, control: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """To version 99.0, whose check takes a second: it is under way."""
    words = bgctl_command("--upgrade", "--program", build(directory / "slow", "99.0", SLOW), control)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as asking:
        wait_until(lambda: is_checked(server), "the check")
        yield asking


def test_one_upgrade_at_a_time(target: Server, control: Path, tmp_path: Path) -> None:
    with slow_upgrade(target, control, tmp_path) as first:
        assert ask(control, "upgrade")["error"] == "an upgrade is under way already"
        assert "-> 99.0" in first.communicate()[0]
    assert target.process.poll() is None


def test_a_reload_meanwhile_counts(start: Start, image: Path, control: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-clients 2\n")
    server = start("--target", "--limits", limits, "--control", control, image)
    with negotiated(server) as client, slow_upgrade(server, control, tmp_path) as asking:
        limits.write_text("max-clients 7\n")
        assert "max-clients 2 -> 7" in bgctl("--reload", control)
        assert "-> 99.0: 1 client moved" in asking.communicate()[0]
        assert len(client.read(0, 512)) == 512
    assert query(control)["configuration"]["max_clients"] == 7


def test_a_stop_meanwhile_is_a_stop(target: Server, control: Path, tmp_path: Path) -> None:
    with slow_upgrade(target, control, tmp_path) as asking:
        assert target.stop() == 0
        said = asking.communicate()[0]
    assert said.startswith("xnbd-bgctl: ")
    assert said.count("\n") == 1
    assert not control.exists()


def test_a_stop_at_any_moment_is_minded(start: Start, image: Path, tmp_path: Path, seed: int) -> None:
    """Before the exec, in it, or by the next program."""
    for number in range(4):
        control = tmp_path / f"ctl{number}"
        server = start("--target", "--control", control, image)
        with negotiated(server), subprocess.Popen(bgctl_command("--upgrade", control), stderr=subprocess.DEVNULL):
            wait_until(lambda: is_checked(server) or "goes on where" in server.log(), "the check")  # noqa: B023
            time.sleep(random.Random(seed + number).uniform(0, 0.6))
            assert server.stop() == 0
        assert not control.exists()


# Everything that may be under way


def test_a_snapshot_under_way_is_finished_by_the_old_steward(start: Start, tmp_path: Path, control: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(64 * MIB))
    target = start("--target", "--control", control, image)
    before = image.read_bytes()
    with subprocess.Popen(bgctl_command("--snapshot", control), stdout=subprocess.PIPE, text=True) as taking:
        wait_until(lambda: any("making" in title_of(pid) for pid in _descendants(target.pid)), "the snapshot's process")
        making = next(pid for pid in _descendants(target.pid) if "making" in title_of(pid))
        os.kill(making, signal.SIGSTOP)
        with negotiated(target) as client:
            os.kill(making, signal.SIGCONT)
            wait_until(lambda: _is_kept(target) or not is_alive(making), "the moment of the snapshot")
            upgrade(control)
            assert client.write(0, b"later") == 0
            path, _ = taking.communicate()
    assert taking.returncode == 0
    assert Path(path.strip()).read_bytes()[4096:] == before[4096:]
    wait_until(lambda: len(workers_of(target)["steward"]) == 1, "the old steward's end")


def _is_kept(server: Server) -> bool:
    return bool(query(server.log_path.parent / "ctl").get("snapshot"))


def _descendants(pid: int) -> List[int]:
    children = children_of(pid)
    return [*children, *(below for child in children for below in _descendants(child))]


@pytest.fixture
def line(start: Start, tmp_path: Path) -> Iterator[Relay]:
    """To an origin of 4,096 blocks."""
    origin = tmp_path / "origin.img"
    origin.write_bytes(random.Random(2).randbytes(16 * MIB))
    with Relay(start("--target", "--readonly", origin, tcp=True).port) as relay:
        yield relay


@pytest.fixture
def slow_proxy(start: Start, tmp_path: Path, line: Relay) -> Proxy:
    """Whose copy takes some seconds."""
    return Proxy(start, tmp_path, line.uri)


def test_a_copy_in_the_background_goes_on_with_the_new_steward(slow_proxy: Proxy, line: Relay) -> None:
    slow_proxy.bgctl("--cache-all2", "--limit-rate", "8M")
    wait_until(lambda: slow_proxy.cached() > 0, "the first blocks")
    line.stall()
    upgrade(slow_proxy.control)
    assert slow_proxy.cached() < 4096
    line.resume()
    wait_until(lambda: slow_proxy.cached() == 4096, "the end of the copy")


def test_a_copy_that_somebody_waits_for_is_finished_by_the_old_steward(slow_proxy: Proxy, line: Relay) -> None:
    words = bgctl_command("--cache-all", "--limit-rate", "8M", slow_proxy.control)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as copying:
        wait_until(lambda: slow_proxy.cached() > 0, "the first blocks")
        line.stall()
        upgrade(slow_proxy.control)
        assert copying.poll() is None
        upgrade(slow_proxy.control)
        line.resume()
        out, _ = copying.communicate()
    assert (copying.returncode, out[:13]) == (0, "100 % cached,") or out.startswith("100% cached"), out
    wait_until(lambda: len(workers_of(slow_proxy.server)["steward"]) == 1, "the old steward's end")


def test_who_connects_to_the_control_socket_is_never_refused(target: Server, control: Path) -> None:
    with subprocess.Popen(bgctl_command("--upgrade", control), stdout=subprocess.PIPE) as upgrading:
        asked = 0
        while upgrading.poll() is None:
            with closing(socket.socket(socket.AF_UNIX)) as sock:
                sock.connect(str(control))
                sock.sendall(b'{"command": "query"}\n')
                assert b'"done"' in sock.makefile("rb").readline()
            asked += 1
    assert upgrading.returncode == 0
    assert asked > 3


def test_what_was_flushed_is_durable_and_the_cache_is_clean(slow_proxy: Proxy, tmp_path: Path) -> None:
    client = slow_proxy.connect()
    client.pwrite(b"mine", 0)
    upgrade(slow_proxy.control)
    client.pwrite(b"mine too", 4096)
    client.flush()
    client.shutdown()
    assert slow_proxy.server.stop() == 0
    assert slow_proxy.cache.read_bytes()[:4] == b"mine"
    from xnbd.proxy.state.format import HEADER_SIZE, parse_header

    with open(f"{slow_proxy.bitmap}.state", "rb") as state:
        assert parse_header(state.read(HEADER_SIZE)).clean


def test_a_switched_proxy_stays_a_target(slow_proxy: Proxy) -> None:
    slow_proxy.bgctl("--cache-all")
    slow_proxy.bgctl("--switch")
    upgrade(slow_proxy.control)
    assert slow_proxy.query()["mode"] == "target"
    assert Path(slow_proxy.bgctl("--snapshot").strip()).stat().st_size == 16 * MIB


@pytest.mark.parametrize("first", ["--switch", "--upgrade"])
def test_a_switch_and_an_upgrade_at_once(slow_proxy: Proxy, first: str) -> None:
    """Both happen, or the switch is refused and nothing of it has happened."""
    slow_proxy.bgctl("--cache-all")
    orders = sorted(["--switch", "--upgrade"], key=lambda order: order != first)
    with slow_proxy.raw() as client:
        asking = {
            order: subprocess.Popen(
                bgctl_command(order, slow_proxy.control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for order in orders
        }
        said = {order: process.communicate()[0] for order, process in asking.items()}
        assert asking["--upgrade"].returncode == 0, said
        assert said["--switch"].count("\n") <= 1, said
        if asking["--switch"].returncode:
            assert slow_proxy.query()["mode"] == "proxy", said
            slow_proxy.bgctl("--switch")
        assert slow_proxy.query()["mode"] == "target"
        assert client.write(0, b"mine") == 0
    assert slow_proxy.cache.read_bytes()[:4] == b"mine"


def test_what_clients_of_a_cow_target_have_written_is_there(start: Start, image: Path, control: Path) -> None:
    server = start("--cow-target", "--control", control, image)
    with negotiated(server) as client:
        assert client.write(5, b"over") == 0
        upgrade(control)
        assert client.read(5, 4) == b"over"
    with negotiated(server) as another:
        assert another.read(5, 4) == b"over"


def test_at_the_limit_of_clients_all_move(start: Start, image: Path, control: Path) -> None:
    server = start("--target", "--control", control, "--max-clients", 3, image)
    server.expected_errors.append("which is the limit")
    clients = [negotiated(server) for _ in range(3)]
    assert upgrade(control).moved == 3
    for client in clients:
        with client:
            assert len(client.read(0, 512)) == 512


def test_a_client_of_tls_stays_and_is_named(
    start: Start, image: Path, control: Path, certificates: Certificates
) -> None:
    server = start("--target", "--tls", certificates.server, "--tls-optional", "--control", control, image)
    with tls_client(server, certificates.alice) as secret, negotiated(server) as plain:
        outcome = upgrade(control)
        assert (outcome.moved, outcome.rest) == (1, f"; 1 stays with {__version__} until it leaves (TLS)")
        assert upgrade(control).moved == 1
        assert secret.read(0, 512) == plain.read(0, 512) == image.read_bytes()[:512]
    wait_until(lambda: not target_workers_with_clients(server), "the end of the old worker")


def target_workers_with_clients(server: Server) -> List[int]:
    return [pid for pid in server.workers() if "worker for" in title_of(pid)]


def test_who_a_client_is_and_that_it_may_only_read_goes_along(
    start: Start, image: Path, control: Path, tmp_path: Path
) -> None:
    """The next program has other rules; they are for new clients."""
    rules, uid = tmp_path / "rules", os.getuid()
    rules.write_text(f"uid:{uid} * ro\n")
    server = start("--target", "--tls-authz", rules, "--control", control, image)
    with negotiated(server) as client:
        rules.write_text(f"uid:{uid} * rw\n")
        assert upgrade(control).moved == 1
        assert [worker["identity"] for worker in query(control)["workers"] if worker["identity"]] == [f"uid:{uid}"]
        (worker,) = target_workers_with_clients(server)
        assert f"worker for unix:pid={os.getpid()},uid={uid} " in title_of(worker)
        server.wait_for_log(f"unix:pid={os.getpid()},uid={uid}: goes on as uid:{uid}, process ")
        assert client.write(0, b"x") == errno.EPERM
        with negotiated(server) as another:
            assert another.write(0, b"x") == 0


def test_the_limits_of_a_file_are_read_again(start: Start, image: Path, control: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-clients 2\n")
    server = start("--target", "--limits", limits, "--control", control, image)
    limits.write_text("max-clients none\n")
    assert "limits:1" in refused("--upgrade", control)
    limits.write_text("max-clients 7\n")
    upgrade(control)
    assert server.process.poll() is None
    assert "nothing has changed" in bgctl("--reload", control)


def test_a_client_whose_process_stands_still_stays(target: Server, control: Path) -> None:
    with negotiated(target) as client, negotiated(target) as other:
        wait_until(lambda: len(target.busy_workers()) == 2, "both workers")
        stopped = next(p for p in target.busy_workers() if f"pid={os.getpid()}" in title_of(p))
        os.kill(stopped, signal.SIGSTOP)
        outcome = upgrade(control)
        assert (outcome.moved, outcome.rest) == (1, f"; 1 stays with {__version__} until it leaves (busy)")
        os.kill(stopped, signal.SIGCONT)
        assert len(client.read(0, 512)) == len(other.read(0, 512)) == 512
        wait_until(lambda: not is_alive(stopped), "its client's move, when it goes on")


# Under load


@contextmanager
def idle_clients(server: Server) -> Iterator[None]:
    """Clients that do nothing, and are there at the end."""
    with ExitStack() as stack:
        idle = [stack.enter_context(negotiated(server)) for _ in range(IDLE)]
        yield
        for client in idle:
            assert len(client.read(0, 512)) == 512


@pytest.mark.parametrize("mode", ["target", "cow"])
def test_who_writes_and_who_waits_does_not_notice(start: Start, tmp_path: Path, mode: str) -> None:
    """Six clients write numbered stamps."""
    noise_disk(tmp_path / "disk.img")
    control = tmp_path / "ctl"
    server = start("--target" if mode == "target" else "--cow-target", "--control", control, tmp_path / "disk.img")
    with idle_clients(server), writers(server.uri, tmp_path) as busy:
        with upgrading(partial(upgrade, control)) as outcomes:
            pass
        busy.stop()
        data = read_all(connect(server.uri))
    check_cut(data, busy.histories, 0, 1 << 63)
    assert all(outcome.moved >= IDLE for outcome in outcomes), outcomes


@pytest.mark.parametrize("mode", ["target", "cow", "proxy"])
def test_the_model_agrees(start: Start, tmp_path: Path, seed: int, mode: str) -> None:
    """The proxy's cache is cold at first, and a copy is begun in the middle."""
    content = random.Random(seed).randbytes(4 * MIB + 777)
    image, control = tmp_path / "disk.img", tmp_path / "ctl"
    image.write_bytes(content)
    if mode == "proxy":
        proxy = Proxy(start, tmp_path, start("--target", "--readonly", image).uri)
        server, control = proxy.server, proxy.control
    else:
        server = start("--target" if mode == "target" else "--cow-target", "--control", control, image)
    model = Model([connect(server.uri, structured=number != 0) for number in range(4)], content, random.Random(seed))
    with upgrading(partial(upgrade, control)) as outcomes:
        model.play(60)
        if mode == "proxy":
            bgctl("--cache-all2", control)
        while len(outcomes) < UPGRADES:
            model.play(20)
    model.run(20)


def test_programs_of_others_do_not_notice(start: Start, tmp_path: Path, seed: int) -> None:
    control, noise = tmp_path / "ctl", tmp_path / "noise.img"
    noise.write_bytes(random.Random(seed).randbytes(24 * MIB))
    server = start("--target", "--control", control, "--create", "24M", tmp_path / "disk.img")
    words = f"--name=x --ioengine=nbd --uri={server.uri} --rw=randrw --bs=4k --iodepth=64 --size=16M --io_size=256M"
    fio = [
        "fio",
        *words.split(),
        "--verify=crc32c",
        "--verify_state_save=0",
        "--aux-path=" + str(tmp_path),
        f"--output={tmp_path / 'fio.log'}",
    ]
    with subprocess.Popen(fio, cwd=tmp_path) as checking:
        for _ in range(UPGRADES):
            upgrade(control)
        assert checking.wait() == 0, (tmp_path / "fio.log").read_text()
    for direction in ([noise, server.uri], [server.uri, tmp_path / "copy.img"]):
        with subprocess.Popen(["nbdcopy", *map(str, direction)]) as copying:
            upgrade(control)
            assert copying.wait() == 0
    assert (tmp_path / "copy.img").read_bytes() == noise.read_bytes()


def test_requests_that_wait_for_the_origin_are_answered_by_the_next_program(slow_proxy: Proxy) -> None:
    pytest.importorskip("nbd")
    client = slow_proxy.connect()
    import nbd

    buffer = nbd.Buffer(MIB)
    wanted = (slow_proxy.cache.parent / "origin.img").read_bytes()[:MIB]
    cookie = client.aio_pread(buffer, 0)
    upgrade(slow_proxy.control)
    while not client.aio_command_completed(cookie):
        client.poll(-1)
    assert bytes(buffer.to_bytearray()) == wanted


# What the operations guide says


def test_the_recipe_of_the_operations_guide_is_right(image: Path, tmp_path: Path) -> None:
    guide = (ROOT / "contrib/doc/operations.rst").read_text()
    section = guide.split("\nUpgrading\n=========\n")[1].split("\n\n\n")[0]
    lines = re.findall(r"^    (xnbd-bgctl .*?) +# (.*)$", section, re.MULTILINE)
    assert len(lines) == 2
    program, control = build(tmp_path / "tree", "1.1.0"), tmp_path / "p.ctl"
    words = ["--target", "--control", str(control), "--unix", str(tmp_path / "sock"), str(image)]
    with subprocess.Popen([program, *words], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(control.exists, "the control socket")
            with closing(socket.socket(socket.AF_UNIX)) as sock:
                sock.connect(str(tmp_path / "sock"))
                RawClient(sock).negotiate()
                init = tmp_path / "tree/xnbd/__init__.py"
                init.write_text(init.read_text().replace("1.1.0", "1.2.0"))
                for line, printed in lines:
                    out = bgctl(*line.split()[1:-1], control).replace("1 client", "815 clients")
                    assert re.sub(r"pause \d+", "pause 7", out) == f"{printed}\n"
        finally:
            process.terminate()


# Processes that die


def test_a_steward_that_dies_on_the_way_is_replaced(target: Server, control: Path) -> None:
    target.expected_errors += ["the steward died", "does not give way"]
    with negotiated(target) as client:
        for delay in (0.0, 0.1, 0.2, 0.3, 0.4):
            wait_until(lambda: len(workers_of(target)["steward"]) == 1, "a steward")
            (steward,) = workers_of(target)["steward"]
            asking = subprocess.Popen(
                bgctl_command("--upgrade", control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            time.sleep(delay)
            if is_alive(steward):
                os.kill(steward, signal.SIGKILL)
            asking.communicate()
            assert query(control)["mode"] == "target"
            assert len(client.read(0, 512)) == 512


@pytest.mark.parametrize(
    "call",
    [
        "memfd_create:signal=KILL:when=1",
        "memfd_create:signal=KILL:when=2",
        "execve:signal=KILL:when=1",
        "recvfrom:signal=KILL:when=1",
        "clone,clone3:signal=KILL:when=1",
        "clone,clone3:signal=KILL:when=2",
        "clone,clone3:signal=KILL:when=4",
        "sendto:signal=KILL:when=1",
        "sendto:signal=KILL:when=2",
        "wait4:signal=KILL:when=2",
        "kill:signal=KILL:when=1",
    ],
)
def test_a_master_that_dies_at_a_system_call_leaves_nothing_behind(
    start: Start, image: Path, control: Path, call: str
) -> None:
    server = start("--target", "--control", control, image)
    with negotiated(server) as client:
        assert client.write(0, b"written") == 0
        with injected(server.pid, call):
            asking = subprocess.Popen(
                bgctl_command("--upgrade", control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            server.process.wait(20)
        asking.communicate()
    wait_until(lambda: not _serving(image), "the end of all processes")
    with negotiated(start("--target", "--control", control, image)) as client:
        assert client.read(0, 7) == b"written"


@pytest.mark.parametrize("call", ["execve", "clone,clone3"])
def test_a_proxys_master_that_dies_leaves_its_files_free_and_what_was_flushed_in_them(
    slow_proxy: Proxy, line: Relay, start: Start, tmp_path: Path, call: str
) -> None:
    """Requests wait for the origin then, and processes of both programs have blocks locked."""
    content = (tmp_path / "origin.img").read_bytes()
    with slow_proxy.raw() as client:
        client.write(4096, b"flushed")
        client.request(FLUSH, cookie=1)
        assert client.simple_reply() == (0, 1, b"")
        client.send(b"".join(pack_request(READ, n * 64 * 4096, 1, cookie=n) for n in range(50)))
        with injected(slow_proxy.server.pid, f"{call}:signal=KILL:when=1"):
            asking = subprocess.Popen(
                bgctl_command("--upgrade", slow_proxy.control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            slow_proxy.server.process.wait(60)
        asking.communicate()
    wait_until(lambda: not _serving(slow_proxy.cache), "the end of all processes")
    again = Proxy(start, tmp_path, line.uri)
    with again.raw() as client:
        assert client.read(0, 64 * 4096) == content[:4096] + b"flushed" + content[4103 : 64 * 4096]
        assert client.write(64 * 4096, bytes(4096)) == 0


def _serving(image: Path) -> List[int]:
    """Processes that have the image open."""
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.path.samefile(fd, image) for fd in (process / "fd").iterdir() if _is_file(fd)):
                holders.append(int(process.name))
    return holders


def _is_file(fd: Path) -> bool:
    return os.readlink(fd).startswith("/")


@pytest.mark.parametrize(
    "fault",
    ["clone,clone3:error=EAGAIN:when=2..6", "sendto:error=ENOBUFS:when=1..3"],
)
def test_a_system_call_that_fails_in_the_new_program_harms_no_client(target: Server, control: Path, fault: str) -> None:
    target.expected_errors += [
        "cannot start a worker",
        "the steward cannot be started",
        "a command failed in the master",
    ]
    with negotiated(target) as client:
        with injected(target.pid, fault):
            subprocess.run(bgctl_command("--upgrade", control), capture_output=True, check=False)
        assert len(client.read(0, 512)) == 512
        wait_until(lambda: workers_of(target)["spare"] and workers_of(target)["steward"], "steward and spare workers")
        assert query(control)["mode"] == "target"


def test_a_worker_that_dies_on_the_way_takes_its_client_with_it_and_nothing_else(target: Server, control: Path) -> None:
    target.expected_errors += ["worker .* died", "spare worker"]
    with negotiated(target) as client, negotiated(target) as doomed:
        wait_until(lambda: len(target.busy_workers()) == 2, "both workers")
        first = target.busy_workers()[0]
        os.kill(first, signal.SIGSTOP)
        asking = subprocess.Popen(
            bgctl_command("--upgrade", control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_until(lambda: "goes on where" in target.log(), "the next program")
        os.kill(first, signal.SIGKILL)
        out, _ = asking.communicate()
        assert "1 client moved" in out
        working = 0
        for one in (client, doomed):
            try:
                working += len(one.read(0, 512)) == 512
            except (OSError, EOFError, AssertionError):
                pass
        assert working == 1


@pytest.mark.parametrize("moment", [0.0, 0.15, 0.25, 0.3, 0.35, 0.4, 0.5])
def test_a_master_that_dies_on_the_way_leaves_nothing_behind(
    start: Start, image: Path, tmp_path: Path, moment: float
) -> None:
    control = tmp_path / "ctl"
    server = start("--target", "--control", control, "--pidfile", tmp_path / "pid", image)
    with negotiated(server) as client:
        assert client.write(0, b"flushed") == 0
        asking = subprocess.Popen(bgctl_command("--upgrade", control), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(moment)
        everybody = _descendants(server.pid)
        server.process.kill()
        server.process.wait()
        asking.communicate()
        wait_until(lambda: not any(map(is_alive, everybody)), "the end of all processes")
    again = start("--target", "--control", control, "--pidfile", tmp_path / "pid", image)
    with negotiated(again) as client:
        assert client.read(0, 7) == b"flushed"
    assert state_of(again.pid) != "X"
