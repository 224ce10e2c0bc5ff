"""What a client may make a proxy hold: a share of the memory that there is, found out from the kernel's files."""

from __future__ import annotations

import itertools
import random
import resource
import socket
from contextlib import suppress
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from conftest import MIB, Start
from proxies import BLOCK, query, reads, replies
from rawclient import CACHE, READ, WRITE, RawClient, pack_request
from relay import Relay
from server_process import Server, wait_until

from xnbd.server.session import memory
from xnbd.server.session.memory import Memory
from xnbd.server.session.parking import LEAST, REQUEST_SIZE, Allowance, ParkedRequest, Parking, QueueLimits
from xnbd.storage.image import Ticket

GIB = 1 << 30
MEMINFO = "MemTotal:       {total} kB\nMemFree:          123 kB\nMemAvailable:   {free} kB\nHugePages_Total:  0\n"
V1_MOUNT = "40 30 0:35 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
V2_MOUNT = "42 30 0:27 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHERS = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n41 30 0:36 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture
def computer(tmp_path: Path) -> Callable[..., Memory]:
    """A computer with 64 GiB, 40 of them free, and files under its root."""

    def make(files: Dict[str, str]) -> Memory:
        everything = {"proc/meminfo": MEMINFO.format(total=64 << 20, free=40 << 20), **files}
        for name, text in everything.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Memory(tmp_path)

    return make


# What there is


