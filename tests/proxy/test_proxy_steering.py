"""xnbd-bgctl and a running proxy: asking, copying, switching, moving, and several servers on one cache."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import MIB, Start
from injection import NO_PROCESSES, injected
from launch import fails
from origin_programs import is_listening
from proxies import BLOCK, DISK, Proxy, ask, bgctl, make_disk, program, query, reads, refused, replies
from rawclient import DISC, READ, WRITE, RawClient, pack_request
from relay import Relay
from server_process import STOP_TIME, Server, children_of, command, is_alive, title_of, wait_until

from xnbd.proxy.state.format import BEGUN, CHECKPOINT, SCOREBOARD_SUFFIX, SUCCEEDED
from xnbd.proxy.state.opening import open_state
from xnbd.scoreboard.layout import COPYING
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.system.file_locks import RangeLocks

BLOCKS = -(-DISK // BLOCK)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The origin's image."""
    return make_disk(tmp_path)


@pytest.fixture
def origin(start: Start, disk: Path) -> Server:
    return start("--target", "--spare-workers", "2", disk, tcp=True)


@pytest.fixture
def relay(origin: Server) -> Iterator[Relay]:
    with Relay(origin.port) as relay:
        yield relay


@pytest.fixture
def proxy(start: Start, tmp_path: Path, origin: Server) -> Proxy:
    return Proxy(start, tmp_path, origin.uri, "--readahead", "0")


