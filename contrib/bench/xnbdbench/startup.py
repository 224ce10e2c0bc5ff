"""Probes of how long xnbd-server takes to start: they run a process of their own."""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import ProbeFailed
from .flavours import XNBD_SERVER
from .trial import Sample, Trial

PATIENCE = 30.0

_HANDSHAKE = struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0)
"""Client flags (fixed newstyle, no zeroes) and EXPORT_NAME of the empty name."""

_FIRST_READ = struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4096)


@dataclass(frozen=True)
class VersionTime:
    """Milliseconds that ``xnbd-server --version`` takes: the median of *count*."""

    count: int = 5

    def __call__(self, trial: Trial) -> Sample:
        times = [_time_version() for _ in range(self.count)]
        return {"value": statistics.median(times), "times_ms": times}


@dataclass(frozen=True)
class InetdTime:
    """Milliseconds from starting ``xnbd-server --inetd`` to the first 4 KiB read: the median of *count*."""

    count: int = 3

    def __call__(self, trial: Trial) -> Sample:
        times = [_time_inetd(trial.settings.image) for _ in range(self.count)]
        return {"value": statistics.median(times), "times_ms": times}


def _time_version() -> float:
    start = time.perf_counter()
    done = subprocess.run([*XNBD_SERVER, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise ProbeFailed(f"--version: status {done.returncode}")
    return elapsed * 1e3


def _time_inetd(image: Path) -> float:
    """Start the server as inetd does, with the client's socket as all three of its standard descriptors."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(PATIENCE)
        start = time.perf_counter()
        with theirs:
            server = subprocess.Popen(
                [*XNBD_SERVER, "--target", "--inetd", str(image)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=theirs.fileno(),
            )
        try:
            _read_first(ours)
            elapsed = time.perf_counter() - start
            ours.close()
            server.wait(PATIENCE)
        finally:
            server.kill()
            server.wait()
    return elapsed * 1e3


def _read_first(sock: socket.socket) -> None:
    try:
        if _receive(sock, 18)[:8] != b"NBDMAGIC":
            raise ProbeFailed("--inetd: no NBD greeting")
        sock.sendall(_HANDSHAKE)
        _receive(sock, 10)
        sock.sendall(_FIRST_READ)
        magic, error = struct.unpack(">II8x", _receive(sock, 16))
        if (magic, error) != (0x67446698, 0):
            raise ProbeFailed(f"--inetd: reply {magic:#x}, error {error}")
        _receive(sock, 4096)
    except OSError as problem:
        raise ProbeFailed(f"--inetd: {problem}") from problem


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ProbeFailed("--inetd: the server closed the connection")
        data += part
    return data
