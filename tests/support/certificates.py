"""Certificates and keys for tests of TLS, made by GnuTLS's ``certtool`` and ``psktool`` (Debian: gnutls-bin).

A directory of a server holds ``ca-cert.pem``, ``server-cert.pem``, ``server-key.pem``, and ``ca-crl.pem`` and
``keys.psk`` if they are asked for; one of a client ``ca-cert.pem``, ``client-cert.pem`` and ``client-key.pem``. That is
what qemu, nbdkit, libnbd and xnbd expect. The fixture `certificates` of a session makes each when it is first used;
whoever changes one copies its directory (`copy`).
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Optional, Sequence

PAST = ("2020-01-01 00:00:00", "2020-02-01 00:00:00")
"""When a certificate was valid that is expired now."""

_SERVER_SANS = ('dns_name = "localhost"', 'ip_address = "127.0.0.1"', 'ip_address = "::1"')


NO_TEXT = 'add_extension = "2.5.29.17 0x300b8209ff2e6578616d706c65"'
"""A line of a template: a subject alternative name, of the kind ``dns``, that is no UTF-8."""


def _certtool(*words: object) -> None:
    subprocess.run(["certtool", *map(str, words)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _make_key(path: Path) -> None:
    _certtool("--generate-privkey", "--key-type=ecdsa", "--outfile", path)
    path.chmod(0o600)


def _validity(days: float, between: Sequence[str]) -> str:
    if between:
        return f'activation_date = "{between[0]}"\nexpiration_date = "{between[1]}"\n'
    return f"expiration_days = {days}\n"


class Authority:
    """A certificate authority with its files in *path*; with *above* that one has signed its certificate."""

    def __init__(self, path: Path, name: str = "test CA", above: Optional[Authority] = None) -> None:
        path.mkdir()
        self.path = path
        self.certificate = path / "ca-cert.pem"
        self._key = path / "ca-key.pem"
        _make_key(self._key)
        usage = "ca\ncert_signing_key\ncrl_signing_key\n"
        template = ("--template", self._template("ca", f'cn = "{name}"\n{usage}expiration_days = 3650\n'))
        how = ["--generate-self-signed"] if above is None else ["--generate-certificate", *above._signs]
        _certtool(*how, "--load-privkey", self._key, *template, "--outfile", self.certificate)

    @property
    def _signs(self) -> Sequence[object]:
        return "--load-ca-certificate", self.certificate, "--load-ca-privkey", self._key

    def _template(self, name: str, text: str) -> Path:
        path = self.path / f"{name}.info"
        path.write_text(text)
        return path

    def _issue(self, directory: Path, role: str, text: str) -> Path:
        directory.mkdir(exist_ok=True)
        key = directory / f"{role}-key.pem"
        _make_key(key)
        shutil.copy(self.certificate, directory / "ca-cert.pem")
        usage = f"tls_www_{role}\nsigning_key\nencryption_key\n"
        template = ("--template", self._template(directory.name, text + usage))
        out = ("--outfile", directory / f"{role}-cert.pem")
        _certtool("--generate-certificate", "--load-privkey", key, *self._signs, *template, *out)
        return directory

    def server(
        self,
        directory: Path,
        *,
        name: str = "localhost",
        sans: Sequence[str] = _SERVER_SANS,
        days: float = 3650,
        between: Sequence[str] = (),
    ) -> Path:
        """*directory* with a new certificate of a server; *sans* are lines of a template, *between* as in `PAST`."""
        return self._issue(
            directory, "server", f'cn = "{name}"\n' + "".join(f"{san}\n" for san in sans) + _validity(days, between)
        )

    def client(
        self,
        directory: Path,
        name: str,
        *,
        organization: str = "xnbd tests",
        sans: Sequence[str] = (),
        days: float = 3650,
        between: Sequence[str] = (),
    ) -> Path:
        """*directory* with a new certificate of the client ``CN=name,O=organization``."""
        subject = f'cn = "{name}"\norganization = "{organization}"\n'
        return self._issue(
            directory, "client", subject + "".join(f"{san}\n" for san in sans) + _validity(days, between)
        )

    def revoke(self, out: Path, *certificates: Path, days: int = 3650) -> Path:
        """The list *out*, by which *certificates* are revoked."""
        template = self._template("crl", f"crl_next_update = {days}\ncrl_number = 1\n")
        revoked = self.path / "revoked.pem"
        revoked.write_text("".join(certificate.read_text() for certificate in certificates))
        which = ("--load-certificate", revoked) if certificates else ()
        _certtool("--generate-crl", *self._signs, *which, "--template", template, "--outfile", out)
        return out


def make_psk(path: Path, *names: str) -> Path:
    """The file *path* with a new pre-shared key for each of *names*."""
    for name in names:
        subprocess.run(["psktool", "-u", name, "-p", str(path)], check=True, capture_output=True)
    path.chmod(0o600)
    return path


def copy(directory: Path, to: Path) -> Path:
    """A copy of *directory* that a test may change."""
    shutil.copytree(directory, to)
    return to


class Certificates:
    """One authority and what it has signed, in *path*; each is made when it is first used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def authority(self) -> Authority:
        return Authority(self.path / "authority")

    @cached_property
    def other_authority(self) -> Authority:
        """One that nobody trusts."""
        return Authority(self.path / "other-authority", "other CA")

    @cached_property
    def department(self) -> Authority:
        """One below `authority`."""
        return Authority(self.path / "department", "department", self.authority)

    @cached_property
    def clerk(self) -> Path:
        """A client of `department`, which shows that one's certificate behind its own, and trusts `authority`."""
        directory = self.department.client(self.path / "clerk", "clerk")
        with (directory / "client-cert.pem").open("a") as chain:
            chain.write(self.department.certificate.read_text())
        shutil.copy(self.authority.certificate, directory / "ca-cert.pem")
        return directory

    @cached_property
    def server(self) -> Path:
        """A server's directory: for ``localhost``, 127.0.0.1 and ::1."""
        return self.authority.server(self.path / "server")

    @cached_property
    def server_with_crl(self) -> Path:
        """Like `server`, with a list by which `revoked` is."""
        directory = self.authority.server(self.path / "server-with-crl")
        self.authority.revoke(directory / "ca-crl.pem", self.revoked / "client-cert.pem")
        return directory

    @cached_property
    def server_elsewhere(self) -> Path:
        """A server's directory for another host name."""
        return self.authority.server(
            self.path / "elsewhere", name="elsewhere.example", sans=('dns_name = "elsewhere.example"',)
        )

    @cached_property
    def server_expired(self) -> Path:
        return self.authority.server(self.path / "server-expired", between=PAST)

    @cached_property
    def server_of_other(self) -> Path:
        """A server's directory that `other_authority` has signed."""
        return self.other_authority.server(self.path / "server-of-other")

    @cached_property
    def server_psk(self) -> Path:
        """A server's directory with pre-shared keys for alice and bob and nothing else."""
        directory = self.path / "server-psk"
        directory.mkdir()
        make_psk(directory / "keys.psk", "alice", "bob")
        return directory

    @cached_property
    def alice(self) -> Path:
        sans = ('dns_name = "alice.example"', 'uri = "urn:xnbd:alice"', 'email = "alice@example.org"')
        return self.authority.client(self.path / "alice", "alice", sans=sans)

    @cached_property
    def bob(self) -> Path:
        return self.authority.client(self.path / "bob", "bob")

    @cached_property
    def revoked(self) -> Path:
        return self.authority.client(self.path / "revoked", "revoked")

    @cached_property
    def expired(self) -> Path:
        return self.authority.client(self.path / "expired", "expired", between=PAST)

    @cached_property
    def stranger(self) -> Path:
        """A client that `other_authority` has signed, but that trusts our servers."""
        directory = self.other_authority.client(self.path / "stranger", "stranger")
        shutil.copy(self.authority.certificate, directory / "ca-cert.pem")
        return directory

    @cached_property
    def anonymous(self) -> Path:
        """A client without a certificate: nothing but whom it trusts."""
        directory = self.path / "anonymous"
        directory.mkdir()
        shutil.copy(self.authority.certificate, directory / "ca-cert.pem")
        return directory

    @cached_property
    def wrong_psk(self) -> Path:
        """A file with keys for alice and bob that no server knows."""
        return make_psk(self.path / "wrong.psk", "alice", "bob")