@pytest.fixture
def full(proxy: Proxy) -> Proxy:
    """A proxy that misses nothing."""
    proxy.bgctl("--cache-all")
    return proxy


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do *work* in a thread; calling what is returned waits for its result."""
    results: List[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def finish() -> Any:
        thread.join(60)
        assert results, "no result"
        return results[0]

    return finish


# Asking


def test_query_counts_hits_misses_and_bytes(proxy: Proxy) -> None:
    with proxy.raw() as client:
        for _ in range(3):
            for block in range(0, 100, 10):
                client.read(block * BLOCK, BLOCK)
        assert client.write(0, b"x" * 5000) == 0
        client.read(50 * BLOCK, 11)
        wait_until(lambda: proxy.counter("requests") == 32, "all requests")
        proxy.wait_for_cached(11)
        answer = proxy.query()
        assert answer["counters"] == {
            "requests": 32,
            "bytes_read": 30 * BLOCK + 11,
            "bytes_written": 5000,
            "misses": 10,
            "hits": 22,
            "bytes_fetched": 11 * BLOCK,
            "damaged": 0,
        }
        (worker,) = answer["workers"]
        assert {key: worker[key] for key in answer["counters"]} == answer["counters"]
        assert worker["pid"] in proxy.server.busy_workers()
        assert worker["client"] == f"unix:pid={os.getpid()},uid={os.getuid()}"
        assert worker["memory_bytes"] > 0
        assert answer["blocks"] == {"total": BLOCKS, "cached": 11, "written": 2}
    wait_until(lambda: not proxy.query()["workers"], "the client's end")
    assert proxy.counter("requests") == 32


def test_query_of_a_new_proxy(proxy: Proxy, origin: Server) -> None:
    answer = proxy.query()
    assert answer["mode"] == "proxy"
    assert answer["name"] == "cache.img"
    assert answer["disk_size"] == DISK
    assert answer["pid"] == proxy.server.pid
    assert answer["blocks"] == {"total": BLOCKS, "cached": 0, "written": 0}
    assert answer["origin"]["state"] == "idle"
    assert answer["origin"]["address"] == f"nbd+unix:///?socket={origin.socket}"
    assert answer["cache_all"] is None
    assert answer["workers"] == []


def test_query_s_text(proxy: Proxy, origin: Server) -> None:
    with proxy.raw() as client:
        client.read(0, MIB)
        wait_until(lambda: proxy.counter("requests") == 1, "the request")
        proxy.wait_for_cached(256)
        text = proxy.bgctl("--query")
    for line in (
        f"cache.img: proxy, 4.0 MiB ({DISK:,} bytes)",
        f"  origin      nbd+unix:///?socket={origin.socket}",
        "              connected, 1 connection",
        f"  cached      24.9 %, 256 of {BLOCKS:,} blocks, 3.0 MiB missing",
        "  fetched     1 MiB from the origin",
        "  hits        0 (0.0 %), 1 miss",
        "  requests    1; 1 MiB read, 0 bytes written",
        "1 client:",
    ):
        assert line in text.splitlines(), text


def test_query_never_says_100_percent_before_it_is(proxy: Proxy) -> None:
    with proxy.raw() as client:
        for at in range(0, DISK - BLOCK, MIB):
            client.read(at, min(MIB, DISK - 1234 - at) or 1)
        proxy.wait_for_cached(BLOCKS - 1)
        assert " 99.9 %, 1,024 of 1,025 blocks, 4 KiB missing" in proxy.bgctl("--query")
        client.read(DISK - 1, 1)
        assert " 100 %, 1,025 of 1,025 blocks\n" in proxy.bgctl("--query")


def test_query_as_json_and_with_a_map(proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.read(0, 2 * MIB)
    answer = json.loads(proxy.bgctl("--query", "--json", "--map"))
    assert len(answer["map"]) == 1024
    assert answer["map"][:511] == [1.0] * 511
    assert answer["map"][-511:] == [0.0] * 511
    assert re.search(r"^ +0 bytes \|", proxy.bgctl("--query", "--map"), re.MULTILINE)


def test_query_tells_what_waits_and_why_the_origin_is_away(start: Start, tmp_path: Path, relay: Relay) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        assert proxy.query()["origin"] == {
            "address": f"{relay.uri}/",
            "state": "connected",
            "error": None,
            "connections": 1,
            "version": None,
            "changed": False,
        }
        relay.refuse()
        relay.cut()
        client.send(reads((MIB, 10)))
        client.request(WRITE, 2 * MIB + 1, 5, data=b"waits", cookie=2)
        wait_until(lambda: proxy.query()["origin"]["state"] == "unreachable", "unreachable")
        proxy.wait_for_queue(2)
        answer = proxy.query()
        assert answer["queue"]["bytes"] == answer["workers"][0]["queued_bytes"] == 5
        wait_until(lambda: "Connection refused" in (proxy.query()["origin"]["error"] or ""), "the reason")
        relay.accept()
        client.simple_reply(10)
        wait_until(lambda: proxy.query()["origin"]["state"] == "connected", "the origin")
        assert proxy.query()["origin"]["error"] is None


def test_query_tells_of_an_origin_that_is_lost_while_requests_wait(start: Start, tmp_path: Path, relay: Relay) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10)))
        proxy.wait_for_queue(1)
        assert proxy.query()["origin"]["state"] == "connected"
        relay.refuse()
        relay.cut()
        wait_until(lambda: proxy.query()["origin"]["state"] == "unreachable", "unreachable")
        relay.resume()
        relay.accept()


def test_checkpoints_are_made_and_told(proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.read(0, BLOCK)
    wait_until(lambda: proxy.query()["checkpoint"]["dirty_pages"] == 0, "a checkpoint")
    wait_until(lambda: proxy.query()["checkpoint"]["completed"] > 0, "a checkpoint")
    assert proxy.query()["checkpoint"]["seconds_since_last"] < 60


def test_garbage_on_the_control_socket_ends_that_connection_only(proxy: Proxy) -> None:
    for garbage in (b"\0" * 100, b"{" * 100 + b"\n", b"x" * 200_000, b'{"command": "query", "map": -1}\n'):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(str(proxy.control))
            try:
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                assert b'"error"' in sock.recv(4096)
            except (BrokenPipeError, ConnectionResetError):
                pass
    assert proxy.query()["mode"] == "proxy"


# Copying


def test_cache_all_brings_everything(proxy: Proxy, disk: Path, origin: Server) -> None:
    assert proxy.bgctl("--cache-all") == "100 % cached, 4.0 MiB of 4.0 MiB; 4.0 MiB fetched\n"
    assert proxy.cached() == BLOCKS
    origin.stop()
    with proxy.raw() as client:
        assert client.read(0, DISK) == disk.read_bytes()
    assert proxy.bgctl("--cache-all") == "100 % cached, 4.0 MiB of 4.0 MiB; 0 bytes fetched\n"


def test_cache_all_leaves_what_clients_have_written(proxy: Proxy, disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    with proxy.raw() as client:
        for at in (5, 8 * BLOCK, MIB + 77, DISK - 100):
            assert client.write(at, b"written" * 10) == 0
            expected[at : at + 70] = b"written" * 10
        proxy.bgctl("--blocks-per-request", 7, "--cache-all")
        assert client.read(0, DISK) == expected
    proxy.wait_for_counter("bytes_fetched", DISK)


def on_terminal(*arguments: object) -> Tuple[str, str]:
    """What xnbd-bgctl prints, and what it shows on a terminal."""
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm"}
    process = subprocess.Popen(program(*arguments), stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        pass  # the last one has closed it
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0, shown
    return out.decode(), shown.decode()


def test_progress_of_cache_all_on_a_terminal(proxy: Proxy) -> None:
    out, shown = on_terminal("--progress", "--limit-rate", "1M", "--cache-all", proxy.control)
    assert out == "100 % cached, 4.0 MiB of 4.0 MiB; 4.0 MiB fetched\n"
    frames = [frame for frame in re.split("[\r\n]+", shown) if "%" in frame]
    assert "of 4.0 MiB" in frames[0]
    assert len(frames) > 2
    assert "100 % |" in frames[-1]
    assert all(len(frame) <= 80 for frame in frames)


def test_cache_all_keeps_to_its_rate(start: Start, tmp_path: Path) -> None:
    big = make_disk(tmp_path, 6 * MIB, "big.img")
    proxy = Proxy(start, tmp_path, start("--target", big).uri)
    began = time.monotonic()
    proxy.bgctl("--limit-rate", "4M", "--cache-all")
    assert time.monotonic() - began > 0.7  # 1.5 s by the book
    assert proxy.cached() == 6 * 256


SLOW = 32 << 10
"""Bytes per second: a copy does not come to its end while a test looks at it."""


def start_copy(proxy: Proxy) -> subprocess.Popen[str]:
    """xnbd-bgctl --cache-all, from when it has copied something."""
    command = program("--limit-rate", SLOW, "--cache-all", proxy.control)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: proxy.cached() > 0, "copied blocks")
    return process


def running_copy(proxy: Proxy) -> Dict[str, Any]:
    """What --query tells of a copy, but for what changes all the time."""
    wait_until(lambda: proxy.query()["cache_all"], "the copy in the answer")
    return {key: proxy.query()["cache_all"][key] for key in ("pid", "total_bytes")}


def test_ctrl_c_stops_the_copy_and_nothing_else(proxy: Proxy, disk: Path) -> None:
    with proxy.raw() as client:
        process = start_copy(proxy)
        copier = running_copy(proxy)["pid"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.fullmatch(r"xnbd-bgctl: stopped at .* %, .* of 4.0 MiB; run again, it goes on from there\n", err)
        wait_until(lambda: not is_alive(copier), "the copier's end")
        wait_until(lambda: proxy.query()["cache_all"] is None, "no copy")
        before = proxy.cached()
        assert 0 < before < BLOCKS
        client.read(DISK - 100, 100)
        proxy.bgctl("--cache-all")
        assert DISK <= proxy.counter("bytes_fetched") <= DISK + 128 * BLOCK, "only what was under way came twice"
        assert client.read(0, DISK) == disk.read_bytes()


def test_cache_all2_returns_and_query_shows_the_copy(start: Start, tmp_path: Path, relay: Relay) -> None:
    proxy = Proxy(start, tmp_path, relay.uri)
    with proxy.raw():
        relay.stall()
        answer = ask(proxy.control, command="cache-all", wait=False)
        assert is_alive(answer["pid"])
        copy = running_copy(proxy)
        assert copy["pid"] == answer["pid"]
        assert copy["total_bytes"] == DISK
        assert "cache-all" in proxy.bgctl("--query")
        relay.resume()
        wait_until(lambda: proxy.cached() == BLOCKS, "the whole disk")
    wait_until(lambda: proxy.query()["cache_all"] is None, "the end of the copy")


def test_rate_of_a_copy_is_told_from_the_second_query_on(proxy: Proxy) -> None:
    with proxy.raw():
        ask(proxy.control, command="cache-all", wait=False, limit_rate=MIB)
        answers = (proxy.query()["cache_all"] for _ in iter(int, 1))
        first = next(filter(None, answers))
        wait_until(lambda: next(answers)["rate"] > 0, "a rate")
    assert first["rate"] is None


def test_cache_all2_of_the_program(proxy: Proxy) -> None:
    assert re.fullmatch(r"process \d+ copies; --query shows how far it is\n", proxy.bgctl("--cache-all2"))
    wait_until(lambda: proxy.cached() == BLOCKS, "the whole disk")
    proxy.server.wait_for_log("the copy has ended, 0 blocks are missing")
    proxy.server.wait_for_log("every block is cached")


def test_copy_that_nobody_waits_for_ends_with_its_process(proxy: Proxy) -> None:
    ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)
    os.kill(running_copy(proxy)["pid"], signal.SIGTERM)
    proxy.server.wait_for_log("the copy has ended")
    wait_until(lambda: proxy.query()["cache_all"] is None, "no copy")
    assert proxy.cached() < BLOCKS


def test_second_copy_is_refused(proxy: Proxy) -> None:
    ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)
    assert "a copy is under way already" in proxy.refused("--cache-all")
    assert "a copy is under way already" in proxy.refused("--cache-all2")


def test_second_copy_by_another_server_on_the_cache_is_refused(start: Start, tmp_path: Path, proxy: Proxy) -> None:
    other = Proxy(start, tmp_path, proxy.query()["origin"]["address"])
    ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)
    wait_until(lambda: proxy.cached() > 0, "the copy")
    assert "copy" in other.refused("--cache-all")
    assert running_copy(other) == running_copy(proxy)


def test_server_that_has_just_taken_a_copy_over_stops_in_time(start: Start, tmp_path: Path, proxy: Proxy) -> None:
    other = Proxy(start, tmp_path, proxy.query()["origin"]["address"])
    ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)
    wait_until(lambda: proxy.cached() > 0, "the copy")
    assert proxy.server.stop() == 0
    other.server.wait_for_log("copying all blocks that are missing")
    assert other.server.stop() == 0


def test_copy_waits_for_an_origin_that_is_away(start: Start, tmp_path: Path, relay: Relay) -> None:
    proxy = Proxy(start, tmp_path, relay.uri)
    relay.refuse()
    finish = in_background(lambda: proxy.bgctl("--cache-all"))
    proxy.server.wait_for_log("Connection refused")
    relay.accept()
    assert finish() == "100 % cached, 4.0 MiB of 4.0 MiB; 4.0 MiB fetched\n"


def test_holes_of_the_origin_are_not_transferred(start: Start, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.img"
    with open(sparse, "wb") as file:
        file.truncate(1 << 40)
        for at in (0, 5 << 30, (1 << 40) - MIB):
            file.seek(at)
            file.write(random.Random(at).randbytes(MIB))
    proxy = Proxy(start, tmp_path, start("--target", sparse).uri)
    proxy.bgctl("--cache-all")
    assert proxy.cached() == 1 << 28
    assert 3 * MIB <= proxy.counter("bytes_fetched") <= 4 * MIB
    assert proxy.cache.stat().st_blocks * 512 <= 8 * MIB
    with proxy.raw() as client:
        assert client.read(5 << 30, MIB) == random.Random(5 << 30).randbytes(MIB)
        assert client.read(7 << 30, 4096) == bytes(4096)


def test_holes_do_not_cover_what_was_written(start: Start, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.img"
    with open(sparse, "wb") as file:
        file.truncate(64 * MIB)
    proxy = Proxy(start, tmp_path, start("--target", sparse).uri)
    with proxy.raw() as client:
        assert client.write(MIB + 10, b"kept") == 0
        proxy.bgctl("--cache-all")
        assert client.read(MIB, 20) == bytes(10) + b"kept" + bytes(6)
        assert proxy.cached() == 64 * 256


# Switching


def test_switch_is_refused_while_blocks_are_missing(proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.read(0, 25 * BLOCK)
        assert proxy.refused("--switch").startswith(f"{BLOCKS - 25} of {BLOCKS} blocks are missing")
        assert proxy.refused("--shutdown").startswith(f"{BLOCKS - 25} of {BLOCKS} blocks are missing")
        assert proxy.query()["mode"] == "proxy"
        client.read(DISK - 10, 10)
        proxy.wait_for_cached(26)


def test_sigusr2_is_refused_with_a_log_line_while_blocks_are_missing(proxy: Proxy) -> None:
    os.kill(proxy.server.pid, signal.SIGUSR2)
    proxy.server.wait_for_log(f"SIGUSR2: {BLOCKS} of {BLOCKS} blocks are missing")
    assert proxy.query()["mode"] == "proxy"


@pytest.mark.parametrize("how", ["--switch", "--shutdown", "SIGUSR2"])
def test_switch(start: Start, full: Proxy, origin: Server, disk: Path, how: str) -> None:
    expected = bytearray(disk.read_bytes())
    with full.raw() as client:
        client.read(0, 10)
        if how == "SIGUSR2":
            os.kill(full.server.pid, signal.SIGUSR2)
            full.server.wait_for_log("switched to a plain target")
        else:
            out = full.bgctl(how)
            assert re.fullmatch(
                r"the server is a plain target .* now; \d workers switched, longest pause .* ms\n", out
            ), out
        origin.stop()
        assert client.read(0, DISK) == expected
        assert client.write(MIB + 1, b"by the target") == 0
        expected[MIB + 1 : MIB + 14] = b"by the target"
        with full.raw() as new:
            assert new.read(0, DISK) == expected
        answer = full.query()
        assert answer["mode"] == "target"
        assert not answer.keys() & {"origin", "blocks", "cache_all", "checkpoint", "queue"}
        assert "No map: only a proxy has one." in full.bgctl("--query", "--map")
        assert "this is a plain target already" in full.refused("--switch")
        assert "nothing is missing" in full.refused("--cache-all")
        assert "it has no origin any more" in refused("--reconnect", full.control, origin.uri)
    full.server.stop()
    later = start("--target", full.cache)
    with RawClient(later.connect()) as client:
        assert client.negotiate().read(0, DISK) == expected


def test_forced_switch_reads_zeros_where_blocks_are_missing(
    start: Start, proxy: Proxy, origin: Server, disk: Path
) -> None:
    with proxy.raw() as client:
        client.read(0, MIB)
        proxy.bgctl("--force", "--switch")
        assert client.read(0, DISK) == disk.read_bytes()[:MIB] + bytes(DISK - MIB)
        assert client.write(2 * MIB, b"new") == 0
    proxy.server.stop()
    status, error = fails(
        "--proxy",
        "--quiet",
        "--unix",
        proxy.cache.parent / "x.sock",
        origin.uri,
        proxy.cache,
        proxy.bitmap,
        proxy.control,
    )
    assert status == 1
    assert f"switched to a plain target by force with {BLOCKS - 256} blocks missing" in error
    assert "--clear-bitmap, which forgets what clients have written" in error
    assert "--clear-bitmap" in error


def test_restart_as_a_proxy_after_a_full_switch(start: Start, tmp_path: Path, full: Proxy, origin: Server) -> None:
    with full.raw() as client:
        full.bgctl("--switch")
        assert client.write(100, b"by the target") == 0
    full.server.stop()
    again = Proxy(start, tmp_path, origin.uri)
    assert again.query()["mode"] == "proxy"
    with again.raw() as client:
        assert client.read(100, 13) == b"by the target"
    again.bgctl("--switch")


def test_late_reply_of_the_origin_does_not_overwrite_what_was_written_after_a_forced_switch(
    start: Start, tmp_path: Path, relay: Relay
) -> None:
    proxy, new = Proxy(start, tmp_path, relay.uri, "--readahead", "0"), b"new!" * 1024
    with proxy.raw() as waiting, proxy.raw() as writer:
        waiting.read(0, 100)
        relay.stall()
        waiting.send(reads((MIB, BLOCK)))
        proxy.wait_for_queue(1)
        finish = in_background(lambda: ask(proxy.control, command="switch", force=True))
        wait_until(lambda: proxy.query()["mode"] == "target", "the switch")
        assert writer.write(MIB, new) == 0
        relay.resume()
        assert "error" not in finish()
        assert replies(waiting, BLOCK)[0][1] in (new, bytes(BLOCK))
        assert writer.read(MIB, BLOCK) == new


def test_forced_switch_answers_requests_that_waited(start: Start, tmp_path: Path, relay: Relay, disk: Path) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (2 * MIB, 10)))
        client.request(WRITE, 3 * MIB + 1, 4, data=b"late", cookie=3)
        proxy.wait_for_queue(3)
        proxy.bgctl("--force", "--switch")
        for _ in range(3):
            error, cookie, _ = client.simple_reply()
            assert error == 0
            assert cookie == 3 or client.receive(10) == bytes(10)
        assert client.read(3 * MIB, 6) == b"\0late\0"


def test_a_copy_that_is_stopped_does_not_keep_the_steward(proxy: Proxy) -> None:
    """It cannot end when it is told to. No command, checkpoint or answer would come from the steward any more."""
    pid = ask(proxy.control, command="cache-all", limit_rate=MIB)["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert ask(proxy.control, command="switch", force=True)["done"]
    assert not is_alive(pid)
    assert proxy.query()["mode"] == "target"


def test_switch_ends_a_running_copy(proxy: Proxy) -> None:
    process = start_copy(proxy)
    proxy.bgctl("--force", "--switch")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped before its end" in err
    assert proxy.query()["mode"] == "target"


class StampingClient(threading.Thread):
    """Writes stamps to its own part of the disk and verifies them, eight in flight, until it is told to stop."""

    def __init__(self, server: Server, number: int, share: int) -> None:
        super().__init__()
        self.client = RawClient(server.connect()).negotiate()
        self.base, self.blocks = number * share, share // BLOCK
        self.stop = threading.Event()
        self.failure = ""
        self.longest = 0.0
        self.rounds = 0
        self._rng = random.Random(number)
        self._content: Dict[int, bytes] = {}

    def run(self) -> None:
        try:
            with self.client:
                while not self.stop.is_set():
                    began = time.monotonic()
                    self._round()
                    self.longest = max(self.longest, time.monotonic() - began)
                    self.rounds += 1
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _round(self) -> None:
        blocks = self._rng.sample(range(self.blocks), 8)
        requests, checks = b"", {}
        for cookie, block in enumerate(blocks, 1):
            at = self.base + block * BLOCK
            if block in self._content and self._rng.random() < 0.5:
                checks[cookie] = block
                requests += pack_request(READ, at, BLOCK, cookie=cookie)
            else:
                data = self._content[block] = self._rng.randbytes(16) * (BLOCK // 16)
                requests += pack_request(WRITE, at, BLOCK, cookie=cookie) + data
        self.client.send(requests)
        for _ in blocks:
            error, cookie, _ = self.client.simple_reply()
            assert not error, f"error {error}"
            if cookie in checks:
                assert self.client.receive(BLOCK) == self._content[checks[cookie]], "wrong bytes"


def test_switch_under_full_load_of_8_clients(start: Start, tmp_path: Path) -> None:
    big = make_disk(tmp_path, 16 * MIB, "big.img")
    origin = start("--target", big)
    proxy = Proxy(start, tmp_path, origin.uri)
    proxy.bgctl("--cache-all")
    clients = [StampingClient(proxy.server, number, 2 * MIB) for number in range(8)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: all(client.rounds > 20 for client in clients), "load", 30)
        usual = max(client.longest for client in clients)
        answer = json.dumps(ask(proxy.control, command="switch"))
        after = [client.rounds + 20 for client in clients]
        origin.stop()
        wait_until(
            lambda: all(c.rounds > least or c.failure for c, least in zip(clients, after)), "load after the switch", 30
        )
    finally:
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join()
    before, longest = usual * 1e3, max(client.longest for client in clients) * 1e3
    print(f"switch {answer}; longest round of requests before {before:.1f} ms, in all {longest:.1f} ms")
    assert [client.failure for client in clients] == [""] * 8
    assert "error" not in answer
    proxy.server.stop()
    with RawClient(start("--target", proxy.cache).connect()) as check:
        check.negotiate()
        for client in clients:
            for block, data in client._content.items():
                assert check.read(client.base + block * BLOCK, BLOCK) == data


# Another origin


def test_reconnect_asks_waiting_requests_again_elsewhere(
    start: Start, tmp_path: Path, relay: Relay, origin: Server, disk: Path
) -> None:
    proxy, content = Proxy(start, tmp_path, relay.uri, "--readahead", "0"), disk.read_bytes()
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.stall()
        client.send(reads((MIB, 10), (2 * MIB, 10)))
        client.request(WRITE, 3 * MIB + 1, 4, data=b"late", cookie=3)
        proxy.wait_for_queue(3)
        out = bgctl("--reconnect", proxy.control, "127.0.0.1", origin.port)
        assert out == f"the origin is nbd://127.0.0.1:{origin.port}/ now\n"
        answers = {}
        for _ in range(3):
            error, cookie, _ = client.simple_reply()
            answers[cookie] = b"" if cookie == 3 else client.receive(10)
            assert error == 0
        assert answers == {1: content[MIB : MIB + 10], 2: content[2 * MIB : 2 * MIB + 10], 3: b""}
        assert client.read(3 * MIB + 1, 4) == b"late"
        assert proxy.query()["origin"]["address"] == f"nbd://127.0.0.1:{origin.port}/"


@pytest.mark.parametrize("command_line", ["old", "new"])
def test_restart_after_a_move_uses_the_new_address(
    start: Start, tmp_path: Path, relay: Relay, origin: Server, disk: Path, command_line: str
) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
    bgctl("--reconnect", proxy.control, origin.uri)
    proxy.server.stop()
    relay.refuse()
    relay.cut()
    again = Proxy(start, tmp_path, relay.uri if command_line == "old" else origin.uri)
    assert again.query()["origin"]["address"] == f"nbd+unix:///?socket={origin.socket}"
    with again.raw() as client:
        assert client.read(0, DISK) == disk.read_bytes()


def test_move_to_a_disk_of_another_size_or_to_nowhere_is_refused(start: Start, tmp_path: Path, proxy: Proxy) -> None:
    other = start("--target", make_disk(tmp_path, 5 * MIB, "other.img"))
    before = proxy.query()["origin"]
    assert f"has {5 * MIB} bytes, not {DISK}; nothing was changed" in refused("--reconnect", proxy.control, other.uri)
    assert "nothing was changed" in refused("--reconnect", proxy.control, "127.0.0.1", 1)
    assert "nothing was changed" in refused("--exportname", "none", "--reconnect", proxy.control, other.uri)
    assert proxy.query()["origin"] == before
    with proxy.raw() as client:
        client.read(0, 100)


def test_move_by_the_relay_needs_no_reconnect(
    start: Start, tmp_path: Path, relay: Relay, disk: Path, origin: Server
) -> None:
    proxy = Proxy(start, tmp_path, relay.uri, "--readahead", "0")
    copy = start("--target", disk, tcp=True)
    with proxy.raw() as client:
        client.read(0, BLOCK)
        relay.retarget(copy.port)
        origin.stop()
        assert client.read(MIB, BLOCK) == disk.read_bytes()[MIB : MIB + BLOCK]


# The steward


def test_dead_steward_is_replaced_and_operators_who_come_meanwhile_only_wait(proxy: Proxy, disk: Path) -> None:
    proxy.server.expected_errors.append("the steward died")
    with proxy.raw() as client:
        old = proxy.steward()
        os.kill(old, signal.SIGKILL)
        client.read(0, 10)
        wait_until(lambda: not is_alive(old), "the old steward's end")
        assert proxy.query()["mode"] == "proxy"
        assert proxy.steward() != old
        proxy.bgctl("--cache-all")
        proxy.bgctl("--switch")
        assert client.read(0, DISK) == disk.read_bytes()


def test_copy_does_not_ask_again_and_again_for_holes_that_another_process_has_in_hand(
    start: Start, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.img"
    with empty.open("wb") as file:
        file.truncate(16 * MIB)
    with Relay(start("--target", empty, tcp=True).port) as link:
        proxy = Proxy(start, tmp_path, link.uri)
        with open(proxy.bitmap, "rb+") as bitmap:
            assert RangeLocks(bitmap.fileno()).try_acquire(1, 1)
            ask(proxy.control, command="cache-all", wait=False)
            wait_until(lambda: link.moved()[0] > 1000, "some attempts")
            (before, _), second = link.moved(), time.monotonic() + 1
            wait_until(lambda: time.monotonic() > second, "a second")
            assert link.moved()[0] - before < 50 * 28
            assert proxy.cached() == 0
        proxy.wait_for_cached(16 * MIB // BLOCK)


def test_steward_that_cannot_be_started_for_want_of_descriptors_starts_later(proxy: Proxy) -> None:
    master, log = proxy.server.pid, proxy.server.log
    proxy.server.expected_errors += ["the steward died", "the steward cannot be started"]
    # A spare that is only forked now wants descriptors too.
    proxy.server.expected_errors += ["worker cannot work: .*Too many open files", "spare worker .* died"]
    with proxy.raw() as client:
        steward, (_, hard) = proxy.steward(), resource.prlimit(master, resource.RLIMIT_NOFILE)
        used = max(int(fd.name) for fd in Path(f"/proc/{master}/fd").iterdir())
        resource.prlimit(master, resource.RLIMIT_NOFILE, (used + 1, hard))
        os.kill(steward, signal.SIGKILL)
        wait_until(lambda: log().count("the steward cannot be started") == 2, "a second attempt")
        assert client.works()
        resource.prlimit(master, resource.RLIMIT_NOFILE, (hard, hard))
        wait_until(lambda: any("steward" in title_of(pid) for pid in proxy.server.workers()), "the next steward")
        assert client.works()
    assert "Traceback" not in log()


def test_switch_of_a_cache_that_cannot_be_made_durable_is_refused(proxy: Proxy) -> None:
    proxy.bgctl("--cache-all")
    wait_until(lambda: "every block is cached" in proxy.server.log(), "a proxy without a need of its origin")
    steward = proxy.steward()
    with injected(steward, "fdatasync:error=ENOSPC"):
        proxy.server.expected_errors += ["cache.img: write-back failed: No space left", "the last flush failed"]
        assert "(No space left on device), nothing is durable" in proxy.refused("--switch")
        os.kill(proxy.server.pid, signal.SIGUSR2)
        proxy.server.wait_for_log("SIGUSR2: the cache cannot be made durable: write-back failed at ")
    assert "cannot be made durable: write-back failed at " in proxy.refused("--switch", "--force")
    assert proxy.steward() == steward
    assert proxy.query()["mode"] == "proxy"


def test_flush_does_not_wait_for_a_checkpoint_of_the_steward_that_was_killed(proxy: Proxy, origin: Server) -> None:
    """One that found nothing to save, because a client's FLUSH had been under way when it began."""
    proxy.server.expected_errors.append("cannot make the cache durable: status -9")
    with proxy.raw() as client, open(proxy.cache, "rb+") as cache:
        files = open_state(str(proxy.bitmap), cache.fileno(), disk_size=DISK, origin=origin.uri)
        state, locks = files.open_process(), RangeLocks(files._state_fd)
        wait_until(lambda: not state.changed, "a quiet steward")
        locks.acquire(CHECKPOINT, 1)
        number = int.from_bytes(os.pread(files._state_fd, 8, BEGUN), sys.byteorder) + 1
        os.pwrite(files._state_fd, number.to_bytes(8, sys.byteorder), BEGUN)
        assert client.write(0, b"w" * BLOCK) == 0
        steward = proxy.steward()
        wait_until(lambda: children_of(steward), "a checkpoint that waits for the other one")
        (child,) = children_of(steward)
        with injected(child, "fdatasync:signal=SIGKILL"):
            state._make_durable(cache.fileno())
            os.pwrite(files._state_fd, number.to_bytes(8, sys.byteorder), BEGUN)
            os.pwrite(files._state_fd, number.to_bytes(8, sys.byteorder), SUCCEEDED)
            locks.release(CHECKPOINT, 1)
            proxy.server.wait_for_log("cannot make the cache durable: status -9")
        assert not state.changed
        assert client.works()
        state.close()
        files.close()


