"""Reading the configuration again while clients are connected: SIGHUP and xnbd-bgctl --reload."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import List, Tuple

import pytest
from checked_clients import checked_clients
from conftest import Start
from launch import fails
from rawclient import RawClient, bystander
from server_process import PYTHON, ROOT, Server, children_of, is_alive, run, title_of, wait_until

NAMES = (
    "max-clients, handshake-timeout, spare-workers, "
    "limit-rate, limit-iops, limit-rate-total, limit-iops-total, limit-burst"
)

ROUNDS_OF_KILLS = int(os.environ.get("XNBD_RELOAD_KILLS", 20))

BGCTL = [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl")]


def reload_of(server: Server) -> Tuple[int, str, str]:
    return run(*BGCTL, "--reload", server.socket.with_suffix(".ctl"), check=False)


def reloads(server: Server) -> str:
    """What is printed for a reload that succeeds."""
    status, out, err = reload_of(server)
    assert (status, err) == (0, ""), err
    return out


def refuses(server: Server) -> str:
    """The one line for a reload that is refused."""
    status, out, err = reload_of(server)
    assert (status, out, err.count("\n")) == (1, "", 1), (status, out, err)
    return err.removeprefix("xnbd-bgctl: ").rstrip("\n")


def query(server: Server) -> dict:  # type: ignore[type-arg]
    return dict(json.loads(run(*BGCTL, "--json", server.socket.with_suffix(".ctl"))[1]))


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    path = tmp_path / "limits"
    path.write_text("# nothing yet\n")
    return path


@pytest.fixture
def limited(start: Start, image: Path, limits: Path, tmp_path: Path) -> Server:
    """A server with limits and a control socket."""
    return start("--target", "--limits", limits, "--control", tmp_path / "server0.ctl", image)


def client_of(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


def spares(server: Server) -> List[int]:
    return [pid for pid in server.workers() if "spare worker" in title_of(pid)]


def test_limits_are_taken_at_the_start_and_go_before_options(start: Start, image: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("\n  max-clients\t1 # one\nhandshake-timeout 0.3\n")
    server = start(
        "--target", "--max-clients", 9, "--spare-workers", 7, "--limits", limits,
        "--control", tmp_path / "server0.ctl", image,
    )  # fmt: skip
    with RawClient(server.connect()) as silent:
        silent.receive(18)
        assert silent.closed()
    configuration = query(server)["configuration"]
    assert (configuration["max_clients"], configuration["spare_workers"]) == (1, 7)
    with client_of(server):
        server.wait_for_log("1 client is connected, which is the limit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max-clients", "expected a line max-clients VALUE"),
        ("max-clients 1 2", "expected a line max-clients VALUE"),
        ("max-clients many", "max-clients many: expected a whole number from 1 to 1000000"),
        ("max-clients 0", "max-clients 0: expected a whole number from 1 to 1000000"),
        ("handshake-timeout -1", "handshake-timeout -1: expected a number of seconds above 0"),
        ("max-disks 3", f"there is no limit 'max-disks', only: {NAMES}"),
        ("max-queue-size 3", f"max-queue-size means nothing here, only: {NAMES}"),
        ("limit-rate fast", "limit-rate fast: expected a size like 512M, 1G or 4096"),
        ("max-clients 2\nmax-clients 2", "max-clients stands in line 3 already"),
    ],
)
def test_bad_lines_are_refused(image: Path, limits: Path, line: str, message: str) -> None:
    limits.write_text(f"# limits\n\n{line}\n")
    number = 3 + line.count("\n")
    assert fails("--target", "--limits", limits, image) == (1, f"xnbd-server: {limits}:{number}: {message}\n")


def test_what_cannot_be_read_is_refused(image: Path, tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(b"#" * 70000)
    for path, message in (
        (tmp_path / "none", "it cannot be read: No such file or directory"),
        (tmp_path, "it cannot be read: Is a directory"),
        (pipe, "this is no regular file"),
        (large, "it has more than 65536 bytes"),
    ):
        assert fails("--target", "--limits", path, image) == (1, f"xnbd-server: --limits {path}: {message}\n")


def test_reload_tells_what_has_changed(limited: Server, limits: Path) -> None:
    assert reloads(limited) == "configuration read again: nothing has changed; clients that go on: 0\n"
    limits.write_text("max-clients 100\nspare-workers 2\n")
    with client_of(limited):
        assert reloads(limited) == (
            "configuration read again: max-clients 4096 -> 100, spare-workers 4 -> 2; clients that go on: 1\n"
        )
    limited.wait_for_log("INFO: configuration read again: max-clients 4096 -> 100, spare-workers 4 -> 2")
    assert query(limited)["configuration"]["max_clients"] == 100
    wait_until(lambda: len(spares(limited)) == 2, "as few spare workers as are wanted now")


def test_reload_without_a_change_leaves_the_spare_workers_alone(limited: Server) -> None:
    wait_until(lambda: len(spares(limited)) == 4, "spare workers")
    before = spares(limited)
    reloads(limited)
    assert spares(limited) == before


def test_broken_file_changes_nothing(limited: Server, limits: Path) -> None:
    limited.expected_errors.append("the configuration stays as it was")
    limits.write_text("max-clients 100\n")
    reloads(limited)
    wait_until(lambda: len(spares(limited)) == 4, "all workers")
    before = query(limited)["configuration"], set(limited.workers())
    limits.write_text("spare-workers 2\nmax-clients 1OO\n")
    message = f"{limits}:2: max-clients 1OO: expected a whole number from 1 to 1000000"
    assert refuses(limited) == message
    os.kill(limited.pid, signal.SIGHUP)
    wait_until(lambda: limited.log().count(f"stays as it was: {message}") == 2, "both lines")
    limits.unlink()
    assert refuses(limited) == f"--limits {limits}: it cannot be read: No such file or directory"
    assert (query(limited)["configuration"], set(limited.workers())) == before


def test_more_clients_than_the_scoreboard_has_room_for_are_refused(limited: Server, limits: Path) -> None:
    limited.expected_errors.append("the configuration stays as it was")
    limits.write_text("max-clients 900000\n")
    assert refuses(limited) == ("max-clients 900000: this server has room for 16384 processes: restart it for more")


def test_log_file_is_opened_again_or_all_stays_as_it_was(start: Start, image: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    log.parent.mkdir()
    server = start("--target", "--logpath", log, "--control", tmp_path / "server0.ctl", image)
    log.rename(tmp_path / "old")
    reloads(server)
    assert "configuration read again" in log.read_text()
    log.rename(tmp_path / "older")
    log.parent.rmdir()
    assert refuses(server) == f"cannot open log file {log}: No such file or directory"
    log.parent.mkdir()
    with client_of(server) as client:
        assert client.works()
    wait_until(lambda: ": left" in log.read_text(), "lines in a new log")


def test_hangup_with_nothing_configured_is_harmless(server: Server) -> None:
    with bystander(server):
        wait_until(lambda: len(spares(server)) == 4, "all workers")
        before = set(server.workers())
        for _ in range(5):
            os.kill(server.pid, signal.SIGHUP)
        server.wait_for_log("configuration read again: nothing has changed")
        assert set(server.workers()) == before


def test_lower_limit_ends_nobody_and_admits_nobody(limited: Server, limits: Path) -> None:
    clients = [client_of(limited) for _ in range(3)]
    limits.write_text("max-clients 2\n")
    reloads(limited)
    limited.wait_for_log("3 clients are connected, more than the limit of 2; others wait")
    with RawClient(limited.connect()) as waiting:
        clients.pop().sock.close()
        wait_until(lambda: len(limited.busy_workers()) == 2, "one to have left")
        assert all(client.works() for client in clients)
        assert len(limited.workers()) == 3  # the steward too
        clients.pop().sock.close()
        assert waiting.negotiate().works()
    for client in clients:
        assert client.works()
        client.sock.close()


def test_raised_limit_lets_those_in_who_wait(start: Start, image: Path, limits: Path, tmp_path: Path) -> None:
    limits.write_text("max-clients 1\n")
    server = start("--target", "--limits", limits, "--control", tmp_path / "server0.ctl", image)
    with client_of(server) as first, RawClient(server.connect()) as second:
        server.wait_for_log("which is the limit")
        limits.write_text("max-clients 2\n")
        reloads(server)
        assert second.negotiate().works()
        assert first.works()


def test_worker_of_before_ends_with_its_client(limited: Server, limits: Path) -> None:
    with client_of(limited) as client:
        wait_until(lambda: len(limited.busy_workers()) == 1, "the worker")
        (worker,) = limited.busy_workers()
        limits.write_text("handshake-timeout 5\n")
        reloads(limited)
        assert client.works()
        assert limited.busy_workers() == [worker]
    wait_until(lambda: not is_alive(worker), "the worker's end")
    wait_until(lambda: len(spares(limited)) == 4, "spare workers")


def test_silent_connections_are_served_by_the_workers_of_after(limited: Server, limits: Path) -> None:
    silent = [RawClient(limited.connect()) for _ in range(60)]
    for client in silent:
        client.greet()
    for number in range(5):
        limits.write_text(f"handshake-timeout {60 + number}\nspare-workers {16 - number}\n")
        reloads(limited)
    for client in silent:
        client.go()
        assert client.works()
        client.sock.close()
    assert "closed" not in limited.log()


def test_oldstyle_clients_are_served_all_the_time(start: Start, image: Path, limits: Path) -> None:
    server = start("--target", "--oldstyle", "--limits", limits, image)
    for number in range(30):
        limits.write_text(f"handshake-timeout {60 + number}\n")
        os.kill(server.pid, signal.SIGHUP)
        with RawClient(server.connect()) as client:
            client.receive(152)
            assert client.works()


def test_new_connections_have_the_new_configuration_at_once(limited: Server, limits: Path) -> None:
    for _ in range(5):
        limits.write_text("handshake-timeout 0.2\n")
        reloads(limited)
        hasty = [RawClient(limited.connect()) for _ in range(8)]
        for client in hasty:
            client.sock.settimeout(20)
            client.receive(18)
            assert client.closed()
            client.sock.close()
        limits.write_text("handshake-timeout 60\n")
        reloads(limited)


def test_hundred_clients_go_on_while_everything_changes(limited: Server, limits: Path) -> None:
    def connect() -> RawClient:
        return client_of(limited)

    with checked_clients(connect, 100) as clients:
        for number in range(20):
            limits.write_text(f"max-clients {200 + number}\nspare-workers {1 + number % 5}\n")
            reloads(limited)
            with connect() as newcomer:
                assert newcomer.works()
        for number in range(100):
            limits.write_text(f"handshake-timeout {20 + number}\n")
            os.kill(limited.pid, signal.SIGHUP)
        limits.write_text("handshake-timeout 9\n")
        assert reloads(limited).endswith("clients that go on: 100\n")
        rounds = [client.rounds for client in clients]
        wait_until(lambda: all(c.rounds > r for c, r in zip(clients, rounds)), "each to have done something")
    wait_until(lambda: not limited.busy_workers(), "the clients' leaving")
    wait_until(lambda: len(limited.workers()) == 5, "the steward and four spare workers")
    assert query(limited)["configuration"]["handshake_timeout"] == 9


def test_kills_during_reloads_harm_nobody_else(limited: Server, limits: Path, seed: int) -> None:
    limited.expected_errors += ["worker .* died: killed by", "the steward died: killed by", "stays as it was"]
    dice = random.Random(seed)
    with checked_clients(lambda: client_of(limited), 5) as clients:
        for number in range(ROUNDS_OF_KILLS):
            limits.write_text(f"handshake-timeout {60 + number}\n" if dice.random() < 0.9 else "nonsense\n")
            os.kill(limited.pid, signal.SIGHUP)
            if dice.random() < 0.5:
                victims = [pid for pid in children_of(limited.pid) if "worker for" not in title_of(pid)]
                for pid in dice.sample(victims, min(len(victims), dice.randrange(3))):
                    kill_unless_busy(pid)
            if dice.random() < 0.5:
                with client_of(limited) as newcomer:
                    assert newcomer.works()
        rounds = [client.rounds for client in clients]
        wait_until(lambda: all(c.rounds > r for c, r in zip(clients, rounds)), "each to have done something")
    limits.write_text("handshake-timeout 7\n")
    wait_until(lambda: reload_of(limited)[0] == 0, "a steward that answers")
    with client_of(limited) as newcomer:
        assert newcomer.works()


def kill_unless_busy(pid: int) -> None:
    """It must not become the worker of a client between a look and the kill."""
    try:
        os.kill(pid, signal.SIGSTOP)
        busy = "worker for" in title_of(pid)
        os.kill(pid, signal.SIGCONT if busy else signal.SIGKILL)
    except ProcessLookupError:
        pass


def test_master_killed_in_a_reload_leaves_nobody(start: Start, image: Path, limits: Path, tmp_path: Path) -> None:
    server = start("--target", "--limits", limits, "--control", tmp_path / "server0.ctl", image)
    with client_of(server):
        for number in range(5):
            limits.write_text(f"handshake-timeout {60 + number}\n")
            os.kill(server.pid, signal.SIGHUP)
        children = children_of(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, children)), "the end of all")
    server.process.wait()


def test_signals_while_the_server_stops(limited: Server, limits: Path) -> None:
    with client_of(limited):
        os.kill(limited.pid, signal.SIGHUP)
        os.kill(limited.pid, signal.SIGTERM)
        for number in range(20):
            limits.write_text(f"handshake-timeout {60 + number}\n")
            try:
                os.kill(limited.pid, signal.SIGHUP)
            except ProcessLookupError:
                break
    assert limited.process.wait(60) == 0
