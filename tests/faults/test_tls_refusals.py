"""Clients that a server with TLS refuses, and servers that clients refuse: each in one clear line on both ends.

The good client at the end of each test is served: no refusal is anybody else's trouble.
"""

from __future__ import annotations

import errno
import re
import select
import shutil
import socket
import ssl
import subprocess
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Union

import pytest
from caching import CacheFiles
from certificates import NO_TEXT, Certificates, copy
from conftest import Start, StartWrapper
from launch import fails
from proxies import ask
from rawclient import ABORT, ACK, EXPORT_NAME, GO, INFO, LIST, SET_META_CONTEXT, STRUCTURED_REPLY, RawClient, go_data
from server_process import PATIENCE, Server, run, wait_until
from tls_client import (
    TLS_REQUIRED,
    ask_for_tls,
    context_of,
    refusal_of,
    start_tls,
    stripped,
    tls_client,
)


@pytest.fixture
def server(start: Start, image: Path, certificates: Certificates) -> Server:
    return start("--target", image, "--tls", certificates.server_with_crl, tcp=True)


@contextmanager
def refuses_in_one_line(server: Server, *words: str) -> Iterator[None]:
    """What happens meanwhile, the log of *server* tells in one line with all *words*; Alice is served afterwards."""
    before = len(server.log().splitlines())

    def lines() -> List[str]:
        return [line for line in server.log().splitlines()[before:] if " WARNING: " in line]

    yield
    wait_until(lines, f"a warning with {words}")
    (said,) = lines()
    assert all(word in said for word in words), said


def alice_is_served(server: Server, certificates: Certificates) -> None:
    with tls_client(server, certificates.alice) as alice:
        assert alice.works()


# Without TLS


@pytest.mark.parametrize("option", [LIST, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT, 99])
def test_a_client_in_the_clear_gets_no_option_but_starttls_and_abort(
    server: Server, certificates: Certificates, option: int
) -> None:
    with refuses_in_one_line(server, "TLS"), RawClient(server.connect()) as client:
        client.greet()
        data = go_data("disk.img") if option in (INFO, GO) else b""
        assert [kind for kind, _ in client.option(option, data)] == [TLS_REQUIRED]
        assert [kind for kind, _ in client.option(option, data)] == [TLS_REQUIRED]
        assert client.option(ABORT) == [(ACK, b"")]
        assert client.closed()
    alice_is_served(server, certificates)


def test_a_client_in_the_clear_may_change_its_mind(server: Server, certificates: Certificates) -> None:
    with RawClient(server.connect()) as client:
        client.greet()
        assert [kind for kind, _ in client.option(GO, go_data("disk.img"))] == [TLS_REQUIRED]
        assert client.option(5) == [(ACK, b"")]
        client.sock = context_of(certificates.alice).wrap_socket(client.sock, server_hostname="localhost")
        assert client.go()[-1][0] == ACK
        assert client.works()


def test_export_name_in_the_clear_ends_the_connection(server: Server, certificates: Certificates) -> None:
    with refuses_in_one_line(server, "TLS"), RawClient(server.connect()) as client:
        client.greet()
        client.send_option(EXPORT_NAME, b"disk.img")
        assert client.closed()
    alice_is_served(server, certificates)


LIBNBD_SAYS = "Operation not supported"
"""Its words for REP_ERR_TLS_REQD in version 1.14."""

PLAIN_PROGRAMS = {
    "nbdinfo": ["nbdinfo", "nbd://127.0.0.1:{port}"],
    "qemu-img": ["qemu-img", "info", "nbd://127.0.0.1:{port}"],
    "nbdkit": ["nbdkit", "-U", "-", "nbd", "nbd://127.0.0.1:{port}", "--run", "nbdinfo $uri"],
}


@pytest.mark.parametrize("program", PLAIN_PROGRAMS.values(), ids=PLAIN_PROGRAMS.keys())
def test_programs_without_tls_are_told(server: Server, program: List[str]) -> None:
    status, _, err = run(*[word.format(port=server.port) for word in program], check=False)
    assert status != 0
    assert re.search(f"TLS|{LIBNBD_SAYS}", err), err