@pytest.mark.parametrize("command", ["cache-all", "reconnect"])
def test_command_that_no_process_can_be_started_for_is_refused(proxy: Proxy, origin: Server, command: str) -> None:
    steward, arguments = proxy.steward(), {"uri": origin.uri} if command == "reconnect" else {"wait": True}
    with injected(steward, NO_PROCESSES):
        refusal = ask(proxy.control, command=command, **arguments)["error"]
        assert refusal == "the server cannot start a process: Resource temporarily unavailable"
    assert proxy.steward() == steward
    assert "error" not in ask(proxy.control, command=command, **arguments)
    assert proxy.server.stop() == 0


def test_checkpoint_that_no_process_can_be_started_for_is_made_later(proxy: Proxy) -> None:
    proxy.server.expected_errors.append("cannot make the cache durable: the server cannot start a process")
    steward, complaint = proxy.steward(), proxy.server.expected_errors[0]
    with proxy.raw() as client:
        with injected(steward, NO_PROCESSES):
            assert client.write(0, b"w" * BLOCK) == 0
            proxy.server.wait_for_log(complaint)
            before = proxy.query()["checkpoint"]["completed"]
        wait_until(lambda: proxy.query()["checkpoint"]["completed"] > before, "a checkpoint")
    assert proxy.steward() == steward
    assert proxy.server.log().count(complaint) == 1


