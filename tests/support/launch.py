"""xnbd-server started by hand, for tests of how it starts, listens and ends.

`Server` always listens where the test finds it; here the test says everything itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from server_process import START_TIME, STOP_TIME, children_of, command, is_alive, run, wait_until


class Launched:
    """A program that was started and has not necessarily come up."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self.log_path = log_path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log() or self.process.poll() is not None, f"{text!r} in the log", START_TIME)
        assert text in self.log(), self.log()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the program and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_TIME)


@contextmanager
def launched(
    program: Sequence[object],
    log_path: Path,
    *,
    env: Optional[Dict[str, str]] = None,
    fds: Sequence[int] = (),
    cwd: Optional[Path] = None,
) -> Iterator[Launched]:
    """Run *program* with standard output and error in *log_path*; it is stopped at the end, its log must be clean."""
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            [str(a) for a in program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(env or {})},
            pass_fds=fds,
            cwd=cwd,
        )
    this = Launched(process, log_path)
    try:
        yield this
        this.stop()
    finally:
        for pid in [*children_of(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert "Traceback" not in this.log(), this.log()
    assert " ERROR: " not in this.log(), this.log()


@contextmanager
def serving(log_path: Path, *arguments: object, cwd: Optional[Path] = None, **env: str) -> Iterator[Launched]:
    """A server with exactly these *arguments*, from when it listens."""
    with launched(command(*arguments), log_path, env=env, cwd=cwd) as server:
        server.wait_for_log("INFO: serving ")
        yield server


def fails(*arguments: object, prefix: Sequence[object] = (), timeout: float = START_TIME) -> Tuple[int, str]:
    """Run a server that cannot start: its exit status, and the one line it says on standard error."""
    status, out, err = run(*prefix, *command(*arguments), timeout=timeout, check=False)
    assert out == ""
    assert err.count("\n") == 1, f"not one line: {err!r}"
    assert err.startswith("xnbd-server: "), err
    return status, err


def stop_daemon(pid_file: Path) -> None:
    """End the daemon whose process id is in *pid_file*, if it runs."""
    try:
        pid = int(pid_file.read_text())
    except FileNotFoundError:
        return
    workers: List[int] = children_of(pid)
    with suppress(ProcessLookupError):  # it may be on its way out
        os.kill(pid, signal.SIGTERM)
    try:
        wait_until(lambda: not is_alive(pid), "the daemon's end", STOP_TIME)
    except AssertionError:
        for left in [*workers, pid]:
            os.kill(left, signal.SIGKILL)
        raise
