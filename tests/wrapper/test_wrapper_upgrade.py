"""xnbd-wrapper-ctl --upgrade: the running wrapper and its clients' servers become another program, and clients go on.

The long form is ``XNBD_UPGRADES=100 XNBD_IDLE=1000``, and in ``contrib/soak``.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List

import nbd
import pytest
from caching import CacheFiles
from certificates import Certificates
from conftest import MIB, Start, StartWrapper
from injection import injected
from model import Model, read_all
from notify_socket import listening
from proxies import bgctl, query
from rawclient import LIST, REP_SERVER, RawClient
from release_0_5_0 import ANSWERS, ask_old
from server_process import PYTHON, ROOT, Server, children_of, is_alive, title_of, wait_until
from snapshots import bgctl_command
from stamps import check_cut, noise_disk, writers
from tls_client import context_of, start_tls
from upgrades import IDLE, LONGEST, UPGRADES, Figures, Outcome, build, parse, upgrading
from wrapper_process import Wrapper, fails, program, wait_for_end

from xnbd import __version__
from xnbd.scoreboard.layout import VERSION

EPERM = 1

FOREIGN = ROOT / "tests" / "support" / "foreign_server.py"


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path) -> Wrapper:
    return start_wrapper("--imgfile", image)


def upgrade(wrapper: Wrapper, *options: object) -> Outcome:
    return parse(wrapper.ctl("--upgrade", *options, timeout=LONGEST))


def ctl_command(wrapper: Wrapper, *arguments: object) -> List[str]:
    return [*program("xnbd-wrapper-ctl"), "--socket", str(wrapper.control), *map(str, arguments)]


@contextmanager
def asking(wrapper: Wrapper, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """xnbd-wrapper-ctl beside the test."""
    words = ctl_command(wrapper, *arguments)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield process


def serving(wrapper: Wrapper) -> List[int]:
    return [pid for pid in wrapper.servers() if ": serving " in title_of(pid)]


def works(client: RawClient) -> bool:
    return len(client.read(0, 512)) == 512


def moved(number: int, rest: str = "") -> tuple[str, str, int, str]:
    return (__version__, __version__, number, rest)


def of(outcome: Outcome) -> tuple[str, str, int, str]:
    return (outcome.old, outcome.new, outcome.moved, outcome.rest)


# What stays, and what is new


def test_wrapper_sockets_and_clients_stay_and_their_processes_are_new(wrapper: Wrapper, image: Path) -> None:
    with wrapper.client("disk.img") as client, wrapper.client(str(image)) as other:
        assert client.write(0, b"before") == 0
        before = wrapper.servers()
        assert of(upgrade(wrapper)) == moved(2)
        assert client.read(0, 6) == other.read(0, 6) == b"before"
        wait_for_end(before)
        assert len(serving(wrapper)) == 2
        assert wrapper.process.poll() is None
        assert wrapper.listed()["disk.img"]["clients"] == 2
        with wrapper.client("disk.img") as another:
            assert another.read(0, 6) == b"before"
    wrapper.wait_for_log(f"upgraded, {__version__} -> {__version__}: 2 clients moved")
    wait_until(lambda: not wrapper.servers(), "the end of all clients' processes")


def test_a_check_changes_nothing(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        before = wrapper.servers()
        line = wrapper.ctl("--upgrade", "--check")
        assert line == f"{__version__} -> {__version__} is possible, with 1 client; nothing was changed\n"
        assert wrapper.servers() == before
        assert works(client)


def test_without_clients_nothing_waits(wrapper: Wrapper) -> None:
    assert of(upgrade(wrapper)) == moved(0)
    with wrapper.client("disk.img") as client:
        assert works(client)


def test_connections_that_have_said_nothing_stay(wrapper: Wrapper) -> None:
    silent = [wrapper.connect() for _ in range(20)]
    upgrade(wrapper)
    for client in silent:
        with client:
            client.negotiate("disk.img")
            assert works(client)


def test_clients_that_come_meanwhile_are_served(wrapper: Wrapper) -> None:
    with asking(wrapper, "--upgrade") as upgrading:
        served = 0
        while upgrading.poll() is None:
            with wrapper.client("disk.img") as client:
                assert works(client)
            served += 1
    assert upgrading.returncode == 0
    assert served > 3


def test_a_client_in_the_middle_of_its_handshake_sees_what_the_next_program_serves(
    wrapper: Wrapper, tmp_path: Path
) -> None:
    (tmp_path / "new.img").write_bytes(bytes(MIB))
    with wrapper.connect() as client:
        client.greet()
        assert exports_of(client) == ["disk.img"]
        with asking(wrapper, "--upgrade") as upgrading:
            wrapper.wait_for_log("goes on where")
            wrapper.ctl("--add-target", "new", tmp_path / "new.img")
            client.go("new")
            assert upgrading.wait() == 0
        assert client.read(0, 4) == bytes(4)
        assert of(upgrade(wrapper)) == moved(1)
        assert client.read(0, 4) == bytes(4)


def exports_of(client: RawClient) -> List[str]:
    """What LIST says."""
    return [data[4:].decode() for kind, data in client.option(LIST) if kind == REP_SERVER]


def test_descriptors_and_processes_do_not_pile_up(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        upgrade(wrapper)
        wait_until(lambda: len(wrapper.servers()) == 1, "one process")
        before = descriptors(wrapper)
        for _ in range(4):
            upgrade(wrapper)
            assert works(client)
        wait_until(lambda: len(wrapper.servers()) == 1, "one process")
        wait_until(lambda: descriptors(wrapper) <= before, "as many descriptors as before")


def descriptors(wrapper: Wrapper) -> int:
    """How many the wrapper has, and its clients' processes."""
    return sum(len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in (wrapper.process.pid, *wrapper.servers()))