def test_copy_of_a_server_that_has_ended_waits_until_a_process_can_be_started(proxy: Proxy) -> None:
    proxy.server.expected_errors.append("cannot go on copying: the server cannot start a process")
    steward = proxy.steward()
    with closing(Scoreboard(os.open(f"{proxy.bitmap}{SCOREBOARD_SUFFIX}", os.O_RDWR))) as scoreboard:
        with injected(steward, NO_PROCESSES):
            scoreboard.wanted_copy = 0
            proxy.server.wait_for_log(proxy.server.expected_errors[0])
        proxy.wait_for_cached(BLOCKS)
    assert proxy.steward() == steward


def test_copy_that_another_server_was_quicker_with_stays_wanted(proxy: Proxy) -> None:
    """The one that was quicker may have ended, and left the rest, before the other looks."""
    steward = proxy.steward()
    with closing(Scoreboard(os.open(f"{proxy.bitmap}{SCOREBOARD_SUFFIX}", os.O_RDWR))) as other:

        def was_first() -> bool:
            copier = None
            while copier is None:  # the end of the one before may be noted yet, and that nothing is wanted
                other.wanted_copy = SLOW
                copier = proxy.copier()
            was_first = other.try_lock(COPYING)
            os.kill(steward, signal.SIGSTOP)
            if not was_first:
                os.kill(copier, signal.SIGTERM)
            wait_until(lambda: not is_alive(copier), "the end of the copier")
            if was_first:
                other.unlock(COPYING)
            os.kill(steward, signal.SIGCONT)
            return was_first

        wait_until(was_first, "a copier that is not the first")
        proxy.server.wait_for_log("the copy has ended: another server on this cache is copying already")
        assert other.wanted_copy == SLOW
        wait_until(lambda: proxy.copier() is not None, "its next try")


