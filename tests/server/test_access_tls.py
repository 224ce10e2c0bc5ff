"""Who may open a disk, by what TLS has proved: subjects, alternative names, pre-shared keys."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Callable

import pytest
from certificates import Certificates
from conftest import Start, StartWrapper
from launch import fails
from proxies import query
from rawclient import ACK, ERR_UNKNOWN, LIST, REP_SERVER, RawClient, string
from server_process import Server, command, run, title_of
from tls_client import context_of, start_tls, tls_client

READ_ONLY = 1 << 1
EPERM = 1
ALICE = "CN=alice,O=xnbd tests"

Serve = Callable[..., Server]


@pytest.fixture
def serve(start: Start, image: Path, certificates: Certificates, tmp_path: Path) -> Serve:
    """A server with these rules."""

    def serve_by(*rules: str, directory: str = "server", options: tuple[object, ...] = ()) -> Server:
        (tmp_path / "rules").write_text("".join(f"{rule}\n" for rule in rules))
        where = ["--tls", getattr(certificates, directory), "--tls-authz", tmp_path / "rules"]
        return start("--target", *where, *options, image, tcp=True)

    return serve_by


def answer(server: Server, directory: Path, *, tcp: bool = True) -> int:
    """What the server replies to GO of a client with the files of *directory*."""
    with start_tls(RawClient(server.connect(tcp=tcp)), context_of(directory)) as client:
        return client.go("disk.img")[-1][0]


def test_each_of_a_certificates_names_may_fit(serve: Serve, certificates: Certificates) -> None:
    patterns = ["CN=alice,O=*", "dns:alice.exam*", "uri:urn:xnbd:alice", "email:*@example.org"]
    for pattern in patterns:
        server = serve(f'"{pattern}" disk.img rw')
        assert answer(server, certificates.alice) == ACK, pattern
        assert answer(server, certificates.bob) == ERR_UNKNOWN, pattern
        server.stop()


def test_a_reader_and_a_writer(serve: Serve, certificates: Certificates) -> None:
    server = serve("CN=alice,* * rw", "CN=bob,* * ro")
    with tls_client(server, certificates.alice) as writer, tls_client(server, certificates.bob) as reader:
        assert (writer.flags & READ_ONLY, bool(reader.flags & READ_ONLY)) == (0, True)
        assert writer.write(0, b"new") == 0
        assert reader.write(0, b"old") == EPERM
        assert reader.read(0, 3) == b"new"


def test_a_comma_in_a_name_is_no_other_organization(serve: Serve, certificates: Certificates) -> None:
    """Its CA lets mallory choose a common name, and nothing else."""
    forged = certificates.authority.client(certificates.path / "forged", "alice,O=xnbd tests", organization="Others")
    server = serve('"CN=alice,O=xnbd tests" * rw', '"CN=*,O=xnbd tests" * ro', '"*,O=xnbd tests" * ro')
    assert answer(server, forged) == ERR_UNKNOWN
    server.wait_for_log(r"export 'disk.img' is denied to CN=alice\,O=xnbd tests,O=Others")
    assert answer(server, certificates.alice) == ACK


def test_a_name_of_the_log_can_be_copied_into_the_rules(serve: Serve, certificates: Certificates) -> None:
    odd = certificates.authority.client(certificates.path / "odd", r"# O'Neil, \"Ann\"; +1 = <é>")
    server = serve("CN=nobody * ro")
    assert answer(server, odd) == ERR_UNKNOWN
    server.wait_for_log("is denied to ")
    name = server.log().partition("is denied to ")[2].splitlines()[0]
    again = serve(f'"{name}" * ro')
    assert answer(again, odd) == ACK


def test_the_identity_is_everywhere(serve: Serve, certificates: Certificates, tmp_path: Path) -> None:
    server = serve("* * rw", options=("--control", tmp_path / "ctl"))
    with start_tls(RawClient(server.connect(tcp=True)), context_of(certificates.alice)) as client:
        assert client.go()[-1][0] == ACK
        peer = f"127.0.0.1:{client.sock.getsockname()[1]}"
        server.wait_for_log(f"{peer}: connected as {ALICE}")
        (worker,) = query(tmp_path / "ctl")["workers"]
        assert (worker["client"], worker["identity"]) == (peer, ALICE)
        (pid,) = server.busy_workers()
        assert title_of(pid) == f"xnbd-server: worker for {peer} as {ALICE} disk.img"


def test_a_user_at_a_unix_socket_has_that_name_besides(serve: Serve, certificates: Certificates) -> None:
    server = serve(f"uid:{os.getuid()} * rw")
    assert answer(server, certificates.bob, tcp=False) == ACK
    assert answer(server, certificates.bob) == ERR_UNKNOWN


def test_without_a_certificate_a_client_is_anonymous(serve: Serve, certificates: Certificates) -> None:
    server = serve("* * rw", options=("--tls-anonymous",))
    assert answer(server, certificates.anonymous) == ERR_UNKNOWN
    assert answer(server, certificates.bob) == ACK
    server.stop()
    assert answer(serve("anonymous * ro", options=("--tls-anonymous",)), certificates.anonymous) == ACK


def test_what_is_denied_before_tls_may_be_allowed_within(serve: Serve, certificates: Certificates) -> None:
    server = serve("CN=alice,* * rw", options=("--tls-optional",))
    with RawClient(server.connect(tcp=True)) as client:
        client.greet()
        assert client.option(LIST) == [(ACK, b"")]
        assert client.go("disk.img")[-1][0] == ERR_UNKNOWN
        assert client.option(5) == [(ACK, b"")]
        client.sock = context_of(certificates.alice).wrap_socket(client.sock, server_hostname="localhost")
        assert client.option(LIST)[0] == (REP_SERVER, string("disk.img"))
        assert client.go("disk.img")[-1][0] == ACK


def test_rules_without_anybody_whom_tls_could_name_are_refused(
    certificates: Certificates, image: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "tls"
    directory.mkdir()
    for name in ("server-cert.pem", "server-key.pem"):
        (directory / name).write_bytes((certificates.server / name).read_bytes())
    (tmp_path / "rules").write_text("CN=alice * rw\n")
    where = ["--laddr", "127.0.0.1", "--lport", "0", "--tls-authz", tmp_path / "rules"]
    status, message = fails("--target", "--tls", directory, "--tls-anonymous", *where, image)
    assert (status, "clients on TCP prove nothing" in message) == (1, True)


@pytest.mark.parametrize("way", [["--inetd"], ["--connected-fd", "0"]])
def test_a_server_of_one_client_has_rules_too(
    certificates: Certificates, image: Path, tmp_path: Path, way: list[str]
) -> None:
    (tmp_path / "rules").write_text("CN=alice,* * rw\n")
    words = command("--target", *way, "--tls", certificates.server, "--tls-authz", tmp_path / "rules", image)
    for who, expected in ((certificates.alice, ACK), (certificates.bob, ERR_UNKNOWN)):
        ours, theirs = socket.socketpair()
        log = subprocess.DEVNULL
        with subprocess.Popen(words, stdin=theirs.fileno(), stdout=log, stderr=log) as process:
            theirs.close()
            ours.settimeout(60)
            with start_tls(RawClient(ours), context_of(who)) as client:
                assert client.go()[-1][0] == expected
            assert process.wait(60) == 0


def test_the_owner_of_a_shared_key(serve: Serve, certificates: Certificates) -> None:
    server = serve("psk:alice * rw", directory="server_psk")
    keys = certificates.server_psk / "keys.psk"
    for user, expected in (("alice", "is_read_only: false"), ("bob", "No such file or directory")):
        uri = f"nbds://{user}@127.0.0.1:{server.port}/disk.img?tls-psk-file={keys}"
        _, out, err = run("nbdinfo", uri, check=False)
        assert expected in out + err
    server.wait_for_log(": connected as psk:alice")
    server.wait_for_log("export 'disk.img' is denied to psk:bob")


def test_the_wrapper_knows_tls_clients_too(
    start_wrapper: StartWrapper, certificates: Certificates, image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    (tmp_path / "rules").write_text("CN=alice,* disk.img rw\nCN=bob,* * ro\n")
    wrapper = start_wrapper(
        *("--tls", certificates.server, "--tls-authz", tmp_path / "rules", "--imgfile", image, "--imgfile", other)
    )

    def connect(directory: Path) -> RawClient:
        return start_tls(wrapper.connect(), context_of(directory))

    with connect(certificates.alice) as alice, connect(certificates.bob) as bob:
        assert [data for kind, data in alice.option(LIST) if kind == REP_SERVER] == [string("disk.img")]
        assert len(bob.option(LIST)) == 3
        assert alice.go("other.img")[-1] == (ERR_UNKNOWN, b"no such export")
        assert alice.go("")[-1][0] == bob.go("disk.img")[-1][0] == ACK
        assert alice.write(0, b"by alice") == 0
        assert bob.write(0, b"by bob") == EPERM
        assert bob.read(0, 8) == b"by alice"
        wrapper.wait_for_log(f"connected as {ALICE}")
        names = {title_of(pid).partition(" as ")[2] for pid in wrapper.servers()}
    assert names == {f"{ALICE} disk.img", "CN=bob,O=xnbd tests disk.img"}
