"""Connections to origins in TLS: with real servers, and with some that are made for it; how each refusal reads."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from certificates import NO_TEXT, Certificates, copy, make_psk
from lying_origin import LyingOrigin, Visitor, export_info, greeting, option_reply, simple
from origin_owner import Own, Owner, owners
from origin_programs import OriginProgram
from rawclient import ACK, ERR_UNSUP, GO, STRUCTURED_REPLY
from tls_visitor import STARTTLS, TlsVisitor, grant_tls, old_context, server_context

from xnbd.origin.address import parse_origin
from xnbd.origin.base import OriginLost
from xnbd.origin.probe import probe

MIB = 1 << 20
SIZE = 8 * MIB
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def disk() -> bytes:
    return random.Random(15).randbytes(SIZE)


@pytest.fixture
def image(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    return path


@pytest.fixture
def own() -> Iterator[Own]:
    with owners() as make:
        yield make


class Origins:
    """Starts servers that demand TLS."""

    def __init__(self, image: Path, where: Path) -> None:
        self._image, self._where = image, where
        self._running: List[OriginProgram] = []

    def __call__(self, kind: str, credentials: Path) -> OriginProgram:
        where = self._where / f"origin{len(self._running)}"
        where.mkdir()
        self._running.append(OriginProgram(kind, self._image, where, credentials))
        return self._running[-1]

    def stop(self) -> None:
        for origin in self._running:
            origin.stop()


@pytest.fixture
def origins(image: Path, tmp_path: Path) -> Iterator[Origins]:
    started = Origins(image, tmp_path)
    yield started
    started.stop()


def refusal(uri: str, timeout: float = TIMEOUT) -> str:
    """Why there is no way, in one line without the address, which begins it."""
    address = parse_origin(uri)
    with pytest.raises(OriginLost) as lost:
        probe(address, timeout=timeout)
    message = str(lost.value)
    assert "\n" not in message
    assert message.startswith(f"origin {address}: ")
    return message[len(f"origin {address}: ") :]


def trusting(directory: Path) -> str:
    return f"tls-certificates={directory}"


# Real servers


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_every_server_is_read_through_tls(
    origins: Origins, own: Own, certificates: Certificates, disk: bytes, kind: str
) -> None:
    origin = origins(kind, certificates.server)
    owner = own(origin.tls_uri(trusting(certificates.alice))).connect()
    check_reads(owner, disk)


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_every_server_is_read_with_a_pre_shared_key(
    origins: Origins, own: Own, certificates: Certificates, disk: bytes, kind: str
) -> None:
    origin = origins(kind, certificates.server_psk)
    owner = own(origin.tls_uri(f"tls-psk-file={certificates.server_psk / 'keys.psk'}", user="alice")).connect()
    check_reads(owner, disk)


def check_reads(owner: Owner, disk: bytes) -> None:
    """Reads of all lengths, many at once: what has come is never left where poll does not show it."""
    rng = random.Random(3)
    wanted = {}
    for token in range(300):
        length = rng.choice((1, 4096, 16 << 10, 100_000, 256 << 10, MIB))
        offset = rng.randrange(SIZE - length)
        wanted[token] = disk[offset : offset + length]
        owner.connection.read(token, offset, length)
    owner.connection.push()
    owner.finish()
    assert {token: owner.content(token) for token in wanted} == wanted


def test_holes_are_asked_for_through_tls(origins: Origins, own: Own, certificates: Certificates, image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(MIB)
        file.truncate(SIZE)
    owner = own(origins("nbdkit", certificates.server).tls_uri(trusting(certificates.alice))).connect()
    assert owner.connection.can_tell_zeros
    owner.connection.query_extents("query", 0, SIZE)
    owner.connection.push()
    owner.finish()
    assert owner.extents["query"] == [(MIB, False), (SIZE - MIB, True)]


# What is refused, each in a line that says what to do


NAMES = "localhost, 127.0.0.1, 0:0:0:0:0:0:0:1"


def test_a_host_is_known_by_its_name_or_by_its_address(origins: Origins, certificates: Certificates) -> None:
    origin, trust = origins("nbdkit", certificates.server), trusting(certificates.alice)
    for name in ("localhost", "LOCALHOST", "127.0.0.1", "::1"):
        assert probe(parse_origin(origin.tls_uri(trust, f"tls-hostname={name}")), timeout=TIMEOUT).size == SIZE
    for name in ("elsewhere.example", "127.0.0.2", "local"):
        uri = origin.tls_uri(trust, f"tls-hostname={name}")
        assert refusal(uri) == f"its certificate is for {NAMES}, not for {name}"
    assert probe(parse_origin(f"{uri}&tls-verify-peer=false"), timeout=TIMEOUT).size == SIZE


def test_an_address_among_the_names_of_hosts_is_no_address(
    origins: Origins, certificates: Certificates, tmp_path: Path
) -> None:
    """A frequent mistake in templates, after which the certificate seems to be for what was asked for."""
    mistaken = certificates.authority.server(tmp_path / "mistaken", sans=['dns_name = "127.0.0.1"'])
    uri = origins("nbdkit", mistaken).tls_uri(trusting(certificates.alice), "tls-hostname=127.0.0.1")
    assert refusal(uri) == "its certificate is for 127.0.0.1 (as a host's name), not for 127.0.0.1"


def test_an_authority_of_the_origin_may_be_trusted_without_the_one_above(
    origins: Origins, certificates: Certificates, tmp_path: Path
) -> None:
    department = certificates.department
    trust = copy(certificates.clerk, tmp_path / "clerk")
    shutil.copy(department.certificate, trust / "ca-cert.pem")
    theirs = department.server(tmp_path / "server")
    assert probe(parse_origin(origins("nbdkit", theirs).tls_uri(trusting(trust))), timeout=TIMEOUT).size == SIZE
    other = origins("nbdkit", certificates.server).tls_uri(trusting(trust))
    assert refusal(other) == f"its certificate is not of an authority in {trust / 'ca-cert.pem'}"


def test_an_origin_whose_name_is_no_text_is_refused(
    origins: Origins, certificates: Certificates, tmp_path: Path
) -> None:
    odd = certificates.authority.server(tmp_path / "odd", sans=[NO_TEXT])
    uri = origins("nbdkit", odd).tls_uri(trusting(certificates.alice), "tls-hostname=localhost")
    assert refusal(uri) == "its certificate is for nobody whose name can be read, not for localhost"


def test_a_name_that_no_host_has_is_refused(origins: Origins, certificates: Certificates) -> None:
    uri = origins("nbdkit", certificates.server).tls_uri(trusting(certificates.alice), f"tls-hostname={'x' * 300}")
    assert refusal(uri) == f"no certificate can be for the name {'x' * 300!r}"


def test_a_certificate_that_cannot_be_trusted_is_refused(
    origins: Origins, certificates: Certificates, tmp_path: Path
) -> None:
    theirs = f"its certificate is not of an authority in {certificates.alice / 'ca-cert.pem'}"
    trust = trusting(certificates.alice)
    assert refusal(origins("nbdkit", certificates.server_of_other).tls_uri(trust)) == theirs
    assert refusal(origins("nbdkit", certificates.server_expired).tls_uri(trust)) == "its certificate has expired"
    good = origins("nbdkit", certificates.server)
    system = "its certificate is not of an authority in this system's store"
    assert refusal(good.tls_uri("tls-hostname=localhost")) == system
    strict = copy(certificates.alice, tmp_path / "strict")
    certificates.authority.revoke(strict / "ca-crl.pem", certificates.server / "server-cert.pem")
    assert refusal(good.tls_uri(trusting(strict))) == f"its certificate is revoked by {strict / 'ca-crl.pem'}"
    certificates.authority.revoke(strict / "ca-crl.pem")
    assert probe(parse_origin(good.tls_uri(trusting(strict))), timeout=TIMEOUT).size == SIZE
    certificates.other_authority.revoke(strict / "ca-crl.pem")
    assert "has no list of an authority behind its certificate" in refusal(good.tls_uri(trusting(strict)))


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_a_server_that_wants_another_certificate_of_ours_says_so_or_leaves(
    origins: Origins, certificates: Certificates, kind: str
) -> None:
    """GnuTLS ends the connection without an alert."""
    origin = origins(kind, certificates.server)
    begin = "it closed the connection during the handshake of TLS; does it"
    ours = certificates.stranger / "client-cert.pem"
    assert refusal(origin.tls_uri(trusting(certificates.stranger))) == f"{begin} accept our certificate {ours}?"
    none = f"{begin} want a certificate from us? {certificates.anonymous} has none"
    assert refusal(origin.tls_uri(trusting(certificates.anonymous))) == none
    assert "there is no tls-certificates=DIRECTORY" in refusal(origin.tls_uri("tls-verify-peer=false"))


def test_a_key_that_the_server_does_not_have_is_refused(
    origins: Origins, certificates: Certificates, tmp_path: Path
) -> None:
    origin, other = origins("nbdkit", certificates.server_psk), make_psk(tmp_path / "other.psk", "carol")
    end = "it closed the connection during the handshake of TLS; does it know the key of the user"
    wrong = origin.tls_uri(f"tls-psk-file={certificates.wrong_psk}", user="alice")
    assert refusal(wrong) == f"{end} 'alice'?"
    assert refusal(origin.tls_uri(f"tls-psk-file={other}", user="carol")) == f"{end} 'carol'?"
    for user, shown in (("dave", "dave"), ("", "root")):
        expected = f"{other} has no key for the user {shown!r}; another user is named by nbds://USER@..."
        if user or os.geteuid() == 0:
            assert refusal(origin.tls_uri(f"tls-psk-file={other}", user=user)) == expected


def test_who_expects_a_key_takes_no_certificate(origins: Origins, certificates: Certificates) -> None:
    key = f"tls-psk-file={certificates.server_psk / 'keys.psk'}"
    for kind in ("nbdkit", "qemu-nbd"):
        assert "closed the connection" in refusal(origins(kind, certificates.server).tls_uri(key, user="alice"))


def test_files_of_ours_that_cannot_be_used_are_named(certificates: Certificates, tmp_path: Path) -> None:
    """Before anybody is asked: nobody listens there."""
    mine = copy(certificates.alice, tmp_path / "mine")
    uri = f"nbds+unix:///?socket={tmp_path}/none&tls-certificates={mine}"
    assert refusal(uri) == "No such file or directory"
    assert "none/ca-cert.pem: No such file" in refusal(f"nbds://h/?tls-certificates={tmp_path}/none")
    assert "none: No such file" in refusal(f"nbds://alice@h/?tls-psk-file={tmp_path}/none")
    shutil.copy(certificates.bob / "client-key.pem", mine)
    assert refusal(uri) == f"{mine / 'client-key.pem'} is not the key of {mine / 'client-cert.pem'}"
    (mine / "client-key.pem").unlink()
    assert refusal(uri) == f"cannot read {mine / 'client-key.pem'}: No such file or directory"


def test_an_origin_that_demands_tls_gets_an_error_that_says_which_uri_to_use(
    origins: Origins, certificates: Certificates
) -> None:
    for kind in ("nbdkit", "qemu-nbd", "nbd-server"):
        origin = origins(kind, certificates.server)
        wanted = f"nbds+unix:///disk?socket={origin.path}&tls-certificates=DIRECTORY"
        assert refusal(origin.uri) == f"it demands TLS: use {wanted}"


# Servers that are made for it


def tls_refusal(path: Path, behave: Callable[[Visitor], None], directory: Path, *, timeout: float = TIMEOUT) -> str:
    with LyingOrigin(path, behave):
        return refusal(f"nbds+unix:///disk?socket={path}&tls-certificates={directory}", timeout)


@pytest.mark.parametrize("offered", [True, False])
def test_nothing_is_asked_of_who_does_not_offer_tls(tmp_path: Path, certificates: Certificates, offered: bool) -> None:
    left = []

    def behave(visitor: Visitor) -> None:
        visitor.send(greeting())
        visitor.receive(4)
        assert visitor.option() == (STARTTLS, b"")
        visitor.send(option_reply(STARTTLS, ERR_UNSUP if offered else ERR_UNSUP + 1))
        left.append(visitor.sock.recv(100))

    message = tls_refusal(tmp_path / "s", behave, certificates.alice)
    assert message == "it offers no TLS, which nbds:// insists on"
    assert left == [b""]


def test_a_machine_in_the_middle_that_strips_tls_gets_nothing(
    tmp_path: Path, certificates: Certificates, image: Path
) -> None:
    """The server behind it would speak in the clear as well."""
    behind, heard = OriginProgram("nbdkit", image, tmp_path), bytearray()

    def behave(visitor: Visitor) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(str(behind.path))
            visitor.send(server.recv(18, socket.MSG_WAITALL))
            server.sendall(visitor.receive(4))
            assert visitor.option() == (STARTTLS, b"")
            visitor.send(option_reply(STARTTLS, ERR_UNSUP))
            heard.extend(visitor.sock.recv(100))

    try:
        assert "it offers no TLS" in tls_refusal(tmp_path / "s", behave, certificates.alice)
        assert not heard
    finally:
        behind.stop()


def test_bytes_in_the_clear_after_the_consent_to_tls_end_the_connection(
    tmp_path: Path, certificates: Certificates
) -> None:
    """A machine in the middle slips the rest of a negotiation in, in front of the records of TLS (CVE-2021-3716)."""
    slipped_in = option_reply(STRUCTURED_REPLY, ERR_UNSUP) + export_info(SIZE) + option_reply(GO, ACK)

    def behave(visitor: Visitor) -> None:
        visitor.send(greeting())
        visitor.receive(4)
        visitor.option()
        visitor.send(option_reply(STARTTLS, ACK) + slipped_in)
        TlsVisitor(visitor, server_context(certificates.server)).shake_hands()

    assert tls_refusal(tmp_path / "s", behave, certificates.alice) == "what it says is no TLS"


def test_a_server_without_a_version_of_tls_that_is_wanted_is_refused(
    tmp_path: Path, certificates: Certificates
) -> None:
    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        TlsVisitor(visitor, old_context(certificates.server)).shake_hands()

    message = tls_refusal(tmp_path / "s", behave, certificates.alice)
    assert message == "it has no version of TLS that is wanted here: 1.2 or 1.3"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_alert_about_our_certificate_is_explained(
    tmp_path: Path, certificates: Certificates, version: ssl.TLSVersion
) -> None:
    context = server_context(certificates.server, wants_certificate=True)
    context.maximum_version = version

    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        TlsVisitor(visitor, context).shake_hands()

    path = tmp_path / "s"
    for who, why in (
        (certificates.stranger, "of an authority that it does not trust"),
        (certificates.expired, "expired"),
    ):
        expected = f"it refuses our certificate {who / 'client-cert.pem'}: {why}"
        assert tls_refusal(path, behave, who) == expected
        path.unlink()
    nobody = tls_refusal(path, behave, certificates.anonymous)
    assert nobody in (
        f"it wants a certificate from us, and {certificates.anonymous} has none",
        "there is no cipher or key on which both sides agree",  # all that TLS 1.2 says
    )


def test_a_server_that_is_silent_during_the_handshake_is_given_up(tmp_path: Path, certificates: Certificates) -> None:
    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        visitor.wait_until_gone()

    message = tls_refusal(tmp_path / "s", behave, certificates.alice, timeout=0.3)
    assert message == "the handshake took longer than 0.3 s"


@pytest.mark.parametrize("after", [1, 5, 100, 700])
def test_a_server_that_leaves_during_the_handshake_is_lost(
    tmp_path: Path, certificates: Certificates, after: int
) -> None:
    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        TlsVisitor(visitor, server_context(certificates.server)).shake_hands(after)

    message = tls_refusal(tmp_path / "s", behave, certificates.alice)
    assert message.startswith("it closed the connection during the handshake of TLS")


@pytest.mark.parametrize("part", [0, 3, 5, 100, 4000])
def test_a_server_that_leaves_in_the_middle_of_a_record_is_lost(
    own: Own, tmp_path: Path, certificates: Certificates, part: int
) -> None:
    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        secure = TlsVisitor(visitor, server_context(certificates.server)).shake_hands()
        secure.haggle(SIZE, structured=False)
        record = secure.records(simple(secure.request().cookie, bytes(4096)))
        secure.sock.sendall(record[:part])

    with LyingOrigin(tmp_path / "s", behave):
        owner = own(f"nbds+unix:///disk?socket={tmp_path / 's'}&{trusting(certificates.alice)}").connect()
        owner.connection.read("cut", 0, 4096)
        owner.connection.push()
        assert "it closed the connection with 1 request waiting" in owner.lost()
        assert owner.connection.unfinished() == ["cut"]


def test_a_record_that_was_changed_on_its_way_ends_the_connection(
    own: Own, tmp_path: Path, certificates: Certificates
) -> None:
    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        secure = TlsVisitor(visitor, server_context(certificates.server)).shake_hands()
        secure.haggle(SIZE, structured=False)
        record = bytearray(secure.records(simple(secure.request().cookie, bytes(4096))))
        record[1000] ^= 1
        secure.sock.sendall(record)
        secure.sock.recv(1 << 16)

    with LyingOrigin(tmp_path / "s", behave):
        owner = own(f"nbds+unix:///disk?socket={tmp_path / 's'}&{trusting(certificates.alice)}").connect()
        owner.connection.read("changed", 0, 4096)
        owner.connection.push()
        assert owner.lost().endswith("a record of TLS is broken")
        assert not owner.data