def test_copy_ends_with_its_steward_and_goes_on_with_the_next_one(proxy: Proxy) -> None:
    proxy.server.expected_errors.append("the steward died")
    copier = ask(proxy.control, command="cache-all", wait=False, limit_rate=MIB)["pid"]
    wait_until(lambda: proxy.cached() > 0, "copied blocks")
    os.kill(proxy.steward(), signal.SIGKILL)
    wait_until(lambda: not is_alive(copier), "the copier's end")
    proxy.server.wait_for_log("the steward died")

    def done() -> bool:
        try:
            return "error" not in ask(proxy.control, command="cache-all", wait=True)
        except OSError:
            return False

    wait_until(done, "the copy by the new steward")
    assert proxy.cached() == BLOCKS


def test_steward_ends_with_the_master(proxy: Proxy) -> None:
    steward = proxy.steward()
    copier = ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)["pid"]
    proxy.server.process.kill()
    proxy.server.process.wait()
    wait_until(lambda: not is_alive(steward) and not is_alive(copier), "the end of steward and copier")


def test_control_socket_is_free_before_the_copier_has_ended(proxy: Proxy) -> None:
    """It may take its time to leave its origin; the next server is refused as long as somebody listens."""
    copier = ask(proxy.control, command="cache-all", wait=False, limit_rate=SLOW)["pid"]
    wait_until(lambda: proxy.cached() > 0, "copied blocks")
    os.kill(copier, signal.SIGSTOP)
    try:
        proxy.server.process.kill()
        proxy.server.process.wait()
        wait_until(lambda: not is_listening(proxy.control), "the steward to listen no more")
    finally:
        os.kill(copier, signal.SIGCONT)
    wait_until(lambda: not is_alive(copier), "the copier's end")


