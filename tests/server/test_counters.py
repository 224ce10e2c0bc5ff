"""What metrics count never gets less, whatever happens to the server. The long form is ``XNBD_HAPPENINGS=100``."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

from conftest import Start
from moving import order
from proxies import BLOCK, DISK, Proxy, make_disk
from relay import Relay
from scraping import kill_observer, metrics_port, observer_of
from server_process import children_of, title_of, wait_until
from upgrades import upgrade
from watching import Watcher, happen, visited

HAPPENINGS = int(os.environ.get("XNBD_HAPPENINGS", "10"))


class Stage:
    """A proxy with metrics, and what can happen to it."""

    def __init__(self, start: Start, directory: Path, relay: Relay, rng: random.Random) -> None:
        self._limits = directory / "limits"
        self._limits.write_text("max-clients 50\n")
        options = ("--metrics", 0, "--limits", self._limits, "--readahead", 0, "--spare-workers", 2)
        self.proxy = Proxy(start, directory, relay.uri, *options)
        self.server = self.proxy.server
        self.server.expected_errors += ["killed by SIGKILL", " for it, trying again"]
        self._relay, self._rng = relay, rng

    def visit(self) -> None:
        """One client reads and writes here and there, until something becomes of it."""
        with self.proxy.raw() as client:
            for _ in range(200):
                at = self._rng.randrange(DISK // BLOCK) * BLOCK
                client.read(at, 512)
                client.write(at, bytes(512))

    def kill_a_worker(self) -> None:
        wait_until(lambda: self.server.busy_workers(), "a client")
        with suppress(ProcessLookupError, IndexError):
            os.kill(self._rng.choice(self.server.busy_workers()), signal.SIGKILL)

    def kill_the_steward(self) -> None:
        def stewards() -> list[int]:
            return [pid for pid in children_of(self.server.pid) if "steward" in title_of(pid)]

        wait_until(stewards, "the steward")
        before = stewards()
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: stewards() not in ([], before), "another steward")

    def kill_the_observer(self) -> None:
        wait_until(lambda: observer_of(self.server.pid), "the observer")
        kill_observer(self.server.pid)

    def move_clients(self) -> None:
        for worker in self.server.busy_workers():
            if "worker for" in title_of(worker):
                with suppress(ProcessLookupError):
                    order(worker)

    def upgrade(self) -> None:
        upgrade(self.proxy.control)

    def reload(self) -> None:
        self._limits.write_text(f"max-clients {self._rng.randrange(20, 99)}\n")
        self.proxy.bgctl("--reload")

    def lose_the_origin(self) -> None:
        self._relay.cut()

    def limit(self) -> None:
        self.proxy.bgctl("--limit-iops", self._rng.choice((0, 2000)), "--limit")

    def switch(self) -> None:
        """The second time there is nothing to be done."""
        if self.proxy.query()["mode"] == "proxy":
            self.proxy.bgctl("--cache-all")
            self.proxy.bgctl("--switch")


def test_counters_never_get_less(start: Start, tmp_path: Path, seed: int) -> None:
    """Each sample is compared with the one before, while clients come and go."""
    rng = random.Random(seed)
    origin = start("--target", "--readonly", make_disk(tmp_path), tcp=True)
    with Relay(origin.port) as relay:
        stage = Stage(start, tmp_path, relay, rng)
        stage.server.wait_for_log("INFO: metrics on ")
        happenings = (
            *(stage.kill_a_worker, stage.kill_the_steward, stage.kill_the_observer, stage.move_clients),
            *(stage.upgrade, stage.reload, stage.lose_the_origin, stage.limit, stage.switch),
        )
        with visited(stage.visit, stage.visit, stage.visit), Watcher(metrics_port(stage.server.log())) as watcher:
            happen(happenings, HAPPENINGS, rng, watcher)
        assert watcher.total("xnbd_worker_deaths_total") >= 1
        assert watcher.total("xnbd_requests_total") > 100
        assert watcher.total("xnbd_cache_misses_total") > 0
