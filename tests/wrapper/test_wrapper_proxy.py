"""Proxy exports of a wrapper: several servers on one cache, from a real origin."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import List, Sequence

import pytest
from conftest import MIB, Start, StartWrapper
from rawclient import RawClient
from server_process import Server, children_of, run, wait_until
from wrapper_process import Wrapper, fails, program, wait_for_end

from xnbd.system.sockets import is_listening

SIZE = 8 * MIB


class Far:
    """A wrapper with the proxy export ``far`` of a real origin's disk, whose content is *content*."""

    def __init__(
        self, wrapper: Wrapper, origin: Server, content: bytes, directory: Path, *, where: Sequence[object] = ()
    ) -> None:
        """*where* is the origin's address, if it is not its TCP port."""
        self.wrapper = wrapper
        self.origin = origin
        self.content = content
        self.cache, self.bitmap, self.control = (directory / name for name in ("cache", "bitmap", "far.ctl"))
        files = [self.cache, self.bitmap, self.control]
        wrapper.ctl("--add-proxy", "far", *(where or ["127.0.0.1", origin.port]), *files)

    def client(self, **features: bool) -> RawClient:
        return self.wrapper.client("far", **features)


@pytest.fixture
def far(start_wrapper: StartWrapper, start: Start, tmp_path: Path) -> Far:
    content = random.Random(4).randbytes(SIZE)
    disk = tmp_path / "origin.img"
    disk.write_bytes(content)
    return Far(start_wrapper(), start("--target", "--readonly", disk, tcp=True), content, tmp_path)


