"""What systemd hears of a server, by a notify socket as systemd has it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Iterator

import pytest
from conftest import Start
from launch import launched, stop_daemon
from notify_socket import Listening, listening
from rawclient import RawClient
from server_process import PYTHON, ROOT, Server, children_of, command, run, state_of, title_of, wait_until

BGCTL = [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl")]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listening]:
    with listening(str(tmp_path / "notify")) as found:
        yield found


def client_of(server: Server) -> RawClient:
    return RawClient(server.connect()).negotiate()


def test_from_start_to_stop(start: Start, image: Path, manager: Listening) -> None:
    server = start("--target", image, env=manager.environment)
    manager.wait_for("STATUS=clients: 0")
    with client_of(server):
        manager.wait_for("STATUS=clients: 1")
    manager.wait_for("STATUS=clients: 0", 2)
    server.stop()
    assert manager.listen()[0] == "READY=1"
    assert manager.heard[-1] == "STOPPING=1"
    assert manager.senders == {server.pid}


def test_reload(start: Start, image: Path, manager: Listening, tmp_path: Path) -> None:
    limits = tmp_path / "limits"
    limits.write_text("max-clients 5\n")
    server = start("--target", "--limits", limits, image, env=manager.environment)
    server.expected_errors.append("the configuration stays as it was")
    manager.wait_for("READY=1")
    os.kill(server.pid, signal.SIGHUP)
    manager.wait_for("READY=1", 2)
    begun = [message.partition("=1\nMONOTONIC_USEC=")[0] for message in manager.heard]
    assert "READY=1" in begun[begun.index("RELOADING") :]
    limits.write_text("max-clients -5\n")
    os.kill(server.pid, signal.SIGHUP)
    manager.wait_for("READY=1", 3)
    trouble = f"the last reload failed: {limits}:1: max-clients -5: expected a whole number from 1 to 1000000"
    manager.wait_for(f"STATUS=clients: 0; {trouble}")


def test_when_reload_has_returned_the_manager_knows(
    start: Start, image: Path, manager: Listening, tmp_path: Path
) -> None:
    start("--target", "--control", tmp_path / "ctl", image, env=manager.environment)
    run(*BGCTL, "--reload", tmp_path / "ctl")
    assert manager.listen().count("READY=1") == 2


def test_daemon_is_the_main_process(image: Path, manager: Listening, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    words = ("--target", "--daemonize", "--logpath", tmp_path / "log", "--pidfile", pid_file, "--lport", "0", image)
    try:
        run("env", *(f"{name}={value}" for name, value in manager.environment.items()), *command(*words))
        manager.wait_for(f"READY=1\nMAINPID={int(pid_file.read_text())}")
    finally:
        stop_daemon(pid_file)


def test_watchdog_hears_of_a_server_that_is_alive(start: Start, image: Path, manager: Listening) -> None:
    server = start("--target", image, env={**manager.environment, "WATCHDOG_USEC": "200000"})
    manager.wait_for("WATCHDOG=1", 5)
    with client_of(server):
        manager.wait_for("WATCHDOG=1", 10)
    assert manager.senders == {server.pid}


def test_watchdog_of_another_process_hears_nothing(start: Start, image: Path, manager: Listening) -> None:
    server = start("--target", image, env={**manager.environment, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    with client_of(server):
        manager.wait_for("STATUS=clients: 1")
    assert "WATCHDOG=1" not in manager.heard


def test_watchdog_hears_nothing_of_a_server_whose_steward_hangs(
    start: Start, image: Path, manager: Listening, tmp_path: Path
) -> None:
    environment = {**manager.environment, "WATCHDOG_USEC": "1000000"}
    server = start("--target", "--control", tmp_path / "ctl", image, env=environment)
    manager.wait_for("WATCHDOG=1", 2)
    (steward,) = (pid for pid in children_of(server.pid) if "steward" in title_of(pid))
    os.kill(steward, signal.SIGSTOP)
    try:
        server.wait_for_log("nothing is told to the service manager's watchdog: the steward does not answer")
        told = manager.listen().count("WATCHDOG=1")
        with client_of(server):
            manager.wait_for("WATCHDOG=1", told + 2)  # who would lose a disk by a restart
    finally:
        os.kill(steward, signal.SIGCONT)
    told = manager.listen().count("WATCHDOG=1")
    manager.wait_for("WATCHDOG=1", told + 2)


def test_watchdog_hears_nothing_of_a_master_that_stands_still(start: Start, image: Path, manager: Listening) -> None:
    server = start("--target", image, env={**manager.environment, "WATCHDOG_USEC": "100000"})
    manager.wait_for("WATCHDOG=1")
    os.kill(server.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(server.pid) == "T", "the master to stand still")
    told = len(manager.listen())
    with client_of(server):
        assert len(manager.listen()) == told
    os.kill(server.pid, signal.SIGCONT)
    manager.wait_for("WATCHDOG=1", told + 1)


def test_proxy_tells_of_its_origin(start: Start, image: Path, manager: Listening, tmp_path: Path) -> None:
    origin = start("--target", image)
    files = (tmp_path / "cache", tmp_path / "bitmap", tmp_path / "ctl")
    proxy = start("--proxy", origin.uri, *files, env=manager.environment)
    of = f"proxy of {origin.uri}"
    manager.wait_for(f"STATUS=clients: 0; {of}")
    with client_of(proxy) as client:
        client.read(0, 4096)
        origin.stop()
        client.request(0, 1 << 20, 4096)
        manager.wait_for(f"STATUS=clients: 1; {of}, which cannot be reached")


def test_proxy_that_is_complete_and_switched(start: Start, image: Path, manager: Listening, tmp_path: Path) -> None:
    origin = start("--target", image)
    files = (tmp_path / "cache", tmp_path / "bitmap", tmp_path / "ctl")
    start("--proxy", origin.uri, *files, env=manager.environment)
    run(*BGCTL, "--cache-all", files[2])
    manager.wait_for("STATUS=clients: 0; all blocks are cached")
    run(*BGCTL, "--switch", files[2])
    manager.wait_for("STATUS=clients: 0; a target since the switch")


def test_nobody_who_listens_is_no_trouble(image: Path, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "1000"}
    words = command("--target", "--unix", tmp_path / "sock", image)
    with launched(words, tmp_path / "log", env=environment) as server:
        server.wait_for_log("INFO: serving ")
