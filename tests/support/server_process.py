"""The real xnbd-server as a child of a test."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from certificates import Certificates

ROOT = Path(__file__).resolve().parents[2]

PYTHON = os.environ.get("XNBD_PYTHON", sys.executable)
"""The interpreter that runs the server, to test it under another version than the tests'."""

START_TIME = 40.0
STOP_TIME = 30.0
PATIENCE = 30.0
"""Seconds to wait for what has to come at once: a busy machine may stop any process for some of them."""


def command(*arguments: object) -> List[str]:
    """The command line of xnbd-server from the checkout under test."""
    return [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-server"), *map(str, arguments)]


class Server:
    """A server that listens on the Unix socket ``socket``; with *tcp* also on 127.0.0.1, on ``port``.

    Its standard error, which is its log, goes to the file ``log_path``.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        arguments: List[str],
        *,
        tcp: bool = False,
        env: Optional[Dict[str, str]] = None,
        prefix: Sequence[str] = (),
        tls: Optional[Certificates] = None,
    ) -> None:
        """*prefix* is a program that sets something up and then becomes the server. With *tls* it demands that."""
        self.socket = directory / f"{name}.sock"
        self.log_path = directory / f"{name}.log"
        self.port = free_port() if tcp else 0
        self.expected_errors: List[str] = []
        self._tls = tls
        where = ["--unix", str(self.socket), *(["--tls", str(tls.server)] if tls else [])]
        if tcp:
            where += ["--laddr", "127.0.0.1", "--lport", str(self.port)]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command(*arguments, *where)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        """The master's process id."""
        return self.process.pid

    @property
    def uri(self) -> str:
        """On the Unix socket; over TLS it is Alice who connects."""
        if self._tls:
            return f"nbds+unix:///?socket={self.socket}&tls-certificates={self._tls.alice}"
        return f"nbd+unix:///?socket={self.socket}"

    def wait_until_ready(self) -> None:
        """Until the master listens, has logged that, and minds its signals: then it has its title.

        A visit would tell less, and leave traces in the log and among the workers.
        """
        wait_until(
            lambda: title_of(self.pid).startswith("xnbd-server: master ") or self.process.poll() is not None,
            "the server's start",
            START_TIME,
        )
        assert self.process.poll() is None, f"the server did not start:\n{self.log()}"

    def connect(self, *, tcp: bool = False) -> socket.socket:
        """A fresh connection, nothing said yet."""
        if tcp:
            return socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(60)
        try:
            sock.connect(str(self.socket))
        except OSError:
            sock.close()
            raise
        return sock

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for_log(self, text: str, seconds: float = PATIENCE) -> None:
        wait_until(lambda: text in self.log(), f"{text!r} in the log", seconds)

    def workers(self) -> List[int]:
        """Process ids of all workers, spare ones too."""
        return children_of(self.pid)

    def busy_workers(self) -> List[int]:
        """Process ids of the workers that have a client."""
        return [pid for pid in self.workers() if "worker for" in title_of(pid)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server and return its exit status; kills it if it takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            for pid in [*self.workers(), self.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the server did not stop:\n{self.log()}") from None


def wait_until(condition, what: str, seconds: float = PATIENCE) -> None:  # type: ignore[no-untyped-def]
    """Poll for *condition*; fails the test with *what* was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """A TCP port that was free a moment ago on 127.0.0.1, and that no other test is given.

    Each process of pytest has ports of its own, below those that the kernel gives away.
    """
    for port in _own_ports():
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")


_PORTS_EACH = 1000


@functools.cache
def _own_ports() -> Iterator[int]:
    """Ports of this process, over and over; a socket without a file tells other runs that they are taken."""
    for first in range(12_000, 32_000, _PORTS_EACH):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0xnbd tests have ports from {first}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return itertools.cycle(range(first, first + _PORTS_EACH))
    raise AssertionError("too many tests run at once: all ports are taken")


_claims: List[socket.socket] = []


def kill_all(master: int) -> None:
    """SIGKILL a server's processes, and wait for their end.

    The master is stopped first, or it might fork a worker whom nobody knows of, and who
    would keep the server's addresses for a moment.
    """
    os.kill(master, signal.SIGSTOP)
    wait_until(lambda: state_of(master) == "T", "the master to stand still")
    pids = [master, *children_of(master)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)), f"the end of {pids}")


def children_of(pid: int) -> List[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def title_of(pid: int) -> str:
    """What ``ps`` shows for the process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def state_of(pid: int) -> str:
    """A letter, see ``proc(5)``; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def cpu_seconds(pid: int) -> float:
    """What the process has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_seconds(pid: int) -> float:
    """The same, to the nanosecond: `cpu_seconds` overlooks who wakes up for less than a tick."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def is_alive(pid: int) -> bool:
    """Whether the process runs: a zombie does not."""
    return state_of(pid) not in "ZX"


def run(*arguments: object, timeout: float = 60.0, check: bool = True) -> Tuple[int, str, str]:
    """Run a program to its end: exit status, output and error output; fails the test unless it succeeds."""
    done = subprocess.run(
        [str(a) for a in arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, f"{arguments}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.returncode, done.stdout, done.stderr
