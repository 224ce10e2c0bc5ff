"""Certificates for the servers and clients of one run, made with GnuTLS's ``certtool`` and thrown away with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .errors import BenchmarkError

_AUTHORITY = 'cn = "benchmark CA"\nca\ncert_signing_key\nexpiration_days = 2\n'
_SERVER = 'cn = "localhost"\nip_address = "127.0.0.1"\ntls_www_server\nsigning_key\nexpiration_days = 2\n'
_CLIENT = 'cn = "benchmark"\ntls_www_client\nsigning_key\nexpiration_days = 2\n'


def make_certificates(directory: Path) -> None:
    """Fill the new *directory* with what a server and a client need, named as qemu and nbdkit want it."""
    directory.mkdir(mode=0o700)
    for name, template in (("ca", _AUTHORITY), ("server", _SERVER), ("client", _CLIENT)):
        (directory / f"{name}.info").write_text(template)
        _certtool(directory, "--generate-privkey", "--key-type=ecdsa", "--outfile", f"{name}-key.pem")
        kind = ["--generate-self-signed"] if name == "ca" else ["--generate-certificate", *_SIGNED]
        files = ["--load-privkey", f"{name}-key.pem", "--template", f"{name}.info", "--outfile", f"{name}-cert.pem"]
        _certtool(directory, *kind, *files)


_SIGNED = ["--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"]


def _certtool(directory: Path, *options: str) -> None:
    done = subprocess.run(["certtool", *options], cwd=directory, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BenchmarkError(f"certtool: {done.stderr.strip()}")