# Several servers on one cache


def test_switch_by_one_server_switches_the_clients_of_both(
    start: Start, tmp_path: Path, proxy: Proxy, origin: Server, disk: Path
) -> None:
    other = Proxy(start, tmp_path, origin.uri)
    with proxy.raw() as one, other.raw() as two:
        assert one.read(0, MIB) == two.read(0, MIB)
        assert two.write(10, b"two") == 0
        assert one.read(10, 3) == b"two"
        proxy.bgctl("--cache-all")
        assert other.cached() == BLOCKS
        other.bgctl("--switch")
        origin.stop()
        assert proxy.query()["mode"] == other.query()["mode"] == "target"
        assert one.write(20, b"one") == 0
        assert two.read(20, 3) == b"one"
        assert one.read(100, DISK - 100) == two.read(100, DISK - 100) == disk.read_bytes()[100:]


def test_reconnect_through_one_server_moves_both(
    start: Start, tmp_path: Path, relay: Relay, origin: Server, disk: Path
) -> None:
    proxy, other = Proxy(start, tmp_path, relay.uri), Proxy(start, tmp_path, relay.uri)
    with proxy.raw() as one, other.raw() as two:
        one.read(0, 10)
        two.read(BLOCK, 10)
        relay.stall()
        one.send(reads((MIB, 10)))
        two.send(reads((2 * MIB, 10)))
        proxy.wait_for_queue(2)
        bgctl("--reconnect", other.control, origin.uri)
        assert replies(one, 10) == [(1, disk.read_bytes()[MIB : MIB + 10])]
        assert replies(two, 10) == [(1, disk.read_bytes()[2 * MIB : 2 * MIB + 10])]


