"""--user: a server that root has started gives root's rights up, and says what it could not do without them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from certificates import Certificates, copy
from conftest import MIB, Start
from launch import fails, launched, stop_daemon
from proxies import ask, bgctl, query, refused
from rawclient import RawClient
from server_process import Server, children_of, command, run, title_of, wait_until
from tls_client import tls_client

from xnbd.errors import ConfigurationError
from xnbd.system.user import find_user

pytestmark = pytest.mark.root(reason="only root has rights to give up")

UID, GID = 47110, 47120
USER = f"{UID}:{GID}"
AS_USER = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's that others may look into; ``home`` in it is the user's own."""
    path = Path(tempfile.mkdtemp(prefix="xnbd-user-"))
    path.chmod(0o755)
    (path / "home").mkdir()
    os.chown(path / "home", UID, GID)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def home(place: Path) -> Path:
    return place / "home"


def own(path: Path) -> Path:
    os.chown(path, UID, GID)
    return path


def disk(path: Path, size: int = MIB) -> Path:
    """An image of the user's."""
    path.write_bytes(os.urandom(size))
    path.chmod(0o600)
    return own(path)


def status_of(pid: int) -> Dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def has_no_rights(pid: int) -> bool:
    """Whether the process is the user's in every way, and can become nobody else."""
    status = status_of(pid)
    assert status["Uid"].split() == [str(UID)] * 4, title_of(pid)
    assert status["Gid"].split() == [str(GID)] * 4
    assert status["Groups"].split() == [str(GID)]
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0, name
    return status["NoNewPrivs"] == "1"


def all_without_rights(server: Server) -> bool:
    """Master, steward and workers; there are as many as there should be."""
    wait_until(lambda: len(children_of(server.pid)) >= 4, "all processes")
    return all(map(has_no_rights, [server.pid, *children_of(server.pid)]))


def warnings_of(log: str) -> List[str]:
    """What the user cannot do."""
    return re.findall(f"WARNING: --user {UID}: that user cannot (.*)", log)


def owners(*paths: Path) -> set[tuple[int, int]]:
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in paths}


# What works


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_all_processes_of_a_server_are_the_users(start: Start, home: Path, mode: str) -> None:
    image, control = disk(home / "disk.img"), home / "ctl"
    server = start(mode, "--user", USER, "--control", control, image)
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.write(0, b"written") == 0
        assert client.read(0, 7) == b"written"
        assert all_without_rights(server)
        made = Path(bgctl("--snapshot", control).strip())
    assert made.read_bytes()[:7] == b"written"
    assert owners(image, control, made) == {(UID, GID)}
    assert warnings_of(server.log()) == [
        f"make or remove files in {server.socket.parent}: the socket stays there at the end"
    ]


def test_what_is_made_belongs_to_the_user(start: Start, home: Path, place: Path) -> None:
    pid_file, log = place / "pid", place / "log"
    server = start(
        *("--target", "--user", USER, "--create", "1M", "--file-mode", "0640"),
        *("--pidfile", pid_file, "--logpath", log, home / "new.img"),
    )
    assert owners(pid_file, log, home / "new.img", server.socket) == {(UID, GID)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (pid_file, log, home / "new.img")} == {0o640}
    assert all_without_rights(server)


def test_what_is_there_stays_whose_it_is(start: Start, home: Path, place: Path) -> None:
    image, log = disk(home / "disk.img"), place / "log"
    image.chmod(0o660)
    os.chown(image, 0, GID)
    log.touch()
    start("--target", "--user", USER, "--logpath", log, image)
    assert (owners(image), owners(log)) == ({(0, GID)}, {(0, 0)})
    assert "serving disk image" in log.read_text()


