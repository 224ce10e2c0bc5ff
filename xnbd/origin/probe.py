"""Asking an origin what it has, and leaving again."""

from __future__ import annotations

from typing import Any, List, Tuple

from .base import Data, OriginAddress, Terms


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


def probe(address: OriginAddress, *, timeout: float) -> int:
    """Bytes of the disk that the origin at *address* has; waits for at most *timeout* seconds.

    Raises `OriginLost`, or `OSError` where this computer is short of something.
    """
    origin = address.open(_NoRequests(), Terms(connect_timeout=timeout))
    try:
        origin.start()
        while not origin.ready:
            origin.wait()
        return origin.size
    finally:
        origin.close()
