"""Asking an origin what it has, and leaving again."""

from __future__ import annotations

import json
import os
import select
import signal
from functools import partial
from time import monotonic
from typing import Any, List, NamedTuple, Optional, Tuple

from ..system.forking import fork_with_pipe, reset_signals
from ..system.process import set_title
from .base import Data, OriginAddress, OriginLost, Terms

_LONGEST = 32 << 10
_LEAVING = 2.0
"""Seconds that a process has beyond its time limit, to say that it has passed."""


class Found(NamedTuple):
    """What an origin tells of its disk: the size in bytes, and `Origin.version`."""

    size: int
    version: str = ""


class _NoRequests:
    """The sink of an origin that is asked for nothing."""

    def on_data(self, token: Any, offset: int, data: Data) -> None:
        raise AssertionError("nothing was asked")

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        raise AssertionError("nothing was asked")

    def on_extents(self, token: Any, extents: List[Tuple[int, bool]]) -> None:
        raise AssertionError("nothing was asked")

    def on_done(self, token: Any, error: int) -> None:
        raise AssertionError("nothing was asked")


def probe(address: OriginAddress, *, timeout: float) -> Found:
    """What the origin at *address* has; waits for at most *timeout* seconds.

    An origin that starts threads is asked by a process of its own: whoever calls this may fork later.
    Raises `OriginLost`, or `OSError` where this computer is short of something.
    """
    return _probe_elsewhere(address, timeout) if address.starts_threads else _probe_here(address, timeout)


def _probe_here(address: OriginAddress, timeout: float) -> Found:
    origin = address.open(_NoRequests(), Terms(connect_timeout=timeout))
    try:
        origin.start()
        while not origin.ready:
            origin.wait()
        return Found(origin.size, origin.version)
    finally:
        origin.close()


def _probe_elsewhere(address: OriginAddress, timeout: float) -> Found:
    pid, reading = fork_with_pipe("the process that asks the origin", partial(_live, address, timeout))
    try:
        told = _receive(reading, monotonic() + timeout + _LEAVING)
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if told is None:
        raise OriginLost(f"origin {address}: the process that asked it was stopped")
    if "lost" in told:
        raise OriginLost(told["lost"], refused=told["refused"])
    return Found(told["size"], told["version"])


def _receive(reading: int, until: float) -> Optional[Any]:
    """What the process tells before it ends; None if it ends without a word, or goes on for too long."""
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, until - monotonic()) * 1000):
            return None
        piece = os.read(reading, _LONGEST)
        if not piece:
            return None
        data += piece
    return json.loads(data)


def _live(address: OriginAddress, timeout: float, writing: int) -> int:
    reset_signals(signal.SIGTERM, signal.SIGINT)
    set_title("asking", str(address))
    try:
        told = _probe_here(address, timeout)._asdict()
    except OriginLost as lost:
        told = {"lost": str(lost), "refused": lost.refused}
    except OSError as error:
        told = {"lost": f"origin {address}: {error.strerror}", "refused": False}
    os.write(writing, json.dumps(told).encode() + b"\n")
    return 0
