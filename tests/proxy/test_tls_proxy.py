"""A proxy whose origin speaks TLS: its data, its moves, its restarts, and what it tells of all that."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path
from typing import List

import pytest
from caching import BLOCK, CacheFiles, Reading, bgctl, connect, query
from certificates import Certificates, copy
from conftest import MIB, Start, StartWrapper
from lying_origin import LyingOrigin, Visitor, simple
from model import Model, read_all
from mounts import small_tmpfs
from origin_programs import OriginProgram
from rawclient import DISC
from relay import Relay
from server_process import Server, children_of, run, wait_until
from tls_visitor import TlsVisitor, grant_tls, server_context

SIZE = 6 * MIB + 512


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Noise, with zeros from 1 MiB to 2 MiB."""
    content = bytearray(random.Random(51).randbytes(SIZE))
    content[MIB : 2 * MIB] = bytes(MIB)
    return bytes(content)


@pytest.fixture
def image(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    return path


@pytest.fixture
def own_server(start: Start, image: Path, certificates: Certificates) -> Server:
    """Our own server as the origin."""
    return start("--target", "--readonly", "--tls", certificates.server, image, tcp=True)


def uri_of(port: int, directory: Path, *parameters: str) -> str:
    return "&".join([f"nbds://127.0.0.1:{port}/?tls-certificates={directory}", *parameters])


# The data


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_every_block_comes_once_and_is_right(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path, kind: str
) -> None:
    origin = OriginProgram(kind, image, tmp_path, certificates.server)
    try:
        proxy = start(*files.arguments(origin.tls_uri(f"tls-certificates={certificates.alice}")))
        check_full_read(proxy, files, disk)
        proxy.stop()
        assert files.image.read_bytes() == disk
        assert origin.is_alive(), origin.log()
    finally:
        origin.stop()


def check_full_read(proxy: Server, files: CacheFiles, disk: bytes) -> None:
    copied = files.image.parent / "copy.img"
    run("nbdcopy", proxy.uri, copied)
    assert copied.read_bytes() == disk
    assert query(files.control)["counters"]["bytes_fetched"] <= 1.01 * SIZE


def test_our_own_server_is_an_origin_whose_holes_are_not_fetched(
    start: Start, own_server: Server, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path
) -> None:
    fd = os.open(image, os.O_RDWR)
    os.truncate(fd, MIB)
    os.truncate(fd, SIZE)
    os.close(fd)
    proxy = start(*files.arguments(uri_of(own_server.port, certificates.alice)))
    bgctl("--cache-all", files.control)
    assert query(files.control)["counters"]["bytes_fetched"] <= MIB
    assert read_all(connect(proxy.uri)) == disk[:MIB] + bytes(SIZE - MIB)


def test_the_model_holds_over_tls(
    start: Start, own_server: Server, tmp_path: Path, files: CacheFiles, certificates: Certificates,
    image: Path, disk: bytes, seed: int,
) -> None:  # fmt: skip
    """Two servers on one cache, with a copy of everything under way."""
    uri, second = uri_of(own_server.port, certificates.alice), tmp_path / "control2"
    proxies = [start(*files.arguments(uri)), start(*files.arguments(uri, control=second))]
    clients = [connect(proxies[number % 2].uri, structured=number != 0) for number in range(4)]
    model = Model(clients, disk, random.Random(seed))
    model.play(20)
    bgctl("--cache-all", second)
    model.run(20)
    for client in clients:
        client.shutdown()
    for proxy in proxies:
        proxy.stop()
    assert image.read_bytes() == disk
    assert files.image.read_bytes()[:SIZE] == model.content


@pytest.mark.root(reason="file systems are mounted by root only")
def test_what_finds_no_room_in_the_cache_goes_to_those_who_wait(
    start: Start, own_server: Server, tmp_path: Path, certificates: Certificates, disk: bytes
) -> None:
    with small_tmpfs(tmp_path / "small", "4m") as directory:
        proxy = start(*CacheFiles(directory).arguments(uri_of(own_server.port, certificates.alice)))
        assert read_all(connect(proxy.uri)) == disk
        proxy.wait_for_log("no room for the cache image")
        proxy.stop()


# Connections that break


def test_a_connection_that_is_cut_in_the_middle_of_records_is_taken_up_again(
    start: Start, own_server: Server, files: CacheFiles, certificates: Certificates, disk: bytes
) -> None:
    with Relay(own_server.port) as relay:
        proxy = start(*files.arguments(uri_of(relay.port, certificates.alice), "--readahead", "0"))
        client, rng = connect(proxy.uri), random.Random(7)
        for offset in range(0, SIZE, MIB):
            relay.cut_after(rng.choice((1, 3000, 20_000, 200_000)))
            length = min(MIB, SIZE - offset)
            assert client.pread(length, offset) == disk[offset : offset + length]
        proxy.stop()


def test_a_proxy_goes_on_after_its_origin_was_cut_in_a_record(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes
) -> None:
    """The first connection with a request brings half a record, the second one all of it."""
    halves: List[int] = []

    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        secure = TlsVisitor(visitor, server_context(certificates.server)).shake_hands()
        secure.haggle(SIZE, structured=False)
        while True:
            asked = secure.request()
            reply = simple(asked.cookie, disk[asked.offset : asked.offset + asked.length])
            if halves:
                secure.send(reply)
                continue
            halves.append(asked.offset)
            record = secure.records(reply[:4000])
            secure.sock.sendall(record[: len(record) // 2])
            return

    with LyingOrigin(tmp_path / "s", behave) as origin:
        uri = f"nbds+unix:///?socket={origin.path}&tls-certificates={certificates.alice}"
        proxy = start(*files.arguments(uri, "--readahead", "0"))
        client = connect(proxy.uri)
        assert client.pread(4 * BLOCK, 0) == disk[: 4 * BLOCK]
        client.shutdown()
        proxy.stop()


def test_trouble_with_certificates_is_told_at_reconnection_and_new_files_count_at_once(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path
) -> None:
    mine = copy(certificates.alice, tmp_path / "mine")
    origin = OriginProgram("nbdkit", image, tmp_path, certificates.server)
    try:
        proxy = start(*files.arguments(origin.tls_uri(f"tls-certificates={mine}"), "--readahead", "0"))
        client = connect(proxy.uri)
        assert client.pread(BLOCK, 0) == disk[:BLOCK]
        shutil.copy(certificates.other_authority.certificate, mine / "ca-cert.pem")
        second = connect(proxy.uri)  # another worker's, which has no connection yet
        reading = Reading(second, 2 * MIB, BLOCK)
        proxy.wait_for_log("its certificate is not of an authority in")
        assert query(files.control)["origin"]["error"].startswith("its certificate is not of an authority in")
        shutil.copy(certificates.authority.certificate, mine / "ca-cert.pem")
        assert reading.wait() == 0
        for one in (client, second):
            one.shutdown()
        proxy.stop()
    finally:
        origin.stop()


def test_a_certificate_of_ours_that_expires_soon_is_a_warning_until_it_is_renewed(
    start: Start, own_server: Server, tmp_path: Path, files: CacheFiles, certificates: Certificates
) -> None:
    mine = certificates.authority.client(tmp_path / "soon", "alice", days=9)
    proxy = start(*files.arguments(uri_of(own_server.port, mine)))
    assert f"WARNING: {mine}/client-cert.pem expires on " in proxy.log()
    (warning,) = query(files.control)["warnings"]
    assert warning.startswith(f"{mine}/client-cert.pem expires on ")
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(certificates.alice / name, mine)
    assert query(files.control)["warnings"] == []


def test_a_worker_that_is_stopped_takes_leave_of_its_origin(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes
) -> None:
    """With NBD_CMD_DISC and in TLS; its client is still there."""
    farewells: List[bool] = []

    def behave(visitor: Visitor) -> None:
        grant_tls(visitor)
        secure = TlsVisitor(visitor, server_context(certificates.server)).shake_hands()
        secure.haggle(SIZE, structured=False)
        answered = 0
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", secure.receive(28))
            if command == DISC:
                break
            secure.send(simple(cookie, disk[offset : offset + length]))
            answered += 1
        if secure.ends_politely() and answered:
            farewells.append(True)

    with LyingOrigin(tmp_path / "s", behave) as origin:
        uri = f"nbds+unix:///?socket={origin.path}&tls-certificates={certificates.alice}"
        proxy = start(*files.arguments(uri, "--readahead", "0"))
        client = connect(proxy.uri)
        assert client.pread(BLOCK, 0) == disk[:BLOCK]
        proxy.stop()
        wait_until(lambda: farewells, "the worker's farewell")


# Moving, and starting again


def test_an_origin_that_begins_to_speak_tls_keeps_its_cache(
    start: Start, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path, tmp_path: Path
) -> None:
    port = start("--target", "--readonly", "--tls", certificates.server, "--tls-optional", image, tcp=True).port
    plain, secure = f"nbd://127.0.0.1:{port}/", uri_of(port, certificates.alice)
    proxy = start(*files.arguments(plain))
    assert connect(proxy.uri).pread(BLOCK, 0) == disk[:BLOCK]
    assert bgctl("--reconnect", files.control, secure)[1] == f"the origin is {secure} now\n"
    assert query(files.control)["origin"]["address"] == secure
    proxy.stop()

    proxy = start(*files.arguments(plain))  # the unit file was forgotten: not back to the clear
    assert query(files.control)["origin"]["address"] == secure
    proxy.stop()

    moved = copy(certificates.alice, tmp_path / "elsewhere")
    again = uri_of(port, moved)
    proxy = start(*files.arguments(again))
    assert query(files.control)["origin"]["address"] == again
    assert query(files.control)["blocks"]["cached"]
    assert read_all(connect(proxy.uri)) == disk
    proxy.stop()
    proxy = start(*files.arguments(plain))
    assert query(files.control)["origin"]["address"] == again
    proxy.stop()


def test_a_move_to_an_origin_that_cannot_be_trusted_is_refused(
    start: Start, own_server: Server, files: CacheFiles, certificates: Certificates, image: Path, tmp_path: Path
) -> None:
    uri = uri_of(own_server.port, certificates.alice)
    proxy = start(*files.arguments(uri))
    other = start("--target", "--readonly", "--tls", certificates.server_of_other, image, tcp=True)
    there = uri_of(other.port, certificates.alice)
    status, out, err = bgctl("--reconnect", files.control, there, check=False)
    assert (status, out) == (1, "")
    assert "its certificate is not of an authority in" in err
    assert err.endswith("; nothing was changed\n")
    assert query(files.control)["origin"]["address"] == uri
    proxy.stop()


def test_relative_paths_hold_after_the_directory_was_changed(
    start: Start, own_server: Server, files: CacheFiles, certificates: Certificates, disk: bytes
) -> None:
    directory = os.path.relpath(certificates.alice, files.image.parent)
    proxy = start(*files.arguments(uri_of(own_server.port, Path(directory))), prefix=["env", "-C", files.image.parent])
    assert query(files.control)["origin"]["address"] == uri_of(own_server.port, certificates.alice)
    assert read_all(connect(proxy.uri)) == disk


def test_a_proxy_in_the_clear_loads_nothing_of_tls(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path
) -> None:
    port = start("--target", "--readonly", "--tls", certificates.server, "--tls-optional", image, tcp=True).port
    for uri, loaded in ((f"nbd://127.0.0.1:{port}/", False), (uri_of(port, certificates.alice), True)):
        proxy = start(*files.arguments(uri, control=tmp_path / f"control{loaded}"))
        client = connect(proxy.uri)
        client.pread(BLOCK, MIB if loaded else 0)
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in [proxy.pid, *children_of(proxy.pid)]]
        assert any("libssl" in text for text in maps) == loaded
        client.shutdown()
        proxy.stop()


# What is secret


def test_keys_are_neither_in_the_log_nor_in_titles_nor_in_answers(
    start: Start, tmp_path: Path, files: CacheFiles, certificates: Certificates, disk: bytes, image: Path
) -> None:
    keys = certificates.server_psk / "keys.psk"
    secrets = [line.partition(":")[2] for line in keys.read_text().split()]
    origin = OriginProgram("nbdkit", image, tmp_path, certificates.server_psk)
    try:
        proxy = start(*files.arguments(origin.tls_uri(f"tls-psk-file={keys}", user="alice")))
        assert read_all(connect(proxy.uri)) == disk
        told = proxy.log() + bgctl("--query", files.control)[1] + bgctl("--query", "--json", files.control)[1]
        for pid in [proxy.pid, *children_of(proxy.pid)]:
            told += Path(f"/proc/{pid}/cmdline").read_text()
        assert str(keys) in told
        assert not [secret for secret in secrets if secret in told]
        proxy.stop()
    finally:
        origin.stop()


# The wrapper


def test_the_wrappers_proxies_have_origins_that_speak_tls(
    start_wrapper: StartWrapper, own_server: Server, files: CacheFiles, certificates: Certificates, disk: bytes
) -> None:
    uri, other = uri_of(own_server.port, certificates.alice), uri_of(own_server.port, certificates.bob)
    wrapper = start_wrapper()
    wrapper.ctl("--add-proxy", "far", uri, files.image, files.bitmap, files.control)
    assert wrapper.stored()["far"]["remote_uri"] == uri
    assert uri in wrapper.ctl("--list")
    client = connect(wrapper.uri("far"))
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert f"the origin is {other} now" in wrapper.ctl("--bgctl-reconnect", "far", other)
    assert wrapper.stored()["far"]["remote_uri"] == other
    assert client.pread(BLOCK, 3 * MIB) == disk[3 * MIB : 3 * MIB + BLOCK]
    client.shutdown()
