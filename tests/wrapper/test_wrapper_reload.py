"""The wrapper reads its configuration again, and what a service manager hears of it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from checked_clients import checked_clients
from conftest import StartWrapper
from notify_socket import listening
from proxies import ask
from rawclient import RawClient
from server_process import PYTHON, ROOT, wait_until
from wrapper_process import Wrapper, fails

UID = os.getuid()
READ_ONLY = 1 << 1


@pytest.fixture
def limits(tmp_path: Path) -> Path:
    path = tmp_path / "limits"
    path.write_text("max-clients 200\n")
    return path


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path, limits: Path) -> Wrapper:
    return start_wrapper("--imgfile", image, "--limits", limits)


def test_reload_tells_what_has_changed(wrapper: Wrapper, limits: Path) -> None:
    with wrapper.client():
        expected = "configuration read again: nothing has changed; clients that go on: 1\n"
        wait_until(lambda: wrapper.ctl("--reload") == expected, "the client to be known")
    limits.write_text("max-clients 1\nhandshake-timeout 7\n")
    assert "max-clients 200 -> 1, handshake-timeout 10 -> 7; clients" in wrapper.ctl("--reload")
    with wrapper.client() as client:
        wrapper.wait_for_log("1 client is connected, which is the limit")
        assert client.works()


def test_broken_file_changes_nothing(wrapper: Wrapper, limits: Path) -> None:
    wrapper.expected_errors.append("the configuration stays as it was")
    limits.write_text("spare-workers 3\n")
    assert f"{limits}:1: spare-workers means nothing here, only: max-clients" in wrapper.refuses("--reload")
    limits.write_text("max-clients -1\n")
    message = f"{limits}:1: max-clients -1: expected a whole number from 1 to 1000000"
    assert wrapper.refuses("--reload") == f"xnbd-wrapper-ctl: {message}\n"
    os.kill(wrapper.process.pid, signal.SIGHUP)
    wait_until(lambda: wrapper.log().count(f"stays as it was: {message}") == 2, "both lines")
    with wrapper.client() as client:
        assert client.works()


def test_bad_limits_are_refused_at_the_start(tmp_path: Path, image: Path, limits: Path) -> None:
    limits.write_text("max-buf-size some\n")
    status, message = fails(tmp_path, "--dbpath", tmp_path / "db", "--imgfile", image, "--limits", limits)
    assert (status, message) == (
        1,
        f"xnbd-wrapper: {limits}:1: max-buf-size some: expected a size like 512M, 1G or 4096\n",
    )


def test_silent_connection_is_dropped_by_the_new_timeout(wrapper: Wrapper, limits: Path) -> None:
    limits.write_text("handshake-timeout 0.2\n")
    ask(wrapper.control, command="reload")
    with wrapper.connect() as silent:
        silent.receive(18)
        assert silent.closed()


def test_hundred_clients_go_on_while_rules_and_limits_change(
    start_wrapper: StartWrapper, image: Path, limits: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.write_text(f"uid:{UID} * rw\n")
    wrapper = start_wrapper("--imgfile", image, "--limits", limits, "--tls-authz", rules, "--unix", tmp_path / "sock")

    def connect() -> RawClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(str(tmp_path / "sock"))
        return RawClient(sock).negotiate()

    with checked_clients(connect, 100) as clients:
        for number in range(10):
            readonly = not number % 2
            rules.write_text(f"uid:{UID} * {'ro' if readonly else 'rw'}\n")
            limits.write_text(f"max-clients {200 + number}\n")
            assert "rules" in ask(wrapper.control, command="reload")["changes"]
            with connect() as newcomer:
                assert bool(newcomer.flags & READ_ONLY) == readonly
        for _ in range(100):
            os.kill(wrapper.process.pid, signal.SIGHUP)
        rounds = [client.rounds for client in clients]
        wait_until(lambda: all(c.rounds > r for c, r in zip(clients, rounds)), "each to have done something")


def test_service_manager_hears_of_the_wrapper(
    start_wrapper: StartWrapper, image: Path, limits: Path, tmp_path: Path
) -> None:
    with listening(str(tmp_path / "notify")) as manager:
        environment = {**manager.environment, "WATCHDOG_USEC": "200000"}
        wrapper = start_wrapper("--imgfile", image, "--limits", limits, env=environment)
        wrapper.expected_errors.append("the configuration stays as it was")
        manager.wait_for("STATUS=clients: 0; exports: 1")
        with wrapper.client():
            manager.wait_for("STATUS=clients: 1; exports: 1")
        limits.write_text("nothing\n")
        wrapper.refuses("--reload")
        assert manager.listen().count("READY=1") == 2
        manager.wait_for("WATCHDOG=1", 3)
        wrapper.stop()
        assert "STOPPING=1" in manager.listen()
        assert manager.heard[0] == "READY=1"
        assert manager.senders == {wrapper.process.pid}


def test_executed_server_has_no_service_manager(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    """Whatever it says there would be taken for the wrapper's word, or end it."""
    script = tmp_path / "server"
    script.write_text(f'#!/bin/sh\nenv > {tmp_path}/environment.$$\nexec {PYTHON} {ROOT}/bin/xnbd-server "$@"\n')
    script.chmod(0o755)
    with listening(str(tmp_path / "notify")) as manager:
        environment = {**manager.environment, "WATCHDOG_USEC": "20000000"}
        wrapper = start_wrapper("--imgfile", image, "--xnbd-server", script, env=environment)
        with wrapper.client() as client:
            assert client.works()
        found = list(tmp_path.glob("environment.*"))
        assert len(found) == 2  # it was asked for --help too
        assert not any("NOTIFY_SOCKET" in path.read_text() or "WATCHDOG" in path.read_text() for path in found)
