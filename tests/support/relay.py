"""The benchmark's `wanrelay.py` as a child of a test: a link that can be slow, stall and break."""

from __future__ import annotations

import subprocess
import sys
from typing import Optional, Tuple, Type

from server_process import ROOT, STOP_TIME, free_port

_PROGRAM = ROOT / "contrib" / "bench" / "wanrelay.py"


class Relay:
    """A context in which ``127.0.0.1:port`` leads to a port of *host* over a link that does as it is told.

    *delay* is in seconds, each way; *rate* in megabits per second, 0 for no limit.
    Each method returns once it has taken effect.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1", *, delay: float = 0.0, rate: float = 0.0) -> None:
        self._options = ["--delay", str(delay * 1e3), "--rate", str(rate)]
        # The kernel might give a port that it chose itself to somebody's connection while the relay refuses.
        self._options += [str(free_port()), host, str(target_port)]
        self._process: Optional[subprocess.Popen[str]] = None
        self.port = 0

    def __enter__(self) -> Relay:
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), "--control", *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = self._read_line()
        if not first.startswith("listening on "):
            self.stop()
            raise AssertionError(f"the relay did not start: {first!r}")
        self.port = int(first.split()[-1])
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}"

    def stall(self) -> None:
        """Move no byte any more and accept nobody; connections stay open."""
        self._command("stall")

    def resume(self) -> None:
        """Go on after `stall`, with the bytes that waited."""
        self._command("resume")

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        self._command("cut")

    def cut_after(self, count: int) -> None:
        """Reset all connections when *count* more bytes have come back from the target."""
        self._command(f"cut-after {count}")

    def refuse(self) -> None:
        """Refuse new connections."""
        self._command("refuse")

    def accept(self) -> None:
        """Accept connections again after `refuse`."""
        self._command("accept")

    def retarget(self, port: int) -> None:
        """Lead new connections to another *port*; those that exist stay."""
        self._command(f"target {port}")

    def moved(self) -> Tuple[int, int]:
        """How many bytes have come out so far: at the target, and back at the clients."""
        there, back = self._command("bytes").split()
        return int(there), int(back)

    def stop(self) -> None:
        """End the relay, and with it all connections."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(timeout=STOP_TIME)
        finally:
            process.kill()
            process.wait()

    def _command(self, line: str) -> str:
        assert self._process and self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        status, _, rest = self._read_line().partition(" ")
        assert status == "ok", f"{line}: {status} {rest}"
        return rest

    def _read_line(self) -> str:
        assert self._process and self._process.stdout
        return self._process.stdout.readline().rstrip("\n")
