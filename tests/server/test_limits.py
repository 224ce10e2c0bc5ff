"""Limits on clients: how fast they may be, while all else goes on, and as an operator changes them."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Sequence

import nbd
import pytest
from caching import bgctl as try_bgctl
from caching import connect
from certificates import Certificates
from conftest import MIB, Start
from moving import move, worker_of_only_client
from proxies import Proxy, bgctl, make_disk, query
from rawclient import READ, WRITE, RawClient, pack_request
from scraping import metrics_port, scrape
from server_process import PATIENCE, PYTHON, ROOT, Server, run_seconds, state_of, wait_until
from upgrades import upgrade

SECONDS = float(os.environ.get("XNBD_LIMIT_SECONDS", "2"))
"""How long accuracy is measured. In the long form, of ten and more, the lower bound counts, too, and a neighbour's p99.

What other processes take of the processor meanwhile is taken into account.
"""

FLOOD = ROOT / "tests" / "support" / "flood.py"
KIB = 1 << 10
BURST = 0.1

Limited = Callable[..., Server]
"""Starts a server with these options, and a control socket."""


@pytest.fixture
def limited(start: Start, image: Path, tmp_path: Path) -> Limited:
    return lambda *options: start("--target", *options, "--control", tmp_path / "ctl", image)


def raw(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


def limit(tmp_path: Path, *options: object) -> str:
    return bgctl("--limit", *options, tmp_path / "ctl")


def processor_time(pid: int) -> float:
    """Seconds that a process has had the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def waits_of(*pids: int) -> float:
    """Seconds for which processes were ready and did not have the processor (``/proc/PID/schedstat``)."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) for pid in pids) / 1e9


class Flood:
    """A client that has *depth* requests of *length* bytes under way all the time; ``done`` are those answered."""

    def __init__(self, server: Server, length: int, depth: int, command: int = READ) -> None:
        self.client = raw(server)
        self.done = 0
        self._length = length
        self._answer = 16 + (length if command == READ else 0)
        payload = b"" if command == READ else bytes(length)
        self._request = pack_request(command, 0, length) + payload
        self.client.send(self._request * depth)

    def step(self) -> None:
        self.client.receive(self._answer)
        self.client.send(self._request)
        self.done += 1

    def run(self, seconds: float) -> float:
        """What it gets, in bytes a second."""
        began, before = time.monotonic(), self.done
        while time.monotonic() < began + seconds:
            self.step()
        return (self.done - before) * self._length / (time.monotonic() - began)


def has_to_wait(client: RawClient) -> None:
    """Half a second brings no answer."""
    client.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.receive(16)
    client.sock.settimeout(60)


@pytest.mark.parametrize(
    ("options", "command", "length", "depth", "rate"),
    [
        (("--limit-rate", "4M"), READ, 4 * KIB, 32, 4 * MIB),
        (("--limit-rate", "4M"), WRITE, 4 * KIB, 32, 4 * MIB),
        (("--limit-rate", "4M"), WRITE, 100 * KIB, 8, 4 * MIB),
        (("--limit-rate", "8M"), READ, MIB, 2, 8 * MIB),
        (("--limit-iops", "500"), READ, 512, 16, 500 * 512),
        (("--limit-rate-total", "4M", "--limit-iops", "100000"), READ, 16 * KIB, 16, 4 * MIB),
        (("--limit-iops-total", "500"), WRITE, 4 * KIB, 4, 500 * 4 * KIB),
    ],
)
def test_a_client_gets_what_it_may_and_no_more(
    start: Start, image: Path, options: Sequence[str], command: int, length: int, depth: int, rate: int
) -> None:
    server = start("--target", *options, image)
    flood = Flood(server, length, depth, command)
    with flood.client:
        flood.run(0.5)  # the burst is used up
        worker = worker_of_only_client(server)
        waits = waits_of(worker, os.getpid())
        found = flood.run(SECONDS)
        waits = waits_of(worker, os.getpid()) - waits
        batch = 2 * (depth + 1) * length
        assert found < 1.05 * rate + (BURST * rate + batch) / SECONDS
        assert found > 0.3 * rate  # another process may have had the processor
        if SECONDS >= 10:
            assert found < 1.03 * rate
            assert found / (1 - waits / SECONDS) > 0.97 * rate  # a pause longer than the burst is not made up for


def test_a_client_at_its_limit_sleeps(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "2M", image)
    flood = Flood(server, 4 * KIB, 16)
    with flood.client:
        flood.run(0.5)
        worker = worker_of_only_client(server)
        before = processor_time(worker)
        flood.run(SECONDS)
        assert processor_time(worker) - before < 0.15 * SECONDS


def test_a_client_in_debt_takes_no_processor_time(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "1K", image)
    with in_debt(server):
        worker = worker_of_only_client(server)
        until = time.monotonic() + 1
        wait_until(lambda: state_of(worker) == "S", "its sleep")
        before = run_seconds(worker)
        wait_until(lambda: time.monotonic() > until, "a second")
        assert run_seconds(worker) - before < 0.01


def latencies(client: RawClient, worker: int, seconds: float) -> list[float]:
    """Seconds that single reads take, without those in which others had the processor."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        waits, began = waits_of(worker, os.getpid()), time.monotonic()
        client.read(0, 4 * KIB)
        took = time.monotonic() - began
        found.append(max(0.0, took - (waits_of(worker, os.getpid()) - waits)))
        time.sleep(0.0005)
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "length", "depth"),
    [(("--limit-iops", "5000"), 4 * KIB, 64), (("--limit-rate-total", "50M"), 64 * KIB, 32)],
)
def test_a_neighbour_of_a_flood(start: Start, image: Path, options: Sequence[str], length: int, depth: int) -> None:
    """Its reads take hardly longer than when it is alone."""
    server = start("--target", *options, image)
    alone: list[float] = []
    beside: list[float] = []
    with raw(server) as client:
        worker = worker_of_only_client(server)
        for _ in range(2):
            alone += latencies(client, worker, SECONDS / 4)
            flood = subprocess.Popen([PYTHON, FLOOD, server.socket, str(length), str(depth)])
            try:
                wait_until(lambda: len(server.busy_workers()) == 2, "the flood")
                latencies(client, worker, 0.2)
                beside += latencies(client, worker, SECONDS / 4)
            finally:
                flood.kill()
                flood.wait()
            wait_until(lambda: len(server.busy_workers()) == 1, "its end")
    p99 = [sorted(found)[int(0.99 * len(found))] for found in (alone, beside)]
    assert p99[1] < (2 if SECONDS >= 10 else 4) * p99[0] + 1e-4, p99


