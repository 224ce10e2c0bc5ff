"""Who may open which of the wrapper's exports: --tls-authz with users at a Unix socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from conftest import MIB, StartWrapper
from launch import launched
from rawclient import (
    ACK,
    ERR_UNKNOWN,
    EXPORT_NAME,
    LIST,
    REP_SERVER,
    WRITE,
    RawClient,
    string,
)
from server_process import run, title_of, wait_until
from wrapper_process import Wrapper, fails, program

UID = os.getuid()
EPERM = 1
READ_ONLY, MULTI_CONN = 1 << 1, 1 << 8

NAMES = ["private", "public", "shared", "vm-1", "vm-2"]
RULES = f"""
uid:{UID + 1} private rw
uid:{UID}     public  ro
uid:{UID}     shared  rw
uid:{UID}     vm-*    ro
"""

Connect = Callable[..., RawClient]


@pytest.fixture
def disks(tmp_path: Path) -> Dict[str, Path]:
    paths = {name: tmp_path / name for name in NAMES}
    for name, path in paths.items():
        path.write_bytes(name.encode() * (MIB // len(name)))
    return paths


@pytest.fixture
def ruled(start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path) -> Wrapper:
    return start_ruled(start_wrapper, disks, tmp_path)


def start_ruled(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, *options: object, rules: str = RULES
) -> Wrapper:
    (tmp_path / "rules").write_text(rules)
    images: List[object] = []
    for path in disks.values():
        images += ["--imgfile", path]
    where = ["--unix", tmp_path / "nbd.sock", "--tls-authz", tmp_path / "rules"]
    return start_wrapper(*where, *images, *options)


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    clients: List[RawClient] = []

    def connect_one(*name: str) -> RawClient:
        sock = socket.socket(socket.AF_UNIX)
        clients.append(RawClient(sock))
        sock.settimeout(60)
        sock.connect(str(tmp_path / "nbd.sock"))
        return clients[-1].negotiate(*name) if name else clients[-1]

    yield connect_one
    for client in clients:
        client.sock.close()


def listed(client: RawClient) -> List[bytes]:
    replies = client.option(LIST)
    assert replies[-1] == (ACK, b"")
    assert all(kind == REP_SERVER for kind, _ in replies[:-1])
    return [data for _, data in replies[:-1]]


def test_a_client_sees_the_exports_that_it_may_open(ruled: Wrapper, connect: Connect) -> None:
    client = connect()
    client.greet()
    assert sorted(listed(client)) == sorted(map(string, ["public", "shared", "vm-1", "vm-2"]))


def test_a_denied_export_is_answered_as_an_unknown_one(ruled: Wrapper, connect: Connect, tmp_path: Path) -> None:
    client = connect()
    client.greet()
    unknown = [client.go("nothing", option) for option in (6, 7)]
    for name in ("private", str(tmp_path / "private")):  # and by the other name of --imgfile
        assert [client.go(name, option) for option in (6, 7)] == unknown == [[(ERR_UNKNOWN, b"no such export")]] * 2
    client.send_option(EXPORT_NAME, b"private")
    assert client.closed()
    ruled.wait_for_log(f"uid={UID}: export 'private' is denied to uid:{UID}")
    ruled.wait_for_log(f"uid={UID}: disconnected: export 'private' is denied to uid:{UID}")


def test_a_denied_export_is_not_looked_at(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, connect: Connect
) -> None:
    """An unknown export is answered at once and the same, also where a disk that may be opened would not be there."""
    start_ruled(start_wrapper, disks, tmp_path)
    disks["private"].unlink()
    disks["public"].unlink()
    client = connect()
    client.greet()
    assert client.go("private") == [(ERR_UNKNOWN, b"no such export")]
    assert client.go("public") == [(ERR_UNKNOWN, b"this disk is not available at the moment")]


def test_the_empty_name_is_the_only_export_that_a_client_may_open(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, connect: Connect
) -> None:
    start_ruled(start_wrapper, disks, tmp_path, rules=f"uid:{UID} vm-2 rw\nuid:{UID + 1} * rw\n")
    assert connect("").read(0, 4) == b"vm-2"


@pytest.mark.parametrize("options", [[], ["--cow"]])
def test_writers_write_and_readers_get_eperm(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, connect: Connect, options: List[str]
) -> None:
    wrapper = start_ruled(start_wrapper, disks, tmp_path, *options)
    reader, writer = connect("vm-1"), connect("shared")
    assert reader.flags & READ_ONLY
    assert bool(reader.flags & MULTI_CONN) == (not options)
    assert reader.write(0, b"x") == EPERM
    assert reader.read(0, 8) == b"vm-1vm-1"
    assert not writer.flags & READ_ONLY
    assert writer.write(0, b"x") == 0
    assert writer.read(0, 2) == b"xh"
    wrapper.wait_for_log("WRITE refused: this client may only read it")


def test_the_servers_know_who_their_client_is(ruled: Wrapper, connect: Connect) -> None:
    connect("shared")
    ruled.wait_for_log(f"connected as uid:{UID}")
    (pid,) = ruled.servers()
    wait_until(lambda: title_of(pid).startswith("xnbd-server: serving unix:pid="), "the server's title")


def test_a_server_of_the_users_choice_is_read_only_for_a_reader(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, connect: Connect
) -> None:
    command = " ".join(program("xnbd-server"))
    start_ruled(start_wrapper, disks, tmp_path, "--xnbd-server", command)
    assert connect("shared").write(0, b"x") == 0
    reader = connect("public")
    assert reader.flags & READ_ONLY
    reader.request(WRITE, 0, 1, data=b"x")
    assert reader.closed()


def test_proxies_have_rules_as_targets_have(
    start_wrapper: StartWrapper, disks: Dict[str, Path], tmp_path: Path, connect: Connect
) -> None:
    origin = start_ruled(start_wrapper, disks, tmp_path, rules="anonymous public ro\nuid:* cache ro\n")
    files = [tmp_path / f"cache{suffix}" for suffix in (".img", ".bitmap", ".ctl")]
    origin.ctl("--add-proxy", "cache", "127.0.0.1", origin.port, *files, "--target-exportname", "public")
    reader = connect("cache")
    assert reader.flags & READ_ONLY
    assert reader.read(0, 12) == b"publicpublic"
    assert reader.write(0, b"x") == EPERM
    assert reader.write(4096, b"x" * 8192) == EPERM
    assert reader.read(4096, 6) == disks["public"].read_bytes()[4096:4102]


def test_broken_rules_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("uid:1 disk\n")
    status, message = fails(tmp_path, "--dbpath", tmp_path / "db", "--tls-authz", tmp_path / "rules")
    assert (status, "rules:1: expected IDENTITY EXPORT rw|ro" in message) == (1, True)


def test_rules_that_nobody_can_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("uid:1 disk rw\n")
    status, message = fails(tmp_path, "--dbpath", tmp_path / "db", "--tls-authz", tmp_path / "rules")
    assert (status, "clients on TCP prove nothing" in message) == (1, True)


def test_a_wrapper_on_a_unix_socket_only(tmp_path: Path, disks: Dict[str, Path]) -> None:
    words = [*program("xnbd-wrapper"), "--unix", tmp_path / "s", "--socket", tmp_path / "ctl"]
    words += ["--dbpath", tmp_path / "db", "--imgfile", disks["public"]]
    with launched(words, tmp_path / "log") as wrapper:
        wrapper.wait_for_log(f"serving 1 export of {tmp_path}/db on unix:{tmp_path}/s\n")
        assert "export-size: 1048572" in run("nbdinfo", f"nbd+unix:///public?socket={tmp_path}/s")[1]
    assert not (tmp_path / "s").exists()
