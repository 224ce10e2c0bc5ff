"""Fixtures: a real server, started for a test and always stopped, whose log must be clean."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from browser import Browser
from caching import CacheFiles
from certificates import Certificates
from hypothesis import HealthCheck, settings
from moving import make_restless
from server_process import Server
from shared_ceph import SharedCeph, sharing
from wrapper_process import Wrapper

MIB = 1 << 20

Start = Callable[..., Server]

# Time says nothing here: another process may have the processor for seconds.
settings.register_profile("xnbd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xnbd")


def unexpected_lines(log: str, expected_errors: List[str]) -> List[str]:
    """Lines of a log that tell of an error that no test has announced."""
    return [
        line
        for line in log.splitlines()
        if re.search(r" ERROR: |\"level\": \"ERROR\"|Traceback|^\w*Error\b|Warning:", line)
        and not any(re.search(pattern, line) for pattern in expected_errors)
    ]


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Machines first: with several workers the longest tests would else be the last ones, while nobody else works."""
    items.sort(key=lambda item: item.get_closest_marker("guest") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What only root can do is skipped for others."""
    for mark in item.iter_markers("root") if os.geteuid() else ():
        pytest.skip(mark.kwargs["reason"])


@pytest.fixture(scope="session", autouse=True)
def default_dispositions() -> None:
    """Have what the tests start begin with default signal dispositions and nothing blocked.

    A shell's background jobs ignore SIGINT, what runs under nohup ignores SIGHUP, and
    both would go on through exec. A handler does not: pytest itself minds such a signal
    as little as before, its children begin with the default.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # those are restored by `subprocess`
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB and a bit, full of noise, whose size is no multiple of anything."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(8520).randbytes(8 * MIB + 1234 + 1))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers; stops them after the test, and fails it if their logs show an error.

    ``start("--target", image)`` listens on ``server.socket``; see `Server` for more.
    What a test expects in the log it names in ``server.expected_errors``.
    """
    servers: List[Server] = []

    def start_one(*arguments: object, **options: object) -> Server:
        server = Server(tmp_path, f"server{len(servers)}", [str(a) for a in arguments], **options)  # type: ignore[arg-type]
        servers.append(server)
        server.wait_until_ready()
        make_restless(server)
        return server

    try:
        yield start_one
    finally:
        for server in reversed(servers):  # an origin that goes first waits a second for its proxy to hang up
            server.stop()
    for server in servers:
        unexpected = unexpected_lines(server.log(), server.expected_errors)
        assert not unexpected, "\n".join(unexpected)


@pytest.fixture
def files(tmp_path: Path) -> CacheFiles:
    """Where a proxy keeps its cache."""
    return CacheFiles(tmp_path)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates and keys for TLS."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCeph]:
    """Ceph, which all processes of pytest-xdist share: its start takes five seconds."""
    own = tmp_path_factory.getbasetemp()
    with sharing((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ceph") as ceph:
        yield ceph


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, whose start takes a second or two; each test opens tabs of its own."""
    program = Browser(tmp_path_factory.mktemp("browser"))
    try:
        yield program
    finally:
        program.close()


@pytest.fixture
def server(start: Start, image: Path) -> Server:
    """A plain target on a Unix socket."""
    return start("--target", image)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for a randomised test; set XNBD_SEED to repeat a run. Printed when the test fails."""
    value = int(os.environ.get("XNBD_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"XNBD_SEED={value}")
    return value


StartWrapper = Callable[..., Wrapper]


@pytest.fixture
def start_wrapper(tmp_path: Path) -> Iterator[StartWrapper]:
    """Starts wrappers, all with the same database and control socket, so one after the other; checks their logs."""
    wrappers: List[Wrapper] = []

    def start_one(*arguments: object, **options: object) -> Wrapper:
        wrapper = Wrapper(tmp_path, arguments, **options)  # type: ignore[arg-type]
        wrappers.append(wrapper)
        wrapper.wait_until_ready()
        return wrapper

    try:
        yield start_one
    finally:
        for wrapper in wrappers:
            wrapper.stop()
    expected = [pattern for wrapper in wrappers for pattern in wrapper.expected_errors]
    for wrapper in wrappers:
        assert not unexpected_lines(wrapper.log(), expected), wrapper.log()
