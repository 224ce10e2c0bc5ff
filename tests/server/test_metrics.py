"""xnbd-server --metrics: what is told, that it never goes backwards, and that nobody is harmed by who asks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, List

import pytest
from certificates import Certificates
from conftest import Start
from launch import fails
from proxies import DISK, Proxy, make_disk
from proxies import ask as ask_server
from rawclient import DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, RawClient, pack_request
from relay import Relay
from scraping import (
    Scrape,
    ask,
    check_by_promtool,
    connect,
    get,
    kill_observer,
    metrics_port,
    observer_of,
    read_answer,
    scrape,
    status,
)
from server_process import PATIENCE, Server, children_of, free_port, wait_until
from upgrades import build, upgrade

from xnbd.metrics.http import MOST_CONNECTIONS

EVERY_COMMAND = {"read": 3, "write": 2, "flush": 1, "trim": 1, "write_zeroes": 1}


def measured(start: Start, *arguments: object, **options: Any) -> Server:
    server = start("--metrics", 0, *arguments, **options)
    server.wait_for_log("INFO: metrics on ")
    return server


def port_of(server: Server) -> int:
    return metrics_port(server.log())


def raw(server: Server, **options: Any) -> RawClient:
    return RawClient(server.connect()).negotiate(**options)


def wait_for(where: int, name: str, value: float, **labels: str) -> Scrape:
    """Until a sample has that value; the scrape that says so."""
    found: List[Scrape] = []

    def is_so() -> bool:
        found[:] = [scrape(where)]
        return found[0].find(name, **labels) == [value]

    wait_until(is_so, f"{name}{labels} = {value}")
    return found[0]


@pytest.fixture
def server(start: Start, image: Path, tmp_path: Path) -> Server:
    return measured(start, "--target", "--control", tmp_path / "control", image)


def do_every_command(client: RawClient) -> None:
    for _ in range(3):
        client.read(0, 4096)
    for _ in range(2):
        client.write(0, bytes(512))
    for command, length in ((FLUSH, 0), (TRIM, 4096), (WRITE_ZEROES, 4096)):
        assert error_of(client, command, 0, length) == 0


def error_of(client: RawClient, command: int, offset: int, length: int, data: bytes = b"") -> int:
    client.request(command, offset, length, data=data)
    return client.simple_reply(length if command == READ else 0)[0]


def test_requests_bytes_and_durations_are_told_by_command(server: Server, image: Path) -> None:
    with raw(server) as client:
        do_every_command(client)
        seen = wait_for(port_of(server), "xnbd_requests_total", 1, command="write_zeroes")
        for command in ("read", "write", "other", "flush", "trim", "cache", "write_zeroes", "block_status"):
            count = EVERY_COMMAND.get(command, 0)
            assert seen("xnbd_requests_total", export=image.name, command=command) == count
            assert seen.find("xnbd_request_duration_seconds_count", command=command) == ([count] if count else [])
        assert seen("xnbd_bytes_total", direction="read") == 3 * 4096
        assert seen("xnbd_bytes_total", direction="written") == 2 * 512
        assert 0 < seen("xnbd_request_duration_seconds_sum", command="read") < PATIENCE
        assert seen("xnbd_clients") == 1
        assert seen("xnbd_disk_bytes") == image.stat().st_size
    wait_for(port_of(server), "xnbd_clients", 0)


def test_batches_of_all_kinds_count_each_request_once(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    counts = dict.fromkeys((READ, WRITE, FLUSH, TRIM), 0)
    with raw(server) as client:
        for _ in range(40):
            commands = rng.choices((READ, READ, READ, WRITE, WRITE, FLUSH, TRIM), k=rng.randrange(1, 60))
            batch = b""
            for command in commands:
                counts[command] += 1
                batch += pack_request(command, 4096 * rng.randrange(8), 512 if command != FLUSH else 0)
                batch += bytes(512) if command == WRITE else b""
            client.send(batch)
            client.receive(16 * len(commands) + 512 * commands.count(READ))
        names = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim"}
        for number, name in names.items():
            wait_for(port_of(server), "xnbd_requests_total", counts[number], command=name)
        seen = scrape(port_of(server))
        assert {number: seen("xnbd_requests_total", command=name) for number, name in names.items()} == counts
        assert {n: seen("xnbd_request_duration_seconds_count", command=name) for n, name in names.items()} == counts


def test_errors_are_told_by_command_and_errno(server: Server, image: Path) -> None:
    size = image.stat().st_size
    with raw(server) as client:
        assert error_of(client, READ, size, 512)
        assert error_of(client, WRITE, size, 512, bytes(512))
        assert error_of(client, 77, 0, 0)
        seen = wait_for(port_of(server), "xnbd_request_errors_total", 1, command="other", errno="EINVAL")
    assert seen("xnbd_request_errors_total", command="read", errno="EINVAL") == 1
    assert seen("xnbd_request_errors_total", command="write", errno="ENOSPC") == 1
    assert seen("xnbd_request_errors_total", command="read", errno="EIO") == 0
    assert seen("xnbd_requests_total", command="read") == 1


def test_replies_whose_data_cannot_be_read_are_errors(server: Server, image: Path) -> None:
    with raw(server) as client:
        client.read(0, 512)
        server.expected_errors.append("WARNING")
        os.truncate(image, 4096)
        assert error_of(client, READ, 1 << 16, 4096)
        wait_for(port_of(server), "xnbd_request_errors_total", 1, command="read", errno="EIO")


def test_promtool_and_the_formats(server: Server) -> None:
    with raw(server) as client:
        do_every_command(client)
    answer = get(port_of(server), Accept="text/plain")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert check_by_promtool(answer.body) == ""
    names = {name.removesuffix("_info") for name, _ in Scrape(answer.body.decode(), plain=True).samples}
    assert names == {name.removesuffix("_info") for name, _ in scrape(port_of(server)).samples}
    assert b'href="metrics"' in get(port_of(server), "/").body
    assert get(port_of(server), "/other").status == 404


def test_the_status_is_what_the_query_tells(server: Server, tmp_path: Path) -> None:
    from proxies import query

    with raw(server) as client:
        client.read(0, 4096)
        wait_until(lambda: query(tmp_path / "control")["counters"]["requests"] == 1, "the client's figures")
        told, asked = status(port_of(server)), query(tmp_path / "control")
    for answer in (told, asked):
        for changing in ("uptime_seconds", "workers"):
            del answer[changing]
    assert told == asked


def test_the_status_leaves_out_what_is_not_wanted_and_has_more_if_wanted(server: Server, image: Path) -> None:
    with raw(server) as client:
        client.read(0, 4096)
        wait_for(port_of(server), "xnbd_requests_total", 1, command="read")
        usual = status(port_of(server))
        asked = status(port_of(server), f"/status?durations=1&usage=0&map=8&export={image.name}")
    assert "memory_bytes" in usual["workers"][0]
    assert "memory_bytes" not in asked["workers"][0]
    assert (sum(asked["durations"]["read"]), "map" in asked, "durations" in usual) == (1, False, False)


def test_operators_are_told_durations_and_spared_usage_if_they_want(server: Server, tmp_path: Path) -> None:
    with raw(server) as client:
        client.read(0, 4096)
        wait_for(port_of(server), "xnbd_requests_total", 1, command="read")
        told = ask_server(tmp_path / "control", command="query", durations=True, usage=False)
        assert sum(told["durations"]["read"]) == 1
        assert len(told["durations"]["bounds"]) == len(told["durations"]["read"]) - 1
        assert told["limited_clients"] == 0
        assert "cpu_percent" not in told["workers"][0]
        plain = ask_server(tmp_path / "control", command="query")
        assert ("durations" in plain, "cpu_percent" in plain["workers"][0]) == (False, True)


def test_operators_are_told_that_nobody_counts_durations(start: Start, image: Path, tmp_path: Path) -> None:
    start("--target", "--control", tmp_path / "plain.ctl", image).wait_for_log("INFO: serving ")
    assert ask_server(tmp_path / "plain.ctl", command="query", durations=True)["durations"] is None


def test_it_listens_on_this_computer_only_unless_told(start: Start, image: Path) -> None:
    port = free_port()
    servers = [start("--target", "--readonly", "--metrics", where, image) for where in (port, "0.0.0.0:0", "[::1]:0")]
    for server, where in zip(servers, (f"127.0.0.1:{port}", "0.0.0.0:", "[::1]:")):
        server.wait_for_log(f"INFO: metrics on {where}")
    assert get(port, "/").status == 200


def test_it_listens_on_a_unix_socket(start: Start, image: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    server = start("--target", "--metrics", path, image)
    server.wait_for_log(f"INFO: metrics on unix:{path}")
    assert scrape(path)("xnbd_clients") == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.stop()
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (
            "nine",
            "--metrics nine: expected a port, an address and a port as 0.0.0.0:9555, or a path with a slash in it",
        ),
        (":9555", "--metrics :9555: expected a port,"),
        ("65536", "--metrics 65536: expected a port,"),
        ("192.0.2.1:0", "192.0.2.1 is no address of this computer: choose another --metrics"),
        ("/nowhere/at/all", "cannot listen on /nowhere/at/all: No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_is_refused(image: Path, where: str, reason: str) -> None:
    assert reason in fails("--target", "--lport", 0, "--metrics", where, image)[1]


def test_a_port_in_use_is_refused(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = fails("--target", "--lport", 0, "--metrics", port, image)[1]
    assert f"port {port} is in use" in told
    assert "choose another --metrics" in told


def test_servers_of_one_client_have_no_metrics(image: Path) -> None:
    assert "--metrics" in fails("--target", "--inetd", "--metrics", 0, image)[1]


def test_stuck_scrapers_harm_nobody(server: Server) -> None:
    port = port_of(server)
    with ExitStack() as stack, raw(server) as client:
        for number in range(MOST_CONNECTIONS + 30):
            sock = stack.enter_context(connect(port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall((b"GET /metrics HTTP/1.1\r\n\r\n" * 200, b"GET /met", b"")[number % 3])
        for _ in range(20):
            client.read(0, 4096)
            assert scrape(port)("xnbd_clients") == 1
        observer = observer_of(server.pid)
        assert observer is not None
        os.kill(observer, signal.SIGSTOP)
        for _ in range(100):
            client.read(0, 4096)
        os.kill(observer, signal.SIGCONT)
        wait_for(port, "xnbd_requests_total", 120, command="read")


def test_the_observer_writes_to_nothing_that_others_share(start: Start, tmp_path: Path) -> None:
    origin = start("--target", "--readonly", make_disk(tmp_path))
    proxy = Proxy(start, tmp_path, origin.uri, "--metrics", 0)
    assert scrape(port_of(proxy.server))("xnbd_disk_bytes") == DISK
    assert status(port_of(proxy.server))["mode"] == "proxy"
    pid = observer_of(proxy.server.pid)
    shared = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.split()[1][3] == "s"]
    assert any("bitmap.board" in line for line in shared)
    assert any("xnbd-tally" in line for line in shared)
    assert not [line for line in shared if line.split()[1][1] == "w" and ("bitmap" in line or "tally" in line)]


def test_a_dead_observer_is_started_again(server: Server) -> None:
    server.expected_errors.append("the process for metrics died: killed by SIGKILL")
    with raw(server) as client:
        client.read(0, 4096)
        with connect(port_of(server)) as sock:
            assert ask(sock).status == 200
            kill_observer(server.pid)
            with pytest.raises((EOFError, ConnectionResetError)):
                read_answer(sock)
        client.read(0, 4096)
        wait_for(port_of(server), "xnbd_requests_total", 2, command="read")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_master_however_that_ends(server: Server, number: int) -> None:
    wait_until(lambda: observer_of(server.pid), "the observer")
    left = children_of(server.pid)
    with connect(port_of(server)) as sock:
        sock.sendall(b"GET /metr")
        server.stop(number)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "the end of all processes")


def test_deaths_of_workers_are_counted(server: Server) -> None:
    server.expected_errors.append("died: killed by SIGKILL")
    for deaths in (1, 2):
        with raw(server) as client:
            client.read(0, 4096)
            wait_for(port_of(server), "xnbd_requests_total", deaths, command="read")
            os.kill(server.busy_workers()[0], signal.SIGKILL)
            seen = wait_for(port_of(server), "xnbd_worker_deaths_total", deaths)
            assert seen("xnbd_requests_total", command="read") == deaths


def test_snapshots_are_counted(server: Server, tmp_path: Path) -> None:
    from proxies import bgctl

    bgctl("--snapshot", tmp_path / "control")
    seen = wait_for(port_of(server), "xnbd_snapshots_total", 1, outcome="made")
    assert seen("xnbd_snapshots_total", outcome="failed") == 0
    assert seen("xnbd_snapshot_running") == 0


def test_certificates_tell_their_end(start: Start, image: Path, certificates: Certificates) -> None:
    server = measured(start, "--target", image, tls=certificates)
    files = scrape(port_of(server)).find("xnbd_tls_certificate_expiry_seconds")
    assert files
    assert all(3600 < seconds < 1e9 for seconds in files)


def test_a_reload_that_changes_something_replaces_the_observer(start: Start, image: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-clients 7\n")
    server = measured(start, "--target", "--limits", limits, image)
    with connect(port_of(server)) as sock:
        assert ask(sock).status == 200
        assert scrape(port_of(server))("xnbd_clients_limit") == 7
        limits.write_text("max-clients 9\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for(port_of(server), "xnbd_clients_limit", 9)
        assert sock.recv(1) == b""  # the one before has ended in good order


# Proxies


@pytest.fixture
def far(start: Start, tmp_path: Path) -> Server:
    return start("--target", "--readonly", make_disk(tmp_path), tcp=True)


def test_a_proxy_tells_of_hits_misses_origin_and_cache(start: Start, far: Server, tmp_path: Path) -> None:
    proxy = Proxy(start, tmp_path, ["127.0.0.1", far.port], "--metrics", 0, "--readahead", 0)
    port = port_of(proxy.server)
    with proxy.raw() as client:
        for _ in range(3):
            client.read(0, 4096)
        seen = wait_for(port, "xnbd_cache_hits_total", 2)
        assert seen("xnbd_cache_misses_total") == 1
        assert seen("xnbd_origin_bytes_total") == 4096
        assert seen("xnbd_origin_up") == 1
        assert seen("xnbd_origin_connections") == 1
        wait_for(port, "xnbd_request_duration_seconds_count", 3, command="read")
        wait_for(port, "xnbd_cached_bytes", DISK % 4096)  # as if the short block was the one that is there
        wait_for(port, "xnbd_checkpoint_pending_pages", 0)
        wait_until(lambda: scrape(port).find("xnbd_checkpoint_duration_seconds"), "a checkpoint")
        seen = scrape(port)
        assert 0 <= seen("xnbd_checkpoint_age_seconds") < 2 * PATIENCE
        assert 0 < seen("xnbd_checkpoint_duration_seconds") < PATIENCE
        assert (seen("xnbd_copy_running"), seen("xnbd_waiting_requests")) == (0, 0)


def test_an_origin_that_goes_and_comes_back(start: Start, far: Server, tmp_path: Path) -> None:
    with Relay(far.port) as relay:
        proxy = Proxy(start, tmp_path, ["127.0.0.1", relay.port], "--metrics", 0, "--readahead", 0)
        proxy.server.expected_errors.append(" for it, trying again")
        port = port_of(proxy.server)
        with proxy.raw() as client:
            client.read(0, 4096)
            relay.refuse()
            relay.cut()
            client.send(pack_request(READ, offset=1 << 20, length=4096))
            seen = wait_for(port, "xnbd_origin_up", 0)
            wait_for(port, "xnbd_waiting_requests", 1)
            assert seen("xnbd_origin_reconnects_total") == 0
            relay.accept()
            client.receive(16 + 4096)
            wait_for(port, "xnbd_origin_reconnects_total", 1)
            seen = wait_for(port, "xnbd_request_duration_seconds_count", 2, command="read")
            assert seen("xnbd_origin_up") == 1
            assert seen("xnbd_request_duration_seconds_sum", command="read") > 0.05


def test_requests_of_a_client_that_takes_its_leave_are_counted(start: Start, far: Server, tmp_path: Path) -> None:
    proxy = Proxy(start, tmp_path, ["127.0.0.1", far.port], "--metrics", 0, "--readahead", 0)
    with proxy.raw() as client:
        client.send(pack_request(READ, 1 << 20, 4096) + pack_request(DISC, 0, 0))
        client.receive(16 + 4096)
        assert client.closed()
    wait_for(port_of(proxy.server), "xnbd_request_duration_seconds_count", 1, command="read")


@pytest.mark.root(reason="becomes another user")
def test_metrics_without_roots_rights(start: Start) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as home:  # others may not enter what pytest makes
        os.chown(home, 65534, 65534)
        image = Path(home, "disk.img")
        image.write_bytes(bytes(1 << 20))
        os.chown(image, 65534, 65534)
        server = measured(start, "--target", "--user", "65534", image)
        server.expected_errors.append("that user cannot")
        with raw(server) as client:
            client.read(0, 4096)
            wait_for(port_of(server), "xnbd_requests_total", 1, command="read")
            observer = observer_of(server.pid)
        assert "Uid:\t65534\t65534\t65534\t65534" in Path(f"/proc/{observer}/status").read_text()


def test_a_copy_and_a_switch(start: Start, far: Server, tmp_path: Path) -> None:
    proxy = Proxy(start, tmp_path, ["127.0.0.1", far.port], "--metrics", 0)
    port = port_of(proxy.server)
    with proxy.raw() as client:
        client.read(0, 4096)
        proxy.bgctl("--cache-all")
        before = wait_for(port, "xnbd_cached_bytes", DISK)
        proxy.bgctl("--switch")
        client.read(0, 4096)
        after = wait_for(port, "xnbd_requests_total", 2, command="read")
        assert after("xnbd_cached_bytes") == DISK
        assert before("xnbd_cache_misses_total") <= after("xnbd_cache_misses_total")
        assert after("xnbd_write_back_failed") == 0


# Upgrades


def test_a_program_that_counts_in_another_way_goes_on(start: Start, image: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    change = ("scoreboard/tally.py", 'Row("misses", ', 'Row("another", "nothing"),\n    Row("misses", ')
    server = measured(start, "--target", "--control", control, image)
    with raw(server) as client:
        client.read(0, 4096)
        wait_for(port_of(server), "xnbd_requests_total", 1, command="read")
        for version, changes in (("9.1", [change]), ("9.2", [])):
            program = build(tmp_path / version, version, *changes)
            assert upgrade(control, "--program", program).moved == 1
            client.read(0, 4096)
            seen = wait_for(port_of(server), "xnbd_build_info", 1, version=version)
            assert seen("xnbd_clients") == 1
        wait_for(port_of(server), "xnbd_requests_total", 3, command="read")


def test_a_server_that_is_upgraded_has_one_observer(server: Server, tmp_path: Path) -> None:
    with raw(server) as client:
        client.read(0, 4096)
        for reads in (2, 3, 4):
            former = observer_of(server.pid)
            upgrade(tmp_path / "control")
            client.read(0, 4096)
            wait_for(port_of(server), "xnbd_requests_total", reads, command="read")
            wait_until(lambda: former not in children_of(server.pid), "the end of the former one")  # noqa: B023


def test_scraping_goes_on_through_an_upgrade(server: Server, tmp_path: Path) -> None:
    failures, over = [], threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                assert scrape(port_of(server))("xnbd_start_time_seconds") < time.time()
            except (OSError, EOFError) as error:
                failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3):
        upgrade(tmp_path / "control")
    over.set()
    thread.join()
    assert not failures


def test_without_the_option_nothing_is_counted_or_opened(start: Start, image: Path) -> None:
    server = start("--target", image)
    with raw(server) as client:
        client.read(0, 4096)
        assert observer_of(server.pid) is None
        worker = server.busy_workers()[0]
        assert "xnbd-tally" not in Path(f"/proc/{worker}/maps").read_text()


def test_json_of_a_target_and_of_a_proxy_is_whole(start: Start, far: Server, tmp_path: Path) -> None:
    proxy = Proxy(start, tmp_path, ["127.0.0.1", far.port], "--metrics", 0)
    told = json.loads(get(port_of(proxy.server), "/status").body)
    assert set(told) == set(proxy.query())
