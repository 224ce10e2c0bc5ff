"""Clients that are moved from worker to worker while they do what they do."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from contextlib import contextmanager, suppress
from typing import Iterator, List, Optional

from server_process import Server, title_of, wait_until

HAND_OVER = signal.SIGRTMIN + 3
"""The order to a worker; other programs have no handler for it, and end by it."""


def order(worker: int) -> None:
    """Have *worker* hand its client over."""
    os.kill(worker, HAND_OVER)


def worker_of_only_client(server: Server) -> int:
    """The worker of the only client, from when it has one."""
    wait_until(lambda: len(server.busy_workers()) == 1, "one worker with a client")
    return server.busy_workers()[0]


def move(server: Server) -> int:
    """Move the only client of *server*: its new worker."""
    before = worker_of_only_client(server)
    order(before)
    wait_until(lambda: server.busy_workers() not in ([], [before]), "the client's new worker")
    return worker_of_only_client(server)


def pauses(log: str) -> List[float]:
    """Seconds that clients waited, one for each move, as *log* has them."""
    return [float(found) / 1e3 for found in re.findall(r" pause ([\d.]+) ms", log)]


class Restlessness:
    """Moves clients of *server* at random moments, one or several at once, until it is told to `stop`."""

    def __init__(self, server: Server, rng: random.Random, longest_rest: float) -> None:
        self._server = server
        self._rng = rng
        self._longest_rest = longest_rest
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._rng.uniform(0, self._longest_rest)) and self._server.process.poll() is None:
            workers = self._server.busy_workers()
            for worker in self._rng.sample(workers, min(len(workers), self._rng.choice((1, 1, 2, 4)))):
                if "worker for" in title_of(worker):
                    with suppress(ProcessLookupError):
                        order(worker)


@contextmanager
def restless(server: Server, seed: int, longest_rest: float = 0.03) -> Iterator[None]:
    """Clients of *server* are moved all the time; at least one has been, or the test fails."""
    mover = Restlessness(server, random.Random(seed), longest_rest)
    try:
        yield
    finally:
        mover.stop()
    assert pauses(server.log()), "no client was moved"


_LONGEST_REST: Optional[str] = os.environ.get("XNBD_RESTLESS")


def make_restless(server: Server) -> None:
    """With ``XNBD_RESTLESS=SECONDS`` in the environment every server of every test moves its clients so often."""
    if _LONGEST_REST:
        Restlessness(server, random.Random(server.pid), float(_LONGEST_REST))