def test_a_proxy_does_everything_as_the_user(start: Start, home: Path, tmp_path: Path) -> None:
    far = tmp_path / "far.img"
    far.write_bytes(os.urandom(MIB))
    origin = start("--target", "--readonly", far, tcp=True)
    files = [home / name for name in ("cache.img", "cache.bitmap", "ctl")]
    proxy = start("--proxy", "--user", USER, f"nbd://127.0.0.1:{origin.port}", *files)
    with RawClient(proxy.connect()) as client:
        client.negotiate()
        assert client.read(0, 8192) == far.read_bytes()[:8192]
        assert client.write(4096, b"x" * 4096) == 0
        assert client.works()  # FLUSH: a checkpoint
        assert all_without_rights(proxy)
        assert any("steward" in title_of(pid) for pid in children_of(proxy.pid))
        assert client.write(8192, b"y" * 4096) == 0
        wait_until(lambda: query(files[2])["checkpoint"]["completed"] >= 1, "a checkpoint of the steward")
        bgctl("--cache-all", files[2])
        bgctl("--switch", files[2])
        made = Path(bgctl("--snapshot", files[2]).strip())
        assert client.read(4096, 4096) == b"x" * 4096
    assert made.read_bytes()[4096:8192] == b"x" * 4096
    assert owners(made, *home.iterdir()) == {(UID, GID)}
    assert proxy.stop() == 0
    again = start("--target", "--user", USER, files[0])
    assert all_without_rights(again)


def test_a_steward_that_died_comes_back(start: Start, home: Path) -> None:
    server = start("--target", "--user", USER, "--control", home / "ctl", disk(home / "disk.img"))
    server.expected_errors.append("the steward died")
    first = query(home / "ctl")["uptime_seconds"]
    (steward,) = [pid for pid in children_of(server.pid) if "steward" in title_of(pid)]
    os.kill(steward, signal.SIGKILL)

    def is_new() -> bool:
        stewards = [pid for pid in children_of(server.pid) if "steward" in title_of(pid)]
        return bool(stewards) and stewards != [steward]

    wait_until(is_new, "the next steward")
    wait_until(lambda: run_query(home / "ctl") is not None, "its control socket")
    assert first >= 0
    assert all_without_rights(server)


def run_query(control: Path) -> object:
    try:
        return query(control)
    except (OSError, AssertionError):
        return None


def test_a_daemon_gives_its_rights_up(home: Path, place: Path) -> None:
    pid_file, image = place / "pid", disk(home / "disk.img")
    where = ["--unix", place / "s", "--pidfile", pid_file, "--logpath", place / "log"]
    try:
        run(*command("--target", "--daemonize", "--user", USER, *where, image))
        assert has_no_rights(int(pid_file.read_text()))
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={place}/s")[1] == f"{MIB}\n"
    finally:
        stop_daemon(pid_file)
    wait_until(lambda: not pid_file.read_text(), "the end")


def test_a_super_servers_child_gives_its_rights_up(home: Path, place: Path) -> None:
    image = disk(home / "disk.img")
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    words = command("--target", "--inetd", "--user", USER, "--logpath", place / "log", image)
    process = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno())
    with theirs, process, RawClient(ours) as client:
        client.negotiate()
        assert client.read(0, 100) == image.read_bytes()[:100]
        assert has_no_rights(process.pid)


def test_root_listens_where_users_must_not(place: Path, home: Path) -> None:
    port = free_low_port()
    image = disk(home / "disk.img")
    words = command("--target", "--user", USER, "--laddr", "127.0.0.1", "--lport", port, image)
    with launched(words, place / "log") as server:
        server.wait_for_log("INFO: serving")
        assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}")[1] == f"{MIB}\n"
        assert has_no_rights(server.process.pid)


def free_low_port() -> int:
    for port in range(1023, 600, -1):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port below 1024 is free")


def test_a_server_that_is_the_users_already_stays_as_it_is(place: Path, home: Path) -> None:
    """As under systemd with ``User=``, or when the server executes its own program."""
    image = disk(home / "disk.img")
    words = [*AS_USER, *command("--target", "--user", USER, "--unix", home / "s", image)]
    with launched(words, place / "log") as server:
        server.wait_for_log("INFO: serving")
    assert "--user" not in server.log()
    assert not (home / "s").exists()


# What the user cannot do