def test_idleness_is_saved_up_as_far_as_the_burst_allows(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "1M", "--limit-burst", 4, image)
    with raw(server) as client:
        began = time.monotonic()
        for _ in range(3):
            client.read(0, MIB)
        assert time.monotonic() - began < PATIENCE
        for _ in range(3):  # the fourth is at once, too, and it is paid for before the sixth
            client.read(0, MIB)
        assert time.monotonic() - began > 0.95


def test_a_request_larger_than_a_second_goes_through_in_debt(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "4M", image)
    with raw(server) as client:
        began = time.monotonic()
        assert client.write(0, bytes(8 * MIB)) == 0
        assert time.monotonic() - began < PATIENCE
        assert client.read(0, 4096) == bytes(4096)
        assert time.monotonic() - began > 2 - BURST - 0.05


def test_the_handshake_and_the_leave_are_not_limited(start: Start, image: Path) -> None:
    server = start("--target", "--limit-iops", 1, image)
    for _ in range(3):
        with raw(server) as client:
            client.read(0, 512)
            client.request(2)
            assert client.closed()


def in_debt(server: Server, *, seconds_worth: bytes = bytes(8 * MIB)) -> RawClient:
    """A client that has to wait for a long time before its next request is done, which it has sent."""
    client = raw(server)
    assert client.write(0, seconds_worth) == 0
    client.request(READ, 0, 512, cookie=5)
    return client


def test_another_limit_holds_at_once_for_a_client_that_sleeps(limited: Limited, tmp_path: Path) -> None:
    server = limited("--limit-rate", "1K")
    with in_debt(server) as client:
        assert limit(tmp_path, "--limit-rate", "1G").splitlines()[0] == "each client: 1 GiB/s"
        assert client.simple_reply(512)[:2] == (0, 5)
    with in_debt(server) as fast:
        assert fast.simple_reply(512)[:2] == (0, 5)


