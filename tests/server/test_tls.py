"""TLS in xnbd-server: its options, the ways in which clients come, and what operators see of them."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from certificates import Certificates
from conftest import Start
from launch import fails, launched
from rawclient import ACK, RawClient
from server_process import PYTHON, ROOT, command, run, title_of, wait_until
from tls_client import context_of, start_tls, tls_client


@pytest.mark.parametrize(
    "options, message",
    [
        (["--oldstyle", "--tls", "."], "--tls and --oldstyle do not go together"),
        (["--connected-fd", "0", "--negotiated", "newstyle", "--tls", "."], "--tls and --negotiated do not go"),
        (["--tls-optional"], "--tls-optional is for --tls only"),
        (["--tls-anonymous"], "--tls-anonymous is for --tls only"),
        (["--tls-ciphers", "ALL"], "--tls-ciphers is for --tls only"),
        (["--tls", "/nonexistent"], "--tls /nonexistent: there is no such directory"),
    ],
)
def test_options_that_make_no_sense_are_refused(image: Path, options: list[str], message: str) -> None:
    assert message in fails("--target", *options, image)[1]


def test_nothing_is_made_before_the_credentials_are_known_to_be_good(tmp_path: Path) -> None:
    fails("--target", "--tls", tmp_path, "--create", "1M", tmp_path / "new.img")
    assert not (tmp_path / "new.img").exists()


def test_without_the_option_nothing_of_ssl_is_imported(start: Start, image: Path) -> None:
    server = start("--target", image)
    with RawClient(server.connect()) as client:
        client.negotiate()
        for pid in (server.pid, *server.workers()):
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "/_ssl." not in maps
            assert "libssl" not in maps


def test_optional_tls_serves_both(start: Start, image: Path, certificates: Certificates) -> None:
    server = start("--target", "--tls", certificates.server, "--tls-optional", image)
    with RawClient(server.connect()) as client:
        assert client.negotiate().works()
    with tls_client(server, certificates.alice) as client:
        assert client.read(0, 512) == image.read_bytes()[:512]


def test_anonymous_clients_are_let_in_if_they_may_be(start: Start, image: Path, certificates: Certificates) -> None:
    server = start("--target", "--tls", certificates.server, "--tls-anonymous", image)
    with tls_client(server, certificates.anonymous) as client:
        assert client.works()
    server.wait_for_log("connected as uid:")


def test_a_cipher_can_be_chosen(start: Start, image: Path, certificates: Certificates) -> None:
    wanted = "ECDHE-ECDSA-AES128-GCM-SHA256"
    server = start("--target", "--tls", certificates.server, "--tls-ciphers", wanted, image)
    context = context_of(certificates.alice)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with start_tls(RawClient(server.connect()), context) as client:
        assert client.sock.cipher()[0] == wanted  # type: ignore[attr-defined]


def test_log_title_and_query_tell_who_a_client_is(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    control = tmp_path / "ctl"
    server = start("--target", "--tls", certificates.server, "--control", control, image, tcp=True)
    with start_tls(RawClient(server.connect(tcp=True)), context_of(certificates.alice)) as client:
        assert client.go()[-1][0] == ACK
        server.wait_for_log("connected as CN=alice,O=xnbd tests over TLSv1.3 TLS_")
        (worker,) = server.busy_workers()
        wait_until(lambda: "CN=alice,O=xnbd tests" in title_of(worker), "the title")
        bgctl = [*command()[:-1], str(ROOT / "bin" / "xnbd-bgctl")]
        (told,) = json.loads(run(*bgctl, "--query", "--json", control)[1])["workers"]
        assert told["identity"] == "CN=alice,O=xnbd tests"
        assert told["encryption"].startswith("TLSv1.3 TLS_")
        report = run(*bgctl, "--query", control)[1]
        assert " TLS " in report
        assert " 1.3 " in report
        assert "as CN=alice,O=xnbd tests" in report


def test_a_certificate_that_expires_soon_is_a_warning(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    directory = certificates.authority.server(tmp_path / "soon", days=9)
    server = start("--target", "--tls", directory, image)
    assert "server-cert.pem expires on" in server.log()


def test_by_inetd_and_by_a_descriptor_the_client_is_greeted(
    image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """With --connected-fd nobody can have negotiated: TLS begins in the negotiation."""
    for way in (["--inetd"], ["--connected-fd", "0"]):
        ours, theirs = socket.socketpair()
        words = command("--target", *way, "--tls", certificates.server, "--logpath", tmp_path / "log", image)
        with subprocess.Popen(words, stdin=theirs.fileno(), stdout=subprocess.DEVNULL) as process, ours:
            theirs.close()
            ours.settimeout(60)
            with start_tls(RawClient(ours), context_of(certificates.bob)) as client:
                assert client.go()[-1][0] == ACK
                assert client.write(5, b"hello") == 0
                assert client.read(4, 7)[1:6] == b"hello"
            assert process.wait(60) == 0
        assert "connected as CN=bob,O=xnbd tests" in (tmp_path / "log").read_text()


def test_a_server_without_the_keys_in_reach_serves_on(
    start: Start, image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """Workers that are forked later do not read the directory."""
    directory = certificates.authority.server(tmp_path / "tls")
    server = start("--target", "--tls", directory, "--spare-workers", "1", image)
    for path in directory.iterdir():
        path.unlink()
    clients = [tls_client(server, certificates.alice) for _ in range(4)]
    for client in clients:
        with client:
            assert client.works()


def test_without_sslpsk3_the_start_is_refused_in_a_line(
    image: Path, certificates: Certificates, tmp_path: Path
) -> None:
    if "True" in run(PYTHON, "-c", "import sys; print(sys.version_info >= (3, 13))")[1]:
        pytest.skip("ssl knows pre-shared keys")
    (tmp_path / "sslpsk3.py").write_text("raise ImportError")
    words = command("--target", "--unix", tmp_path / "s", "--tls", certificates.server_psk, image)
    with launched(words, tmp_path / "log", env={"PYTHONPATH": str(tmp_path)}) as server:
        assert server.process.wait(60) == 1
        (line,) = server.log().splitlines()
        assert line.endswith("before that the extra psk: pip install 'xnbd[psk]'")
