"""An origin that has a name, and name servers that take their time; addresses with a zone."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Iterator, List

import pytest
from caching import BLOCK, CacheFiles, Reading, by_kind, connect, descendants, kill, query, wait_until_gone
from conftest import MIB, Start
from injection import NO_PROCESSES, injected
from launch import fails, launched
from name_server import NameServer
from proxies import program
from server_process import Server, command, free_port, title_of, wait_until

pytestmark = pytest.mark.root(reason="only root has namespaces of its own")

NAME = "origin.test"


@pytest.fixture
def names(tmp_path: Path) -> Iterator[NameServer]:
    with NameServer(tmp_path) as names:
        yield names


@pytest.fixture
def origin(start: Start, names: NameServer, image: Path) -> Server:
    """It listens on 127.0.0.1, and has the name."""
    names.hosts[NAME] = ["127.0.0.1"]
    return start("--target", "--readonly", image, tcp=True)


@pytest.fixture
def proxy(start: Start, names: NameServer, files: CacheFiles, origin: Server) -> Iterator[Server]:
    """A proxy with a block in its cache, whose next clients have workers that know no address yet."""
    uri = f"nbd://{NAME}:{origin.port}"
    proxy = start(*files.arguments(uri, "--readahead", "0", "--connect-timeout", "20"), prefix=names.prefix)
    first_client = connect(proxy.uri)
    first_client.pread(BLOCK, 0)
    yield proxy
    del first_client


@pytest.fixture
def disk(image: Path) -> bytes:
    return image.read_bytes()


def lookups(server: Server) -> List[int]:
    """The processes that look the name up."""
    return [pid for pid in descendants(server.pid) if f"looking up {NAME}" in title_of(pid)]


def has_pipe_and_socket(pid: int) -> bool:
    """Whether a process has just these open, beside the standard streams."""
    kinds = []
    for fd in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed just now
            if int(fd.name) > 2:
                kinds.append(os.readlink(fd.path).partition(":")[0])
    return sorted(kinds) == ["pipe", "socket"]


class Waiting:
    """Two clients of *proxy* whose misses wait for the name server's answers."""

    def __init__(self, proxy: Server, names: NameServer) -> None:
        names.hold()
        self.clients = [connect(proxy.uri), connect(proxy.uri)]
        self.readings = [Reading(client, MIB, BLOCK) for client in self.clients]
        for client in self.clients:
            client.poll(0)
        wait_until(lambda: len(lookups(proxy)) == 2, "two processes that look the name up")
        names.wait_for_question()

    def assert_are_served(self, disk: bytes) -> None:
        assert [reading.content() for reading in self.readings] == [disk[MIB : MIB + BLOCK]] * 2


def test_hits_and_writes_do_not_wait_for_a_name_server(proxy: Server, names: NameServer, disk: bytes) -> None:
    waiting = Waiting(proxy, names)
    for number, client in enumerate(waiting.clients):
        assert client.pread(BLOCK, 0) == disk[:BLOCK]
        client.pwrite(b"w" * BLOCK, (8 + number) * BLOCK)
        client.flush()
        assert client.pread(BLOCK, (8 + number) * BLOCK) == b"w" * BLOCK
    assert not any(reading.is_done() for reading in waiting.readings)
    names.release()
    waiting.assert_are_served(disk)
    wait_until(lambda: not lookups(proxy), "the end of the processes that looked")


def test_a_server_ends_in_the_middle_of_a_lookup(proxy: Server, names: NameServer) -> None:
    _waiting = Waiting(proxy, names)
    left = descendants(proxy.pid)
    assert proxy.stop() == 0
    wait_until_gone(left, 1)


def test_a_killed_worker_takes_its_lookup_with_it(proxy: Server, names: NameServer) -> None:
    _waiting = Waiting(proxy, names)
    proxy.expected_errors.append("died: killed by SIGKILL")
    left = lookups(proxy)
    kill(by_kind(proxy)["worker for"])
    wait_until_gone(left)


def test_a_lookup_holds_no_descriptor_of_its_worker(proxy: Server, names: NameServer) -> None:
    _waiting = Waiting(proxy, names)
    looking = lookups(proxy)
    assert len(looking) == 2
    for pid in looking:  # one of them may be between two questions
        wait_until(partial(has_pipe_and_socket, pid), "a pipe to its worker, and a socket to us")


def test_a_lookup_that_was_killed_is_begun_again(proxy: Server, names: NameServer, disk: bytes) -> None:
    waiting = Waiting(proxy, names)
    kill(lookups(proxy))
    proxy.wait_for_log("cannot find the host: the process that looked was killed")
    names.release()
    waiting.assert_are_served(disk)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(NO_PROCESSES, "Resource temporarily unavailable"), ("pipe2:error=EMFILE", "Too many open files")],
    ids=["processes", "descriptors"],
)
def test_short_of_what_a_lookup_takes_hits_are_served_and_misses_wait(
    proxy: Server, disk: bytes, fault: str, reason: str
) -> None:
    others = by_kind(proxy)["worker for"]
    client = connect(proxy.uri)
    (worker,) = set(by_kind(proxy)["worker for"]) - set(others)
    with injected(worker, fault):
        reading = Reading(client, MIB, BLOCK)
        client.poll(0)
        proxy.wait_for_log(f"cannot find the host: no process can be started to look: {reason}")
        assert client.pread(BLOCK, 0) == disk[:BLOCK]
        assert not reading.is_done()
    assert reading.content() == disk[MIB : MIB + BLOCK]


