"""Who may open a disk, and who may write to it: --tls-authz with users at a Unix socket."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Callable, List, Optional

import nbd
import pytest
from conftest import Start
from launch import fails
from proxies import query
from rawclient import (
    ABORT,
    ACK,
    CACHE,
    ERR_UNKNOWN,
    EXPORT_NAME,
    FLUSH,
    FUA,
    GO,
    INFO,
    LIST,
    LIST_META_CONTEXT,
    REP_SERVER,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    context_data,
    go_data,
    pack_option,
    string,
)
from server_process import Server, command, run, title_of

READ_ONLY, TRIMS, ZEROES, MULTI_CONN, FAST = 1 << 1, 1 << 5, 1 << 6, 1 << 8, 1 << 11
EPERM = 1
UID = os.getuid()

Rules = Callable[..., Path]


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    def write(*lines: str) -> Path:
        path = tmp_path / "rules"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def everything_said(server: Server, name: str, asked_for: Optional[str] = None) -> List[bytes]:
    """All bytes that a server sends to a client that asks for *name* in every way; the name itself is put aside."""
    asked = name if asked_for is None else asked_for
    heard = []
    for last in (pack_option(ABORT), pack_option(EXPORT_NAME, asked.encode())):
        with RawClient(server.connect()) as client:
            client.greet()
            for option, data in (
                (LIST, b""),
                (INFO, go_data(asked, 0, 1, 2, 3)),
                (GO, go_data(asked, 3)),
                (STRUCTURED_REPLY, b""),
                (SET_META_CONTEXT, context_data(asked, "base:allocation")),
                (LIST_META_CONTEXT, context_data(asked)),
                (GO, go_data(asked)),
            ):
                client.send(pack_option(option, data))
            client.send(last)
            client.finish_sending()
            said = bytearray()
            while True:
                part = client.sock.recv(1 << 16)
                if not part:
                    break
                said += part
            heard.append(bytes(said))
    return heard


def test_a_denied_disk_is_to_its_client_as_one_that_is_not_there(start: Start, image: Path, rules: Rules) -> None:
    access = rules(f"uid:{UID + 1} * rw", f"uid:{UID} other rw")
    denied = start("--target", "--tls-authz", access, image)
    for name in ("disk.img", ""):
        assert everything_said(denied, name) == everything_said(denied, name, "n" * len(name) or "n")
    with RawClient(denied.connect()) as client:
        client.greet()
        assert client.option(LIST) == [(ACK, b"")]
        assert client.go("disk.img") == [(ERR_UNKNOWN, b"no such export")]
    denied.wait_for_log(f"unix:pid={os.getpid()},uid={UID}: export 'disk.img' is denied to uid:{UID}")
    denied.wait_for_log(f"unix:pid={os.getpid()},uid={UID}: disconnected: export 'disk.img' is denied to uid:{UID}")
    denied.wait_for_log("unknown export 'nnnnnnnn'")


def test_the_log_tells_once_of_each_kind_of_refusal(start: Start, image: Path, rules: Rules) -> None:
    server = start("--target", "--tls-authz", rules("uid:9 disk.img ro"), image)
    with RawClient(server.connect()) as client:
        client.greet()
        for name in ("a", "disk.img", "b", "disk.img", ""):
            client.go(name)
    server.wait_for_log("left during the handshake")
    refusals = re.findall("WARNING: [^ ]*: (.*)", server.log())
    assert refusals == ["unknown export 'a'", f"export 'disk.img' is denied to uid:{UID}"]


def test_a_client_that_may_write_is_served_as_without_rules(start: Start, image: Path, rules: Rules) -> None:
    plain = start("--target", image)
    ruled = start("--target", "--tls-authz", rules(f"uid:{UID} disk.img rw"), image)
    assert everything_said(ruled, "disk.img") == everything_said(plain, "disk.img")
    with RawClient(ruled.connect()) as client:
        client.negotiate()
        assert client.write(5, b"written") == 0
        assert client.read(5, 7) == b"written"


# Read-only


def offered(server: Server, name: str = "") -> RawClient:
    return RawClient(server.connect()).negotiate(name)


def test_a_reader_is_told_so_and_may_use_several_connections(start: Start, image: Path, rules: Rules) -> None:
    server = start("--target", "--tls-authz", rules("uid:* disk.img ro"), image)
    with offered(server) as reader:
        assert reader.flags & READ_ONLY
        assert not reader.flags & (TRIMS | ZEROES | FAST)
        assert reader.flags & MULTI_CONN
        assert reader.read(0, 4096) == image.read_bytes()[:4096]


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_whatever_a_reader_writes_is_refused_and_nothing_changes(
    start: Start, image: Path, rules: Rules, mode: str
) -> None:
    before = image.read_bytes()
    server = start(mode, "--tls-authz", rules("uid:* disk.img ro"), image)
    with offered(server) as reader:
        for flags in (0, FUA):
            for length in (0, 1, 4096, 3 << 20):
                assert reader.write(0, b"x" * length, flags) == EPERM
            for command in (TRIM, WRITE_ZEROES):
                reader.request(command, 0, 4096, flags=flags, cookie=9)
                assert reader.simple_reply() == (EPERM, 9, b"")
        for number in range(50):  # a batch, without waiting for replies
            reader.request(WRITE, number * 512, 512, data=b"y" * 512, cookie=number)
        assert [reader.simple_reply()[0] for _ in range(50)] == [EPERM] * 50
        for command in (FLUSH, CACHE):
            reader.request(command, 0, 0 if command == FLUSH else 4096)
            assert reader.simple_reply()[0] == 0
        assert reader.read(0, len(before)) == before
    assert image.read_bytes() == before
    server.wait_for_log("WRITE refused: this client may only read it")
    assert server.log().count("may only read it") == 1


def test_a_writer_and_a_reader_of_one_disk(start: Start, image: Path, rules: Rules) -> None:
    """The same worker serves both, one after the other."""
    path = rules("uid:* disk.img ro")
    reading = start("--target", "--spare-workers", "1", "--tls-authz", path, image)
    writing = start("--target", image)
    with offered(writing) as writer, offered(reading) as reader:
        assert writer.write(0, b"new") == 0
        assert reader.read(0, 3) == b"new"
        assert reader.write(0, b"old") == EPERM


def test_qemu_and_libnbd_see_a_disk_that_is_read_only(start: Start, image: Path, rules: Rules) -> None:
    server = start("--target", "--tls-authz", rules("uid:* disk.img ro"), image)
    out = run("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", server.uri)[1]
    assert "read 65536/65536 bytes" in out
    _, out, err = run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri, check=False)
    assert "Permission denied" in out + err or "read-only" in (out + err).lower()
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.connect_uri(server.uri)
    assert client.is_read_only()
    for write, arguments in ((client.pwrite, (b"x", 0)), (client.trim, (512, 0)), (client.zero, (512, 0))):
        with pytest.raises(nbd.Error, match="Operation not permitted"):
            write(*arguments)
    assert client.pread(512, 0) == image.read_bytes()[:512]
    client.shutdown()


def test_a_server_that_is_read_only_for_all_disconnects_writers_as_ever(
    start: Start, image: Path, rules: Rules
) -> None:
    server = start("--target", "--readonly", "--tls-authz", rules("uid:* disk.img rw"), image)
    with offered(server) as client:
        assert client.flags & READ_ONLY
        client.request(WRITE, 0, 1, data=b"x")
        assert client.closed()


def test_oldstyle_clients_have_the_rights_of_others(start: Start, image: Path, rules: Rules) -> None:
    path = rules(f"uid:{UID} disk.img ro")
    server = start("--target", "--oldstyle", "--tls-authz", path, image)
    with RawClient(server.connect()) as client:
        greeting = client.receive(152)
        assert int.from_bytes(greeting[24:28], "big") & READ_ONLY
        assert client.write(0, b"x") == EPERM
    rules("uid:0x disk.img ro".replace("0x", str(UID + 1)))
    stranger = start("--target", "--oldstyle", "--tls-authz", path, image)
    with RawClient(stranger.connect()) as client:
        assert client.closed()
    stranger.wait_for_log(f"disconnected: export 'disk.img' is denied to uid:{UID}")


# Who a client is


def test_the_identity_is_in_the_log_and_in_the_query(start: Start, image: Path, rules: Rules, tmp_path: Path) -> None:
    server = start("--target", "--control", tmp_path / "ctl", "--tls-authz", rules("uid:* * rw"), image)
    with offered(server):
        server.wait_for_log(f"unix:pid={os.getpid()},uid={UID}: connected as uid:{UID}")
        (worker,) = query(tmp_path / "ctl")["workers"]
        assert worker["identity"] == f"uid:{UID}"
        (pid,) = server.busy_workers()
        assert title_of(pid) == f"xnbd-server: worker for unix:pid={os.getpid()},uid={UID} disk.img"


@pytest.mark.root(reason="only root can become another user")
def test_users_are_told_apart_by_the_kernel(start: Start, image: Path, rules: Rules, tmp_path: Path) -> None:
    server = start("--target", "--tls-authz", rules("uid:4711 disk.img ro", "uid:0 disk.img rw"), image)
    for directory in (tmp_path, *list(tmp_path.parents)[:-2]):
        directory.chmod(0o755)
    server.socket.chmod(0o666)
    for user, expected in (("0", "read_only: false"), ("4711", "read_only: true"), ("4712", "No such file")):
        _, out, err = run("setpriv", "--reuid", user, "--clear-groups", "nbdinfo", server.uri, check=False)
        assert expected in out + err


def test_inetd_asks_the_kernel_too(image: Path, rules: Rules, tmp_path: Path) -> None:
    for line, go in ((f"uid:{UID} disk.img ro", ACK), (f"uid:{UID + 1} disk.img rw", ERR_UNKNOWN)):
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        words = command("--target", "--inetd", "--tls-authz", rules(line), "--logpath", tmp_path / "log", image)
        with theirs, subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno()), RawClient(ours) as client:
            client.greet()
            assert client.go()[-1][0] == go


def test_clients_on_tcp_are_nobody(start: Start, image: Path, rules: Rules) -> None:
    server = start("--target", "--tls-authz", rules("* * rw", "anonymous disk.img ro"), image, tcp=True)
    with RawClient(server.connect(tcp=True)) as client:
        assert client.negotiate().flags & READ_ONLY
    with offered(server) as client:
        assert not client.flags & READ_ONLY
    server.wait_for_log(": connected\n")


def test_clients_on_tcp_whom_no_line_is_for_are_told_of(start: Start, image: Path, rules: Rules) -> None:
    server = start("--target", "--tls-authz", rules("* * rw"), image, tcp=True)
    server.wait_for_log("clients on TCP prove nothing, so no line of")
    with RawClient(server.connect(tcp=True)) as client:
        client.greet()
        assert client.option(LIST) == [(ACK, b"")]
        assert client.go()[-1][0] == ERR_UNKNOWN
    server.wait_for_log("is denied to anonymous")
    with RawClient(server.connect()) as client:
        client.greet()
        assert client.option(LIST)[0] == (REP_SERVER, string("disk.img"))


# Starts that are refused


def test_rules_that_nobody_can_fit_are_refused(image: Path, rules: Rules) -> None:
    status, message = fails("--target", "--laddr", "127.0.0.1", "--lport", "0", "--tls-authz", rules("* * rw"), image)
    assert status == 1
    assert "clients on TCP prove nothing, so no line is for them" in message


def test_broken_rules_are_refused_with_file_and_line(image: Path, rules: Rules) -> None:
    path = rules("uid:1 disk ro", "alice disk rw")
    status, message = fails("--target", "--unix", image.parent / "s", "--tls-authz", path, image)
    assert (status, f"xnbd-server: {path}:2: 'alice' is no identity" in message) == (1, True)


@pytest.mark.parametrize("negotiated", [[], ["--negotiated", "newstyle"]])
def test_who_has_negotiated_already_has_no_use_for_rules(image: Path, rules: Rules, negotiated: List[str]) -> None:
    status, message = fails("--target", "--connected-fd", "0", *negotiated, "--tls-authz", rules(), image)
    assert (status, "--tls-authz is for who negotiates" in message) == (2, True)


def test_rules_are_not_written_to_as_a_log(image: Path, rules: Rules) -> None:
    path = rules("* * rw")
    assert "are the same file" in fails("--target", "--logpath", path, "--tls-authz", path, image)[1]
    assert path.read_text() == "* * rw\n"