def test_the_database_stays_locked_and_indexes_stay(wrapper: Wrapper, tmp_path: Path, image: Path) -> None:
    for name in ("a", "b", "c"):
        wrapper.ctl("--add-target", name, image)
    wrapper.ctl("--remove-by-exportname", "c")
    upgrade(wrapper)
    assert {name: export["index"] for name, export in wrapper.listed().items()} == {"disk.img": 1, "a": 2, "b": 3}
    other = tmp_path / "other"
    other.mkdir()
    assert "another wrapper uses it" in fails(other, "--dbpath", wrapper.database)[1]
    wrapper.ctl("--add-target", "d", image)
    wrapper.ctl("--remove", "2")
    assert {name: export["index"] for name, export in wrapper.listed().items()} == {"disk.img": 1, "b": 3, "d": 5}
    assert set(wrapper.stored()) == {"disk.img", "b", "d"}
    assert wrapper.stop() == 0


def test_an_image_of_the_command_line_that_was_removed_does_not_come_back(wrapper: Wrapper) -> None:
    wrapper.ctl("--remove", "1")
    upgrade(wrapper)
    assert wrapper.listed() == {}


def test_a_database_that_somebody_else_has_changed_is_still_left_alone(wrapper: Wrapper, image: Path) -> None:
    wrapper.expected_errors.append("was changed by somebody else")
    wrapper.database.write_text(wrapper.database.read_text() + " ")
    upgrade(wrapper)
    assert "was changed by somebody else" in wrapper.refuses("--add-target", "x", image)
    wrapper.process.terminate()
    assert wrapper.process.wait() == 1


def test_relative_paths_are_those_of_the_start(image: Path, tmp_path: Path) -> None:
    where = tmp_path / "there"
    where.mkdir()
    (where / "disk.img").write_bytes(image.read_bytes())
    (where / "server").write_text(f'#!/bin/sh\nexec {PYTHON} {ROOT}/bin/xnbd-server "$@"\n')
    (where / "server").chmod(0o755)
    words = ["--unix", "sock", "--socket", "ctl", "--dbpath", "db", "--logpath", "log", "--imgfile", "disk.img"]
    run = [*program("xnbd-wrapper"), "--daemonize", "--xnbd-server", "./server", *words]
    subprocess.run(run, cwd=where, check=True)
    ctl = [*program("xnbd-wrapper-ctl"), "--socket", str(where / "ctl")]
    try:
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///disk.img?socket={where / 'sock'}")
        for _ in range(2):
            subprocess.run([*ctl, "--upgrade"], check=True)
        assert client.pread(512, 0) == image.read_bytes()[:512]
        client.shutdown()
        assert (where / "log").read_text().count("goes on where") == 2
    finally:
        subprocess.run([*ctl, "--shutdown"], check=True)


