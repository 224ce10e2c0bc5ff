"""xnbd-wrapper with real clients: several exports at once, and what they are told."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, List

import nbd
import pytest
from conftest import MIB, Start, StartWrapper
from rawclient import (
    ACK,
    ERR_UNKNOWN,
    FLUSH,
    GO,
    INFO,
    LIST,
    READ,
    REP_SERVER,
    RawClient,
    go_data,
    pack_option,
    pack_request,
)
from server_process import run, title_of, wait_until
from wrapper_process import Wrapper, program

ODD_NAME = "ünï cödé/磁盘 %41?"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second image, of 4 MiB."""
    path = tmp_path / "other.img"
    path.write_bytes(random.Random(8521).randbytes(4 * MIB))
    return path


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path, other: Path) -> Wrapper:
    """A wrapper with the exports disk.img and other.img."""
    return start_wrapper("--imgfile", image, "--imgfile", other)


def details(uri: str) -> Dict[str, Any]:
    """What nbdinfo says of one export, without what depends on where it is."""
    export: Dict[str, Any] = json.loads(run("nbdinfo", "--json", uri)[1])["exports"][0]
    return {key: value for key, value in export.items() if key not in ("uri", "export-name")}


# Choosing


def test_nbdinfo_lists_all_exports_with_their_sizes(wrapper: Wrapper, image: Path, other: Path) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", wrapper.uri())[1])["exports"]
    assert {export["export-name"]: export["export-size"] for export in listed} == {
        "disk.img": image.stat().st_size,
        "other.img": other.stat().st_size,
    }
    for name in ("disk.img", "other.img"):
        (about,) = json.loads(run("nbdinfo", "--json", wrapper.uri(name))[1])["exports"]
        assert about["description"] == f"disk image {name}"


@pytest.mark.parametrize("readonly", [[], ["--readonly"]])
def test_an_export_is_described_as_xnbd_server_describes_it(
    start_wrapper: StartWrapper, start: Start, image: Path, readonly: List[str]
) -> None:
    wrapper = start_wrapper("--imgfile", image, *readonly)
    assert details(wrapper.uri("disk.img")) == details(start("--target", *readonly, image).uri)


def test_images_of_one_wrapper_are_read_each_by_its_name(wrapper: Wrapper, image: Path, other: Path) -> None:
    with wrapper.client("disk.img") as first, wrapper.client("other.img") as second:
        assert first.read(1 * MIB, 5000) == image.read_bytes()[1 * MIB :][:5000]
        assert second.read(1 * MIB, 5000) == other.read_bytes()[1 * MIB :][:5000]


def test_unknown_and_empty_names_are_unknown_among_several(wrapper: Wrapper) -> None:
    with wrapper.connect() as client:
        client.greet()
        for name in ("nothing", "", "disk.im", "disk.img\0", "DISK.IMG"):
            assert client.go(name)[-1][0] == ERR_UNKNOWN
        assert client.go("disk.img")[-1][0] == ACK
        assert client.works()


def test_the_empty_name_is_the_only_export(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image)
    with wrapper.client("") as client:
        assert client.size == image.stat().st_size
        assert client.works()


def test_no_export_at_all_is_no_trouble(start_wrapper: StartWrapper) -> None:
    wrapper = start_wrapper()
    with wrapper.connect() as client:
        client.greet()
        assert client.option(LIST) == [(ACK, b"")]
        assert client.go("")[-1][0] == ERR_UNKNOWN