def test_an_eighth_of_what_is_free_beyond_an_eighth_of_all(computer: Callable[..., Memory]) -> None:
    assert computer({}).share() == (40 - 64 // 8) * GIB // 8


def test_what_is_free_is_asked_for_each_time(computer: Callable[..., Memory]) -> None:
    memory = computer({})
    computer({"proc/meminfo": MEMINFO.format(total=64 << 20, free=16 << 20)})
    assert memory.share() == 1 * GIB


def test_the_least_remains_where_nothing_is_free(computer: Callable[..., Memory]) -> None:
    assert computer({"proc/meminfo": MEMINFO.format(total=64 << 20, free=1 << 20)}).share() == LEAST


def test_without_the_kernel_s_files_it_is_64_mib(tmp_path: Path) -> None:
    assert Memory(tmp_path).share() == 64 * MIB


def v2(directory: str, maximum: object, used: int, high: object = "max") -> Dict[str, str]:
    base = f"sys/fs/cgroup{directory}/memory"
    return {
        f"{base}.max": f"{maximum}\n",
        f"{base}.high": f"{high}\n",
        f"{base}.current": f"{used}\n",
        f"{base}.stat": f"anon 5\nfile {GIB}\ninactive_file {GIB}\nactive_file 7\n",
    }


def v1(directory: str, limit: int, used: int) -> Dict[str, str]:
    base = f"sys/fs/cgroup/memory{directory}/memory"
    return {
        f"{base}.limit_in_bytes": f"{limit}\n",
        f"{base}.usage_in_bytes": f"{used}\n",
        f"{base}.stat": f"cache 3\ninactive_file 5\ntotal_inactive_file {GIB}\n",
    }


@pytest.mark.parametrize("inner, outer", [(("max", "max"), (16 * GIB, "max")), ((16 * GIB, "max"), ("max", "max"))])
def test_a_cgroup_of_version_2_or_one_around_it_limits(
    computer: Callable[..., Memory], inner: List[object], outer: List[object]
) -> None:
    """What its page cache could give back counts as free: 16 - 7 + 1, less an eighth of 16."""
    files = {
        "proc/self/cgroup": "0::/system.slice/xnbd.service\n",
        "proc/self/mountinfo": OTHERS + V2_MOUNT.format(root="/"),
        **v2("/system.slice/xnbd.service", inner[0], 7 * GIB, inner[1]),
        **v2("/system.slice", outer[0], 7 * GIB, outer[1]),
    }
    assert computer(files).share() == (16 - 7 + 1 - 2) * GIB // 8


def test_what_slows_a_cgroup_down_counts_as_its_limit(computer: Callable[..., Memory]) -> None:
    files = {"proc/self/cgroup": "0::/x\n", "proc/self/mountinfo": V2_MOUNT.format(root="/")}
    assert computer({**files, **v2("/x", 32 * GIB, 7 * GIB, 16 * GIB)}).share() == 1 * GIB


def test_a_cgroup_of_version_1_limits(computer: Callable[..., Memory]) -> None:
    files = {
        "proc/self/cgroup": "12:cpu,cpuacct:/\n11:blkio,memory:/docker/abc\n1:name=systemd:/x\n0::/x\n",
        "proc/self/mountinfo": OTHERS + V1_MOUNT.format(root="/"),
        **v1("/docker/abc", 16 * GIB, 7 * GIB),
        **v1("/docker", 0x7FFFFFFFFFFFF000, 9 * GIB),
        **v1("", 0x7FFFFFFFFFFFF000, 30 * GIB),
    }
    assert computer(files).share() == 1 * GIB


def test_a_container_finds_its_own_cgroup_at_the_mount_point(computer: Callable[..., Memory]) -> None:
    files = {
        "proc/self/cgroup": "11:memory:/docker/abc\n",
        "proc/self/mountinfo": V1_MOUNT.format(root="/docker/abc"),
        **v1("", 16 * GIB, 7 * GIB),
    }
    assert computer(files).share() == 1 * GIB


def test_the_process_s_own_limits_count() -> None:
    """This process's, set for a moment: what it has mapped already is taken off."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 800 * MIB, before[1]))
    try:
        share = Memory().share()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert abs(share - (800 * MIB - (used + 800 * MIB) // 8) // 8) < 4 * MIB


# What a client may have of it


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[List[int]]:
    """What is measured next, first to last; the last one stays."""
    found: List[int] = []
    monkeypatch.setattr(memory, "share", lambda: found.pop(0) if len(found) > 1 else found[0])
    yield found


def test_nothing_is_measured_for_little(shares: List[int]) -> None:
    assert Allowance().covers(LEAST - 1)


def test_more_is_measured_as_it_grows(shares: List[int]) -> None:
    shares[:] = [10 * MIB, 5 * MIB]
    allowance = Allowance()
    assert allowance.covers(LEAST)
    assert len(shares) == 1
    assert allowance.covers(2 * MIB)
    assert not allowance.covers(5 * MIB)


def test_a_room_that_is_full_for_want_of_memory_stays_so_until_one_leaves(shares: List[int]) -> None:
    shares[:] = [LEAST, 10 * MIB]
    room = Parking([], QueueLimits(), ordered=False)
    tickets = [Ticket() for _ in range(LEAST // REQUEST_SIZE + 1)]
    for ticket in tickets:
        assert not room.full
        room.enter(ticket, ParkedRequest(READ, b"", lambda _answer: None, (0, 4096)))
    assert room.full and room.full and room.short
    room.leave(tickets[0])
    assert not room.full and not room.short


# A hostile client, and a server that has little

LIMIT = 112 * MIB
DISK = 1 << 40


@pytest.fixture
def relay(start: Start, tmp_path: Path) -> Iterator[Relay]:
    """Before an origin with a huge disk."""
    disk = tmp_path / "origin.img"
    with open(disk, "wb") as file:
        file.write(random.Random(1).randbytes(BLOCK))
        file.truncate(DISK)
    with Relay(start("--target", disk, tcp=True).port) as relay:
        yield relay


@pytest.fixture
def proxy(start: Start, tmp_path: Path, relay: Relay) -> Server:
    files = [tmp_path / name for name in ("cache.img", "bitmap", "control")]
    options = ["--spare-workers", "1", "--readahead", "0"]
    proxy: Server = start("--proxy", *options, relay.uri, *files, prefix=["prlimit", f"--data={LIMIT}", "--"])
    proxy.wait_for_log("INFO: serving ")
    return proxy


def small_reads(number: int) -> bytes:
    return pack_request(READ, BLOCK + number * 3 * BLOCK, 1, cookie=number)


def huge_reads(number: int) -> bytes:
    return pack_request(READ, (number + 1) * 64 * MIB, 32 * MIB, cookie=number)


def huge_copies(number: int) -> bytes:
    return pack_request(CACHE, (number + 1) << 32, (1 << 32) - BLOCK, cookie=number)


def writes(number: int) -> bytes:
    return pack_request(WRITE, BLOCK + number * 16 * BLOCK + 5, 60_000, cookie=number) + bytes(60_000)


def send_until_it_has_to_wait(client: RawClient, proxy: Server, request_: Callable[[int], bytes]) -> None:
    numbers, data = itertools.count(), b""
    client.sock.settimeout(0.5)
    while "memory is short" not in proxy.log():
        data = data or b"".join(request_(next(numbers)) for _ in range(50))
        with suppress(socket.timeout):
            data = data[client.sock.send(data) :]


@pytest.mark.parametrize("request_", [small_reads, huge_reads, huge_copies, writes])
def test_a_hostile_client_of_a_silent_origin_takes_its_share_of_the_memory_at_most(
    proxy: Server, relay: Relay, tmp_path: Path, request_: Callable[[int], bytes]
) -> None:
    with RawClient(proxy.connect()) as client, RawClient(proxy.connect()) as bystander:
        first = bystander.negotiate().read(0, BLOCK)
        client.negotiate()
        relay.stall()
        send_until_it_has_to_wait(client, proxy, request_)
        assert "memory is short, nothing is received from it before some of its" in proxy.log()
        answer = query(tmp_path / "control")
        assert len(answer["workers"]) == 2
        assert (answer["queue"]["requests_limit"], answer["queue"]["bytes_limit"]) == (0, 0)
        assert LEAST <= answer["queue"]["memory_limit"] < LIMIT // 8
        assert answer["queue"]["requests"] * REQUEST_SIZE + answer["queue"]["bytes"] < LIMIT // 4
        assert bystander.read(0, BLOCK) == first
        assert proxy.log().count("memory is short") == 1


def test_all_is_answered_when_the_origin_speaks_again(proxy: Server, relay: Relay, tmp_path: Path) -> None:
    count = 6000
    with RawClient(proxy.connect()) as client:
        client.negotiate().read(0, 1)
        relay.stall()
        client.send(reads(*((BLOCK + n * 3 * BLOCK, 1) for n in range(count))))
        proxy.wait_for_log("memory is short")
        wait_until(lambda: query(tmp_path / "control")["queue"]["requests"] > LEAST // REQUEST_SIZE, "the queue")
        relay.resume()
        assert sorted(replies(client, *[1] * count)) == [(n, b"\0") for n in range(1, count + 1)]
