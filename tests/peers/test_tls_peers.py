"""The programs that people use, over TLS, to xnbd-server and xnbd-wrapper: with certificates and pre-shared keys."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple

import pytest
from certificates import Certificates
from conftest import MIB, Start, StartWrapper
from server_process import run

SIZE = 6 * MIB
NAME = "disk.img"
PROGRAMS = ["xnbd-server", "xnbd-wrapper"]


class Endpoint(NamedTuple):
    """A disk on 127.0.0.1 whose server demands TLS, and what a client needs there."""

    port: int
    image: Path
    clients: Path
    """The client's directory, or its file of pre-shared keys."""

    @property
    def has_psk(self) -> bool:
        return self.clients.is_file()

    @property
    def uri(self) -> str:
        if self.has_psk:
            return f"nbds://alice@127.0.0.1:{self.port}/{NAME}?tls-psk-file={self.clients}"
        return f"nbds://127.0.0.1:{self.port}/{NAME}?tls-certificates={self.clients}"

    def qemu(self) -> List[str]:
        """Options of qemu's programs, with the disk at their end."""
        if self.has_psk:
            credentials = f"tls-creds-psk,id=tls,dir={self.clients.parent},endpoint=client,username=alice"
        else:
            credentials = f"tls-creds-x509,id=tls,dir={self.clients},endpoint=client"
        disk = f"driver=nbd,host=127.0.0.1,port={self.port},export={NAME},tls-creds=tls"
        return ["--object", credentials, "--image-opts", disk]


def serve(start: Start, start_wrapper: StartWrapper, program: str, image: Path, certificates: Path) -> int:
    """The port of a server of *image* with the directory *certificates*."""
    if program == "xnbd-server":
        return start("--target", "--tls", certificates, image, tcp=True).port
    return start_wrapper("--tls", certificates, "--imgfile", image).port


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(random.Random(15).randbytes(SIZE))
    return path


@pytest.fixture(params=PROGRAMS)
def endpoint(
    request: pytest.FixtureRequest, start: Start, start_wrapper: StartWrapper, image: Path, certificates: Certificates
) -> Iterator[Endpoint]:
    port = serve(start, start_wrapper, request.param, image, certificates.server)
    yield Endpoint(port, image, certificates.alice)


@pytest.fixture(params=PROGRAMS)
def psk_endpoint(
    request: pytest.FixtureRequest, start: Start, start_wrapper: StartWrapper, image: Path, certificates: Certificates
) -> Iterator[Endpoint]:
    port = serve(start, start_wrapper, request.param, image, certificates.server_psk)
    yield Endpoint(port, image, certificates.server_psk / "keys.psk")


def nbdinfo(endpoint: Endpoint, *options: object) -> Any:
    return json.loads(run("nbdinfo", "--json", *options, endpoint.uri)[1])


def check_libnbd(endpoint: Endpoint, tmp_path: Path) -> None:
    """nbdinfo and nbdcopy, both ways."""
    answer = nbdinfo(endpoint)
    (export,) = answer["exports"]
    assert (answer["TLS"], export["export-name"], export["export-size"]) == (True, NAME, SIZE)
    assert not export["is_read_only"]
    assert sum(extent["length"] for extent in nbdinfo(endpoint, "--map")) == SIZE
    other, copy = tmp_path / "other.img", tmp_path / "copy.img"
    other.write_bytes(random.Random(16).randbytes(SIZE))
    run("nbdcopy", "--flush", "--connections=4", other, endpoint.uri)
    assert endpoint.image.read_bytes() == other.read_bytes()
    run("nbdcopy", "--connections=4", "--requests=64", endpoint.uri, copy)
    assert copy.read_bytes() == other.read_bytes()


def test_libnbd_with_certificates(endpoint: Endpoint, tmp_path: Path) -> None:
    check_libnbd(endpoint, tmp_path)


def test_libnbd_with_a_pre_shared_key(psk_endpoint: Endpoint, tmp_path: Path) -> None:
    check_libnbd(psk_endpoint, tmp_path)


QEMU_IO_PATTERNS = """
write -P 0x11 0 1M
read -P 0x11 0 1M
write -P 0x22 65536 4096
read -P 0x22 65536 4096
aio_write -P 0x33 1M 512k
aio_write -P 0x44 1536k 512k
aio_flush
aio_read -P 0x33 1M 512k
aio_read -P 0x44 1536k 512k
aio_flush
writev -P 0x55 2M 4k 8k 64k
readv -P 0x55 2M 4k 8k 64k
write -f -P 0x66 3M 4k
read -P 0x66 3M 4k
discard 4M 1M
read -P 0 4M 1M
write -z -f 5M 512
read -P 0 5M 512
flush
"""