# Certificates


@pytest.mark.parametrize(
    "who, in_log, at_client",
    [
        ("stranger", "unable to get local issuer certificate", "unknown ca"),
        ("expired", "expired", "expired"),
        ("revoked", "revoked", "revoked"),
        ("anonymous", "certificate", "certificate required|handshake failure"),
    ],
)
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_client_with_a_wrong_certificate_is_refused(
    server: Server, certificates: Certificates, who: str, in_log: str, at_client: str, version: str
) -> None:
    context = context_of(getattr(certificates, who))
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with refuses_in_one_line(server, in_log), RawClient(server.connect()) as client:
        said = refusal_of(client, context)
    assert re.search(at_client, said.replace("_", " "), re.IGNORECASE), said
    alice_is_served(server, certificates)


def test_a_certificate_with_very_many_names_is_refused(
    server: Server, certificates: Certificates, tmp_path: Path
) -> None:
    """Each would be compared with each rule."""
    names = b"".join(b"\x82\x04h%03d" % number for number in range(250))
    extension = f'add_extension = "2.5.29.17 0x3082{len(names):04x}{names.hex()}"'  # certtool's own way ends at 128
    crowd = certificates.authority.client(tmp_path / "crowd", "crowd", sans=[extension])
    with refuses_in_one_line(server, "has 251 names"), RawClient(server.connect()) as client:
        assert start_tls(client, context_of(crowd)).closed()
    alice_is_served(server, certificates)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_name_that_is_no_text_is_refused(
    server: Server, certificates: Certificates, tmp_path: Path, version: str
) -> None:
    context = context_of(certificates.authority.client(tmp_path / "odd", "odd", sans=[NO_TEXT]))
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with refuses_in_one_line(server, "has a name that cannot be read"), RawClient(server.connect()) as client:
        assert start_tls(client, context).closed()
    alice_is_served(server, certificates)


@pytest.mark.parametrize("who", ["stranger", "expired", "revoked", "anonymous"])
def test_libnbd_with_a_wrong_certificate_gets_a_line(server: Server, certificates: Certificates, who: str) -> None:
    uri = f"nbds://127.0.0.1:{server.port}/?tls-certificates={getattr(certificates, who)}"
    with refuses_in_one_line(server, "certificate"):
        status, _, err = run("nbdinfo", uri, check=False)
    assert (status, err.count("\n")) == (1, 1), err


def lists(directory: Path, *lists: Path) -> None:
    """Put all *lists* of revoked certificates into the server's *directory*."""
    (directory / "ca-crl.pem").write_text("".join(path.read_text() for path in lists))