def test_an_image_that_the_user_cannot_open_is_refused(place: Path, home: Path) -> None:
    image = disk(home / "disk.img")
    os.chown(image, 0, 0)
    expected = f"xnbd-server: --user {UID}: that user cannot open {image}, which every process does for a new client"
    for mode in ("--target", "--cow-target"):
        status, message = fails(mode, "--user", USER, "--unix", place / "s", "--pidfile", place / "pid", image)
        assert (status, message.startswith(expected)) == (1, True)
    assert {path.name for path in place.iterdir()} == {"home"}  # what root has made is gone again
    image.chmod(0o644)
    status, message = fails("--target", "--user", USER, "--unix", place / "s", image)
    assert message.startswith(expected)
    with launched(command("--target", "-r", "--user", USER, "--unix", place / "s", image), place / "log") as server:
        server.wait_for_log("INFO: serving")


def test_a_cache_that_root_has_made_is_refused_to_the_user(start: Start, place: Path, home: Path) -> None:
    far = home / "far.img"
    far.write_bytes(bytes(MIB))
    origin = start("--target", "--readonly", far)
    files = [home / name for name in ("cache.img", "cache.bitmap", "ctl")]
    start("--proxy", origin.uri, *files).stop()
    origin.socket.chmod(0o666)
    for name in ("cache.img", "cache.bitmap", "cache.bitmap.state", "cache.bitmap.board"):
        status, message = fails("--proxy", "--quiet", "--user", USER, "--unix", place / "s", origin.uri, *files)
        assert (status, f"that user cannot open {home}/" in message) == (1, True)
        blocked = re.findall(r"cannot open (\S+),", message)[0]
        own(Path(blocked))
        assert Path(blocked).name in {"cache.img", "cache.bitmap", "cache.bitmap.state", "cache.bitmap.board"}, name
    with launched(
        command("--proxy", "--user", USER, "--unix", place / "s", origin.uri, *files), place / "log"
    ) as proxy:
        proxy.wait_for_log("INFO: serving")
        assert f"that user cannot write to {origin.socket}: no block is fetched" in proxy.log()


def test_what_would_fail_later_is_told_at_the_start(start: Start, place: Path) -> None:
    image, rules = disk(place / "disk.img"), place / "rules"
    rules.write_text("uid:* * rw\n")
    rules.chmod(0o600)
    where = ["--unix", place / "s", "--pidfile", place / "pid", "--logpath", place / "log"]
    words = command("--target", "--user", USER, "--tls-authz", rules, *where, image)
    with launched(words, place / "errors"):
        wait_until(lambda: (place / "pid").exists(), "the start")
        assert warnings_of((place / "log").read_text()) == [
            f"make or remove files in {place}: there are no snapshots; "
            "no new log file is made when this one is moved away; "
            "the pid file is emptied at the end, and not removed; the socket stays there at the end",
            f"read {rules}: a reload and an upgrade are refused",
        ]
        os.rename(place / "log", place / "old")
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={place}/s")[1] == f"{MIB}\n"
    assert ((place / "pid").read_text(), (place / "s").is_socket(), (place / "log").exists()) == ("", True, False)
    with launched(words, place / "errors"):  # what is left is in nobody's way
        wait_until(lambda: (place / "pid").exists() and (place / "pid").read_text(), "the start")


def test_keys_that_only_root_may_read_are_told_of(
    start: Start, place: Path, home: Path, certificates: Certificates
) -> None:
    """And no other file of the directory, such as what a client of this computer has there."""
    directory = copy(certificates.server, place / "tls")
    (directory / "server-key.pem").chmod(0o600)
    (directory / "client-key.pem").write_text("")
    (directory / "client-key.pem").chmod(0o600)
    server = start("--target", "--user", USER, "--tls", directory, "--control", home / "ctl", disk(home / "disk.img"))
    consequence = "a reload and an upgrade are refused"
    told = [line for line in warnings_of(server.log()) if str(directory) in line]
    assert told == [f"read {directory}/server-key.pem: {consequence}"]
    with tls_client(server, certificates.alice) as alice:
        assert alice.works()
    server.expected_errors.append("stays as it was")
    assert ask(home / "ctl", command="reload")["error"] == f"cannot read {directory}/server-key.pem: Permission denied"


