"""Somebody who looks at metrics all the time and finds fault with every number that gets less."""

from __future__ import annotations

import json
import random
import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Sequence

from scraping import Sample, Scrape, Where, ask, connect
from server_process import wait_until

_SAME_START = 0.3
"""Seconds within which a start is the same one: processes and the time of day are counted by different clocks."""


class Watcher:
    """Looks at *where* in a thread; ``faults`` are what it has found. The export *passing* may be gone for a while."""

    def __init__(self, where: Where, passing: str = "") -> None:
        self._passing = ("export", passing)
        self.faults: List[str] = []
        self.looks = 0
        self.counters: Dict[Sample, float] = {}
        self._where = where
        self._start = self._uptime = 0.0
        self._counts: Dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._over.is_set():
            with suppress(OSError, EOFError), connect(self._where) as sock:
                while not self._over.is_set():
                    self._compare(Scrape(ask(sock, Accept="application/openmetrics-text").body.decode()))
                    self._compare_status(json.loads(ask(sock, "/status").body))
                    self.looks += 1

    def _compare(self, scrape: Scrape) -> None:
        for sample, before in self.counters.items():
            now = scrape.counters.get(sample, before if self._passing in sample[1] else -1)
            if now < before:
                self.faults.append(f"{sample}: {before}, then {now}")
        self.counters.update(scrape.counters)
        start = scrape("xnbd_start_time_seconds")
        if self._start and abs(start - self._start) > _SAME_START:
            self.faults.append(f"started at {self._start}, then {start}")
        self._start = start

    def _compare_status(self, status: Dict[str, Any]) -> None:
        if status["uptime_seconds"] < self._uptime:
            self.faults.append(f"up {self._uptime} s, then {status['uptime_seconds']}")
        self._uptime = status["uptime_seconds"]
        counts = {name: number for name, number in status.get("counters", {}).items() if name != "hits"}
        if any(counts.get(name, -1) < before for name, before in self._counts.items()):
            self.faults.append(f"{self._counts}, then {counts}")
        self._counts = counts

    def look(self) -> None:
        """Wait for a look that has begun after this call."""
        until = self.looks + 2
        wait_until(lambda: self.looks >= until, "a look at the metrics")

    def total(self, name: str) -> float:
        """Of all samples of that name, at the last look."""
        return sum(value for (found, _), value in self.counters.items() if found == name)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def in_threads(over: threading.Event, *works: Callable[[], None]) -> Iterator[None]:
    """Each of *works* is done in a thread of its own, until it notices that it is *over*."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@contextmanager
def visited(*visits: Callable[[], None]) -> Iterator[None]:
    """Each of *visits*, a client's, is made again and again, in a thread of its own, whatever becomes of it."""
    over = threading.Event()

    def come_and_go(visit: Callable[[], None]) -> None:
        while not over.is_set():
            with suppress(OSError, EOFError, AssertionError):
                visit()

    with in_threads(over, *(partial(come_and_go, visit) for visit in visits)):
        yield


def happen(happenings: Sequence[Callable[[], object]], number: int, rng: random.Random, watcher: Watcher) -> None:
    """Each of *happenings* once, and more up to the *number*, in any order; the *watcher* looks after each of them."""
    order = [*happenings, *rng.choices(happenings, k=max(0, number - len(happenings)))]
    rng.shuffle(order)
    for happening in order:
        print("now", happening.__name__)
        happening()
        watcher.look()
        assert watcher.faults == []
