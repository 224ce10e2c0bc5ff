"""xnbd-wrapper --metrics: one place for all exports, with clients and without."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import MIB, Start, StartWrapper
from scraping import (
    Scrape,
    check_by_promtool,
    connect,
    get,
    kill_observer,
    metrics_port,
    observer_of,
    scrape,
    status,
)
from server_process import PYTHON, ROOT, children_of, title_of, wait_until
from watching import Watcher, happen, visited
from wrapper_process import Wrapper, fails

HAPPENINGS = int(os.environ.get("XNBD_HAPPENINGS", "8"))

FOREIGN = f"{PYTHON} {ROOT / 'tests' / 'support' / 'foreign_server.py'}"


def port_of(wrapper: Wrapper) -> int:
    return metrics_port(wrapper.log())


def measured(start_wrapper: StartWrapper, *arguments: object) -> Wrapper:
    wrapper = start_wrapper("--metrics", 0, *arguments)
    wrapper.wait_for_log("INFO: metrics on 127.0.0.1:")
    return wrapper


def wait_for(wrapper: Wrapper, name: str, value: float, **labels: str) -> Scrape:
    found: List[Scrape] = []

    def is_so() -> bool:
        found[:] = [scrape(port_of(wrapper))]
        return found[0].find(name, **labels) == [value]

    wait_until(is_so, f"{name}{labels} = {value}")
    return found[0]


@pytest.fixture
def disks(tmp_path: Path) -> List[Path]:
    paths = [tmp_path / "one.img", tmp_path / "two.img"]
    for number, path in enumerate(paths, 1):
        path.write_bytes(bytes(number * MIB))
    return paths


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, disks: List[Path]) -> Wrapper:
    return measured(start_wrapper, *(word for path in disks for word in ("--imgfile", path)))


def test_clients_of_one_export_are_summed_and_those_without_have_their_disk(wrapper: Wrapper) -> None:
    with wrapper.client("one.img") as one, wrapper.client("one.img") as other:
        for client, reads in ((one, 3), (other, 4)):
            for _ in range(reads):
                client.read(0, 4096)
        seen = wait_for(wrapper, "xnbd_requests_total", 7, export="one.img", command="read")
        assert seen("xnbd_clients", export="one.img") == 2
        assert seen("xnbd_request_duration_seconds_count", export="one.img", command="read") == 7
        assert seen("xnbd_disk_bytes", export="one.img") == MIB
        assert seen("xnbd_disk_bytes", export="two.img") == 2 * MIB
        assert seen("xnbd_clients", export="two.img") == 0
        assert seen("xnbd_requests_total", export="two.img", command="read") == 0
    wait_for(wrapper, "xnbd_clients", 0, export="one.img")
    assert scrape(port_of(wrapper))("xnbd_bytes_total", export="one.img", direction="read") == 7 * 4096
    assert check_by_promtool(get(port_of(wrapper)).body) == ""
    told = status(port_of(wrapper))
    assert told["mode"] == "wrapper"
    assert told["exports"]["one.img"]["counters"]["requests"] == 7
    assert told["exports"]["two.img"]["disk_size"] == 2 * MIB


def test_exports_come_and_go(wrapper: Wrapper, disks: List[Path]) -> None:
    wrapper.ctl("--add-target", 'odd "name"', disks[1])
    with wrapper.client('odd "name"') as client:
        client.read(0, 512)
        wait_for(wrapper, "xnbd_requests_total", 1, export='odd "name"', command="read")
        wrapper.ctl("--remove-by-exportname", 'odd "name"')
        assert scrape(port_of(wrapper))("xnbd_clients", export='odd "name"') == 1
    wait_until(lambda: not scrape(port_of(wrapper)).find("xnbd_clients", export='odd "name"'), "its end")


def test_deaths_are_counted_for_their_export(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("died: killed by SIGKILL")
    with wrapper.client("one.img") as client:
        client.read(0, 512)
        wait_for(wrapper, "xnbd_requests_total", 1, export="one.img", command="read")
        served = [pid for pid in children_of(wrapper.process.pid) if "serving" in title_of(pid)]
        os.kill(served[0], signal.SIGKILL)
        seen = wait_for(wrapper, "xnbd_worker_deaths_total", 1, export="one.img")
        assert seen("xnbd_worker_deaths_total", export="two.img") == 0
        assert seen("xnbd_clients", export="one.img") == 0
        assert seen("xnbd_requests_total", export="one.img", command="read") == 1


def test_one_export_is_told_in_detail(start: Start, start_wrapper: StartWrapper, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(random.Random(3).randbytes(MIB))
    origin = start("--target", "--readonly", disk, tcp=True)
    wrapper = measured(start_wrapper)
    files = [tmp_path / name for name in ("cache.img", "bitmap", "ctl")]
    wrapper.ctl("--add-proxy", "far & away", "127.0.0.1", origin.port, *files)
    address = f"nbd://127.0.0.1:{origin.port}"

    def told() -> Dict[str, Any]:
        return status(port_of(wrapper), "/status?export=far%20%26%20away&map=16&durations=1")

    before = told()
    assert before["origin"]["address"].startswith(address)
    assert before["workers"] == []
    with wrapper.client("far & away") as client:
        client.read(0, MIB // 2)
        client.write(MIB // 2, bytes(4096))
        wait_until(lambda: told().get("blocks", {}).get("cached", 0) >= 129, "the count of local blocks")
        wait_until(lambda: told()["blocks"].get("written") == 1, "the count of written ones")
        wait_until(lambda: told()["counters"]["bytes_read"] == MIB // 2, "the client's figures")
        seen = told()
        assert seen["map"][:8] == [1] * 8
        assert seen["blocks"]["total"] == 256
        assert sum(seen["durations"]["read"]) == 1
        assert [worker["bytes_read"] for worker in seen["workers"]] == [MIB // 2]
        assert seen["origin"]["state"] == "connected"
    assert get(port_of(wrapper), "/status?export=none").status == 404
    assert sum(status(port_of(wrapper), "/status?durations=1")["durations"]["read"]) == 1


def test_a_proxy_keeps_its_figures_when_the_last_client_has_left(
    start_wrapper: StartWrapper, start: Start, tmp_path: Path
) -> None:
    disk = tmp_path / "origin.img"
    disk.write_bytes(random.Random(4).randbytes(MIB))
    origin = start("--target", "--readonly", disk, tcp=True)
    wrapper = measured(start_wrapper)
    files = [tmp_path / name for name in ("cache", "bitmap", "control")]
    wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, *files)
    assert scrape(port_of(wrapper)).find("xnbd_disk_bytes", export="far") == []  # nobody has asked its origin yet
    for turn in (1, 2):
        with wrapper.client("far") as client:
            client.read(0, MIB)
            seen = wait_for(wrapper, "xnbd_requests_total", turn, export="far", command="read")
            assert seen("xnbd_clients", export="far") == 1
        seen = wait_for(wrapper, "xnbd_clients", 0, export="far")
        assert seen("xnbd_origin_bytes_total", export="far") == MIB
        assert seen("xnbd_disk_bytes", export="far") == MIB
        wait_for(wrapper, "xnbd_cached_bytes", MIB, export="far")
    wrapper.ctl("--bgctl-query", "far")
    assert scrape(port_of(wrapper))("xnbd_clients", export="far") == 0, "an idle server is none"
    assert set(scrape(port_of(wrapper)).find("xnbd_clients")) == {0}


def test_clients_of_another_server_are_counted_too(
    start_wrapper: StartWrapper, disks: List[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREIGN_LOG", str(tmp_path / "foreign.log"))
    wrapper = measured(start_wrapper, "--imgfile", disks[0], "--xnbd-server", FOREIGN)
    with wrapper.client("one.img") as client:
        assert len(client.read(0, 512)) == 512
        wait_for(wrapper, "xnbd_clients", 1, export="one.img")
    wait_for(wrapper, "xnbd_clients", 0, export="one.img")


def test_the_observer_is_alone_with_its_sockets_and_ends_with_the_wrapper(wrapper: Wrapper) -> None:
    port = port_of(wrapper)
    with wrapper.client("one.img") as client:
        client.read(0, 512)
        wait_until(lambda: observer_of(wrapper.process.pid), "the observer")
        wrapper.ctl("--orphan")
        client.read(0, 512)
        with pytest.raises(ConnectionRefusedError):
            connect(port)


def test_a_dead_observer_is_started_again(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("the process for metrics died: killed by SIGKILL")
    wait_until(lambda: observer_of(wrapper.process.pid), "the observer")
    kill_observer(wrapper.process.pid)
    assert scrape(port_of(wrapper))("xnbd_clients", export="one.img") == 0


def test_it_ends_when_the_wrapper_is_killed(wrapper: Wrapper) -> None:
    wait_until(lambda: observer_of(wrapper.process.pid), "the observer")
    observer = observer_of(wrapper.process.pid)
    wrapper.stop(signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{observer}").exists(), "the observer's end")


def test_a_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    assert fails(tmp_path, "--metrics", "x") == (
        2,
        "xnbd-wrapper: --metrics x: expected a port, an address and a port as 0.0.0.0:9555, "
        "or a path with a slash in it\n",
    )


class Stage:
    """A wrapper with a target and a proxy, and what can happen to it."""

    def __init__(self, wrapper: Wrapper, rng: random.Random, disk: Path) -> None:
        self.wrapper, self._rng, self._disk = wrapper, rng, disk
        wrapper.expected_errors += ["killed by SIGKILL"]

    def visit(self, name: str) -> None:
        """One client reads here and there, until something becomes of it."""
        with self.wrapper.client(name) as client:
            for _ in range(200):
                client.read(self._rng.randrange(MIB // 4096) * 4096, 512)

    def kill_a_server(self) -> None:
        served = [pid for pid in children_of(self.wrapper.process.pid) if "serving" in title_of(pid)]
        if served:
            with suppress(ProcessLookupError):
                os.kill(self._rng.choice(served), signal.SIGKILL)

    def kill_the_observer(self) -> None:
        wait_until(lambda: observer_of(self.wrapper.process.pid), "the observer")
        kill_observer(self.wrapper.process.pid)

    def upgrade(self) -> None:
        self.wrapper.ctl("--upgrade")

    def reload(self) -> None:
        self.wrapper.ctl("--reload")

    def add_and_remove(self) -> None:
        self.wrapper.ctl("--add-target", "other", self._disk)
        self.wrapper.ctl("--remove-by-exportname", "other")

    def limit(self) -> None:
        self.wrapper.ctl("--limit-iops", self._rng.choice((0, 2000)), "--limit", "far")

    def switch(self) -> None:
        """The second time there is nothing to be done."""
        wait_until(self._is_switched, "the switch")

    def _is_switched(self) -> bool:
        """Whoever is asked may end meanwhile, as its client does."""
        if self.wrapper.stored()["far"]["mode"] == "proxy":
            with suppress(AssertionError):
                self.wrapper.ctl("--bgctl-cache-all", "far")
                self.wrapper.ctl("--bgctl-switch", "far")
        return self.wrapper.stored()["far"]["mode"] == "target"


def test_counters_never_get_less(wrapper: Wrapper, start: Start, disks: List[Path], tmp_path: Path, seed: int) -> None:
    """Each sample is compared with the one before, while clients come and go."""
    stage = Stage(wrapper, random.Random(seed), disks[1])
    origin = start("--target", "--readonly", disks[0], tcp=True)
    files = [tmp_path / name for name in ("cache", "bitmap", "control")]
    wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, *files)
    with wrapper.client("far") as client:
        client.read(0, 512)
        wait_for(wrapper, "xnbd_cache_misses_total", 1, export="far")
    happenings = (
        *(stage.kill_a_server, stage.kill_the_observer, stage.upgrade),
        *(stage.reload, stage.add_and_remove, stage.limit, stage.switch),
    )
    visits = [partial(stage.visit, name) for name in ("one.img", "one.img", "far")]
    with visited(*visits), Watcher(port_of(wrapper), passing="other") as watcher:
        happen(happenings, HAPPENINGS, random.Random(seed), watcher)
    assert watcher.total("xnbd_requests_total") > 100