def test_an_authority_in_between_may_be_revoked(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    nobody = certificates.authority.revoke(tmp_path / "nobody.pem")
    department = certificates.authority.revoke(tmp_path / "department.pem", certificates.department.certificate)
    of_department = certificates.department.revoke(tmp_path / "of-department.pem")
    lists(directory, nobody, of_department)
    server = start("--target", image, "--tls", directory, "--control", tmp_path / "ctl", tcp=True)
    with tls_client(server, certificates.clerk) as clerk:
        assert clerk.works()
    for files, reason in (
        ([department, of_department], "certificate revoked"),
        ([nobody], "unable to get certificate CRL"),
        ([of_department], "unable to get certificate CRL"),
    ):
        lists(directory, *files)
        assert ask(tmp_path / "ctl", command="reload")["changes"]
        with refuses_in_one_line(server, reason), RawClient(server.connect()) as client:
            refusal_of(client, context_of(certificates.clerk))


def test_an_authority_may_be_trusted_without_the_one_above(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """As nbdkit and qemu do: clients of the one above, and of others below that, are not let in."""
    directory = copy(certificates.server, tmp_path / "tls")
    shutil.copy(certificates.department.certificate, directory / "ca-cert.pem")
    certificates.department.revoke(directory / "ca-crl.pem")
    server = start("--target", image, "--tls", directory, tcp=True)
    with tls_client(server, certificates.clerk) as clerk:
        assert clerk.works()
    with refuses_in_one_line(server, "certificate is refused"), RawClient(server.connect()) as client:
        refusal_of(client, context_of(certificates.alice))


@pytest.mark.parametrize("which", ["server_of_other", "server_expired", "server_elsewhere"])
def test_a_client_does_not_take_a_wrong_server(
    start: Start, image: Path, certificates: Certificates, which: str
) -> None:
    server = start("--target", image, "--tls", getattr(certificates, which), tcp=True)
    server.expected_errors.append("expired")
    uri = f"nbds://127.0.0.1:{server.port}/?tls-certificates={certificates.alice}"
    status, _, err = run("nbdinfo", uri, check=False)
    assert (status, "certificate" in err) == (1, True), err
    with RawClient(server.connect()) as client, pytest.raises(ssl.SSLCertVerificationError):
        start_tls(client, context_of(certificates.alice))
    wait_until(lambda: "does not" in server.log() or "says the client" in server.log(), server.log())


# Versions


def test_tls_before_1_2_is_refused(server: Server, certificates: Certificates) -> None:
    context = context_of(certificates.alice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL 3 would not even say hello
    with refuses_in_one_line(server, "TLS 1.2"), RawClient(server.connect()) as client:
        assert "protocol version" in refusal_of(client, context).replace("_", " ").lower()
    alice_is_served(server, certificates)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_1_2_and_1_3_are_spoken(server: Server, certificates: Certificates, version: str) -> None:
    context = context_of(certificates.alice)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with start_tls(RawClient(server.connect()), context) as client:
        assert client.sock.version() == version.replace("_", ".")  # type: ignore[attr-defined]
        client.go()
        assert client.works()


# Pre-shared keys


@pytest.mark.parametrize("user, in_log", [("alice", "alice"), ("nobody-knows", "nobody-knows")])
def test_a_wrong_pre_shared_key_is_refused(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path, user: str, in_log: str
) -> None:
    server = start("--target", image, "--tls", certificates.server_psk, tcp=True)
    keys = tmp_path / "keys.psk"
    keys.write_text(certificates.wrong_psk.read_text().replace("bob:", "nobody-knows:"))
    uri = f"nbds://{user}@127.0.0.1:{server.port}/?tls-psk-file="
    with refuses_in_one_line(server, "key", in_log):
        status, _, err = run("nbdinfo", f"{uri}{keys}", check=False)
    assert (status, err.count("\n")) == (1, 1), err
    right = certificates.server_psk / "keys.psk"
    run("nbdinfo", f"nbds://alice@127.0.0.1:{server.port}/?tls-psk-file={right}")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("name", [b"\xff\xfe\n", b"x" * 200, b"a\nb"])
def test_a_hostile_name_of_a_pre_shared_key_is_refused(
    start: Start, image: Path, certificates: Certificates, version: str, name: bytes
) -> None:
    server = start("--target", image, "--tls", certificates.server_psk, tcp=True)
    with refuses_in_one_line(server, "pre-shared key"), RawClient(server.connect()) as client:
        ask_for_tls(client)
        with openssl_client(version, "-psk", "00" * 32, "-psk_identity", name) as theirs:
            pass_on(theirs, client.sock)
    right = certificates.server_psk / "keys.psk"
    run("nbdinfo", f"nbds://alice@127.0.0.1:{server.port}/?tls-psk-file={right}")


@contextmanager
def openssl_client(*options: Union[str, bytes]) -> Iterator[socket.socket]:
    """The other end of the connection that ``openssl s_client`` makes, with the ciphers for keys in TLS 1.3."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        words = ["openssl", "s_client", "-connect", where, "-ciphersuites", "TLS_AES_128_GCM_SHA256", *options]
        program = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with program, listener.accept()[0] as theirs:
            yield theirs
            program.kill()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """Bytes between both, until one of them closes."""
    while True:
        for source in select.select([one, other], [], [], PATIENCE)[0]:
            data = source.recv(1 << 16)
            if not data:
                return
            (other if source is one else one).sendall(data)


# Rules


@pytest.fixture
def ruled(start: Start, image: Path, certificates: Certificates, tmp_path: Path) -> Server:
    rules = tmp_path / "rules"
    rules.write_text("CN=alice,* disk.img rw\nCN=bob,* disk.img ro\n")
    return start("--target", image, "--tls", certificates.server, "--tls-authz", rules, tcp=True)


def test_the_right_identity_on_the_wrong_export_is_refused(
    start_wrapper: StartWrapper, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    rules, other = tmp_path / "rules", tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    rules.write_text("CN=alice,* disk.img rw\n")
    wrapper = start_wrapper(
        *("--tls", certificates.server, "--tls-authz", rules, "--imgfile", image, "--imgfile", other)
    )
    uri = f"nbds://127.0.0.1:{wrapper.port}/{{}}?tls-certificates={certificates.alice}"
    run("nbdinfo", uri.format("disk.img"))
    for name in ("other.img", "no-such.img"):
        status, _, err = run("nbdinfo", uri.format(name), check=False)
        assert (status, "No such file or directory" in err) == (1, True), err  # and libnbd's suggestion
    listed = run("nbdinfo", "--list", uri.format(""))[1]
    assert 'export="disk.img"' in listed
    assert "other.img" not in listed
    refused = [line for line in wrapper.log().splitlines() if "other.img" in line and "CN=alice" in line]
    assert len(refused) == 1, wrapper.log()


def test_a_client_without_a_rule_gets_nothing(ruled: Server, certificates: Certificates) -> None:
    server, stranger = ruled, certificates.authority.client(certificates.path / "mallory", "mallory")
    uri = f"nbds://127.0.0.1:{server.port}/disk.img?tls-certificates={stranger}"
    with refuses_in_one_line(server, "CN=mallory"):
        status, _, err = run("nbdinfo", uri, check=False)
    assert (status, "No such file or directory" in err) == (1, True), err  # as if there was no such disk
    alice_is_served(server, certificates)


def test_who_may_only_read_cannot_write(ruled: Server, image: Path, certificates: Certificates) -> None:
    before = image.read_bytes()
    uri = f"nbds://127.0.0.1:{ruled.port}/disk.img?tls-certificates={certificates.bob}"
    run("nbdinfo", "--is", "read-only", uri)
    with (
        refuses_in_one_line(ruled, "as CN=bob", "WRITE refused", "may only read"),
        tls_client(ruled, certificates.bob) as bob,
    ):
        assert bob.read(0, 512) == before[:512]
        assert bob.write(0, b"x" * 512) == errno.EPERM
        assert bob.write(0, b"x" * 512) == errno.EPERM
        assert bob.works()
    assert image.read_bytes() == before
    with tls_client(ruled, certificates.alice) as alice:
        assert alice.write(0, b"y" * 512) == 0
    assert image.read_bytes()[:512] == b"y" * 512


# Somebody in the middle


def test_libnbd_does_not_go_on_in_the_clear(start: Start, image: Path, certificates: Certificates) -> None:
    server = start("--target", image, "--tls", certificates.server, "--tls-optional", tcp=True)
    with stripped(server.port) as middle:
        uri = f"nbds://127.0.0.1:{middle.port}/?tls-certificates={certificates.alice}"
        status, _, err = run("nbdinfo", uri, check=False)
        assert (status, err.count("\n")) == (1, 1), err
    assert middle.option in (0, ABORT)


def test_our_proxy_does_not_go_on_in_the_clear(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    server = start("--target", image, "--tls", certificates.server, "--tls-optional", tcp=True)
    files = CacheFiles(tmp_path)
    with stripped(server.port) as middle:
        origin = f"nbds://127.0.0.1:{middle.port}/?tls-certificates={certificates.alice}"
        status, err = fails(*files.arguments(origin), "--unix", tmp_path / "proxy.sock", timeout=PATIENCE)
    assert (status, "TLS" in err) == (1, True), err
    assert middle.option in (0, ABORT)
    assert not files.image.exists()


def test_a_stripped_client_finds_no_disk_where_tls_is_required(server: Server) -> None:
    with stripped(server.port) as middle:
        status, _, err = run("nbdinfo", f"nbd://127.0.0.1:{middle.port}", check=False)
    assert (status, LIBNBD_SAYS in err) == (1, True), err
