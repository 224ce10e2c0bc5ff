"""A proxy of an image in Ceph: a real cluster, its loss, its rights and its holes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import List

import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, ask, bgctl, connect, query
from conftest import MIB, Start, StartWrapper
from launch import fails
from ledger import Crowd, Ledger
from model import Model, read_all
from server_process import PYTHON, Server, command, run, title_of, wait_until
from shared_ceph import POOL, READER, READING, Image, SharedCeph

SIZE = 13 * MIB + 1234
HOLE, HOLE_END = 4 * MIB, 8 * MIB
"""The second object of the image is not there."""


@pytest.fixture(scope="module")
def disk() -> bytes:
    noise = random.Random(23).randbytes(SIZE)
    return noise[:HOLE] + bytes(HOLE_END - HOLE) + noise[HOLE_END:]


@pytest.fixture(scope="module")
def image(ceph: SharedCeph, disk: bytes) -> Image:
    """For tests that leave it as it is."""
    return ceph.make(disk)


@pytest.fixture
def proxy(start: Start, files: CacheFiles, image: Image) -> Server:
    return start(*files.arguments(image.uri()))


def test_two_servers_on_one_cache_agree_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, proxy: Server, image: Image, disk: bytes, seed: int
) -> None:
    rng = random.Random(seed)
    second = tmp_path / "control2"
    other = start(*files.arguments(image.uri(), "--fetch-size", rng.choice(("4K", "64K", "256K")), control=second))
    clients = [connect(server.uri) for server in (proxy, other, proxy, other)]
    model = Model(clients, disk, rng)
    model.play(15)
    assert ask(second, "cache-all", wait=False)["done"]
    model.run(15)
    for client in clients:
        client.shutdown()
    for server in (proxy, other):
        server.stop()
    assert files.is_clean()
    again = start(*files.arguments(image.uri()))
    assert read_all(connect(again.uri)) == model.content


def test_a_switch_under_load_is_seen_by_nobody(
    ceph: SharedCeph, files: CacheFiles, proxy: Server, disk: bytes, seed: int
) -> None:
    ledger = Ledger(disk[: SIZE // 512 * 512])
    crowd = Crowd([proxy.uri], 5, ledger, random.Random(seed))
    crowd.wait_for(50)
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    with ceph.stalled():
        crowd.wait_for(50)
        crowd.finish()
        assert query(files.control)["mode"] == "target"
        ledger.check_files(files.image, files.bitmap)
        assert read_all(connect(proxy.uri))[: len(ledger.base)] == ledger.base


def test_a_wrapper_serves_it(start_wrapper: StartWrapper, files: CacheFiles, image: Image, disk: bytes) -> None:
    wrapper = start_wrapper()
    wrapper.ctl("--add-proxy", "disk", image.uri(), files.image, files.bitmap, files.control)
    client = connect(wrapper.uri("disk"))
    assert read_all(client) == disk
    assert image.uri() in wrapper.ctl("--list")
    wrapper.ctl("--bgctl-reconnect", "disk", image.uri(client="admin"))
    assert "id=admin" in wrapper.ctl("--bgctl-query", "disk")
    client.shutdown()


def test_an_upgrade_under_a_client_is_not_noticed(files: CacheFiles, proxy: Server, disk: bytes) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    bgctl("--upgrade", files.control)
    assert read_all(client) == disk


def test_a_server_of_one_client_reads_it(files: CacheFiles, tmp_path: Path, image: Image, disk: bytes) -> None:
    client, log = nbd.NBD(), tmp_path / "inetd.log"
    client.connect_command(command(*files.arguments(image.uri(), "--inetd", "--logpath", log)))
    assert read_all(client) == disk
    client.shutdown()
    wait_until(files.is_clean, "the end of the server")
    assert " ERROR: " not in log.read_text()


def test_a_proxy_moves_between_an_nbd_server_and_an_image(
    start: Start, tmp_path: Path, files: CacheFiles, image: Image, disk: bytes
) -> None:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    far = start("--target", "--readonly", path)
    client = connect(start(*files.arguments(far.uri, "--readahead", "0")).uri)
    client.pread(1, 0)
    assert files.cached() == [0]
    bgctl("--reconnect", files.control, image.uri())
    client.pread(1, BLOCK)  # what the worker does first after a move is still as before
    client.pread(1, MIB)
    assert files.cached() == [0, 1, *range(256, 272)]
    bgctl("--reconnect", files.control, far.uri)
    client.pread(1, 2 * MIB)
    bgctl("--reconnect", files.control, image.uri())
    assert read_all(client) == disk


def test_it_stands_in_for_an_nbd_server(
    start: Start, tmp_path: Path, files: CacheFiles, image: Image, disk: bytes
) -> None:
    path = tmp_path / "origin.img"
    path.write_bytes(disk)
    far = start("--target", "--readonly", path)
    client = connect(start(*files.arguments(far.uri, "--origin", image.uri())).uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    far.stop()
    assert read_all(client) == disk


def test_an_image_of_another_size_is_refused_on_the_way(ceph: SharedCeph, files: CacheFiles, proxy: Server) -> None:
    answer = ask(files.control, "reconnect", uri=ceph.make(bytes(MIB)).uri())
    assert f"has {MIB} bytes, not {SIZE}" in answer["error"]


def test_small_requests_become_few_larger_reads(start: Start, files: CacheFiles, image: Image, disk: bytes) -> None:
    client = connect(start(*files.arguments(image.uri(), "--readahead", "0")).uri)
    client.pwrite(b"w" * BLOCK, 10 * BLOCK)
    assert client.pread(BLOCK, 3 * BLOCK) == disk[3 * BLOCK : 4 * BLOCK]
    assert files.cached() == list(range(11))
    assert client.pread(BLOCK, 12 * BLOCK) == disk[12 * BLOCK : 13 * BLOCK]
    assert files.cached() == list(range(16))
    assert client.pread(BLOCK, 10 * BLOCK) == b"w" * BLOCK


@pytest.mark.parametrize("options", [["--stripe-unit", "4096", "--stripe-count", "3"], ["--object-size", "8K"]])
def test_all_of_a_striped_image_and_of_one_with_small_objects_comes(
    start: Start, ceph: SharedCeph, files: CacheFiles, disk: bytes, options: List[str]
) -> None:
    content = disk[3 * MIB : 5 * MIB] + disk[:100]
    proxy = start(*files.arguments(ceph.make(content, *options).uri()))
    assert read_all(connect(proxy.uri)) == content
    bgctl("--cache-all", files.control)
    assert files.image.read_bytes()[: len(content)] == content


# Who may, and what cannot be had


PROBE = """
import sys
from xnbd.origin.address import parse_origin
from xnbd.origin.base import OriginLost
from xnbd.origin.probe import probe
for uri in sys.argv[1:]:
    try:
        probe(parse_origin(uri), timeout=1)
    except OriginLost as lost:
        print(lost.refused, str(lost).replace(f"origin {uri}: ", ""))