def check_qemu(endpoint: Endpoint, tmp_path: Path) -> None:
    """qemu-img and qemu-io."""
    content = endpoint.image.read_bytes()
    answer = json.loads(run("qemu-img", "info", "--output=json", *endpoint.qemu())[1])
    assert answer["virtual-size"] == SIZE
    copy = tmp_path / "copy.img"
    run("qemu-img", "convert", "-O", "raw", *endpoint.qemu(), copy)
    assert copy.read_bytes() == content
    commands = [option for line in QEMU_IO_PATTERNS.strip().splitlines() for option in ("-c", line)]
    _, out, _ = run("qemu-io", *commands, *endpoint.qemu())
    assert not re.search("failed|error", out, re.IGNORECASE), out
    written = endpoint.image.read_bytes()
    assert written[3 * MIB : 3 * MIB + 4096] == b"\x66" * 4096
    assert written[5 * MIB + 512 :] == content[5 * MIB + 512 :]


def test_qemu_with_certificates(endpoint: Endpoint, tmp_path: Path) -> None:
    check_qemu(endpoint, tmp_path)


def test_qemu_with_a_pre_shared_key(psk_endpoint: Endpoint, tmp_path: Path) -> None:
    check_qemu(psk_endpoint, tmp_path)


def through_nbdkit(endpoint: Endpoint, command: str) -> str:
    """Output of a shell command for which ``$uri`` is nbdkit, whose origin is the endpoint, over TLS."""
    if endpoint.has_psk:
        tls = [f"tls-psk={endpoint.clients}", "tls-username=alice"]
    else:
        tls = [f"tls-certificates={endpoint.clients}"]
    origin = ["nbd", "hostname=127.0.0.1", f"port={endpoint.port}", f"export={NAME}", "tls=require", *tls]
    return run("nbdkit", "--exit-with-parent", "-U", "-", *origin, "--run", command)[1]


def check_nbdkit(endpoint: Endpoint, tmp_path: Path) -> None:
    other, copy = tmp_path / "other.img", tmp_path / "copy.img"
    other.write_bytes(random.Random(17).randbytes(SIZE))
    through_nbdkit(endpoint, f'nbdcopy --flush "{other}" "$uri" && nbdcopy "$uri" "{copy}"')
    assert endpoint.image.read_bytes() == other.read_bytes() == copy.read_bytes()


def test_nbdkit_with_certificates(endpoint: Endpoint, tmp_path: Path) -> None:
    check_nbdkit(endpoint, tmp_path)


def test_nbdkit_with_a_pre_shared_key(psk_endpoint: Endpoint, tmp_path: Path) -> None:
    check_nbdkit(psk_endpoint, tmp_path)


def test_fio_verifies_what_it_wrote(endpoint: Endpoint) -> None:
    """Its engine allows no file names in a URI: libnbd has to find them below HOME, where it does not look for root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        pki = Path(home) / ".pki" / "libnbd"
        shutil.copytree(endpoint.clients, pki)
        user = ["env", f"HOME={home}"]
        if os.geteuid() == 0:
            user += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            for path in [Path(home), *Path(home).rglob("*")]:
                os.chown(path, 65534, 65534)
        report = Path(home) / "report"
        run(
            *user, "fio", "--name=verify", "--ioengine=nbd", f"--uri=nbds://127.0.0.1:{endpoint.port}/{NAME}",
            "--rw=randrw", "--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=16", "--verify=crc32c",
            "--verify_state_save=0", "--verify_fatal=1", "--do_verify=1", "--fsync=64", f"--size={SIZE}",
            f"--directory={home}", "--output-format=json", f"--output={report}",
        )  # fmt: skip
        (job,) = json.loads(report.read_text())["jobs"]
    assert (job["error"], job["write"]["total_ios"] > 0, job["read"]["total_ios"] > 0) == (0, True, True)


def test_nbd_client_lists_the_export(endpoint: Endpoint) -> None:
    files = {"cert": "client-cert.pem", "key": "client-key.pem", "cacert": "ca-cert.pem"}
    options = [word for kind, name in files.items() for word in (f"-{kind}file", endpoint.clients / name)]
    out = run("nbd-client", *options, "-tlshostname", "localhost", "-l", "127.0.0.1", endpoint.port)[1]
    assert NAME in out.splitlines()
