"""nbdkit as one of several origins: it can be slow, answer with errors, be stopped, be killed, and come back."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Optional

from origin_programs import is_listening
from server_process import wait_until


class NbdkitOrigin:
    """A context in which nbdkit serves *image* on a socket in *where*, after *delay* milliseconds for each read.

    While there is a file ``failing`` all reads fail.
    """

    def __init__(self, where: Path, name: str, image: Path, *, delay: int = 0) -> None:
        self.path = where / f"{name}.sock"
        self.failing = where / f"{name}.failing"
        self._words = ["nbdkit", "--foreground", "--unix", str(self.path), "--filter=error", "--filter=delay", "file"]
        self._words += [str(image), f"rdelay={delay}ms"]
        self._words += ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={self.failing}"]
        self._process: Optional[subprocess.Popen[bytes]] = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> NbdkitOrigin:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: is_listening(self.path), "nbdkit to listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """It is silent from now on, until it goes on."""
        assert self._process
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process
        os.kill(self._process.pid, signal.SIGCONT)