"""


def probed(*uris: str) -> List[str]:
    """What a server's start finds out, which takes as long for all of them as a server for one."""
    return run(PYTHON, "-W", "error", "-c", PROBE, *uris)[1].splitlines()


def test_what_cannot_be_had_is_told(tmp_path: Path, ceph: SharedCeph, image: Image) -> None:
    uri, name = image.uri(), image.name.rpartition("/")[2]
    keyring = tmp_path / "keyring"
    ceph.run("ceph-authtool", "-C", keyring, "--gen-key", "-n", f"client.{READER}")
    expected = {
        uri.replace(f"{POOL}/", "nopool/", 1): "True there is no pool nopool",
        uri.replace(name, "nobody"): f"True there is no image nobody in {POOL}",
        uri.replace(name, f"space/{name}"): f"True there is no image {name} in {POOL}/space",
        uri.replace("@snap", "@other"): "True the image has no snapshot other",
        uri.replace(f"id={READER}", "id=nobody"): "True the cluster does not know client.nobody, or not by its key",
        f"rbd:{POOL}/x@y?conf=/nowhere.conf": "True /nowhere.conf cannot be read: No such file or directory",
        f"rbd:{POOL}/x@y?conf=/etc/passwd": "True /etc/passwd is no configuration of Ceph",
        image.uri(
            conf=ceph.configure(tmp_path / "wrong.conf", keyring=keyring)
        ): f"True the cluster does not know client.{READER}, or not by its key",
        image.uri(
            conf=ceph.configure(tmp_path / "keyless.conf", keyring=tmp_path / "no")
        ): f"True there is no keyring with a key of client.{READER} that can be read",
        image.uri(
            conf=ceph.add_client("poor", "mon", "allow r", where=tmp_path), client="poor"
        ): "True client.poor has no right to it",
    }
    assert probed(*expected) == list(expected.values())


