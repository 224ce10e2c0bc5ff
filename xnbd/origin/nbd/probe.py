"""Asking an origin what it has, and leaving again."""

from __future__ import annotations

from time import monotonic
from typing import Any, List, Tuple

from ...protocol.client_handshake import RemoteExport
from ..address import OriginAddress
from .connection import OriginConnection


class _NoRequests:
    """The sink of a connection that asks for nothing."""

    def on_data(self, token: Any, offset: int, data: memoryview) -> None:
        raise AssertionError("nothing was asked")

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        raise AssertionError("nothing was asked")

    def on_extents(self, token: Any, extents: List[Tuple[int, int]]) -> None:
        raise AssertionError("nothing was asked")

    def on_done(self, token: Any, error: int) -> None:
        raise AssertionError("nothing was asked")


def probe(address: OriginAddress, *, timeout: float) -> RemoteExport:
    """What the origin at *address* says of its disk; waits for at most *timeout* seconds.

    Raises `OriginLost`.
    """
    connection = OriginConnection(address, _NoRequests(), connect_timeout=timeout)
    try:
        connection.start()
        while connection.export is None:
            deadline = connection.deadline
            connection.wait(None if deadline is None else max(0.0, deadline - monotonic()) + 0.001)
            connection.on_time()
        return connection.export
    finally:
        connection.close()
