"""The slow log and lines of JSON of clients that go from one process to another, and of those that speak TLS."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, List

import pytest
from caching import BLOCK, CacheFiles
from certificates import Certificates
from conftest import Start, StartWrapper
from injection import injected
from json_log import Line, parse_log, with_words
from moving import move, worker_of_only_client
from rawclient import READ, RawClient
from relay import Relay
from scraping import metrics_port, scrape
from server_process import children_of, title_of, wait_until
from tls_client import context_of, start_tls
from upgrades import upgrade

SLOW = ("--log-format", "json", "--slow-log", "300")
ABOUT = ("export", "peer", "command", "offset", "length", "level", "program")


SLOW_ONE, WAITING_ONE = 3 * BLOCK, 8 * BLOCK
"""Where requests are that are made slow. Others may be slow by themselves, if the computer is busy."""


def slow_lines(log: Callable[[], str], count: int, at: int = SLOW_ONE) -> List[Line]:
    """Those of slow requests at the offset *at*, when there are *count* of them."""

    def found() -> List[Line]:
        return [line for line in with_words(log(), " took ") if line["offset"] == at]

    wait_until(lambda: len(found()) >= count, f"{count} slow requests in the log")
    return found()


def write_slowly(client: RawClient, pid: int) -> None:
    """A WRITE that the process *pid* is slow with."""
    assert client.works()
    with injected(pid, "pwrite64:delay_enter=500000:when=1"):
        assert client.write(SLOW_ONE, bytes(BLOCK)) == 0


def check(lines: List[Line], pids: List[int]) -> None:
    """One line of each of the processes *pids*, all about the same."""
    assert [line["pid"] for line in lines] == pids
    assert len({tuple(line[name] for name in ABOUT) for line in lines}) == 1, lines
    assert (lines[0]["command"], lines[0]["offset"], lines[0]["length"]) == ("WRITE", SLOW_ONE, BLOCK)
    assert all(line["disk"] >= 300 for line in lines), lines


def test_a_client_is_named_by_each_process_that_has_it(start: Start, image: Path, tmp_path: Path) -> None:
    """Its worker, the next one, and that of the next program."""
    server = start("--target", *SLOW, "--exportname", "disk", "--control", tmp_path / "ctl", image)
    pids = []
    with RawClient(server.connect()).negotiate() as client:
        for happens in (lambda: None, lambda: move(server), lambda: upgrade(tmp_path / "ctl")):
            happens()
            pids.append(worker_of_only_client(server))
            write_slowly(client, pids[-1])
            slow_lines(server.log, len(pids))
    check(slow_lines(server.log, 3), pids)
    goes_on = with_words(server.log(), ": goes on")
    assert {(line["export"], line["peer"]) for line in goes_on} == {("disk", slow_lines(server.log, 3)[0]["peer"])}


def test_a_client_over_tls(start: Start, image: Path, tmp_path: Path, certificates: Certificates) -> None:
    options = ("--tls", certificates.server, "--control", tmp_path / "ctl")
    server = start("--target", *SLOW, *options, image, tcp=True)
    with start_tls(RawClient(server.connect(tcp=True)), context_of(certificates.alice)) as client:
        client.go("")
        worker = worker_of_only_client(server)
        for turn in (1, 2):
            write_slowly(client, worker)
            slow_lines(server.log, turn)
            upgrade(tmp_path / "ctl")  # it stays with its process
    check(slow_lines(server.log, 2), [worker, worker])
    assert "alice" in slow_lines(server.log, 2)[0]["identity"]
    assert "alice" in slow_lines(server.log, 2)[0]["message"]


def test_clients_of_a_wrapper(start_wrapper: StartWrapper, image: Path) -> None:
    """Before and after an upgrade, and errors that a client gets."""
    wrapper = start_wrapper(*SLOW)
    wrapper.ctl("--add-target", "disk", image)
    pids = []

    def serving() -> List[int]:
        return [pid for pid in children_of(wrapper.process.pid) if "serving" in title_of(pid)]

    with wrapper.client("disk") as client:
        for turn in (1, 2):
            wait_until(lambda: len(serving()) == 1, "one server")
            pids += serving()
            write_slowly(client, pids[-1])
            slow_lines(wrapper.log, turn)
            with injected(pids[-1], "pwrite64:error=EIO:when=1"):
                assert client.write(SLOW_ONE + BLOCK, bytes(BLOCK)) == 5
            wait_until(lambda: len(with_words(wrapper.log(), "failed")) == turn, "the error")  # noqa: B023
            wrapper.ctl("--upgrade")
    check(slow_lines(wrapper.log, 2), pids)
    for line in with_words(wrapper.log(), "failed"):
        assert (line["export"], line["command"], line["errno"]) == ("disk", "WRITE", "EIO")
    assert slow_lines(wrapper.log, 2)[0]["export"] == "disk"


@pytest.mark.parametrize("way", ["hand-over", "upgrade"])
def test_a_request_that_waits_takes_its_time_along(start: Start, image: Path, files: CacheFiles, way: str) -> None:
    """It has waited for the origin since it came, whichever process has it."""
    origin = start("--target", "--readonly", image, tcp=True)
    with Relay(origin.port) as link:
        proxy = start(*files.arguments(link.uri, *SLOW, "--readahead", "0", "--metrics", "0"))
        proxy.expected_errors.append(" for it, trying again")
        proxy.wait_for_log("metrics on ")
        with RawClient(proxy.connect()).negotiate() as client:
            client.read(0, BLOCK)
            link.refuse()
            link.cut()
            began = time.monotonic()
            client.request(READ, WAITING_ONE, BLOCK)
            wait_until(lambda: time.monotonic() > began + 1.5, "a while")
            if way == "upgrade":
                assert upgrade(files.control).moved == 1
            else:
                move(proxy)
            link.accept()
            assert client.simple_reply(BLOCK)[0] == 0
            line = slow_lines(proxy.log, 1, WAITING_ONE)[0]
            assert line["took"] >= 1400 and line["origin"] >= 1200, line
            assert (line["pid"], line["command"]) == (worker_of_only_client(proxy), "READ")
            seen = scrape(metrics_port(proxy.log()))
            assert seen("xnbd_request_duration_seconds_sum", command="read") >= 1.4
    assert parse_log(proxy.log())
