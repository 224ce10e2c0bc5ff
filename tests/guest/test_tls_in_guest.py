"""TLS in a virtual machine: Linux's own client, and a server for which the kernel encrypts (kTLS)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Iterator, Tuple

import pytest
from certificates import Certificates
from conftest import MIB, Start, StartWrapper
from exported import check_ext4
from server_process import ROOT, free_port, run
from xnbdguest.initramfs import KERNEL_TLS, add_python, add_xnbd, basic_system
from xnbdguest.machine import HOST, Guest
from xnbdguest.packages import fetch_packages

PORT = 8520
SIZE = 24 * MIB
SERVER = "python3 -W error /opt/xnbd/bin/xnbd-server --spare-workers 1"
CERTIFICATES = "-certfile /alice/client-cert.pem -keyfile /alice/client-key.pem -cacertfile /alice/ca-cert.pem"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[Tuple[Guest, int]]:
    """A guest with kTLS, a server's directory /server and a client's /alice, and the port here that is its `PORT`."""
    directory, packages, port = tmp_path_factory.mktemp("guest"), fetch_packages(), free_port()
    archive = basic_system(packages, KERNEL_TLS)
    add_python(archive)
    add_xnbd(archive, ROOT)
    for source, name in ((certificates.server, "server"), (certificates.alice, "alice")):
        for file in source.iterdir():
            archive.add_file(file, f"/{name}/{file.name}")
    archive.write(directory / "initramfs")
    with Guest(
        directory, "tls", packages, directory / "initramfs", memory=512, processors=2, forwards={port: PORT}
    ) as guest:
        yield guest, port


@pytest.fixture
def guest(machine: Tuple[Guest, int]) -> Guest:
    return machine[0]


def connect(guest: Guest, host: str, port: int) -> None:
    """/dev/nbd0, whose connection goes through a process of nbd-client."""
    guest.run(f"nbd-client {CERTIFICATES} -tlshostname localhost -N disk.img {host} {port} /dev/nbd0")
    guest.run("until [ $(blockdev --getsize64 /dev/nbd0) -gt 0 ]; do sleep 0.1; done")


def disconnect(guest: Guest) -> None:
    guest.run("nbd-client -d /dev/nbd0; until ! nbd-client -c /dev/nbd0; do sleep 0.02; done")


def make_file_system(guest: Guest) -> str:
    """An ext4 with the file ``data``, whose MD5 is returned; it is read again from the server."""
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt")
    guest.run("dd if=/dev/urandom of=/mnt/data bs=1M count=4 conv=fsync")
    digest = guest.output("md5sum </mnt/data").split()[0]
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert guest.output("md5sum </mnt/data").split()[0] == digest
    guest.run("umount /mnt && e2fsck -fn /dev/nbd0")
    return digest


@pytest.mark.parametrize("program", ["xnbd-server", "xnbd-wrapper"])
def test_linux_client(
    start: Start,
    start_wrapper: StartWrapper,
    tmp_path: Path,
    guest: Guest,
    certificates: Certificates,
    program: str,
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    if program == "xnbd-server":
        port = start("--target", "--tls", certificates.server, image, tcp=True).port
    else:
        port = start_wrapper("--tls", certificates.server, "--imgfile", image).port
    connect(guest, HOST, port)
    digest = make_file_system(guest)
    disconnect(guest)
    assert check_ext4(image, "data", tmp_path) == digest


@pytest.fixture
def server_in_guest(guest: Guest) -> Iterator[None]:
    """Serves /run/disk.img with TLS; its log is /run/log."""
    listening = f"--laddr 0.0.0.0 --lport {PORT}"
    guest.run(f"truncate -s {SIZE} /run/disk.img")
    guest.run(f"{SERVER} --target --tls /server {listening} /run/disk.img >/run/log 2>&1 & echo $! >/run/pid")
    started = "until grep -q 'INFO: serving' /run/log; do kill -0 $(cat /run/pid) || exit 1; sleep 0.1; done"
    assert guest.run(started, check=False).status == 0, guest.output("cat /run/log")
    yield
    guest.run("kill $(cat /run/pid); while kill -0 $(cat /run/pid) 2>/dev/null; do sleep 0.1; done; rm /run/disk.img")
    log = guest.output("cat /run/log")
    assert "Traceback" not in log
    assert " ERROR: " not in log


def test_server_whose_kernel_encrypts(
    machine: Tuple[Guest, int], server_in_guest: None, tmp_path: Path, certificates: Certificates
) -> None:
    """Clients are this computer's programs, and Linux's own within the guest."""
    guest, port = machine
    uri = f"nbds://127.0.0.1:{port}/disk.img?tls-certificates={certificates.alice}"
    content, copy = tmp_path / "content.img", tmp_path / "copy.img"
    content.write_bytes(random.Random(5).randbytes(SIZE))
    run("nbdcopy", "--flush", content, uri, timeout=300)
    assert "kTLS" in guest.output("cat /run/log")
    run("nbdcopy", "--requests=64", uri, copy, timeout=300)
    assert copy.read_bytes() == content.read_bytes()
    connect(guest, "127.0.0.1", PORT)
    make_file_system(guest)
    disconnect(guest)


def test_pages_that_are_gone_are_an_error_where_the_kernel_encrypts(
    machine: Tuple[Guest, int], server_in_guest: None, certificates: Certificates
) -> None:
    guest, port = machine
    uri = f"nbds://127.0.0.1:{port}/disk.img?tls-certificates={certificates.alice}"
    commands = ["-c", "read 0 4k", "-c", "read 16M 1M", "-c", "read 0 64k"]
    guest.run(f"truncate -s {SIZE // 4} /run/disk.img")
    credentials = f"tls-creds-x509,id=tls,dir={certificates.alice},endpoint=client"
    disk = f"driver=nbd,host=127.0.0.1,port={port},export=disk.img,tls-creds=tls"
    _, out, err = run("qemu-io", "--object", credentials, "--image-opts", *commands, disk, check=False, timeout=120)
    assert (out.count("read failed: Input/output error"), out.count(", 1 ops;")) == (1, 2), out + err
    assert "killed by" not in guest.output("cat /run/log")
    run("nbdinfo", "--size", uri)
