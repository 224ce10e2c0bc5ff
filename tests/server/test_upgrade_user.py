"""xnbd-bgctl --upgrade of a server without root's rights: what is open stays, what it opens again has to be its own.

All tests need root, to become another user.
"""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Iterator

import pytest
from conftest import MIB, Start
from proxies import bgctl, refused
from rawclient import RawClient
from server_process import Server
from upgrades import build, upgrade

NOBODY = 65534

pytestmark = pytest.mark.root(reason="becomes another user")


def negotiated(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


@contextmanager
def home_of(uid: int) -> Iterator[Path]:
    """A directory that this user can reach."""
    with tempfile.TemporaryDirectory(prefix="xnbd-upgrade") as name:
        os.chown(name, uid, uid)
        yield Path(name)


@pytest.fixture
def home() -> Iterator[Path]:
    with home_of(NOBODY) as path:
        (path / "disk.img").write_bytes(bytes(MIB))
        os.chown(path / "disk.img", NOBODY, NOBODY)
        yield path


@pytest.fixture
def hidden(home: Path) -> Path:
    """A directory that only root can enter."""
    path = home / "root"
    path.mkdir(0o700)
    return path


def serve(start: Start, home: Path, *options: object) -> Server:
    """As that user, whatever is warned of."""
    server = start("--target", "--user", NOBODY, "--control", home / "ctl", *options, home / "disk.img")
    server.expected_errors.append("that user cannot")
    return server


def free_privileged_port() -> int:
    for port in range(1023, 600, -1):
        with closing(socket.socket()) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("all ports are taken")


def test_what_only_root_could_open_and_is_open_stays(start: Start, home: Path, hidden: Path) -> None:
    """A port below 1024, and the pid file with its lock."""
    port, pid_file = free_privileged_port(), hidden / "pid"
    server = serve(start, home, "--laddr", "127.0.0.1", "--lport", port, "--pidfile", pid_file)
    for _ in range(2):
        upgrade(home / "ctl")
        with RawClient(socket.create_connection(("127.0.0.1", port))).negotiate() as client:
            assert len(client.read(0, 512)) == 512
    assert int(pid_file.read_text()) == server.pid
    assert server.stop() == 0
    assert pid_file.read_text() == ""


@pytest.mark.parametrize(
    ("option", "content", "reason"),
    [
        ("--logpath", "", "cannot open log file {path}: Permission denied"),
        ("--limits", "max-clients 7", "--limits {path}: it cannot be read: Permission denied"),
        ("--tls-authz", "uid:* * rw", "the rules {path}: it cannot be read: Permission denied"),
    ],
)
def test_what_is_opened_again_has_to_be_that_users(
    start: Start, home: Path, hidden: Path, option: str, content: str, reason: str
) -> None:
    path = hidden / "file"
    path.write_text(content)
    server = serve(start, home, option, path)
    with negotiated(server) as client:
        for check in (["--check"], []):
            assert refused("--upgrade", *check, home / "ctl").endswith(reason.format(path=path))
        hidden.chmod(0o755)
        path.chmod(0o666)
        assert "is possible, with 1 client;" in bgctl("--upgrade", "--check", home / "ctl")
        assert upgrade(home / "ctl").moved == 1
        assert len(client.read(0, 512)) == 512


def test_it_stays_without_roots_rights(start: Start, home: Path) -> None:
    server = serve(start, home)
    with negotiated(server) as client:
        assert upgrade(home / "ctl").moved == 1
        assert client.write(0, b"mine") == 0
    assert "Uid:\t65534\t65534\t65534\t65534" in Path(f"/proc/{server.pid}/status").read_text()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (".", "the server cannot look at the program {program}: Permission denied"),
        ("bin/xnbd-server", "cannot go on with this server, which stays as it is: "),
        ("xnbd/server/worker.py", "cannot go on: {tree}/xnbd/server/worker.py Permission denied"),
    ],
)
def test_a_program_that_the_user_may_not_read_changes_nothing(start: Start, home: Path, part: str, reason: str) -> None:
    program = build(home / "tree", "99.0")
    (home / "tree" / part).chmod(0o600)
    server = serve(start, home)
    with negotiated(server) as client:
        for options in (["--check"], []):
            line = refused("--upgrade", *options, "--program", program, home / "ctl")
            assert reason.format(program=program, tree=home / "tree") in line
        assert len(client.read(0, 512)) == 512