def test_a_name_that_nobody_knows_is_told_once_and_looked_up_again(
    proxy: Server, names: NameServer, origin: Server, disk: bytes
) -> None:
    names.hosts.clear()
    client = connect(proxy.uri)
    reading = Reading(client, MIB, BLOCK)
    client.poll(0)
    proxy.wait_for_log(f"origin nbd://{NAME}:{origin.port}/: cannot find the host: Name or service not known")
    questions = names.questions
    wait_until(lambda: names.questions > questions + 2, "further questions")
    names.hosts[NAME] = ["127.0.0.1"]
    assert reading.content() == disk[MIB : MIB + BLOCK]
    assert proxy.log().count("cannot find the host") == 1


def test_the_time_to_connect_includes_the_lookup(
    start: Start, names: NameServer, files: CacheFiles, origin: Server, disk: bytes
) -> None:
    uri = f"nbd://{NAME}:{origin.port}"
    proxy = start(*files.arguments(uri, "--connect-timeout", "2"), prefix=names.prefix)
    names.hold()
    reading = Reading(connect(proxy.uri), MIB, BLOCK)
    proxy.wait_for_log("cannot find the host: no name server has answered in 2 s; 1 request waits for it")
    names.release()
    assert reading.content() == disk[MIB : MIB + BLOCK]


@pytest.mark.parametrize("listens", ["127.0.0.1", "::1"])
def test_every_address_of_a_name_is_tried(
    start: Start, names: NameServer, files: CacheFiles, image: Path, listens: str
) -> None:
    names.hosts[NAME] = ["127.0.0.1", "::1"]
    port = free_port()
    start("--target", "--readonly", "--laddr", listens, "--lport", port, image)
    proxy = start(*files.arguments(f"nbd://{NAME}:{port}"), prefix=names.prefix)
    assert connect(proxy.uri).pread(BLOCK, 0) == image.read_bytes()[:BLOCK]


def test_ipv6_is_tried_first(start: Start, names: NameServer, files: CacheFiles, tmp_path: Path) -> None:
    names.hosts[NAME] = ["127.0.0.1", "::1"]
    port = free_port()
    for address in names.hosts[NAME]:
        (tmp_path / f"{address}.img").write_bytes(address.encode().ljust(MIB))
        start("--target", "--readonly", "--laddr", address, "--lport", port, tmp_path / f"{address}.img")
    proxy = start(*files.arguments(f"nbd://{NAME}:{port}"), prefix=names.prefix)
    assert connect(proxy.uri).pread(3, 0) == b"::1"


def test_a_proxy_that_cannot_find_its_origin_at_the_first_start_is_told(
    tmp_path: Path, names: NameServer, files: CacheFiles
) -> None:
    names.hold()
    arguments = files.arguments(f"nbd://{NAME}", "--connect-timeout", "0.5")
    _, complaint = fails(*arguments, "--unix", tmp_path / "s", prefix=names.prefix)
    assert f"origin nbd://{NAME}:10809/: cannot find the host: no name server has answered in 0.5 s" in complaint


def test_a_start_that_waits_for_a_name_server_can_be_ended(
    tmp_path: Path, names: NameServer, files: CacheFiles
) -> None:
    names.hold()
    words = [*names.prefix, *command(*files.arguments(f"nbd://{NAME}"), "--unix", tmp_path / "s")]
    with launched(words, tmp_path / "log") as starting:
        names.wait_for_question()
        left = descendants(starting.process.pid)
        assert starting.stop() == -signal.SIGTERM
        wait_until_gone(left)


def test_a_new_origin_that_is_looked_up_keeps_nobody_waiting(
    proxy: Server, names: NameServer, files: CacheFiles, origin: Server
) -> None:
    names.hold()
    words = program("--reconnect", files.control, NAME, origin.port)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reconnecting:
        names.wait_for_question()
        assert query(files.control)["mode"] == "proxy"
        names.release()
        assert reconnecting.communicate(timeout=60)[0] == f"the origin is nbd://{NAME}:{origin.port}/ now\n"


def test_a_server_ends_while_a_new_origin_is_looked_up(
    proxy: Server, names: NameServer, files: CacheFiles, origin: Server
) -> None:
    names.hold()
    words = program("--reconnect", files.control, NAME, origin.port)
    with subprocess.Popen(words, stderr=subprocess.PIPE) as reconnecting:
        names.wait_for_question()
        left = descendants(proxy.pid)
        assert proxy.stop() == 0
        wait_until_gone(left, 1)
        assert reconnecting.wait(60) == 1


# Zones


@pytest.fixture
def network() -> Iterator[List[str]]:
    """What runs a program in a network of its own, with an address fe80::1 at its interface eth0."""
    making = "ip link add eth0 type veth peer name eth1 && ip link set eth0 up && ip link set eth1 up"
    adding = "ip link set lo up && ip addr add fe80::1/64 dev eth0 nodad"
    words = ["unshare", "--net", "sh", "-c", f"{making} && {adding} && echo made && exec sleep 600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"made\n"
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        holder.kill()


@pytest.mark.parametrize("origin", [["fe80::1%eth0", "8520"], ["nbd://[fe80::1%25eth0]:8520"]])
def test_the_zone_of_an_address_is_kept(
    start: Start, files: CacheFiles, network: List[str], image: Path, origin: List[str]
) -> None:
    start("--target", "--readonly", "--laddr", "::", "--lport", "8520", image, prefix=network)
    proxy = start("--proxy", *origin, files.image, files.bitmap, files.control, prefix=network)
    assert connect(proxy.uri).pread(BLOCK, MIB) == image.read_bytes()[MIB : MIB + BLOCK]