def test_odd_names_can_be_listed_and_chosen(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper()
    wrapper.ctl("--add-target", ODD_NAME, image)
    with wrapper.connect() as client:
        client.greet()
        (kind, payload), _ = client.option(LIST)
        assert kind == REP_SERVER
        assert ODD_NAME.encode() in payload
        assert client.go(ODD_NAME)[-1][0] == ACK
        assert client.works()


def test_a_grown_image_has_its_new_size_for_new_clients(wrapper: Wrapper, other: Path) -> None:
    with wrapper.client("other.img") as before:
        with open(other, "ab") as file:
            file.write(bytes(MIB))
        with wrapper.client("other.img") as after:
            assert (before.size, after.size) == (4 * MIB, 5 * MIB)
            assert after.read(5 * MIB - 10, 10) == bytes(10)
            assert before.works()


def test_a_missing_image_is_an_unavailable_export_and_the_next_choice_works(wrapper: Wrapper, other: Path) -> None:
    other.unlink()
    with wrapper.connect() as client:
        client.greet()
        kind, message = client.go("other.img", option=INFO)[-1]
        assert (kind, message) == (ERR_UNKNOWN, b"this disk is not available at the moment")
        assert client.go("disk.img")[-1][0] == ACK
    wrapper.wait_for_log("No such file")


def test_requests_sent_along_with_the_choice_are_answered(wrapper: Wrapper, image: Path) -> None:
    with wrapper.connect() as client:
        client.greet()
        client.send(pack_option(GO, go_data("disk.img")) + pack_request(READ, 0, 512) + pack_request(FLUSH, 0, 0))
        while client.receive_option_reply()[1] != ACK:
            pass
        assert client.simple_reply(512) == (0, 1, image.read_bytes()[:512])
        assert client.simple_reply()[0] == 0


# What was negotiated reaches the server


def test_block_status_and_structured_replies(wrapper: Wrapper, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.img"
    sparse.touch()
    with open(sparse, "r+b") as file:
        file.truncate(8 * MIB)
        file.seek(2 * MIB)
        file.write(b"x" * MIB)
    wrapper.ctl("--add-target", "sparse", sparse)
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(wrapper.uri("sparse"))
    extents: List[int] = []

    def on_extents(_context: str, _offset: int, entries: List[int], _error: object) -> int:
        extents.extend(entries)
        return 0

    handle.block_status(8 * MIB, 0, on_extents)
    assert extents == [2 * MIB, 3, MIB, 0, 5 * MIB, 3]
    assert handle.get_structured_replies_negotiated()
    assert handle.pread(2, 2 * MIB - 1) == b"\0x"
    handle.shutdown()


@pytest.mark.parametrize("structured", [False, True])
def test_sessions_are_plain_or_structured_as_agreed(wrapper: Wrapper, image: Path, structured: bool) -> None:
    with wrapper.client("disk.img", structured=structured) as client:
        if structured:
            client.request(READ, 7, 9)
            assert client.chunks()[0].payload[8:] == image.read_bytes()[7:16]
        else:
            assert client.read(7, 9) == image.read_bytes()[7:16]


def test_readonly_disconnects_who_writes(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--readonly")
    content = image.read_bytes()
    with wrapper.client("disk.img") as client:
        client.request(1, 0, 1, data=b"x")
        assert client.closed()
    assert image.read_bytes() == content


def test_each_client_of_a_cow_wrapper_has_a_disk_of_its_own(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--cow")
    content = image.read_bytes()
    with wrapper.client("disk.img") as first, wrapper.client("disk.img") as second:
        assert first.write(0, b"changed") == 0
        assert first.read(0, 7) == b"changed"
        assert second.read(0, 7) == content[:7]
        assert not first.flags & 1 << 8, "clients would take several connections for one disk"
    assert image.read_bytes() == content


# Many at once


def test_qemu_img_and_nbdcopy_on_two_exports_at_once(
    wrapper: Wrapper, image: Path, other: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / "copy1", tmp_path / "copy2"]
    commands = [
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", wrapper.uri("disk.img"), copies[0]],
        ["nbdcopy", "--connections=4", wrapper.uri("other.img"), copies[1]],
    ]
    processes = [subprocess.Popen([str(word) for word in command]) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    size = image.stat().st_size
    assert copies[0].read_bytes()[:size] == image.read_bytes()
    assert copies[1].read_bytes() == other.read_bytes()


def test_nbdcopy_into_an_export_by_several_connections(wrapper: Wrapper, other: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(4 * MIB))
    run("nbdcopy", "--connections=4", source, wrapper.uri("other.img"))
    assert other.read_bytes() == source.read_bytes()


def test_fio_verifies_what_four_connections_wrote(wrapper: Wrapper) -> None:
    job = ["--name=verify", "--ioengine=nbd", f"--uri={wrapper.uri('other.img')}", "--rw=randwrite", "--bs=4k-64k"]
    job += ["--iodepth=8", "--size=1M", "--numjobs=4", "--offset_increment=1M"]
    run("fio", *job, "--verify=crc32c", "--verify_state_save=0", timeout=90)


def test_fifty_clients_at_once_are_all_served(wrapper: Wrapper, image: Path) -> None:
    content, failures = image.read_bytes(), []
    everybody = threading.Barrier(50, timeout=60)

    def use(number: int) -> None:
        try:
            with wrapper.client("disk.img") as client:
                assert client.read(number * 1000, 1000) == content[number * 1000 :][:1000]
                everybody.wait()  # all are connected now
                assert client.works()
        except BaseException as error:
            failures.append(error)
            everybody.abort()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_burst_of_connections_is_accepted_without_loss(wrapper: Wrapper) -> None:
    sockets = [socket.create_connection(("127.0.0.1", wrapper.port), timeout=60) for _ in range(200)]
    for sock in sockets:
        assert sock.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        sock.close()
    wait_until(lambda: not wrapper.servers(), "the ends of all negotiations")
    with wrapper.client("disk.img") as client:
        assert client.works()


# Who is who


def test_titles_and_log_lines_tell_who_serves_what(wrapper: Wrapper) -> None:
    with wrapper.connect() as client:
        peer = f"127.0.0.1:{client.sock.getsockname()[1]}"
        client.greet()
        wait_until(lambda: len(wrapper.servers()) == 1, "the client's process")
        (pid,) = wrapper.servers()
        wait_until(lambda: title_of(pid) == f"xnbd-wrapper: negotiating with {peer}", "the title")
        assert client.go("disk.img")[-1][0] == ACK
        assert client.works()
        assert title_of(pid) == f"xnbd-server: serving {peer} disk.img"
        wrapper.wait_for_log(f"{peer}: export 'disk.img', served by process {pid}")
        wrapper.wait_for_log(f"xnbd-server[{pid}] INFO: {peer}: connected")
    assert title_of(wrapper.process.pid) == f"xnbd-wrapper: listening on 127.0.0.1:{wrapper.port}"


def test_a_server_keeps_of_the_wrapper_what_an_upgrade_needs_and_nothing_else(wrapper: Wrapper) -> None:
    def files(pid: int) -> str:
        return run("ls", "-l", f"/proc/{pid}/fd")[1]

    with wrapper.client("disk.img") as client:
        assert client.works()
        (pid,) = wrapper.servers()
        sockets = [line for line in files(pid).splitlines() if "socket:" in line]
        assert len(sockets) == 3, "the client's, that of reports, and the one where the client is offered"
        assert str(wrapper.database) not in files(pid)


def test_logpath_takes_the_servers_lines_too(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "file.log"
    where = ["--lport", "0", "--laddr", "127.0.0.1", "--socket", str(tmp_path / "c"), "--dbpath", str(tmp_path / "d")]
    with subprocess.Popen(
        [*program("xnbd-wrapper"), *where, "--imgfile", str(image), "--logpath", str(log)]
    ) as process:
        try:
            wait_until(lambda: log.exists() and "serving 1 export " in log.read_text(), "the start")
            port = int(log.read_text().split()[-1].rpartition(":")[2])
            with RawClient(socket.create_connection(("127.0.0.1", port), timeout=60)) as client:
                client.negotiate("disk.img")
                assert client.works()
                log.rename(tmp_path / "moved.log")
            wait_until(lambda: log.exists() and "xnbd-server[" in log.read_text(), "a line in the new file")
        finally:
            process.terminate()
        assert process.wait(60) == 0
    assert "xnbd-server[" in (tmp_path / "moved.log").read_text()
