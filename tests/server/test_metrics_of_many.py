"""What a look at the metrics of many clients costs. The long form is ``XNBD_OBSERVED_CLIENTS=1000``."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from pathlib import Path

from conftest import Start
from rawclient import RawClient
from scraping import get, metrics_port, observer_of, scrape, status
from server_process import run_seconds, wait_until

CLIENTS = int(os.environ.get("XNBD_OBSERVED_CLIENTS", "40"))
MOST_OF_METRICS, MOST_OF_STATUS = 0.02, 0.05
"""Seconds of the processor for an answer about a thousand clients."""

_DESCRIPTORS = 4096


def seconds_of(observer: int, port: int, path: str) -> float:
    """What the *observer* takes for one answer; the least of some, as others disturb it."""
    found = []
    for _ in range(5):
        before = run_seconds(observer)
        assert get(port, path).status == 200
        found.append(run_seconds(observer) - before)
    return min(found)


def test_a_look_at_many_clients(start: Start, image: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_DESCRIPTORS, most), most))
    server = start("--target", "--metrics", 0, "--max-clients", CLIENTS + 1, "--spare-workers", 20, image)
    server.wait_for_log("metrics on ")
    port = metrics_port(server.log())
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            client = stack.enter_context(RawClient(server.connect()).negotiate())
            client.read(0, 512)
        wait_until(lambda: scrape(port)("xnbd_requests_total", command="read") == CLIENTS, "all requests")
        assert scrape(port)("xnbd_clients") == CLIENTS
        observer = observer_of(server.pid)
        assert observer is not None
        took = seconds_of(observer, port, "/metrics"), seconds_of(observer, port, "/status")
        print(f"{CLIENTS} clients: {took[0] * 1e3:.1f} ms for /metrics, {took[1] * 1e3:.1f} ms for /status")
        assert took[0] < MOST_OF_METRICS and took[1] < MOST_OF_STATUS
        wait_until(lambda: all("memory_bytes" in one for one in status(port)["workers"]), "what each of them uses")
        assert len(status(port)["workers"]) == CLIENTS