def test_systemd_hears_that_the_next_program_is_ready(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as manager:
        environment = {**manager.environment, "WATCHDOG_USEC": "1000000"}
        wrapper = start_wrapper("--imgfile", image, env=environment)
        manager.wait_for("READY=1")
        began = time.monotonic()
        upgrade(wrapper)
        manager.wait_for("READY=1", 2)
        manager.wait_for("STATUS=clients: 0; exports: 1", 2)
        manager.wait_for("WATCHDOG=1", manager.heard.count("WATCHDOG=1") + 2)
        told = [message.split("\n") for message in manager.heard if not message.startswith(("STATUS", "WATCHDOG"))]
        assert [words[0] for words in told] == ["READY=1", "RELOADING=1", "READY=1"]
        assert began <= int(told[1][1].partition("MONOTONIC_USEC=")[2]) / 1e6 <= time.monotonic()


def test_limits_are_read_again(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-clients 2\n")
    wrapper = start_wrapper("--imgfile", image, "--limits", limits)
    limits.write_text("max-clients none\n")
    assert "limits:1" in wrapper.refuses("--upgrade")
    limits.write_text("max-clients 7\n")
    upgrade(wrapper)
    assert "nothing has changed" in wrapper.ctl("--reload")


def test_at_the_limit_of_clients_all_move_and_others_wait(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--max-clients", 3)
    clients = [wrapper.client("disk.img") for _ in range(3)]
    waiting = wrapper.connect()
    assert upgrade(wrapper).moved == 3
    assert len(serving(wrapper)) == 3
    for client in clients:
        assert works(client)
    clients[0].sock.close()
    with waiting:
        waiting.negotiate("disk.img")
        assert works(waiting)
    for client in clients[1:]:
        client.sock.close()


def test_who_may_only_read_may_still_only_read(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("anonymous disk.img ro\n")
    wrapper = start_wrapper("--imgfile", image, "--tls-authz", rules)
    with wrapper.client("disk.img") as client:
        assert client.write(0, b"x") == EPERM
        assert of(upgrade(wrapper)) == moved(1)
        assert client.write(0, b"x") == EPERM
        with wrapper.client("disk.img") as another:
            assert another.write(0, b"x") == EPERM


def test_a_disk_that_was_removed_and_deleted_goes_on(wrapper: Wrapper, image: Path) -> None:
    content = image.read_bytes()[:512]
    with wrapper.client("disk.img") as client:
        assert works(client)
        wrapper.ctl("--remove-by-exportname", "disk.img")
        image.unlink()
        assert of(upgrade(wrapper)) == moved(1)
        assert client.read(0, 512) == content
        assert client.write(0, b"x") == 0


# Two versions


def test_two_versions_become_each_other_and_back(wrapper: Wrapper, tmp_path: Path) -> None:
    later = build(tmp_path / "later", "99.1", name="xnbd-wrapper")
    former = build(tmp_path / "former", "99.0", name="xnbd-wrapper")
    with wrapper.client("disk.img") as client:
        assert client.write(0, b"before") == 0
        seen = [upgrade(wrapper, "--program", path)[:3] for path in (later, former, later)]
        assert seen == [(__version__, "99.1", 1), ("99.1", "99.0", 1), ("99.0", "99.1", 1)]
        assert upgrade(wrapper)[:3] == ("99.1", "99.1", 1)
        assert client.read(0, 6) == b"before"


NEXT_SCOREBOARD = ("scoreboard/layout.py", f"\nVERSION = {VERSION}\n", f"\nVERSION = {VERSION + 1}\n")
NEXT_FORMAT = ("wrapper/upgrade/estate.py", "\nFORMAT = 1\n", "\nFORMAT = 2\n")
NO_OPTION = ("cli/wrapper.py", "  --dbpath PATH ", "  --db PATH     ")
SLOW = ("cli/wrapper_taking_over.py", "\nimport json\n", "\nimport json\nimport time\n\ntime.sleep(1)\n")
HANGING = ("cli/wrapper_taking_over.py", "\nimport json\n", "\nimport json\nimport time\n\ntime.sleep(1000)\n")


@pytest.fixture
def unchanged(wrapper: Wrapper) -> Any:
    """A client that goes on, in the same process."""
    with wrapper.client("disk.img") as client:
        before = wrapper.servers()
        yield
        assert wrapper.servers() == before
        assert works(client)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([NEXT_SCOREBOARD], f"the scoreboard of 99.0 is another one than that of {__version__}"),
        ([NEXT_FORMAT], f"what version {__version__} leaves has format 1, this program knows 2"),
        ([NO_OPTION], "--dbpath"),
        ([("wrapper/wrapper.py", "from __future__ import annotations\n", "import nothing_of_the_kind\n")], "No module"),
        ([("cli/wrapper_taking_over.py", "def take_over(", "def take over(")], "SyntaxError"),
        ([("wrapper/database.py", "VERSION = 2\n", "VERSION = 3\n")], "of version 2"),
    ],
    ids=["scoreboard", "estate", "option", "import", "syntax", "database"],
)
@pytest.mark.usefixtures("unchanged")
def test_a_program_that_cannot_go_on_changes_nothing(
    wrapper: Wrapper, tmp_path: Path, changes: List[tuple[str, str, str]], reason: str
) -> None:
    path = build(tmp_path / "next", "99.0", *changes, name="xnbd-wrapper")
    for options in (["--check"], []):
        line = wrapper.refuses("--upgrade", *options, "--program", path)
        assert line.startswith(f"xnbd-wrapper-ctl: {path} cannot go on with this wrapper, which stays as it is: ")
        assert reason in line


@pytest.mark.usefixtures("unchanged")
def test_what_is_no_program_changes_nothing(wrapper: Wrapper, tmp_path: Path, image: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    assert "no program" in wrapper.refuses("--upgrade", "--program", tmp_path / "none")
    assert "Permission denied" in wrapper.refuses("--upgrade", "--program", image)
    assert "exit status 1" in wrapper.refuses("--upgrade", "--program", silent)
    assert "stays as it is: " in wrapper.refuses("--upgrade", "--program", "/bin/true")
    server = ROOT / "bin" / "xnbd-server"
    assert "holds nothing that a server has left" in wrapper.refuses("--upgrade", "--program", server)


def test_the_release_that_has_no_upgrades_is_told_of_in_one_line(tmp_path: Path) -> None:
    control = tmp_path / "ctl"
    command = [*program("xnbd-wrapper-ctl"), "--socket", str(control), "--upgrade"]
    line = "xnbd-wrapper-ctl: the wrapper is of a version that cannot be upgraded: restart it\n"
    assert ask_old(control, ANSWERS["wrapper"], command) == (1, line)


@pytest.mark.usefixtures("unchanged")
def test_an_exec_that_fails_changes_nothing(wrapper: Wrapper) -> None:
    with injected(wrapper.process.pid, "execve:error=ENOMEM"):
        assert "cannot be executed: Cannot allocate memory; nothing has changed" in wrapper.refuses("--upgrade")
    wrapper.expected_errors.append("a command on the control socket failed")
    with injected(wrapper.process.pid, "memfd_create:error=EMFILE"):
        assert "Too many open files" in wrapper.refuses("--upgrade")
    with injected(wrapper.process.pid, "clone,clone3:error=EAGAIN"):
        assert "cannot do that now" in wrapper.refuses("--upgrade")


def test_one_upgrade_at_a_time_and_other_commands_go_on(wrapper: Wrapper, tmp_path: Path, image: Path) -> None:
    slow = build(tmp_path / "slow", "99.0", SLOW, name="xnbd-wrapper")
    with asking(wrapper, "--upgrade", "--program", slow) as first:
        wait_until(lambda: is_checked(wrapper), "the check")
        assert "an upgrade is under way already" in wrapper.refuses("--upgrade")
        wrapper.ctl("--add-target", "more", image)
        out, _ = first.communicate()
    assert "-> 99.0" in out
    assert set(wrapper.listed()) == {"disk.img", "more"}


def is_checked(wrapper: Wrapper) -> bool:
    return any("--take-over-check" in title_of(pid) for pid in wrapper.servers())


def test_a_program_that_hangs_does_not_keep_the_wrapper_from_its_end(wrapper: Wrapper, tmp_path: Path) -> None:
    hanging = build(tmp_path / "hanging", "99.0", HANGING, name="xnbd-wrapper")
    with wrapper.client("disk.img") as client, asking(wrapper, "--upgrade", "--program", hanging) as upgrading:
        wait_until(lambda: is_checked(wrapper), "the check")
        assert works(client)
        everybody = wrapper.servers()
        assert wrapper.stop() == 0
        assert "the wrapper stops" in upgrading.communicate()[0]
    wait_for_end(everybody)


def test_connections_of_operators_stay(wrapper: Wrapper) -> None:
    """One that has said nothing, one in the middle of a request, and one that says goodbye."""
    with ExitStack() as stack:
        silent, halfway, leaving = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
        for sock in (silent, halfway, leaving):
            sock.connect(str(wrapper.control))
            sock.settimeout(60)
        halfway.sendall(b'{"command": ')
        leaving.sendall(b'{"command": "save"}\n')
        leaving.shutdown(socket.SHUT_WR)
        upgrade(wrapper)
        silent.sendall(b'{"command": "save"}\n')
        halfway.sendall(b'"save"}\n')
        for sock in (silent, halfway, leaving):
            assert b"saved" in sock.makefile("rb").readline()


def test_an_operator_who_does_not_wait_changes_nothing(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        with asking(wrapper, "--upgrade") as upgrading:
            wait_until(lambda: is_checked(wrapper), "the check")
            upgrading.kill()
        wrapper.wait_for_log("upgraded, ")
        assert works(client)


# Proxies, and what operators have under way


@pytest.fixture
def origin(start: Start, tmp_path: Path) -> Server:
    path = tmp_path / "origin.img"
    path.write_bytes(random.Random(2).randbytes(16 * MIB))
    return start("--target", "--readonly", path)


@pytest.fixture
def proxied(wrapper: Wrapper, origin: Server, files: CacheFiles) -> CacheFiles:
    """The export "far"."""
    uri = f"nbd+unix:///?socket={origin.socket}"
    wrapper.ctl("--add-proxy", "far", uri, files.image, files.bitmap, files.control)
    return files


def test_a_proxys_clients_move_with_their_figures(wrapper: Wrapper, proxied: CacheFiles) -> None:
    with wrapper.client("far") as client, wrapper.client("far") as other:
        for _ in range(7):
            assert works(client)
        wait_until(lambda: figures(proxied.control) == [0, 7], "the figures")
        before = wrapper.servers()
        assert of(upgrade(wrapper)) == moved(2)
        assert works(other)
        wait_for_end(before)
        wait_until(lambda: listens(proxied.control), "the new steward")
        wait_until(lambda: figures(proxied.control) == [1, 7], "the figures, in the new processes")
        assert "cached" in wrapper.ctl("--bgctl-query", "far")


def figures(control: Path) -> List[int]:
    """How many requests each client has made."""
    return sorted(one["requests"] for one in query(control)["workers"] if one["client"])


def listens(control: Path) -> bool:
    try:
        query(control)
        return True
    except OSError:
        return False


def test_what_was_flushed_is_durable_and_the_cache_is_clean(wrapper: Wrapper, proxied: CacheFiles) -> None:
    from xnbd.proxy.state.format import HEADER_SIZE, parse_header

    with wrapper.client("far") as client:
        assert client.write(0, b"mine") == 0
        upgrade(wrapper)
        assert client.write(4096, b"mine too") == 0
    wait_until(lambda: not wrapper.servers(), "the end of the client's process")
    assert proxied.image.read_bytes()[:4] == b"mine"
    with open(f"{proxied.bitmap}.state", "rb") as state:
        assert parse_header(state.read(HEADER_SIZE)).clean


def test_a_copy_that_somebody_waits_for_is_finished_by_the_old_process(wrapper: Wrapper, proxied: CacheFiles) -> None:
    with wrapper.client("far") as client:
        assert works(client)
        words = bgctl_command("--cache-all", "--limit-rate", "8M", proxied.control)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as copying:
            wait_until(lambda: bool(copiers(wrapper.process.pid)), "the copy")
            (copier,) = copiers(wrapper.process.pid)
            os.kill(copier, signal.SIGSTOP)
            for _ in range(2):
                assert of(upgrade(wrapper)) == moved(1)
                assert works(client)
            assert copying.poll() is None
            os.kill(copier, signal.SIGCONT)
            out, _ = copying.communicate()
        assert copying.returncode == 0
        assert "100" in out
        wait_until(lambda: len(wrapper.servers()) == 1, "the end of the old process")


def test_a_copy_in_the_background_goes_on(wrapper: Wrapper, proxied: CacheFiles) -> None:
    with wrapper.client("far") as client:
        assert works(client)
        bgctl("--cache-all2", "--limit-rate", "8M", proxied.control)
        wait_until(lambda: query(proxied.control)["blocks"]["cached"] > 0, "the first blocks")
        assert of(upgrade(wrapper)) == moved(1)
        wait_until(lambda: listens(proxied.control), "the new steward")
        wait_until(lambda: query(proxied.control)["blocks"]["cached"] == 4096, "the end of the copy")
        assert works(client)


def test_a_proxy_that_was_switched_stays_a_target(wrapper: Wrapper, proxied: CacheFiles) -> None:
    with wrapper.client("far") as client:
        wrapper.ctl("--bgctl-cache-all", "far")
        wrapper.ctl("--bgctl-switch", "far")
        assert of(upgrade(wrapper)) == moved(1)
        assert works(client)
        assert wrapper.listed()["far"]["mode"] == "target"
        wait_until(lambda: listens(proxied.control), "the new steward")
        assert query(proxied.control)["mode"] == "target"


def test_requests_that_wait_for_the_origin_are_answered_by_the_next_process(
    wrapper: Wrapper, proxied: CacheFiles, origin: Server, tmp_path: Path
) -> None:
    client = nbd.NBD()
    client.connect_uri(wrapper.uri("far"))
    client.pread(512, 0)
    pids = [origin.pid, *origin.workers()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    buffer = nbd.Buffer(MIB)
    cookie = client.aio_pread(buffer, MIB)
    try:
        assert of(upgrade(wrapper)) == moved(1)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    while not client.aio_command_completed(cookie):
        client.poll(-1)
    assert bytes(buffer.to_bytearray()) == (tmp_path / "origin.img").read_bytes()[MIB : 2 * MIB]


def test_a_command_that_takes_long_comes_first(wrapper: Wrapper, proxied: CacheFiles, origin: Server) -> None:
    with wrapper.client("far") as client:
        assert works(client)
        pids = [origin.pid, *origin.workers()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            with asking(wrapper, "--bgctl-cache-all", "far") as copying:
                wait_until(lambda: bool(copiers(wrapper.process.pid)), "the copy")
                line = wrapper.refuses("--upgrade")
                assert line == "xnbd-wrapper-ctl: --bgctl-cache-all is under way: upgrade when it has ended\n"
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                assert copying.wait() == 0
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert of(upgrade(wrapper)) == moved(1)


def copiers(pid: int) -> List[int]:
    """Processes below *pid* that copy."""
    found = [pid] if ": copying " in title_of(pid) else []
    return [*found, *(copier for child in children_of(pid) for copier in copiers(child))]


# What cannot move


def test_a_client_of_tls_stays_and_is_named(
    start_wrapper: StartWrapper, image: Path, certificates: Certificates
) -> None:
    wrapper = start_wrapper("--imgfile", image, "--tls", certificates.server, "--tls-optional")
    with start_tls(wrapper.connect(), context_of(certificates.alice)) as secret, wrapper.client("disk.img") as plain:
        secret.go("disk.img")
        for _ in range(2):
            assert of(upgrade(wrapper)) == moved(1, f"; 1 stays with {__version__} until it leaves (TLS)")
            assert secret.read(0, 512) == plain.read(0, 512) == image.read_bytes()[:512]
        assert wrapper.listed()["disk.img"]["clients"] == 2
        with start_tls(wrapper.connect(), context_of(certificates.bob)) as another:
            another.go("disk.img")
            assert works(another)


def test_with_another_server_only_the_wrapper_is_upgraded(
    start_wrapper: StartWrapper, image: Path, tmp_path: Path
) -> None:
    server = f"{program('xnbd-wrapper')[0]} {FOREIGN}"
    env = {"FOREIGN_LOG": str(tmp_path / "foreign.log")}
    wrapper = start_wrapper("--imgfile", image, "--xnbd-server", server, env=env)
    with wrapper.client("disk.img") as client:
        wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == 1, "the client")
        before = wrapper.servers()
        rest = f"; 1 stays with {__version__} until it leaves (--xnbd-server)"
        assert of(upgrade(wrapper)) == moved(0, rest)
        assert of(upgrade(wrapper)) == moved(0, rest)
        assert wrapper.servers() == before
        assert works(client)
        with wrapper.client("disk.img") as another:
            assert works(another)
            assert wrapper.listed()["disk.img"]["clients"] == 2


def test_a_client_whose_process_stands_still_stays(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client, wrapper.client("disk.img") as other:
        assert works(client)
        assert works(other)
        stopped = serving(wrapper)[0]
        os.kill(stopped, signal.SIGSTOP)
        assert of(upgrade(wrapper)) == moved(1, f"; 1 stays with {__version__} until it leaves (busy)")
        os.kill(stopped, signal.SIGCONT)
        assert works(client)
        assert works(other)
        wrapper.wait_for_log("stays with this process: no upgrade is under way any more")
        assert of(upgrade(wrapper)) == moved(2)


@pytest.mark.root(reason="becomes another user")
def test_a_wrapper_without_roots_rights_is_upgraded(start_wrapper: StartWrapper) -> None:
    with tempfile.TemporaryDirectory(prefix="xnbd-upgrade") as name:
        home = Path(name)
        os.chown(home, 65534, 65534)
        (home / "disk.img").write_bytes(bytes(MIB))
        os.chown(home / "disk.img", 65534, 65534)
        wrapper = start_wrapper("--user", "65534", "--imgfile", home / "disk.img", database=home / "db")
        wrapper.expected_errors.append("that user cannot")
        with wrapper.client("disk.img") as client:
            assert upgrade(wrapper).moved == 1
            assert client.write(0, b"mine") == 0
            for pid in (wrapper.process.pid, *wrapper.servers()):
                assert "Uid:\t65534\t65534\t65534\t65534" in Path(f"/proc/{pid}/status").read_text()
        assert wrapper.stop() == 0


def test_clients_for_whom_there_is_no_process_stay(wrapper: Wrapper, tmp_path: Path) -> None:
    """The new program works, but for that."""
    faults = [
        ("wrapper/upgrade/arrival.py", "_MOST_FAILURES = 10", "_MOST_FAILURES = 2"),
        ("wrapper/upgrade/movers.py", '"""Life of the process: its exit status."""', "return 1"),
    ]
    path = build(tmp_path / "next", "99.0", *faults, name="xnbd-wrapper")
    wrapper.expected_errors.append("waited for a client to move, died: exit status 1")
    with wrapper.client("disk.img") as client:
        rest = f"; 1 stays with {__version__} until it leaves (no process for them)"
        assert upgrade(wrapper, "--program", path).rest == rest
        assert works(client)
        mended = build(tmp_path / "mended", "99.1", name="xnbd-wrapper")
        assert of(upgrade(wrapper, "--program", mended)) == ("99.0", "99.1", 1, "")
        assert works(client)


def test_clients_whose_disk_cannot_be_opened_stay(wrapper: Wrapper, tmp_path: Path) -> None:
    fault = (
        "cli/serving.py",
        '"""A client that another process has, in this process."""',
        "raise OSError(28, 'no room')",
    )
    path = build(tmp_path / "next", "99.0", fault, name="xnbd-wrapper")
    wrapper.expected_errors.append("waited for a client to move, died: exit status 1")
    with wrapper.client("disk.img") as client:
        rest = upgrade(wrapper, "--program", path).rest
        assert rest == f"; 1 stays with {__version__} until it leaves (cannot go on: no room)"
        assert works(client)


# Under load


CROWD = IDLE if "XNBD_IDLE" in os.environ else 25
"""Clients that do nothing."""


def figures_after_one(wrapper: Wrapper) -> Figures:
    """What there is after an upgrade of idle clients."""
    upgrade(wrapper)
    wait_until(lambda: len(wrapper.servers()) == CROWD, "the end of all old processes", LONGEST)
    return Figures.of(wrapper.process.pid, wrapper.servers())


@pytest.mark.timeout(120 + UPGRADES * LONGEST)
def test_who_writes_and_who_waits_does_not_notice(start_wrapper: StartWrapper, tmp_path: Path) -> None:
    """Six clients write numbered stamps."""
    noise_disk(tmp_path / "disk.img")
    wrapper = start_wrapper("--imgfile", tmp_path / "disk.img", "--unix", tmp_path / "sock")
    uri = f"nbd+unix:///disk.img?socket={tmp_path / 'sock'}"
    with ExitStack() as stack:
        idle = [stack.enter_context(wrapper.client("disk.img")) for _ in range(CROWD)]
        before = figures_after_one(wrapper)
        with writers(uri, tmp_path) as busy:
            with upgrading(partial(upgrade, wrapper)) as outcomes:
                pass
            busy.stop()
            data = read_all(connected(wrapper, "disk.img"))
        wait_until(lambda: len(serving(wrapper)) == CROWD, "the end of the writers' servers")
        after = figures_after_one(wrapper)
        for client in idle:
            assert works(client)
    check_cut(data, busy.histories, 0, 1 << 63)
    assert all(outcome.moved >= CROWD for outcome in outcomes), outcomes
    assert after.descriptors == before.descriptors
    assert after.memory < 1.1 * before.memory + 10
    print(f"{before} -> {after}")


def connected(wrapper: Wrapper, name: str) -> nbd.NBD:
    client = nbd.NBD()
    client.connect_uri(wrapper.uri(name))
    return client


@pytest.mark.parametrize("mode", ["target", "cow", "proxy"])
def test_the_model_agrees(start_wrapper: StartWrapper, start: Start, tmp_path: Path, seed: int, mode: str) -> None:
    """Of a copy-on-write disk each client has its own. The proxy's cache is cold at first."""
    content = random.Random(seed).randbytes(4 * MIB + 777)
    image, files = tmp_path / "disk.img", CacheFiles(tmp_path)
    image.write_bytes(content)
    wrapper = start_wrapper(*(["--cow"] if mode == "cow" else []), "--imgfile", image)
    name = "disk.img"
    if mode == "proxy":
        name, far = "far", start("--target", "--readonly", image)
        uri = f"nbd+unix:///?socket={far.socket}"
        wrapper.ctl("--add-proxy", name, uri, files.image, files.bitmap, files.control)
    clients = [connected(wrapper, name) for _ in range(1 if mode == "cow" else 4)]
    model = Model(clients, content, random.Random(seed))
    with upgrading(partial(upgrade, wrapper)) as outcomes:
        model.play(60)
        while len(outcomes) < UPGRADES:
            model.play(20)
    model.run(20)
    assert all(outcome.moved == len(clients) for outcome in outcomes)


# Processes that die


def test_a_process_that_dies_takes_its_client_with_it_and_nothing_else(wrapper: Wrapper) -> None:
    """After the upgrade."""
    wrapper.expected_errors.append("died: killed by SIGKILL")
    with wrapper.client("disk.img") as one, wrapper.client("disk.img") as other:
        assert of(upgrade(wrapper)) == moved(2)
        os.kill(serving(wrapper)[0], signal.SIGKILL)
        assert survivors(one, other) == 1
        wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == 1, "the count of clients")
        with wrapper.client("disk.img") as another:
            assert works(another)


def survivors(*clients: RawClient) -> int:
    count = 0
    for client in clients:
        try:
            count += works(client)
        except (OSError, EOFError, AssertionError):
            pass
    return count


def test_an_old_process_that_dies_on_the_way_takes_its_client_with_it_and_nothing_else(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("died: killed by SIGKILL")
    with wrapper.client("disk.img") as one, wrapper.client("disk.img") as other:
        assert works(one)
        assert works(other)
        first = serving(wrapper)[0]
        os.kill(first, signal.SIGSTOP)
        with asking(wrapper, "--upgrade") as upgrading:
            wrapper.wait_for_log("goes on where")
            os.kill(first, signal.SIGKILL)
            out, _ = upgrading.communicate()
        assert "1 client moved" in out
        assert survivors(one, other) == 1
        assert wrapper.listed()["disk.img"]["clients"] == 1


def test_processes_that_wait_for_clients_may_die(wrapper: Wrapper) -> None:
    """At worst with the client that they have just taken."""
    wrapper.expected_errors += ["waited for a client to move, died", "died: killed by SIGKILL", "cannot take"]
    clients = [wrapper.client("disk.img") for _ in range(12)]
    killed = 0
    with asking(wrapper, "--upgrade") as upgrading:
        while upgrading.poll() is None:
            for pid in [pid for pid in wrapper.servers() if "waits for a client" in title_of(pid)][: 2 - killed]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert upgrading.returncode == 0
    assert survivors(*clients) >= len(clients) - killed
    for client in clients:
        client.sock.close()


@pytest.mark.parametrize(("call", "when"), [("sendmsg", 1), ("recvmsg", 1), ("close", 2), ("poll", 2), ("sendto", 1)])
def test_an_old_process_that_dies_at_a_system_call_costs_its_client_at_most(
    wrapper: Wrapper, call: str, when: int
) -> None:
    wrapper.expected_errors += ["died: killed by SIGKILL"]
    with wrapper.client("disk.img") as doomed, wrapper.client("disk.img") as other:
        assert works(doomed)
        assert works(other)
        with injected(serving(wrapper)[0], f"{call}:signal=KILL:when={when}"):
            parse(wrapper.ctl("--upgrade"))
        assert survivors(doomed, other) >= 1
        wait_until(lambda: wrapper.listed()["disk.img"]["clients"] == len(serving(wrapper)), "the count of clients")


@pytest.mark.parametrize("fault", ["clone,clone3:error=EAGAIN:when=2..4", "sendto:error=ENOBUFS:when=1..2"])
def test_a_system_call_that_fails_in_the_new_program_harms_no_client(wrapper: Wrapper, fault: str) -> None:
    wrapper.expected_errors += ["cannot start a process"]
    with wrapper.client("disk.img") as client:
        with injected(wrapper.process.pid, fault):
            subprocess.run(ctl_command(wrapper, "--upgrade"), capture_output=True, check=False)
        assert works(client)
        assert wrapper.process.poll() is None
        wait_until(lambda: "upgraded, " in wrapper.log(), "the end of the upgrade")


@pytest.mark.parametrize("moment", [0.2, 0.35, 0.5])
def test_a_wrapper_that_dies_on_the_way_leaves_its_clients_alone(
    start_wrapper: StartWrapper, image: Path, moment: float
) -> None:
    """As ever: their processes need no wrapper."""
    wrapper = start_wrapper("--imgfile", image)
    with wrapper.client("disk.img") as client:
        with asking(wrapper, "--upgrade") as upgrading:
            time.sleep(moment)
            wrapper.process.kill()
            wrapper.process.wait()
            upgrading.communicate()
        assert works(client)
        again = start_wrapper("--imgfile", image)
        with again.client("disk.img") as another:
            assert works(another)


@pytest.mark.parametrize(
    "call",
    [
        "memfd_create:signal=KILL:when=2",
        "execve:signal=KILL:when=1",
        "sendto:signal=KILL:when=2",
        "kill:signal=KILL:when=2",
    ],
)
def test_a_wrapper_that_dies_at_a_system_call_leaves_its_clients_alone(
    start_wrapper: StartWrapper, image: Path, call: str
) -> None:
    wrapper = start_wrapper("--imgfile", image)
    with wrapper.client("disk.img") as client, wrapper.client("disk.img") as other:
        assert works(client)
        assert works(other)
        with injected(wrapper.process.pid, call):
            with asking(wrapper, "--upgrade") as upgrading:
                upgrading.communicate()
            wrapper.process.wait(20)
        assert survivors(client, other) == 2
        with start_wrapper("--imgfile", image).client("disk.img") as another:
            assert works(another)


def test_hangups_on_the_way_are_kept(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client, asking(wrapper, "--upgrade") as upgrading:
        while upgrading.poll() is None:
            wrapper.process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        assert upgrading.returncode == 0
        assert works(client)
    assert wrapper.process.poll() is None
    assert "configuration read again" in wrapper.log().split("goes on where")[1]


def test_a_wrapper_that_stops_on_the_way_ends_all(wrapper: Wrapper) -> None:
    clients = [wrapper.client("disk.img") for _ in range(20)]
    with asking(wrapper, "--upgrade") as upgrading:
        wrapper.wait_for_log("goes on where")
        everybody = wrapper.servers()
        assert wrapper.stop() == 0
        upgrading.communicate()
    wait_for_end(everybody)
    for client in clients:
        client.sock.close()


def test_an_orphan_leaves_clients_that_have_moved(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        upgrade(wrapper)
        pids = serving(wrapper)
        wrapper.ctl("--orphan")
        wrapper.process.wait()
        assert works(client)
        assert all(map(is_alive, pids))


# What the operations guide says


def test_the_recipe_of_the_operations_guide_is_right(image: Path, tmp_path: Path) -> None:
    guide = (ROOT / "contrib/doc/operations.rst").read_text()
    section = guide.split("\nUpgrading\n=========\n")[1].split("\n\n\n")[0]
    lines = re.findall(r"^    xnbd-wrapper-ctl (.*?) +# (.*)$", section, re.MULTILINE)
    assert len(lines) == 2
    path = build(tmp_path / "tree", "1.1.0", name="xnbd-wrapper")
    words = ["--unix", tmp_path / "sock", "--socket", tmp_path / "ctl", "--dbpath", tmp_path / "db", "--imgfile", image]
    with subprocess.Popen([path, *map(str, words)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until((tmp_path / "ctl").exists, "the control socket")
            client = nbd.NBD()
            client.connect_uri(f"nbd+unix:///disk.img?socket={tmp_path / 'sock'}")
            init = tmp_path / "tree/xnbd/__init__.py"
            init.write_text(init.read_text().replace("1.1.0", "1.2.0"))
            for line, printed in lines:
                command = [*program("xnbd-wrapper-ctl"), "--socket", str(tmp_path / "ctl"), *line.split()]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                assert re.sub(r"pause \d+", "pause 7", out.replace("1 client", "815 clients")) == f"{printed}\n"
            client.shutdown()
        finally:
            process.terminate()