def test_no_limit_holds_at_once_and_a_limit_for_clients_that_are_connected(limited: Limited, tmp_path: Path) -> None:
    server = limited()
    with raw(server) as client:
        assert client.works()
        assert limit(tmp_path) == "each client: no limit\nall together: no limit\n"
        limit(tmp_path, "--limit-rate-total", "1K")
        assert client.write(0, bytes(MIB)) == 0
        client.request(READ, 0, 512, cookie=5)
        has_to_wait(client)
        limit(tmp_path, "--limit-rate-total", 0)
        assert client.simple_reply(512)[:2] == (0, 5)


def test_the_query_shows_limits(limited: Limited, tmp_path: Path) -> None:
    limited("--limit-rate", "30M", "--limit-iops-total", 1000)
    assert query(tmp_path / "ctl")["limits"] == {
        "rate": 30 * MIB, "iops": 0, "rate_total": 0, "iops_total": 1000, "burst": 0.1,
    }  # fmt: skip
    text = bgctl(tmp_path / "ctl")
    assert "  limits      each client: 30 MiB/s\n" in text
    assert "all together: 1,000 requests/s\n" in text
    limit(tmp_path, "--limit-rate", 0, "--limit-iops-total", 0, "--limit-burst", 3)
    assert "limits " not in bgctl(tmp_path / "ctl")


def test_a_stop_ends_a_sleep_at_once(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "1K", image)
    with in_debt(server):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < PATIENCE
    assert "still busy" not in server.log()


def test_a_stop_in_the_middle_of_a_message_has_the_rest_of_it(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "1K", image)
    with raw(server) as client:
        assert client.write(0, bytes(MIB)) == 0
        client.send((pack_request(WRITE, 4096, 4096, cookie=9) + b"x" * 4096)[:1000])
        server.stop()
    assert "still busy" not in server.log()


def test_a_client_in_debt_moves_and_still_owes(limited: Limited, tmp_path: Path) -> None:
    server = limited("--limit-rate", "1K")
    with in_debt(server) as client:
        for _ in range(3):
            move(server)
        has_to_wait(client)
        limit(tmp_path, "--limit-rate", 0)
        assert client.simple_reply(512)[:2] == (0, 5)


def test_what_an_operator_has_set_outlives_an_upgrade(limited: Limited, tmp_path: Path) -> None:
    server = limited("--limit-rate", "1K")
    with in_debt(server) as client:
        limit(tmp_path, "--limit-iops", 7)
        assert upgrade(tmp_path / "ctl").moved == 1
        limits = query(tmp_path / "ctl")["limits"]
        assert (limits["rate"], limits["iops"]) == (KIB, 7)
        limit(tmp_path, "--limit-rate", 0, "--limit-iops", 0)
        assert client.simple_reply(512)[:2] == (0, 5)