class Siblings:
    """Servers of one client each, all with the same files and the same control socket."""

    def __init__(self, directory: Path, origin: str) -> None:
        self.files = [directory / f"cache.{ending}" for ending in ("img", "bitmap", "ctl")]
        self.control = self.files[2]
        self._origin = origin
        self._log = directory / "siblings.log"
        self.processes: List[subprocess.Popen[bytes]] = []
        self.clients: List[RawClient] = []

    def add(self) -> RawClient:
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        arguments = command("--proxy", "--connected-fd", theirs.fileno(), "--readahead", "0", self._origin, *self.files)
        with open(self._log, "ab") as log:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=log, pass_fds=[theirs.fileno()])
        theirs.close()
        self.processes.append(process)
        self.clients.append(RawClient(ours))
        return self.clients[-1]

    def answering(self) -> Optional[int]:
        """The number of the one whose steward answers; None while there is none, or it is about to go."""
        with suppress(OSError, AssertionError):
            pid = query(self.control)["pid"]
            return next((n for n, one in enumerate(self.processes) if one.pid == pid and one.poll() is None), None)
        return None

    def answers(self) -> bool:
        return self.answering() is not None

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        try:
            for client in self.clients:
                client.sock.close()
            for process in self.processes:
                process.wait(STOP_TIME)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        text = self.log()
        assert " ERROR: " not in text, text
        assert "Traceback" not in text, text


