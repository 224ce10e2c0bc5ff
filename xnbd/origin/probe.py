"""Asking an origin what it has, and leaving again."""

from __future__ import annotations

import json
import os
import select
import signal
from functools import partial
from time import monotonic
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

from ..system.forking import fork_with_pipe, reset_signals
from ..system.process import set_title
from .base import Data, OriginAddress, OriginLost, Terms

T = TypeVar("T")

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
    return _Asker(address, timeout).answer() if address.starts_threads else _probe_here(address, timeout)


def probe_each(addresses: Sequence[OriginAddress], *, timeout: float) -> List[Union[Found, OriginLost, OSError]]:
    """What the origin at each address has, or why it does not tell: all are asked at once if there are several."""
    if len(addresses) == 1:
        return [_outcome(partial(probe, addresses[0], timeout=timeout))]
    askers = [_outcome(partial(_Asker, address, timeout)) for address in addresses]
    return [_outcome(asker.answer) if isinstance(asker, _Asker) else asker for asker in askers]


def _outcome(ask: Callable[[], T]) -> Union[T, OriginLost, OSError]:
    try:
        return ask()
    except (OriginLost, OSError) as error:
        return error


def _probe_here(address: OriginAddress, timeout: float) -> Found:
    origin = address.open(_NoRequests(), Terms(connect_timeout=timeout))
    try:
        origin.start()
        while not origin.ready:
            origin.wait()
        return Found(origin.size, origin.version)
    finally:
        origin.close()


class _Asker:
    """A process that asks the origin at *address*, begun at once."""

    def __init__(self, address: OriginAddress, timeout: float) -> None:
        self._address = address
        self._until = monotonic() + timeout + _LEAVING
        self._pid, self._reading = fork_with_pipe("the process that asks the origin", partial(_live, address, timeout))

    def answer(self) -> Found:
        """What it has found, waited for; it is gone then. Raises `OriginLost`."""
        try:
            told = _receive(self._reading, self._until)
        finally:
            os.close(self._reading)
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        if told is None:
            raise OriginLost(f"origin {self._address}: the process that asked it was stopped")
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