def test_a_log_in_a_directory_that_is_closed_goes_on(place: Path, home: Path) -> None:
    closed, image = place / "closed", disk(home / "disk.img")
    closed.mkdir(0o700)
    words = command("--target", "--user", USER, "--unix", place / "s", "--logpath", closed / "log", image)
    with launched(words, place / "errors"):
        wait_until(lambda: (closed / "log").exists() and "INFO: serving" in (closed / "log").read_text(), "the start")
        run("nbdinfo", f"nbd+unix:///?socket={place}/s")
        wait_until(lambda: ": connected as uid:0" in (closed / "log").read_text(), "the client in the log")


def test_no_snapshot_is_a_line_and_no_death(start: Start, place: Path, home: Path) -> None:
    image = disk(place / "disk.img")
    server = start("--target", "--user", USER, "--control", home / "ctl", image)
    assert refused("--snapshot", home / "ctl") == "no snapshot: Permission denied"
    assert all_without_rights(server)


# Whom it can be


@pytest.mark.parametrize(
    "user, status, reason",
    [
        ("no-such-user", 1, "there is no user no-such-user"),
        ("nobody:no-such-group", 1, "there is no group no-such-group"),
        ("root", 1, "that is root, whose rights are to be given up"),
        ("0", 1, "that is root"),
        ("47110", 1, "no user has this number, so say the group too: 47110:GROUP"),
        ("nobody:", 2, "expected NAME or NAME:GROUP"),
        (":nogroup", 2, "expected NAME or NAME:GROUP"),
        ("4294967295:1", 2, "4294967295 is too large"),
        (f"1:{'9' * 30}", 2, "is too large"),
        ("-1:1", 1, "there is no user -1"),
    ],
)
def test_a_user_that_it_cannot_be_is_a_line(place: Path, user: str, status: int, reason: str) -> None:
    found, message = fails("--target", f"--user={user}", place / "disk.img")
    assert (found, message.startswith(f"xnbd-server: --user {user}: "), reason in message) == (status, True, True)


def test_only_root_becomes_another_user(place: Path, home: Path) -> None:
    image = disk(home / "disk.img")
    for user in ("nobody", f"{UID}:0"):
        status, message = fails("--target", "--user", user, image, prefix=AS_USER)
        assert (status, "only root can start a server that becomes another user" in message) == (1, True)


def test_root_without_the_right_to_become_others_says_so(place: Path, home: Path) -> None:
    image = disk(home / "disk.img")
    prefix = ["setpriv", "--inh-caps=-setuid", "--bounding-set=-setuid"]
    status, message = fails("--target", "--user", USER, "--unix", place / "s", image, prefix=prefix)
    assert (status, f"cannot become {UID}: Operation not permitted (root needs CAP_SETUID" in message) == (1, True)


def test_users_and_groups_by_name_and_number() -> None:
    nobody = find_user("nobody")
    assert find_user(str(nobody.uid)) == nobody
    assert find_user(f"nobody:{GID}")[1:3] == (nobody.uid, GID)
    assert GID in find_user(f"nobody:{GID}").groups
    assert find_user(USER) == (str(UID), UID, GID, (GID,))
    with pytest.raises(ConfigurationError):
        find_user("")


def test_the_users_other_groups_come_along(start: Start, home: Path) -> None:
    run("groupadd", "--force", "--gid", "47130", "xnbdtest")
    try:
        run("usermod", "-a", "-G", "xnbdtest", "nobody")
        image = disk(home / "disk.img")
        os.chown(image, 0, 47130)
        image.chmod(0o660)
        home.chmod(0o777)
        server = start("--target", "--user", "nobody", image)
        assert "47130" in status_of(server.pid)["Groups"].split()
    finally:
        run("groupdel", "xnbdtest")