def test_a_reload_changes_what_is_another_one_in_the_file(start: Start, image: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("limit-rate 1K\nlimit-iops 1000\n")
    server = start("--target", "--limits", limits, "--control", tmp_path / "ctl", image)
    with in_debt(server) as client:
        limit(tmp_path, "--limit-iops", 77)
        limits.write_text("limit-rate 1G\nlimit-iops 1000\n")
        assert "limit-rate 1024 -> 1073741824; clients that go on: 1" in bgctl("--reload", tmp_path / "ctl")
        assert client.simple_reply(512)[:2] == (0, 5)
        found = query(tmp_path / "ctl")["limits"]
        assert (found["rate"], found["iops"]) == (1 << 30, 77)


def test_two_clients_share_the_limit_of_all(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate-total", "8M", image)
    with ExitStack() as stack:
        floods = [Flood(server, 64 * KIB, 16), Flood(server, 16 * KIB, 2)]
        for flood in floods:
            stack.enter_context(flood.client)
        began = time.monotonic()
        while time.monotonic() < began + SECONDS:
            for flood in floods:
                flood.client.sock.settimeout(PATIENCE)
                flood.step()
        found = (floods[0].done * 64 * KIB + floods[1].done * 16 * KIB) / (time.monotonic() - began)
        assert found < 1.05 * 8 * MIB + (3 * BURST * 8 * MIB + 64 * KIB * 40) / SECONDS


def test_who_takes_less_than_its_part_does_not_wait_for_a_debtor(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate-total", "64K", image)
    with in_debt(server), raw(server) as modest:
        for _ in range(4):
            assert len(modest.read(0, 512)) == 512  # in two minutes, if it had to wait for its turn


def test_limits_hold_over_tls(start: Start, image: Path, certificates: Certificates) -> None:
    server = start("--target", "--tls", certificates.server_psk, "--limit-rate", "2M", image)
    client = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_username("alice")
    client.set_tls_psk_file(str(certificates.server_psk / "keys.psk"))
    client.connect_unix(str(server.socket))
    began = time.monotonic()
    content = image.read_bytes()
    for offset in range(0, 4 * MIB, 64 * KIB):
        assert client.pread(64 * KIB, offset) == content[offset : offset + 64 * KIB]
    assert time.monotonic() - began > 2 - BURST - 0.1
    client.shutdown()


def test_a_proxy_goes_on_fetching_for_a_client_that_sleeps(start: Start, tmp_path: Path) -> None:
    origin = start("--target", make_disk(tmp_path))
    proxy = Proxy(start, tmp_path, origin.uri, "--limit-rate", "2M")
    client = connect(proxy.uri)
    began = time.monotonic()
    buffers = [nbd.Buffer(64 * KIB) for _ in range(64)]
    cookies = [client.aio_pread(buffer, number * 64 * KIB) for number, buffer in enumerate(buffers)]
    while cookies:
        client.poll(-1)
        cookies = [cookie for cookie in cookies if not client.aio_command_completed(cookie)]
    assert time.monotonic() - began < 2 + PATIENCE
    client.shutdown()


def test_who_waits_because_of_limits_is_told(limited: Limited, tmp_path: Path) -> None:
    server = limited("--limit-rate", "1K", "--metrics", 0)
    server.wait_for_log("INFO: metrics on ")
    port = metrics_port(server.log())

    def waiting(number: int) -> None:
        wait_until(lambda: scrape(port)("xnbd_limited_clients") == number, f"{number} that wait")

    waiting(0)
    with in_debt(server) as client:
        waiting(1)
        assert scrape(port)("xnbd_limited_requests_total") == 0
        move(server)
        waiting(1)
        began = time.monotonic()
        before = scrape(port)("xnbd_limited_seconds_total")
        limit(tmp_path, "--limit-rate", 0)
        assert client.simple_reply(512)[:2] == (0, 5)
        waiting(0)
        wait_until(lambda: scrape(port)("xnbd_limited_seconds_total") > before, "the time it has waited")
        assert before <= scrape(port)("xnbd_limited_seconds_total") < time.monotonic() - began + PATIENCE
        limit(tmp_path, "--limit-iops", 4)
        late = scrape(port)("xnbd_limited_requests_total")
        client.send(pack_request(READ, 0, 512) * 6)
        client.receive(6 * (16 + 512))
        wait_until(lambda: scrape(port)("xnbd_limited_requests_total") > late, "requests that came late")
        assert scrape(port)("xnbd_limited_requests_total") <= late + 6
    with in_debt(server), raw(server):
        pass
    waiting(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit-rate", "fast"), "--limit-rate fast: expected a size like 512M, 1G or 4096"),
        (("--limit-iops", "-1"), "--limit-iops -1: expected a whole number from 0 to 9223372036854775807"),
        (("--limit-burst", "61"), "--limit-burst 61: expected at most 60 seconds"),
    ],
)
def test_nonsense_is_refused(limited: Limited, tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    limited()
    status, out, err = try_bgctl("--limit", *arguments, tmp_path / "ctl", check=False)
    assert (status, out, err) == (2, "", f"xnbd-bgctl: {message}\n")


def test_a_client_that_goes_in_debt_is_gone(start: Start, image: Path) -> None:
    server = start("--target", "--limit-rate", "1K", image)
    client = in_debt(server)
    client.sock.close()
    wait_until(lambda: not server.busy_workers(), "the end of its session")
