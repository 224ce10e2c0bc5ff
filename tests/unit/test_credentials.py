"""A server's directory of credentials: what is wrong with it in one line, what expires, and reading it again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Callable

import pytest
from certificates import Certificates, copy

from xnbd.errors import ConfigurationError
from xnbd.tls.credentials import ServerCredentials
from xnbd.tls.expiry import expiries, warnings
from xnbd.tls.psk import read_keys


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: os.unlink(d / "server-cert.pem"), "neither server-cert.pem nor keys.psk"),
        (lambda d: os.unlink(d / "server-key.pem"), "cannot read .*server-key.pem: No such file"),
        (lambda d: (d / "server-key.pem").write_text(""), "server-key.pem has no private key"),
        (lambda d: (d / "server-cert.pem").write_text("x"), "server-cert.pem has no certificate"),
        (lambda d: _cut(d / "server-cert.pem"), "cannot use .*server-cert.pem with .*: it is damaged"),
        (lambda d: os.unlink(d / "ca-cert.pem"), "no ca-cert.pem.*--tls-anonymous"),
        (lambda d: (d / "ca-cert.pem").write_text(""), "ca-cert.pem has no certificate"),
        (lambda d: _cut(d / "ca-cert.pem"), "cannot use .*ca-cert.pem: it is damaged"),
        (lambda d: (d / "ca-crl.pem").write_text(""), "ca-crl.pem has no list of revoked"),
        (lambda d: shutil.copy(d / "ca-cert.pem", d / "ca-crl.pem"), "ca-crl.pem has a certificate, where a list"),
        (lambda d: _encrypt(d / "server-key.pem"), "server-key.pem is encrypted"),
        (lambda d: _replace(d / "ca-crl.pem", os.mkfifo), "cannot read .*ca-crl.pem: this is no regular file"),
        (lambda d: _replace(d / "ca-cert.pem", os.mkdir), "cannot read .*ca-cert.pem: Is a directory"),
        (lambda d: os.truncate(d / "server-cert.pem", 65 << 20), "cannot read .*it has more than"),
    ],
)
def test_what_is_wrong_with_a_directory_is_one_line(
    certificates: Certificates, tmp_path: Path, damage: object, message: str
) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    damage(directory)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=message) as caught:
        ServerCredentials(str(directory))
    assert len(str(caught.value).splitlines()) == 1


def _cut(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[-1], ""]))


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def _encrypt(key: Path) -> None:
    words = [
        "certtool",
        "--generate-privkey",
        "--key-type=ecdsa",
        "--pkcs8",
        "--password=secret",
        "--outfile",
        str(key),
    ]
    subprocess.run(words, check=True, capture_output=True)


def test_the_key_of_another_certificate_is_refused(certificates: Certificates, tmp_path: Path) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    shutil.copy(certificates.alice / "client-key.pem", directory / "server-key.pem")
    with pytest.raises(ConfigurationError, match=r"server-key.pem is not the key of .*server-cert.pem"):
        ServerCredentials(str(directory))


def test_a_directory_that_is_not_there_and_a_cipher_that_nobody_knows(certificates: Certificates) -> None:
    with pytest.raises(ConfigurationError, match="there is no such directory"):
        ServerCredentials("/nonexistent")
    with pytest.raises(ConfigurationError, match="no cipher that fits 'rot13'"):
        ServerCredentials(str(certificates.server), ciphers="rot13")


def test_without_an_authority_only_anonymous_clients_are_served(certificates: Certificates, tmp_path: Path) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    (directory / "ca-cert.pem").unlink()
    ServerCredentials(str(directory), anonymous=True)


def test_ciphers_without_a_certificate_cannot_be_asked_for(certificates: Certificates) -> None:
    context = ServerCredentials(str(certificates.server), ciphers="ALL:@SECLEVEL=0").context
    assert not [c for c in context.get_ciphers() if "ADH" in c["name"] or "AECDH" in c["name"] or "NULL" in c["name"]]


def test_credentials_are_equal_if_all_their_files_are(certificates: Certificates, tmp_path: Path) -> None:
    directory = copy(certificates.server, tmp_path / "tls")
    before = ServerCredentials(str(directory))
    assert ServerCredentials(str(directory)) == before
    assert hash(ServerCredentials(str(directory))) == hash(before)
    assert ServerCredentials(str(directory), anonymous=True) != before
    for path in directory.glob("*.pem"):
        content = path.read_text()
        path.write_text(content + "\n")
        assert ServerCredentials(str(directory)) != before, path
        path.write_text(content)
    assert ServerCredentials(str(directory)) == before


def test_what_expires_soon_is_told_of_once_for_each_file(certificates: Certificates, tmp_path: Path) -> None:
    assert not ServerCredentials(str(certificates.server)).warnings()
    (line,) = ServerCredentials(str(certificates.server_expired)).warnings()
    assert "server-cert.pem has expired on 2020-02-01" in line
    soon = certificates.authority.server(tmp_path / "soon", days=12)
    (line,) = ServerCredentials(str(soon)).warnings()
    assert "server-cert.pem expires on" in line
    assert "in 11 days" in line or "in 12 days" in line


def test_of_a_list_is_told_in_the_last_quarter_of_its_time(certificates: Certificates, tmp_path: Path) -> None:
    """Lists for a week are usual."""
    directory = copy(certificates.server, tmp_path / "tls")
    for days in (1, 7, 100, 20):
        certificates.authority.revoke(directory / "ca-crl.pem", days=days)
        assert not ServerCredentials(str(directory)).warnings(), days
    (listed,) = expiries("x", (directory / "ca-crl.pem").read_text())
    assert listed.notice == timedelta(days=5)
    almost = [listed._replace(when=datetime.now(timezone.utc) + timedelta(days=4))]
    assert warnings(almost)[0].startswith("x expires on ")


def test_of_a_chain_the_first_end_counts(certificates: Certificates, tmp_path: Path) -> None:
    """Prometheus refuses two values for one file."""
    soon = certificates.authority.server(tmp_path / "soon", days=12)
    with (soon / "server-cert.pem").open("a") as chain:
        chain.write(certificates.authority.certificate.read_text())
    valid = {Path(path).name: when for path, when, _ in ServerCredentials(str(soon)).valid}
    assert len(ServerCredentials(str(soon)).valid) == len(valid) == 2
    assert valid["server-cert.pem"] < valid["ca-cert.pem"]


def test_the_end_of_validity_is_what_openssl_says(certificates: Certificates) -> None:
    for path, name in ((certificates.server, "server-cert.pem"), (certificates.server_with_crl, "ca-crl.pem")):
        file = path / name
        (expiry,) = expiries(str(file), file.read_text())
        assert timedelta(3648) < expiry.when - datetime.now(timezone.utc) < timedelta(3651)
    text = certificates.server_expired.joinpath("server-cert.pem").read_text()
    assert expiries("x", text * 2)[1].when.isoformat() == "2020-02-01T00:00:00+00:00"


def test_dates_that_cannot_be_read_are_no_trouble() -> None:
    assert not expiries("x", "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n")


def test_keys_are_read_as_psktool_writes_them(certificates: Certificates, tmp_path: Path) -> None:
    keys = read_keys(str(certificates.server_psk / "keys.psk"))
    assert sorted(keys) == ["alice", "bob"]
    assert len(keys["alice"]) == 32
    path = tmp_path / "keys.psk"
    for text, message in (
        ("", "has no keys"),
        ("\nalice:0x12\n", "line 2: expected USER:KEY"),
        (":12", "line 1"),
        ("\ufeffalice:12", "line 1: expected USER:KEY in UTF-8"),
        ("alice:12\nbob:34\nalice:56", "line 3: another key for 'alice'"),
        ("alice:" + "00" * 257, "line 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=message):
            read_keys(str(path))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="ssl knows pre-shared keys")
def test_without_sslpsk3_one_line_says_what_to_install(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sslpsk3", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'xnbd\[psk\]'"):
        ServerCredentials(str(certificates.server_psk))