def test_a_start_ends_with_that_in_one_line(tmp_path: Path, ceph: SharedCeph, image: Image) -> None:
    uri = image.uri("@other")
    told = fails(*CacheFiles(tmp_path, "one").arguments(uri))
    assert told == (1, f"xnbd-server: origin {uri}: the image has no snapshot other\n")
    uri = image.uri(conf=ceph.configure(tmp_path / "away.conf", mon_host="[v2:127.0.0.1:1/0]"))
    told = fails(*CacheFiles(tmp_path, "two").arguments(uri, "--connect-timeout", "1"))
    assert told[1].startswith(f"xnbd-server: origin {uri}: no answer ")
    assert "within 1 s; a proxy's first start needs its origin" in told[1]


def test_the_key_is_seen_nowhere(ceph: SharedCeph, files: CacheFiles, image: Image, start: Start) -> None:
    keyring = ceph.configuration.with_name("keyring").read_text()
    key = keyring.partition(f"[client.{READER}]")[2].partition("key = ")[2].splitlines()[0]
    proxy = start(*files.arguments(image.uri(), "--verbose"))
    client = connect(proxy.uri)
    client.pread(BLOCK, 0)
    wait_until(proxy.busy_workers, "the worker's title")
    processes = [proxy.pid, *proxy.workers()]
    seen = [proxy.log(), str(query(files.control)), *map(title_of, processes)]
    seen.append(files.state.read_bytes().decode("latin1"))
    assert len(key) > 30
    assert not any(key in text for text in seen)


def test_the_tools_variables_are_heeded(start: Start, files: CacheFiles, ceph: SharedCeph, image: Image) -> None:
    """CEPH_CONF and CEPH_ARGS."""
    uri = image.uri().partition("?")[0] + f"?id={READER}"
    keyring = ceph.configuration.parent / "keyring"
    variables = {"CEPH_CONF": str(ceph.configuration), "CEPH_ARGS": f"--keyring {keyring}"}
    assert connect(start(*files.arguments(uri), env=variables).uri).pread(1, 0)


def test_without_the_binding_it_is_said_what_to_install(tmp_path: Path, files: CacheFiles, image: Image) -> None:
    (tmp_path / "rados.py").write_text("raise ImportError\n")
    told = fails(*files.arguments(image.uri()), prefix=["env", f"PYTHONPATH={tmp_path}"])[1]
    assert "apt-get install python3-rbd (a venv sees it if it was made with --system-site-packages" in told
    assert told.count("\n") == 1


# Its loss


