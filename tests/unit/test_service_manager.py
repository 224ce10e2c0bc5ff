"""What a service manager is told, over a real socket."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import pytest
from server_process import wait_until

from xnbd.system.service_manager import ServiceManager, without_manager


class Manager:
    """Listens as a service manager does; *name* begins with ``@`` in the abstract name space."""

    def __init__(self, name: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + name[1:] if name.startswith("@") else name)
        self.sock.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": name}

    def heard(self) -> List[str]:
        messages = []
        while True:
            try:
                messages.append(self.sock.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    found = Manager(f"@xnbd-unit-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify"))
    yield found
    found.sock.close()


def watched(manager: Manager, seconds: float, pid: Optional[int] = None) -> ServiceManager:
    more: Dict[str, str] = {} if pid is None else {"WATCHDOG_PID": str(pid)}
    return ServiceManager({**manager.environment, "WATCHDOG_USEC": str(int(seconds * 1e6)), **more})


def test_states(manager: Manager) -> None:
    this = ServiceManager(manager.environment)
    before = time.monotonic_ns() // 1000
    this.ready()
    this.reloading()
    this.ready()
    this.stopping()
    ready, reloading, again, stopping = manager.heard()
    assert (ready, again, stopping) == ("READY=1", "READY=1", "STOPPING=1")
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_status_is_told_when_it_is_news(manager: Manager) -> None:
    this = ServiceManager(manager.environment)
    assert this.deadline() is None
    this.show("clients: 1")
    this.show("clients: 2\nREADY=0")
    assert this.deadline() == 0.0
    this.progress(lambda: True)
    this.show("clients: 2\nREADY=0")
    assert this.deadline() is None
    this.progress(lambda: True)
    assert manager.heard() == ["STATUS=clients: 2 READY=0"]


def test_status_is_told_once_a_second_at_most(manager: Manager) -> None:
    this = ServiceManager(manager.environment)
    began = time.monotonic()
    for number in range(100):
        this.show(f"clients: {number}")
        this.progress(lambda: True)
    if time.monotonic() < began + 1:
        assert manager.heard() == ["STATUS=clients: 0"]
    deadline = this.deadline()
    assert deadline is not None
    assert began < deadline
    wait_until(lambda: time.monotonic() >= deadline, "the second to be over")
    this.progress(lambda: True)
    assert manager.heard()[-1] == "STATUS=clients: 99"


def test_watchdog_is_told_at_half_its_time(manager: Manager) -> None:
    this = watched(manager, 3600, os.getpid())
    assert this.deadline() == 0.0
    for _ in range(3):
        this.progress(lambda: True)
    assert manager.heard() == ["WATCHDOG=1"]
    assert 1700 < (this.deadline() or 0.0) - time.monotonic() <= 1800


def test_watchdog_is_told_nothing_of_a_dead_program_and_all_when_it_comes_back(manager: Manager) -> None:
    this = watched(manager, 0.08)
    this.progress(lambda: False)
    assert not manager.heard()
    deadline = this.deadline()
    assert deadline is not None
    assert deadline - time.monotonic() <= 0.01
    wait_until(lambda: time.monotonic() >= deadline, "the next look")
    this.progress(lambda: True)
    assert manager.heard() == ["WATCHDOG=1"]


@pytest.mark.parametrize("microseconds", ["", "0", "-5", "many"])
def test_no_watchdog(manager: Manager, microseconds: str) -> None:
    assert ServiceManager({**manager.environment, "WATCHDOG_USEC": microseconds}).watchdog is None


def test_watchdog_of_another_process_is_not_ours(manager: Manager) -> None:
    assert watched(manager, 5, os.getpid() + 1).watchdog is None
    assert watched(manager, 5, os.getpid()).watchdog == 5


def test_daemon_says_who_is_the_main_process_now(manager: Manager) -> None:
    this = watched(manager, 5, os.getpid())
    pid = os.fork()
    if not pid:
        this.ready()
        this.progress(lambda: True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert manager.heard() == [f"READY=1\nMAINPID={pid}", "WATCHDOG=1"]


@pytest.mark.parametrize("address", ["", "/nobody/listens/here", "vsock:2:1", "x" * 200])
def test_nobody_listens(address: str) -> None:
    this = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100"})
    this.ready()
    this.show("status")
    this.progress(lambda: True)
    this.stopping()


def test_manager_that_does_not_read_keeps_nobody_waiting(manager: Manager) -> None:
    this = watched(manager, 5)
    while this._send("X=1"):
        pass
    this.show("later")
    this.progress(lambda: True)
    manager.heard()
    told = []

    def is_told() -> bool:
        this.progress(lambda: True)
        told.extend(manager.heard())
        return len(told) == 2

    wait_until(is_told, "another try of both")
    assert sorted(told) == ["STATUS=later", "WATCHDOG=1"]


def test_other_programs_have_no_manager() -> None:
    environment = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "7", "PATH": "/bin"}
    assert without_manager(environment) == {"PATH": "/bin"}
