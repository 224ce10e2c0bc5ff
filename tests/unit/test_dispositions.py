"""What tests start begins with default signal dispositions, whatever the shell that ran pytest had."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from server_process import ROOT, Server, run, wait_until


def masks_of(status: str) -> tuple[int, int]:
    """The signals that are ignored and blocked, from the text of ``/proc/PID/status``."""
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["SigIgn"], 16), int(fields["SigBlk"], 16)


def test_a_program_is_started_with_default_dispositions() -> None:
    _, out, _ = run("cat", "/proc/self/status")
    assert masks_of(out) == (0, 0)


def test_a_server_minds_a_sigint(server: Server) -> None:
    status = Path(f"/proc/{server.pid}/status")
    interrupt = 1 << (signal.SIGINT - 1)
    assert not masks_of(status.read_text())[0] & interrupt
    wait_until(lambda: not masks_of(status.read_text())[1] & interrupt, "a moment in which it does not fork")
    assert server.stop(signal.SIGINT) == 0


def test_so_they_are_where_pytest_itself_ignores_signals() -> None:
    shell = ["sh", "-c", 'trap "" HUP INT QUIT TERM USR1 USR2; exec "$@"', "sh"]
    pytest = [sys.executable, "-m", "pytest", "-c", ROOT / "setup.cfg", "-p", "no:cacheprovider", "-q"]
    inner = [test_a_program_is_started_with_default_dispositions, test_a_server_minds_a_sigint]
    _, out, _ = run(*shell, *pytest, *(f"{__file__}::{test.__name__}" for test in inner))
    assert "2 passed" in out
