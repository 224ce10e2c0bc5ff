"""The real xnbd-wrapper as a child of a test, and xnbd-wrapper-ctl."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from rawclient import RawClient
from server_process import PYTHON, ROOT, START_TIME, STOP_TIME, children_of, is_alive, run, wait_until


def program(name: str) -> List[str]:
    """The command line of one of the programs of the checkout under test."""
    return [PYTHON, "-W", "error", str(ROOT / "bin" / name)]


_SERVING = re.compile(r" INFO: serving |\"message\": \"serving ")


class Wrapper:
    """A wrapper on 127.0.0.1, on a port that the kernel chose unless one is given; its files are in *directory*."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[object] = (),
        *,
        env: Optional[Dict[str, str]] = None,
        port: int = 0,
        database: Optional[Path] = None,
    ) -> None:
        self.directory = directory
        self.control = directory / "wrapper.ctl"
        self.database = database or directory / "wrapper.db"
        self.log_path = directory / "wrapper.log"
        self.expected_errors: List[str] = []
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *program("xnbd-wrapper"),
                    *("--laddr", "127.0.0.1", "--lport", str(port)),
                    *("--socket", str(self.control), "--dbpath", str(self.database)),
                    *map(str, arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )

    @property
    def port(self) -> int:
        """Where it listens, as its log says."""
        line = next(line for line in self.log().splitlines() if _SERVING.search(line))
        return int(re.findall(r":(\d+)(?:,|\"|$)", line)[-1])

    def uri(self, name: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{name}"

    def wait_until_ready(self) -> None:
        wait_until(
            lambda: bool(_SERVING.search(self.log())) or self.process.poll() is not None,
            "the wrapper's start",
            START_TIME,
        )
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        """What this wrapper and its servers have logged."""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log(), f"{text!r} in the log")

    def connect(self) -> RawClient:
        """A fresh connection, nothing said yet."""
        return RawClient(socket.create_connection(("127.0.0.1", self.port), timeout=60))

    def client(self, name: str = "", **features: bool) -> RawClient:
        return self.connect().negotiate(name, **features)

    def ctl(self, *arguments: object, timeout: float = 60.0) -> str:
        """What xnbd-wrapper-ctl prints; it has to succeed."""
        return run(*program("xnbd-wrapper-ctl"), "--socket", self.control, *arguments, timeout=timeout)[1]

    def refuses(self, *arguments: object) -> str:
        """The one line with which xnbd-wrapper-ctl fails."""
        command = [*program("xnbd-wrapper-ctl"), "--socket", self.control, *arguments]
        status, out, err = run(*command, check=False)
        assert (status, out) == (1, ""), (status, out, err)
        assert err.count("\n") == 1, err
        assert err.startswith("xnbd-wrapper-ctl: "), err
        return err

    def ask(self, **request: object) -> List[Dict[str, Any]]:
        """The lines of the reply to a raw request."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(self.control))
            sock.sendall(json.dumps(request).encode() + b"\n")
            lines = []
            for line in sock.makefile("rb"):
                lines.append(json.loads(line))
                if lines[-1].get("done"):
                    break
            return lines

    def listed(self) -> Dict[str, Dict[str, Any]]:
        """The exports by name, as ``--list --json`` tells."""
        return {export["name"]: export for export in json.loads(self.ctl("--list", "--json"))}

    def stored(self) -> Dict[str, Dict[str, str]]:
        """The exports in the database."""
        content = json.loads(self.database.read_text())
        assert content["version"] == 2
        images: Dict[str, Dict[str, str]] = content["images"]
        return images

    def servers(self) -> List[int]:
        """Process ids of clients' processes."""
        return children_of(self.process.pid)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the wrapper and return its exit status."""
        children = self.servers()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            for pid in [*children, self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the wrapper did not stop:\n{self.log()}") from None


def fails(directory: Path, *arguments: object) -> Tuple[int, str]:
    """Run a wrapper that cannot start: its exit status, and the one line it says on standard error."""
    where = ["--laddr", "127.0.0.1", "--socket", directory / "wrapper.ctl"]
    where += [] if "--lport" in arguments else ["--lport", "0"]
    status, out, err = run(*program("xnbd-wrapper"), *where, *arguments, timeout=START_TIME, check=False)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("xnbd-wrapper: "), err
    return status, err


def wait_for_end(pids: Sequence[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), f"the end of {pids}", STOP_TIME)