def test_nbdcopy_reads_the_whole_origin_by_four_connections(far: Far, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=4", far.wrapper.uri("far"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == far.content
    assert far.cache.read_bytes() == far.content


def test_a_proxy_is_described_as_xnbd_server_describes_it(far: Far, start: Start, tmp_path: Path) -> None:
    def flags(uri: str) -> object:
        export = json.loads(run("nbdinfo", "--json", uri)[1])["exports"][0]
        return {key: value for key, value in export.items() if key.startswith(("can_", "is_", "block_", "export-size"))}

    files = [tmp_path / name for name in ("cache2", "bitmap2", "control2")]
    proxy = start("--proxy", "127.0.0.1", far.origin.port, *files)
    assert flags(far.wrapper.uri("far")) == flags(proxy.uri)


def test_two_clients_see_each_other_s_writes(far: Far) -> None:
    with far.client() as first, far.client() as second:
        assert first.write(5000, b"of the first") == 0
        assert second.read(4990, 30) == far.content[4990:5000] + b"of the first" + far.content[5012:5020]
        assert second.write(5003, b"THE") == 0
        assert first.read(5000, 12) == b"of THE first"


def test_clients_that_write_neighbouring_blocks_lose_nothing(far: Far, seed: int) -> None:
    shadow, lock, failures = bytearray(far.content), threading.Lock(), []

    def use(number: int) -> None:
        chance = random.Random(seed + number)
        try:
            with far.client() as client:
                for _ in range(60):
                    # Every fourth KiB is this client's: blocks are everybody's.
                    offset = chance.randrange(64) * 4096 + number * 1024
                    data = chance.randbytes(chance.randrange(1, 1024))
                    assert client.write(offset, data) == 0
                    with lock:
                        shadow[offset : offset + len(data)] = data
                    assert client.read(offset, len(data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with far.client() as client:
        assert client.read(0, SIZE // 2) == shadow[: SIZE // 2]


def test_a_killed_server_loses_nothing_that_was_answered(far: Far) -> None:
    far.wrapper.expected_errors.append("died: killed by SIGKILL")
    with far.client() as bystander:
        assert bystander.read(0, 4096) == far.content[:4096]
        (other,) = far.wrapper.servers()
        with far.client() as victim:
            assert victim.write(MIB, b"answered") == 0
            (pid,) = set(far.wrapper.servers()) - {other}
            os.kill(pid, signal.SIGKILL)
            assert victim.closed()
        assert bystander.read(MIB - 4, 16) == far.content[MIB - 4 : MIB] + b"answered" + far.content[MIB + 8 : MIB + 12]


def test_cached_blocks_are_served_by_the_next_wrapper_while_the_origin_is_away(
    far: Far, start_wrapper: StartWrapper
) -> None:
    with far.client() as client:
        assert client.read(0, MIB) == far.content[:MIB]
    far.wrapper.ctl("--shutdown")
    far.origin.stop()
    again = start_wrapper()
    with again.client("far") as client:
        assert client.size == SIZE
        assert client.read(0, MIB) == far.content[:MIB]


def test_removed_and_added_again_it_goes_on_with_its_cache(far: Far) -> None:
    with far.client() as client:
        assert client.write(0, b"kept") == 0
    wait_until(lambda: not far.wrapper.servers(), "the server's end")
    far.wrapper.ctl("--remove-by-file", far.cache)
    files = [far.cache, far.bitmap, far.control]
    far.wrapper.ctl("--add-proxy", "again", "127.0.0.1", far.origin.port, *files)
    with far.wrapper.client("again") as client:
        assert client.read(0, 8) == b"kept" + far.content[4:8]


# An origin on a Unix socket


@pytest.fixture
def near(start_wrapper: StartWrapper, start: Start, tmp_path: Path) -> Far:
    """The same, by way of the origin's Unix socket, where the disk has a name."""
    content = random.Random(6).randbytes(SIZE)
    disk = tmp_path / "origin.img"
    disk.write_bytes(content)
    origin = start("--target", "--readonly", "--exportname", "a disk", disk)
    uri = f"nbd+unix:///a%20disk?socket={origin.socket}"
    return Far(start_wrapper(), origin, content, tmp_path, where=[uri])


def test_an_origin_on_a_unix_socket_is_copied(near: Far, tmp_path: Path) -> None:
    run("nbdcopy", "--connections=4", near.wrapper.uri("far"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == near.content
    assert near.wrapper.listed()["far"]["remote_uri"] == f"nbd+unix:///a%20disk?socket={near.origin.socket}"


def test_the_next_wrapper_finds_an_origin_on_a_unix_socket(near: Far, start_wrapper: StartWrapper) -> None:
    before = near.wrapper.stored()
    near.wrapper.ctl("--shutdown")
    again = start_wrapper()
    assert again.stored() == before
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", near.cache.parent / "origin.img", again.uri("far"))


def test_an_origin_on_a_unix_socket_is_copied_and_switched_off(near: Far) -> None:
    with near.client() as client:
        near.wrapper.ctl("--bgctl-cache-all", "far")
        near.wrapper.ctl("--bgctl-switch", "far")
        near.origin.stop()
        assert client.read(SIZE - 4096, 4096) == near.content[-4096:]
    assert near.wrapper.stored() == {"far": {"mode": "target", "image_path": str(near.cache)}}


def test_reconnect_moves_clients_from_tcp_to_a_unix_socket_and_back(far: Far, start: Start) -> None:
    disk = far.cache.parent / "origin.img"
    on_tcp = far.wrapper.stored()["far"]
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
        far.origin.stop()
        near = start("--target", "--readonly", "--exportname", "x", disk)
        far.wrapper.ctl("--target-exportname", "x", "--bgctl-reconnect", "far", near.uri)
        assert client.read(MIB, 4096) == far.content[MIB:][:4096]
        assert far.wrapper.stored()["far"]["remote_uri"] == f"nbd+unix:///x?socket={near.socket}"
        near.stop()
        back = start("--target", "--readonly", disk, tcp=True)
        far.wrapper.ctl("--bgctl-reconnect", "far", f"nbd://127.0.0.1:{back.port}")
        assert client.read(2 * MIB, 4096) == far.content[2 * MIB :][:4096]
    assert far.wrapper.stored()["far"] == {**on_tcp, "remote_port": str(back.port)}


# Steering, by the real xnbd-bgctl


def test_query_of_a_proxy_with_clients(far: Far) -> None:
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
        assert "proxy" in far.wrapper.ctl("--bgctl-query", "far")


def test_cache_all_without_clients_fills_the_cache(far: Far) -> None:
    far.wrapper.ctl("--bgctl-cache-all", "far")
    assert far.cache.read_bytes() == far.content
    wait_until(lambda: not far.wrapper.servers(), "the end of the server that was started for it")


def test_a_switch_with_missing_blocks_is_refused_and_nothing_changes(far: Far) -> None:
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
        command = [*program("xnbd-wrapper-ctl"), "--socket", far.wrapper.control, "--bgctl-switch", "far"]
        assert run(*command, check=False)[0] == 1
        assert far.wrapper.stored()["far"]["mode"] == "proxy"
        assert client.read(SIZE - 100, 100) == far.content[-100:]


def test_two_clients_write_while_the_export_is_switched(far: Far, seed: int) -> None:
    shadows = [bytearray(far.content), bytearray(far.content)]
    failures: List[BaseException] = []
    stop = threading.Event()

    def use(number: int) -> None:
        chance, shadow = random.Random(seed + number), shadows[number]
        try:
            with far.client() as client:
                while not stop.is_set():
                    offset = (chance.randrange(SIZE // 4096 // 2) * 2 + number) * 4096 + chance.randrange(2000)
                    data = chance.randbytes(chance.randrange(1, 2000))
                    assert client.write(offset, data) == 0
                    shadow[offset : offset + len(data)] = data
                    assert client.read(offset, len(data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    far.wrapper.ctl("--bgctl-cache-all", "far")
    far.wrapper.ctl("--bgctl-switch", "far")
    far.origin.stop()
    with far.client() as late:  # served as a target, beside the two that were switched
        assert late.works()
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
        for block in range(SIZE // 4096):
            shadow = shadows[block % 2]
            assert late.read(block * 4096, 4096) == shadow[block * 4096 : (block + 1) * 4096]
    assert far.wrapper.stored() == {"far": {"mode": "target", "image_path": str(far.cache)}}


def switch_past_the_wrapper(far: Far, *options: str, check: bool = True) -> int:
    """With at least one client; returns the exit status."""
    wait_until(lambda: is_listening(str(far.control)), "somebody at the control socket")
    return run(*program("xnbd-bgctl"), *options, "--switch", far.control, check=check)[0]


def test_a_switch_past_the_wrapper_is_booked_when_a_client_comes(far: Far) -> None:
    far.wrapper.ctl("--bgctl-cache-all", "far")
    with far.client() as first:
        switch_past_the_wrapper(far)
        far.origin.stop()
        with far.client() as second:
            wait_until(lambda: far.wrapper.stored()["far"]["mode"] == "target", "the booking")
            assert first.write(5, b"hello") == 0
            assert second.read(5, 5) == b"hello"
            assert second.read(MIB, 4096) == far.content[MIB:][:4096]


def test_after_a_forced_switch_past_the_wrapper_the_next_client_has_a_target(
    far: Far, start_wrapper: StartWrapper
) -> None:
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
        switch_past_the_wrapper(far, "--force")
    far.wrapper.ctl("--shutdown")
    again = start_wrapper()
    with again.client("far") as client:
        assert client.size == SIZE
        assert client.read(0, 4096) == far.content[:4096]
        assert client.read(SIZE - 4096, 4096) == bytes(4096)
        wait_until(lambda: again.stored()["far"]["mode"] == "target", "the booking")
    assert again.listed()["far"]["mode"] == "target"


def test_a_switch_past_the_wrapper_that_cannot_be_booked_is_served_all_the_same(far: Far) -> None:
    far.wrapper.ctl("--bgctl-cache-all", "far")
    with far.client() as first:
        switch_past_the_wrapper(far)
        assert first.works()
    blocker = Path(f"{far.wrapper.database}.new")
    blocker.mkdir()
    far.wrapper.expected_errors.append("cannot write database")
    with far.client() as second:
        far.wrapper.wait_for_log("cannot write database")
        assert second.works()
    blocker.rmdir()
    with far.client() as third:
        wait_until(lambda: far.wrapper.stored()["far"]["mode"] == "target", "the booking")
        assert third.works()


def test_a_switch_past_the_wrapper_that_was_refused_is_not_booked(far: Far) -> None:
    with far.client() as first:
        assert switch_past_the_wrapper(far, check=False) == 1
        with far.client() as second:
            assert first.read(MIB, 4096) == second.read(MIB, 4096) == far.content[MIB:][:4096]
    assert far.wrapper.stored()["far"]["mode"] == "proxy"


def test_reconnect_moves_waiting_clients_to_the_new_origin(far: Far, start: Start) -> None:
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
        disk = far.cache.parent / "origin.img"
        far.origin.stop()
        moved = start("--target", "--readonly", disk, tcp=True)
        far.wrapper.ctl("--bgctl-reconnect", "far", "127.0.0.1", moved.port)
        assert client.read(SIZE - 4096, 4096) == far.content[-4096:]
    assert far.wrapper.stored()["far"]["remote_port"] == str(moved.port)
    with far.client() as client:
        assert client.read(SIZE // 2, 4096) == far.content[SIZE // 2 :][:4096]


def test_reconnect_without_clients_is_for_the_next_one(far: Far, start: Start) -> None:
    with far.client() as client:
        assert client.read(0, 4096) == far.content[:4096]
    wait_until(lambda: not far.wrapper.servers(), "the server's end")
    far.origin.stop()
    moved = start("--target", "--readonly", far.cache.parent / "origin.img", tcp=True)
    far.wrapper.ctl("--bgctl-reconnect", "far", "127.0.0.1", moved.port)
    with far.client() as client:
        assert client.read(SIZE - 4096, 4096) == far.content[-4096:]


def test_the_control_socket_outlives_the_client_whose_server_made_it(far: Far) -> None:
    first, second = far.client(), far.client()
    with first, second:
        assert first.read(0, 1) == second.read(0, 1)
        first.sock.close()
        wait_until(lambda: len(far.wrapper.servers()) == 1, "the end of the first server")
        wait_until(lambda: is_listening(str(far.control)), "somebody at the control socket")
        assert "proxy" in far.wrapper.ctl("--bgctl-query", "far")
        assert second.works()


def test_shutdown_leaves_no_process_of_a_proxy(far: Far) -> None:
    with far.client() as first, far.client() as second:
        assert first.works()
        assert second.works()
        pids = [*far.wrapper.servers(), *(child for pid in far.wrapper.servers() for child in children_of(pid))]
        far.wrapper.ctl("--shutdown")
        assert first.closed()
        assert second.closed()
        wait_for_end(pids)
    assert not is_listening(str(far.control))


def test_a_switched_export_is_a_target_for_the_next_wrapper(far: Far, start_wrapper: StartWrapper) -> None:
    far.wrapper.ctl("--bgctl-cache-all", "far")
    far.wrapper.ctl("--bgctl-switch", "far")
    far.wrapper.ctl("--shutdown")
    far.origin.stop()
    with start_wrapper().client("far") as client:
        assert client.read(SIZE - 4096, 4096) == far.content[-4096:]


def test_an_executed_server_serves_a_proxy_as_well(start_wrapper: StartWrapper, start: Start, tmp_path: Path) -> None:
    content = random.Random(5).randbytes(SIZE)
    (tmp_path / "origin.img").write_bytes(content)
    origin = start("--target", tmp_path / "origin.img", tcp=True)
    server, bgctl = (" ".join(program(name)) for name in ("xnbd-server", "xnbd-bgctl"))
    far = Far(start_wrapper("--xnbd-server", server, "--xnbd-bgctl", bgctl), origin, content, tmp_path)
    far.wrapper.ctl("--bgctl-cache-all", "far")
    with far.client() as client:
        far.wrapper.ctl("--bgctl-switch", "far")
        origin.stop()
        assert client.read(SIZE - 5000, 5000) == content[-5000:]


def test_several_origins_of_an_export(start_wrapper: StartWrapper, start: Start, tmp_path: Path) -> None:
    content = random.Random(4).randbytes(SIZE)
    disk = tmp_path / "origin.img"
    disk.write_bytes(content)
    first, second = (start("--target", "--readonly", disk, tcp=True) for _ in range(2))
    uris = [f"nbd://127.0.0.1:{server.port}/" for server in (first, second)]
    far = Far(start_wrapper(), first, content, tmp_path, where=[*uris[:1], "--origin", uris[1]])
    stored = far.wrapper.stored()["far"]
    assert stored["remote_uri"] == " ".join(uris)
    assert " ".join(uris) in far.wrapper.ctl("--list")
    with far.client() as client:
        first.stop()
        assert client.read(MIB, 100) == content[MIB : MIB + 100]
    far.wrapper.ctl("--bgctl-reconnect", "far", "127.0.0.1", second.port, "--origin", uris[0])
    assert far.wrapper.stored()["far"]["remote_uri"] == " ".join(reversed(uris))


def test_the_cache_of_each_proxy_has_the_wrapper_s_limit(
    start_wrapper: StartWrapper, start: Start, tmp_path: Path
) -> None:
    content, disk = random.Random(5).randbytes(SIZE), tmp_path / "origin.img"
    disk.write_bytes(content)
    wrapper = start_wrapper("--cache-limit", "2M")
    far = Far(wrapper, start("--target", "--readonly", disk, tcp=True), content, tmp_path)
    with far.client() as first, far.client() as second:
        for client in (first, second, first):
            for at in range(0, SIZE, MIB):
                assert client.read(at, MIB) == content[at : at + MIB]
                assert far.cache.stat().st_blocks * 512 <= 2.1 * MIB
        assert "of 2 MiB for what was fetched" in wrapper.ctl("--bgctl-query", "far")


def test_a_limit_is_not_handed_on_to_another_program(tmp_path: Path) -> None:
    status, line = fails(tmp_path, "--cache-limit", "2M", "--xnbd-server", "true")
    assert status == 2
    assert "--cache-limit and --xnbd-server do not go together" in line