@pytest.fixture
def siblings(tmp_path: Path, origin: Server) -> Iterator[Siblings]:
    family = Siblings(tmp_path, origin.uri)
    yield family
    family.stop()


def test_one_of_several_siblings_answers_for_all(siblings: Siblings, disk: Path, origin: Server) -> None:
    clients = [siblings.add() for _ in range(3)]
    for number, client in enumerate(clients):
        client.read(number * MIB, BLOCK)
    wait_until(siblings.answers, "the control socket")
    wait_until(lambda: query(siblings.control)["counters"]["requests"] == 3, "the figures of all")
    workers = query(siblings.control)["workers"]
    assert {worker["pid"] for worker in workers} == {process.pid for process in siblings.processes}
    bgctl("--cache-all", siblings.control)
    bgctl("--switch", siblings.control)
    origin.stop()
    for client in clients:
        assert client.read(0, DISK) == disk.read_bytes()


@pytest.mark.parametrize("end", ["leaves", "dies"])
def test_another_sibling_answers_when_the_one_that_did_has_gone(siblings: Siblings, end: str, disk: Path) -> None:
    for _ in range(3):
        client = siblings.add()
        client.read(0, BLOCK)
        wait_until(siblings.answers, "the control socket")
    for _ in range(2):
        number = siblings.answering()
        assert number is not None
        if end == "leaves":
            siblings.clients[number].request(DISC)
        else:
            siblings.processes[number].kill()
        siblings.processes[number].wait(60)
        wait_until(siblings.answers, "another one's answer")
    assert len(query(siblings.control)["workers"]) == 1
    bgctl("--cache-all", siblings.control)
    left = next(n for n, process in enumerate(siblings.processes) if process.poll() is None)
    assert siblings.clients[left].read(0, DISK) == disk.read_bytes()


def test_copy_of_a_sibling_that_leaves_is_finished_by_another(siblings: Siblings) -> None:
    for _ in range(2):
        siblings.add().read(0, BLOCK)
        wait_until(siblings.answers, "the control socket")
    answering = siblings.answering()
    assert answering is not None
    ask(siblings.control, command="cache-all", wait=False, limit_rate=MIB)
    siblings.clients[answering].request(DISC)
    siblings.processes[answering].wait(60)
    wait_until(
        lambda: siblings.answers() and query(siblings.control)["blocks"]["cached"] == BLOCKS, "the rest of the copy", 30
    )


def test_newcomer_after_a_switch_of_its_siblings_is_a_target(siblings: Siblings, disk: Path, origin: Server) -> None:
    siblings.add().read(0, 10)
    wait_until(siblings.answers, "the control socket")
    bgctl("--cache-all", siblings.control)
    bgctl("--switch", siblings.control)
    origin.stop()
    newcomer = siblings.add()
    assert newcomer.read(0, DISK) == disk.read_bytes()
    assert newcomer.write(5, b"x") == 0
    assert siblings.clients[0].read(5, 1) == b"x"


def has_made(scoreboard: Scoreboard, checkpoints: int) -> bool:
    return scoreboard.checkpoints()[0] >= checkpoints


def test_sibling_that_cannot_answer_the_control_socket_says_so_once(siblings: Siblings) -> None:
    """It tries every second. A checkpoint in between is no reason to say it again."""
    siblings.control.write_text("somebody's notes")
    client = siblings.add()
    client.read(0, BLOCK)
    with closing(Scoreboard(os.open(f"{siblings.files[1]}{SCOREBOARD_SUFFIX}", os.O_RDWR))) as scoreboard:
        for number in range(1, 5):
            assert client.write(number * BLOCK, b"news") == 0
            wait_until(partial(has_made, scoreboard, number), "a checkpoint")
    assert siblings.log().count("WARNING") == siblings.log().count(str(siblings.control)) == 1
    assert siblings.control.read_text() == "somebody's notes"


def test_siblings_make_no_snapshots(siblings: Siblings) -> None:
    siblings.add().read(0, 10)
    wait_until(siblings.answers, "the control socket")
    bgctl("--force", "--switch", siblings.control)
    assert refused("--snapshot", siblings.control) == "a server of --inetd or --connected-fd makes no snapshots"