def test_its_silence_is_told_and_its_return_ends_the_wait(
    ceph: SharedCeph, start: Start, files: CacheFiles, image: Image, disk: bytes
) -> None:
    proxy = start(*files.arguments(image.uri(), "--origin-timeout", "1"))
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    with ceph.stalled():
        assert Reading(client, 3 * MIB, BLOCK).wait() == 5
        proxy.wait_for_log("silent for 1 s with ")
        assert client.pread(BLOCK, 0) == disk[:BLOCK]
    wait_until(lambda: Reading(client, 3 * MIB, BLOCK).wait() == 0, "the origin's return")
    assert client.pread(BLOCK, 3 * MIB) == disk[3 * MIB : 3 * MIB + BLOCK]
    proxy.wait_for_log(f"origin {image.uri()}: answers again")


def test_a_client_that_the_cluster_has_shut_out_comes_back(
    start: Start, tmp_path: Path, ceph: SharedCeph, files: CacheFiles, image: Image, disk: bytes
) -> None:
    """As happens to clients that were away for too long: reads wait, and go on by another connection."""
    conf = ceph.add_client("exile", *READING, where=tmp_path)
    proxy = start(*files.arguments(image.uri(conf=conf, client="exile")))
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    ceph.shut_out("exile")
    assert client.pread(BLOCK, 3 * MIB) == disk[3 * MIB : 3 * MIB + BLOCK]
    assert "the cluster has shut this client out; " in proxy.log()


def test_cached_blocks_are_served_while_the_cluster_is_away(
    start: Start, tmp_path: Path, ceph: SharedCeph, files: CacheFiles, image: Image, disk: bytes
) -> None:
    conf = ceph.configure(tmp_path / "own.conf")
    proxy = start(*files.arguments(image.uri(conf=conf)))
    connect(proxy.uri).pread(1, 0)
    proxy.stop()
    ceph.configure(conf, mon_host="[v2:127.0.0.1:1/0]")
    again = start(*files.arguments(image.uri(conf=conf), "--connect-timeout", "1"))
    again.wait_for_log("cached blocks are served, the others wait")
    client = connect(again.uri)
    assert client.pread(64 << 10, 0) == disk[: 64 << 10]
    reading = Reading(client, 3 * MIB, BLOCK)
    ceph.configure(conf)
    assert reading.content() == disk[3 * MIB : 3 * MIB + BLOCK]


# Holes


def test_what_is_not_there_is_not_transferred(files: CacheFiles, proxy: Server, disk: bytes) -> None:
    bgctl("--cache-all", files.control)
    assert files.image.read_bytes()[:SIZE] == disk
    assert query(files.control)["counters"]["bytes_fetched"] == SIZE - (HOLE_END - HOLE)
    assert files.image.stat().st_blocks * 512 <= SIZE - (HOLE_END - HOLE) + MIB


@pytest.mark.parametrize("features", ["layering", "layering,exclusive-lock,object-map,fast-diff"])
def test_a_clone_has_its_parents_data_and_its_own_holes(
    ceph: SharedCeph, start: Start, files: CacheFiles, disk: bytes, features: str
) -> None:
    """With a map of the objects, and without one."""
    clone = ceph.make(disk).clone("--image-feature", features)
    clone.write(b"c" * BLOCK, HOLE_END)
    clone.snap("snap")
    start(*files.arguments(clone.uri()))
    bgctl("--cache-all", files.control)
    expected = disk[:HOLE_END] + b"c" * BLOCK + disk[HOLE_END + BLOCK :]
    assert files.image.read_bytes()[:SIZE] == expected
    assert query(files.control)["counters"]["bytes_fetched"] == SIZE - (HOLE_END - HOLE)


def test_zeros_that_are_read_become_holes_of_the_cache(files: CacheFiles, proxy: Server) -> None:
    client = connect(proxy.uri)
    assert client.pread(2 * MIB, HOLE + MIB) == bytes(2 * MIB)
    assert set(range((HOLE + MIB) // BLOCK, (HOLE + 3 * MIB) // BLOCK)) <= set(files.cached())
    assert files.image.stat().st_blocks == 0
