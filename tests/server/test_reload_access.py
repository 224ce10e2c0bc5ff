"""Rules, certificates and keys that change under connected clients: who comes after the reload meets the new ones."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import struct
from pathlib import Path
from typing import Dict, List

import pytest
from certificates import Certificates, copy
from checked_clients import checked_clients
from conftest import Start
from proxies import ask, query
from rawclient import ACK, ERR_UNKNOWN, RawClient
from server_process import Server, state_of, title_of, wait_until
from tls_client import context_of, refusal_of, start_tls, tls_client

READ_ONLY = 1 << 1
UID = os.getuid()


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "ctl"


def write(path: Path, text: str) -> Path:
    """As a careful operator does it: no reader ever sees half of the file."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)
    return path


def client_of(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


def is_readonly(client: RawClient) -> bool:
    return bool(client.flags & READ_ONLY)


def test_rules_hold_for_all_who_come_after_the_reload(start: Start, image: Path, tmp_path: Path, control: Path) -> None:
    rules = write(tmp_path / "rules", f"uid:{UID} * rw\n")
    server = start("--target", "--tls-authz", rules, "--control", control, image)
    with checked_clients(lambda: client_of(server), 100) as clients:
        for number in range(16):
            readonly = not number % 2
            silent = [RawClient(server.connect()) for _ in range(4)]
            write(rules, f"uid:{UID} * {'ro' if readonly else 'rw'}\n")
            assert ask(control, command="reload")["changes"] == ["rules"]
            newcomers = [*(RawClient(server.connect()) for _ in range(4)), *silent]
            assert [is_readonly(client.negotiate()) for client in newcomers] == [readonly] * 8
            for client in newcomers:
                client.sock.close()
        rounds = [client.rounds for client in clients]
        wait_until(lambda: all(c.rounds > r for c, r in zip(clients, rounds)), "each to have done something")


def test_worker_of_before_does_not_serve_whom_it_hears_only_now(
    start: Start, image: Path, tmp_path: Path, control: Path
) -> None:
    """It wakes up with both before it: the order to leave, and a connection in its lobby that has spoken."""
    rules = write(tmp_path / "rules", f"uid:{UID} * rw\n")
    server = start("--target", "--tls-authz", rules, "--control", control, image)
    silent = [RawClient(server.connect()) for _ in range(16)]
    for client in silent:
        client.receive(18)
    spares = [pid for pid in server.workers() if "spare worker" in title_of(pid)]
    for pid in spares:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(state_of(pid) == "T" for pid in spares), "the workers to stand still")
    write(rules, f"uid:{UID} * ro\n")
    ask(control, command="reload")
    for client in silent:
        client.send(struct.pack(">I", 3))
    for pid in spares:
        os.kill(pid, signal.SIGCONT)
    for client in silent:
        client.go()
        assert is_readonly(client)
        assert client.works()
        client.sock.close()


def test_broken_rules_change_nothing(start: Start, image: Path, tmp_path: Path, control: Path) -> None:
    rules = write(tmp_path / "rules", f"uid:{UID} * ro\n")
    limits = write(tmp_path / "limits", "max-clients 9\n")
    server = start("--target", "--tls-authz", rules, "--limits", limits, "--control", control, image)
    server.expected_errors.append("stays as it was")
    write(rules, f"uid:{UID} * rw\nuid:{UID} *\n")
    write(limits, "max-clients 8\n")
    answer = ask(control, command="reload")
    assert answer["error"].startswith(f"{rules}:2: expected IDENTITY EXPORT rw|ro")
    with client_of(server) as client:
        assert is_readonly(client)
    write(rules, f"uid:{UID} * rw\n")
    assert ask(control, command="reload")["changes"] == ["max-clients 9 -> 8", "rules"]
    with client_of(server) as client:
        assert not is_readonly(client)


def test_who_is_denied_from_now_on_stays_until_he_leaves(
    start: Start, image: Path, tmp_path: Path, control: Path
) -> None:
    rules = write(tmp_path / "rules", f"uid:{UID} * rw\n")
    server = start("--target", "--tls-authz", rules, "--control", control, image)
    with client_of(server) as client, RawClient(server.connect()) as denied:
        write(rules, f"uid:{UID + 1} * rw\n")
        ask(control, command="reload")
        denied.greet()
        assert denied.go()[-1][0] == ERR_UNKNOWN
        assert client.works()
        assert client.write(0, b"x" * 4096) == 0


def certificate_seen(server: Server, context: ssl.SSLContext) -> bytes:
    """The certificate that the server shows to a new client, who may then use the disk."""
    with start_tls(RawClient(server.connect()), context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        shown = client.sock.getpeercert(binary_form=True)
        assert client.go()[-1][0] == ACK
        assert client.works()
    assert shown
    return shown


def shown_by(directory: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert((directory / "server-cert.pem").read_text())


def test_certificates_are_exchanged_under_hundred_clients(
    start: Start, image: Path, tmp_path: Path, control: Path, certificates: Certificates
) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    certificates.server_with_crl  # noqa: B018 - made now
    sources = [certificates.server, certificates.server_with_crl]
    server = start("--target", "--tls", directory, "--control", control, image)
    context = context_of(certificates.alice)
    with checked_clients(lambda: tls_client(server, certificates.alice), 100) as clients:
        for number in range(1, 6):
            source = sources[number % 2]
            for name in ("server-cert.pem", "server-key.pem"):
                shutil.copy(source / name, directory / name)
            assert ask(control, command="reload")["changes"] == ["certificates or keys"]
            assert {certificate_seen(server, context) for _ in range(3)} == {shown_by(source)}
        rounds = [client.rounds for client in clients]
        wait_until(lambda: all(c.rounds > r for c, r in zip(clients, rounds)), "each to have done something")


def test_broken_certificates_change_nothing(
    start: Start, image: Path, tmp_path: Path, control: Path, certificates: Certificates
) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    server = start("--target", "--tls", directory, "--control", control, image)
    server.expected_errors.append("stays as it was")
    context = context_of(certificates.alice)
    files: Dict[Path, str] = {path: path.read_text() for path in directory.glob("*.pem")}
    broken: List[str] = []
    for path in files:
        path.write_text("nonsense")
        broken.append(ask(control, command="reload")["error"])
        assert str(path) in broken[-1]
        assert certificate_seen(server, context) == shown_by(certificates.server)
        path.write_text(files[path])
    assert ask(control, command="reload")["changes"] == []
    assert len(broken) == 3


def test_revoked_client_is_refused_after_the_reload_and_stays_if_he_is_in(
    start: Start, image: Path, tmp_path: Path, control: Path, certificates: Certificates
) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    server = start("--target", "--tls", directory, "--control", control, image)
    with tls_client(server, certificates.revoked) as client:
        shutil.copy(certificates.server_with_crl / "ca-crl.pem", directory)
        assert ask(control, command="reload")["changes"] == ["certificates or keys"]
        with RawClient(server.connect()) as newcomer:
            assert "revoked" in refusal_of(newcomer, context_of(certificates.revoked))
        assert client.works()


def test_query_warns_of_what_expires_until_it_is_renewed(
    start: Start, image: Path, tmp_path: Path, control: Path, certificates: Certificates
) -> None:
    directory = copy(certificates.authority.server(tmp_path / "soon", days=10), tmp_path / "tls")
    start("--target", "--tls", directory, "--control", control, image)
    (warning,) = query(control)["warnings"]
    assert warning.startswith(f"{directory}/server-cert.pem expires on ")
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(certificates.server / name, directory / name)
    ask(control, command="reload")
    assert query(control)["warnings"] == []
