"""Real NBD servers of every kind, as origins."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Dict, List, Optional

from server_process import free_port, is_alive, wait_until

CONFIGURATION = """[generic]
port = {port}
listenaddr = 127.0.0.1
unixsock = {socket}
[disk]
exportname = {image}
readonly = true
"""

TLS_CONFIGURATION = """[generic]
force_tls = true
certfile = {directory}/server-cert.pem
keyfile = {directory}/server-key.pem
cacertfile = {directory}/ca-cert.pem"""


class OriginProgram:
    """A server of *kind* for *image*, on the Unix socket ``path`` in *where*, until it is stopped.

    With *credentials*, a server's directory (`certificates`), it demands TLS, and with certificates a client's one.
    """

    def __init__(self, kind: str, image: Path, where: Path, credentials: Optional[Path] = None) -> None:
        self.path = where / "origin.sock"
        self._pid_file = where / "nbd-server.pid"
        self._log_path = where / "origin.log"
        text = CONFIGURATION.format(port=free_port(), socket=self.path, image=image)
        if credentials is not None:
            text = text.replace("[generic]", TLS_CONFIGURATION.format(directory=credentials))
        (where / "nbd-server.conf").write_text(text)
        words = program(kind, image, where)
        words[1:1] = tls_options(kind, credentials) if credentials is not None else []
        command = [str(word) for word in words]
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: is_listening(self.path), f"{kind} to listen")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.path}"

    def tls_uri(self, *parameters: object, user: str = "") -> str:
        """With *parameters* like ``tls-hostname=x``."""
        server = f"{user}@" if user else ""
        return "&".join([f"nbds+unix://{server}/disk?socket={self.path}", *map(str, parameters)])

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def is_alive(self) -> bool:
        """nbd-server goes into the background."""
        return self._daemon() > 0 or self.process.poll() is None

    def _daemon(self) -> int:
        written = self._pid_file.read_text() if self._pid_file.exists() else ""  # empty for a moment
        pid = int(written or 0)
        return pid if pid and is_alive(pid) else 0

    def stop(self) -> None:
        daemon = self._daemon()
        if daemon:
            os.kill(daemon, signal.SIGTERM)
            wait_until(lambda: not is_alive(daemon), "the end of nbd-server")
        elif self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()  # nbdkit waits for its clients, and a test that failed has left some
            self.process.wait()


def program(kind: str, image: Path, where: Path) -> List[object]:
    """The command line of a server on the socket ``origin.sock`` in *where*."""
    nbdkit = ["nbdkit", "--foreground", "--unix", where / "origin.sock"]
    qemu = ["qemu-nbd", "--read-only", "--persistent", "--format=raw", "--socket", where / "origin.sock"]
    programs: Dict[str, List[object]] = {
        "nbdkit": [*nbdkit, "file", image],
        "nbdkit memory": [*nbdkit, "memory", image.stat().st_size],
        "nbdkit without structured replies": [*nbdkit, "--no-sr", "file", image],
        "nbdkit not fixed": [*nbdkit, "--mask-handshake=0", "file", image],
        "nbdkit oldstyle": [*nbdkit, "--oldstyle", "file", image],
        "nbdkit with 64 KiB requests": [
            *nbdkit, "--filter=blocksize-policy", "file", image,
            "blocksize-minimum=512", "blocksize-preferred=4K", "blocksize-maximum=64K", "blocksize-error-policy=error",
        ],
        "nbdkit that fails": [
            *nbdkit, "--filter=error", "file", image,
            "error-pread=ENOSPC", "error-pread-rate=100%", f"error-pread-file={where / 'fail'}",
        ],
        "qemu-nbd": [*qemu, "--export-name=disk", image],
        "nbd-server": ["nbd-server", "-C", where / "nbd-server.conf", "-p", where / "nbd-server.pid"],
    }  # fmt: skip
    return programs[kind]


def tls_options(kind: str, credentials: Path) -> List[object]:
    """What makes a server of *kind* demand TLS; nbd-server's is in its configuration."""
    keys = credentials / "keys.psk"
    if kind == "nbdkit":
        how = [f"--tls-psk={keys}"] if keys.exists() else [f"--tls-certificates={credentials}", "--tls-verify-peer"]
        return ["--tls=require", *how]
    if kind == "qemu-nbd":
        what = "psk" if keys.exists() else "x509"
        return [f"--object=tls-creds-{what},id=tls,dir={credentials},endpoint=server", "--tls-creds=tls"]
    return []


def is_listening(path: Path) -> bool:
    """Whether somebody listens on the Unix socket at *path*, found out without a visit."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(fields[3] == "00010000" and fields[-1] == str(path) for fields in sockets)
