"""xnbd-bgctl, the real program, against a control socket with canned answers."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import Start
from control_loop import ControlLoop, Message
from hypothesis import given
from hypothesis import strategies as st
from server_process import PYTHON, ROOT, run, wait_until

from xnbd.cli import quantities
from xnbd.cli.cache_map import cells_for, draw
from xnbd.cli.progress_display import Pace, status
from xnbd.cli.query_report import report
from xnbd.control.client import ControlClient
from xnbd.control.server import CommandTable, ControlSocket, Reply
from xnbd.errors import ConfigurationError

GIB = 1 << 30
MIB = 1 << 20

Serve = Callable[[CommandTable], Path]


def command(*arguments: object) -> List[str]:
    return [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl"), *map(str, arguments)]


def bgctl(*arguments: object) -> str:
    """What the program prints; it has to succeed and say nothing on standard error."""
    _, out, err = run(*command(*arguments))
    assert err == ""
    return out


def fails(*arguments: object) -> Tuple[int, str]:
    """The exit status, and the one line of a program that fails."""
    code, out, err = run(*command(*arguments), check=False)
    assert out == ""
    assert err.startswith("xnbd-bgctl: ")
    assert err.count("\n") == 1, err
    return code, err[len("xnbd-bgctl: ") : -1]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves commands on a control socket, whose path it returns."""
    loops: List[ControlLoop] = []

    def serve_one(commands: CommandTable) -> Path:
        loops.append(ControlLoop(tmp_path / f"control{len(loops)}", commands))
        return loops[-1].path

    yield serve_one
    for loop in loops:
        loop.stop()


class Canned:
    """A command that answers with *lines* and keeps the requests."""

    def __init__(self, *lines: Message) -> None:
        self.lines = lines
        self.requests: List[Message] = []

    def __call__(self, request: Message) -> Reply:
        self.requests.append(request)
        yield from self.lines


def proxy_answer(**changes: Any) -> Message:
    """A proxy's answer to a query."""
    total = 16 * GIB // 4096
    answer: Dict[str, Any] = {
        "done": True,
        "mode": "proxy",
        "name": "disk.img",
        "description": "a cache",
        "pid": 4711,
        "version": "0.5.0",
        "uptime_seconds": 8000.5,
        "readonly": False,
        "disk_size": 16 * GIB,
        "block_size": 4096,
        "blocks": {"total": total, "cached": total // 4},
        "origin": {"address": "nbd://192.0.2.7:10809/", "state": "connected", "error": None, "connections": 1},
        "counters": {
            "requests": 1234567,
            "bytes_read": 10 * GIB,
            "bytes_written": 5 * MIB,
            "hits": 999,
            "misses": 1,
            "bytes_fetched": 4 * GIB,
        },
        "queue": {"requests": 1, "requests_limit": 0, "bytes": 4096, "bytes_limit": 64 * MIB, "memory_limit": GIB},
        "workers": [worker(4720), worker(4721, client="[2001:db8::1]:50122", hits=0, misses=0)],
        "checkpoint": {"dirty_pages": 5, "completed": 812, "seconds_since_last": 0.86},
        "cache_all": {"pid": 4790, "copied_bytes": 4 * GIB, "total_bytes": 16 * GIB, "rate": 128.0 * MIB},
    }
    answer.update(changes)
    return answer


def worker(pid: int, **changes: Any) -> Message:
    return {
        "pid": pid,
        "client": "192.0.2.33:50122",
        "connected_seconds": 125.0,
        "requests": 1234567,
        "bytes_read": 3 * GIB // 2,
        "bytes_written": 0,
        "hits": 987,
        "misses": 13,
        "bytes_fetched": 225 * MIB + 12345,
        "queued_requests": 0,
        "queued_bytes": 0,
        "cpu_percent": 12.4,
        "cpu_seconds": 3.2,
        "memory_bytes": 2 * MIB,
        **changes,
    }


# --query


def test_query_of_a_proxy(serve: Serve) -> None:
    assert bgctl("--query", serve({"query": Canned(proxy_answer())})) == (
        "disk.img: proxy, 16 GiB (17,179,869,184 bytes)\n"
        "  disk        a cache\n"
        "  server      xnbd-server 0.5.0, process 4711, up 2 h 13 min\n"
        "  origin      nbd://192.0.2.7:10809/\n"
        "              connected, 1 connection\n"
        "  cached      25.0 %, 1,048,576 of 4,194,304 blocks, 12 GiB missing\n"
        "  fetched     4 GiB from the origin\n"
        "  hits        999 (99.9 %), 1 miss\n"
        "  requests    1,234,567; 10 GiB read, 5 MiB written\n"
        "  waiting     1 request, no limit; 4 KiB of buffers, at most 64 MiB\n"
        "              at most 1 GiB for each client, by the memory that is free\n"
        "  checkpoint  5 pages not durable yet, 812 done, last one 0.8 s ago\n"
        "  cache-all   25.0 %, 4 GiB of 16 GiB, process 4790\n"
        "              128 MiB/s, 1 min 36 s left\n"
        "\n"
        "2 clients:\n"
        " PID       AGE REQS READ WRITE  HITS FETCH WAIT CPU MEM CLIENT\n"
        "4720 2 min 5 s 1.2M 1.5G     0 98.7%  225M    0 12%  2M 192.0.2.33:50122\n"
        "4721 2 min 5 s 1.2M 1.5G     0     -  225M    0 12%  2M [2001:db8::1]:50122\n"
    )


def test_query_of_a_target_shows_what_there_is(serve: Serve) -> None:
    answer = {"done": True, "mode": "target", "name": "disk.img", "disk_size": 1023, "readonly": True, "workers": []}
    assert bgctl("--query", serve({"query": Canned(answer)})) == (
        "disk.img: target, 1023 bytes, read-only\n\nNo clients.\n"
    )


def test_query_of_a_target_says_nothing_of_a_cache() -> None:
    answer = {name: value for name, value in proxy_answer(mode="target").items() if name in ("name", "mode", "workers")}
    lines = report({**answer, "counters": proxy_answer()["counters"]})
    assert lines == [
        "disk.img: target",
        "  requests    1,234,567; 10 GiB read, 5 MiB written",
        "",
        "2 clients:",
        " PID       AGE REQS READ WRITE CPU MEM CLIENT",
        "4720 2 min 5 s 1.2M 1.5G     0 12%  2M 192.0.2.33:50122",
        "4721 2 min 5 s 1.2M 1.5G     0 12%  2M [2001:db8::1]:50122",
    ]


def test_query_shows_who_a_client_has_proved_to_be() -> None:
    first, second = proxy_answer()["workers"]
    first["identity"] = "CN=alice\x1b[2J,O=Example"
    second.update(client="unix:pid=5,uid=0", identity="uid:0")
    lines = report({"workers": [first, second]})
    assert lines[-2].endswith(" 192.0.2.33:50122 as CN=alice\\x1b[2J,O=Example")
    assert lines[-1].endswith(" unix:pid=5,uid=0")


@pytest.mark.parametrize("left_out", [None, *(name for name in proxy_answer() if name != "done")])
def test_query_does_without_any_part(left_out: str) -> None:
    answer = {name: value for name, value in proxy_answer().items() if name != left_out}
    lines = report(answer)
    assert all(len(line) <= 80 for line in lines), lines
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    "name", ["origin", "counters", "queue", "checkpoint", "cache_all"], ids=lambda name: f"no-{name}"
)
def test_query_does_with_null(name: str) -> None:
    assert report(proxy_answer(**{name: {} if name == "counters" else None}))


def test_copy_whose_rate_is_not_known_yet_is_not_said_to_wait() -> None:
    copy = proxy_answer()["cache_all"]
    assert not any(line.strip() == "waiting" for line in report(proxy_answer(cache_all={**copy, "rate": None})))
    assert any(line.strip() == "waiting" for line in report(proxy_answer(cache_all={**copy, "rate": 0.0})))


def test_fully_cached_disk_is_100_per_cent(serve: Serve) -> None:
    out = bgctl("--query", serve({"query": Canned(proxy_answer(blocks={"total": 100, "cached": 100}))}))
    assert "  cached      100 %, 100 of 100 blocks\n" in out


def test_one_missing_block_is_not_100_per_cent(serve: Serve) -> None:
    blocks = {"total": 1 << 40, "cached": (1 << 40) - 1}
    out = bgctl("--query", serve({"query": Canned(proxy_answer(blocks=blocks))}))
    assert "  cached      99.9 %, 1,099,511,627,775 of 1,099,511,627,776 blocks, 4 KiB missing\n" in out


def test_origins_trouble_is_shown_without_terminal_codes(serve: Serve) -> None:
    origin = {"address": "nbd://x:1/", "state": "unreachable", "error": "\x1b[2Jno\nway \udcff", "connections": 0}
    out = bgctl("--query", serve({"query": Canned(proxy_answer(origin=origin))}))
    assert "              unreachable, 0 connections\n              \\x1b[2Jno\\nway \\udcff\n" in out


def test_query_as_json(serve: Serve) -> None:
    query = Canned(proxy_answer(name="ü\udcff"))
    answer = json.loads(bgctl("--query", "--json", serve({"query": query})))
    assert answer == {name: value for name, value in proxy_answer(name="ü\udcff").items() if name != "done"}
    assert query.requests == [{"command": "query"}]


def test_json_with_map_has_as_many_parts_on_any_terminal(serve: Serve) -> None:
    query = Canned(proxy_answer(map=[0.0, 1.0]))
    assert json.loads(bgctl("--query", "--json", "--map", serve({"query": query})))["map"] == [0.0, 1.0]
    assert query.requests == [{"command": "query", "map": 1024}]


def mapped(request: Message) -> Reply:
    cells = request["map"]
    assert isinstance(cells, int)
    yield proxy_answer(map=[1.0] * (cells // 2) + [0.0] * (cells - cells // 2))


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_map_fits_the_terminal(serve: Serve, columns: int) -> None:
    out = run(
        "env", f"COLUMNS={columns}", "PYTHONIOENCODING=utf-8", *command("--query", "--map", serve({"query": mapped}))
    )[1]
    rows = [line for line in out.splitlines() if line.endswith("|")]
    assert {len(row) for row in rows} == {columns}
    assert [row[:12] for row in rows] == [
        f"{label:>10} |" for label in ("0 bytes", *(f"{2 * n} GiB" for n in range(1, 8)))
    ]
    assert [set(row[12:-1]) for row in rows] == [{"█"}] * 4 + [{"·"}] * 4


def test_map_in_a_pipe_has_80_columns(serve: Serve) -> None:
    out = run("env", "-u", "COLUMNS", *command("--query", "--map", serve({"query": mapped})))[1]
    assert {len(line) for line in out.splitlines() if line.endswith("|")} == {80}


def test_map_in_ascii(serve: Serve) -> None:
    out = run("env", "PYTHONIOENCODING=ascii", *command("--query", "--map", serve({"query": mapped})))[1]
    assert out.isascii()
    assert f"   0 bytes |{'#' * 67}|\n" in out
    assert out.endswith("a character:  . nothing  -+* a part  # all\n")


def test_what_clients_have_written_is_told_and_drawn_if_there_is_any(serve: Serve) -> None:
    blocks = {"total": 4096, "cached": 1000, "written": 256}
    answer = proxy_answer(blocks=blocks, map=[1.0, 0.5], map_written=[0.5, 0.0], disk_size=16 << 20)
    lines = run("env", "PYTHONIOENCODING=ascii", *command("--query", "--map", serve({"query": Canned(answer)})))[1]
    assert "  written     256 blocks, 1 MiB that only exist here\n" in lines
    assert "|#+|" in lines.partition("Written by clients:")[0]
    assert "|+.|" in lines.partition("Written by clients:")[2]
    answer = proxy_answer(blocks={**blocks, "written": 0}, map=[1.0], map_written=[0.0])
    assert "ritten by" not in bgctl("--query", "--map", serve({"query": Canned(answer)}))


def test_map_of_a_server_without_cache(serve: Serve) -> None:
    out = bgctl("--query", "--map", serve({"query": Canned({"done": True, "mode": "target", "name": "x"})}))
    assert out == "x: target\n\nNo map: only a proxy has one.\n"


def test_only_nothing_looks_empty_and_only_everything_looks_full() -> None:
    (row, _legend) = draw([0, 1e-9, 0.33, 0.34, 0.66, 0.67, 1 - 1e-9, 1], 8 * GIB, 80, "utf-8")
    assert row == "   0 bytes |·░░▒▒▓▓█|"


def test_map_of_a_disk_with_fewer_blocks_than_cells() -> None:
    assert draw([1.0, 0.5], 8192, 80, "ascii") == [
        "   0 bytes |#+|",
        "            4 KiB a character:  . nothing  -+* a part  # all",
    ]
    assert cells_for(80) == 8 * 67


@pytest.mark.parametrize("text", ["head -1", "true"])
def test_reader_that_has_seen_enough_is_no_error(serve: Serve, text: str) -> None:
    path = serve({"query": Canned(proxy_answer(workers=[worker(pid) for pid in range(5000)]))})
    _, _, err = run("bash", "-o", "pipefail", "-c", f'"$@" | {text}', "bash", *command("--query", path))
    assert err == ""


def test_full_disk_is_told(serve: Serve) -> None:
    path = serve({"query": Canned(proxy_answer())})
    code, _, err = run("bash", "-c", '"$@" > /dev/full', "bash", *command("--query", path), check=False)
    assert (code, err) == (1, "xnbd-bgctl: cannot write the answer: No space left on device\n")


# --switch, --reconnect, --cache-all2


@pytest.mark.parametrize("option", ["--switch", "--shutdown"])
def test_switch(serve: Serve, option: str) -> None:
    switch = Canned({"done": True, "workers": 8, "longest_pause_ms": 12.34})
    path = serve({"switch": switch})
    assert bgctl(option, path) == (
        "the server is a plain target on its cache file now; 8 workers switched, longest pause 12.3 ms\n"
    )
    bgctl("--force", option, path)
    bgctl(path, option, "--force")
    assert [request["force"] for request in switch.requests] == [False, True, True]


def test_refusal_is_told(serve: Serve) -> None:
    path = serve({"switch": Canned({"done": True, "error": "3 of 8 blocks are missing\x1b[2J"})})
    assert fails("--switch", path) == (1, "3 of 8 blocks are missing\\x1b[2J")


def test_command_that_the_server_does_not_know(serve: Serve) -> None:
    path = serve({"query": Canned({"done": True}), "snapshot": Canned({"done": True})})
    assert fails("--switch", path) == (1, "there is no command 'switch' here, only: query, snapshot")


def test_cache_all2(serve: Serve) -> None:
    cache_all = Canned({"done": True, "pid": 4790})
    assert (
        bgctl("--cache-all2", serve({"cache-all": cache_all})) == "process 4790 copies; --query shows how far it is\n"
    )
    assert cache_all.requests == [{"command": "cache-all", "wait": False}]


def test_options_of_cache_all2_reach_the_server(serve: Serve) -> None:
    cache_all = Canned({"done": True, "pid": 4790})
    bgctl("--limit-rate", "4M", "--blocks-per-request", "8", "--cache-all2", serve({"cache-all": cache_all}))
    assert cache_all.requests == [
        {"command": "cache-all", "wait": False, "blocks_per_request": 8, "limit_rate": 4 * MIB}
    ]


@pytest.mark.parametrize(
    "words, request_",
    [
        (["--reconnect", "SOCKET", "host", "10809"], {"host": "host", "port": "10809"}),
        (
            ["--exportname", "x", "--reconnect", "SOCKET", "::1", "1"],
            {"host": "::1", "port": "1", "exportname": "x"},
        ),
        (["--reconnect", "SOCKET", "nbd://host/a%20b"], {"uri": "nbd://host:10809/a%20b"}),
        (
            ["--reconnect", "SOCKET", "nbd://host", "--exportname", "x"],
            {"uri": "nbd://host:10809/x", "exportname": "x"},
        ),
        (["--reconnect", "SOCKET", "nbd+unix:///x?socket=s"], {"uri": f"nbd+unix:///x?socket={Path.cwd()}/s"}),
    ],
)
def test_reconnect(serve: Serve, words: List[str], request_: Message) -> None:
    reconnect = Canned({"done": True, "address": "nbd://host:10809/"})
    path = serve({"reconnect": reconnect})
    out = bgctl(*(path if word == "SOCKET" else word for word in words))
    assert out == "the origin is nbd://host:10809/ now\n"
    assert reconnect.requests == [{"command": "reconnect", **request_}]


# --cache-all


def progress(cached: int, total: int = 4 * GIB) -> Message:
    return {
        "progress": {
            "cached_bytes": cached,
            "total_bytes": total,
            "fetched_bytes": cached,
            "holes_bytes": 0,
            "rate": 1.0 * MIB,
        }
    }


CACHED = {"done": True, "cached_bytes": 4 * GIB, "total_bytes": 4 * GIB, "fetched_bytes": GIB}


def test_cache_all(serve: Serve) -> None:
    cache_all = Canned(progress(3 * GIB), progress(4 * GIB), CACHED)
    assert bgctl("--cache-all", serve({"cache-all": cache_all})) == "100 % cached, 4 GiB of 4 GiB; 1 GiB fetched\n"
    assert cache_all.requests == [{"command": "cache-all", "wait": True}]


def test_options_of_cache_all(serve: Serve) -> None:
    cache_all = Canned(CACHED)
    path = serve({"cache-all": cache_all})
    bgctl("--blocks-per-request", "16", "--limit-rate", "200M", "--cache-all", path)
    bgctl(path, "--cache-all", "--limit-rate=512K")
    assert cache_all.requests == [
        {"command": "cache-all", "wait": True, "blocks_per_request": 16, "limit_rate": 200 * MIB},
        {"command": "cache-all", "wait": True, "limit_rate": 512 * 1024},
    ]


def test_failed_copy_is_told(serve: Serve) -> None:
    path = serve({"cache-all": Canned(progress(GIB), {"done": True, "error": "no space left"})})
    assert fails("--cache-all", path) == (1, "no space left")


class Endless:
    """A copy that stands still until its client goes."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.started = False
        self.closed = False

    def __call__(self, _request: Message) -> Reply:
        try:
            yield self.message
            yield self.message
            self.started = True
            while True:
                yield None
        finally:
            self.closed = True


@pytest.mark.parametrize("options", [[], ["--progress"]])
def test_interrupt_stops_the_copy_and_tells_how_far_it_was(serve: Serve, options: List[str]) -> None:
    copy = Endless(progress(GIB))
    path = serve({"cache-all": copy})
    code, out, err = interrupted(copy, "--cache-all", *options, path)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == ("xnbd-bgctl: stopped at 25.0 %, 1 GiB of 4 GiB; run again, it goes on from there")
    assert len(err.splitlines()) == (2 if options else 1)


def test_interrupted_snapshot(serve: Serve) -> None:
    copy = Endless({"progress": {"copied_bytes": 0, "total_bytes": 1}})
    code, _, err = interrupted(copy, "--snapshot", serve({"snapshot": copy}))
    assert (code, err) == (130, "xnbd-bgctl: interrupted; the snapshot is given up\n")


def test_interrupted_switch(serve: Serve) -> None:
    copy = Endless({"waiting": 1})
    code, _, err = interrupted(copy, "--switch", serve({"switch": copy}))
    assert (code, err) == (130, "xnbd-bgctl: interrupted; --query tells whether the server has switched\n")


def interrupted(copy: Endless, *arguments: object) -> Tuple[int, str, str]:
    """Exit status and output of a program that gets SIGINT while *copy* runs."""
    process = subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: copy.started, "the copy's start")
    wait_until(lambda: is_asleep(process.pid), "the program to have read what the copy said")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    wait_until(lambda: copy.closed, "the copy's end")
    return process.returncode, out, err


def is_asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_killed_program_stops_the_copy(serve: Serve) -> None:
    copy = Endless(progress(GIB))
    process = subprocess.Popen(command("--cache-all", serve({"cache-all": copy})))
    wait_until(lambda: copy.started, "the copy's start")
    process.kill()
    process.wait()
    wait_until(lambda: copy.closed, "the copy's end")


def test_progress_in_a_log_is_lines(serve: Serve) -> None:
    path = serve({"cache-all": Canned(progress(GIB), progress(2 * GIB), CACHED)})
    _, out, err = run(*command("--progress", "--cache-all", path))
    assert err == "25.0 %: 1 GiB of 4 GiB\n"
    assert out == "100 % cached, 4 GiB of 4 GiB; 1 GiB fetched\n"


class Copy:
    """A copy that goes on two tenths of a second after the terminal has shown how far it is: ``shown``."""

    def __init__(self, *cached: int) -> None:
        self.shown = b""
        self._cached = cached

    def __call__(self, _request: Message) -> Reply:
        for cached in self._cached:
            frames = self._frames()
            yield progress(cached)
            while self._frames() == frames:
                yield None
            yield None
            yield None
        yield CACHED

    def _frames(self) -> int:
        return self.shown.count(b" of 4 GiB")


def growing() -> Copy:
    return Copy(*((8 + step) * GIB // 4 for step in range(8)))


def on_terminal(copy: Copy, *arguments: object, columns: int = 80, encoding: str = "utf-8") -> Tuple[str, str]:
    """Output of a program that waits for *copy*, and what comes to a terminal that is standard error."""
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=slave, env=environment)
    os.close(slave)
    try:
        while part := os.read(terminal, 4096):
            copy.shown += part
    except OSError:
        pass  # the last one has closed it
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0, copy.shown
    return out.decode(), copy.shown.decode()


def test_progress_on_a_terminal_is_a_bar(serve: Serve) -> None:
    copy = growing()
    out, shown = on_terminal(copy, "--progress", "--cache-all", serve({"cache-all": copy}))
    assert out == "100 % cached, 4 GiB of 4 GiB; 1 GiB fetched\n"
    frames = [frame for frame in re.split("[\r\n]+", shown) if frame.strip()]
    assert re.fullmatch(r" 50\.0 % \|█+.? +\| 2 GiB of 4 GiB", frames[0])
    assert any(re.fullmatch(r" ..\.. % \|█+.? +\| 3.* of 4 GiB, .*iB/s, .* s left", frame.rstrip()) for frame in frames)
    assert re.fullmatch(r" 100 % \|█+\| 4 GiB of 4 GiB", frames[-1].rstrip()[1:]), frames[-1]
    assert all(len(frame) <= 80 for frame in frames)
    assert shown.endswith("\r\n")


def test_rate_counts_from_where_the_copy_began(serve: Serve) -> None:
    """Half of the disk was there already: to count that would be a rate of GiB a second."""
    copy = Copy(*(2 * GIB + step * MIB for step in range(8)))
    _, shown = on_terminal(copy, "--progress", "--cache-all", serve({"cache-all": copy}))
    rates = [float(number) for number in re.findall(r"([\d.]+) MiB/s", shown)]
    assert rates
    assert max(rates) < 20
    assert "GiB/s" not in shown


def test_bar_follows_narrow_and_plain_terminals(serve: Serve) -> None:
    copy = growing()
    path = serve({"cache-all": copy})
    _, shown = on_terminal(copy, "--progress", "--cache-all", path, columns=60, encoding="ascii")
    assert all(len(frame) <= 60 for frame in re.split("[\r\n]+", shown))
    assert shown.isascii()
    assert "#" in shown


def test_rate_falls_to_nothing_when_the_copy_stands_still() -> None:
    pace = Pace()
    assert pace.rate() is None
    for tick in range(100):
        pace.add(tick * 0.2, min(tick, 20) * MIB)
        if tick == 20:
            assert pace.rate() == pytest.approx(5 * MIB)
    assert pace.rate() == 0
    assert status(GIB, 4 * GIB, pace.rate()) == "1 GiB of 4 GiB, waiting"


# --snapshot


def test_snapshot_prints_the_exact_path(serve: Serve) -> None:
    name = "/srv/d\xefsk\udcff.img.snapshot.1795352495"
    path = serve({"snapshot": Canned({"done": True, "path": name, "seconds": 1.25, "held_ms": 3.21})})
    done = subprocess.run(command("--snapshot", path), capture_output=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (os.fsencode(name) + b"\n", b"")


def test_snapshot_with_progress(serve: Serve) -> None:
    lines = [{"progress": {"copied_bytes": GIB, "total_bytes": 4 * GIB}}]
    last = {"done": True, "path": "/srv/x", "seconds": 12.5, "held_ms": 3.21}
    _, out, err = run(*command("--snapshot", "--progress", serve({"snapshot": Canned(*lines, last)})))
    assert out == "/srv/x\n"
    assert err == "25.0 %: 1 GiB of 4 GiB\nthe snapshot took 12 s, clients were held for 3.2 ms\n"


# Servers that cannot be reached


def test_no_such_socket(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "none" / "none"):
        assert fails("--query", path) == (
            1,
            f"there is no control socket {path}: start the server, or give the path that it was started with",
        )


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead"))
    code, reason = fails("--query", tmp_path / "dead")
    assert (code, reason) == (1, f"nobody listens on {tmp_path}/dead: the server has ended, start it again")


@pytest.mark.parametrize("kind", ["file", "directory", "datagram socket"])
def test_no_control_socket(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        if kind == "file":
            path.write_text("")
        elif kind == "directory":
            path.mkdir()
        else:
            datagrams.bind(str(path))
        code, reason = fails("--query", path)
    assert code == 1
    assert reason == f"{path} is not a control socket: give the path that the server was started with"


def test_socket_of_nbd_clients_is_no_control_socket(start: Start, image: Path) -> None:
    server = start("--target", image)
    code, reason = fails("--query", server.socket)
    assert (code, reason) == (1, f"{server.socket} is not a control socket: another program answers there")


def test_path_that_is_too_long(tmp_path: Path) -> None:
    code, reason = fails("--query", tmp_path / ("x" * 200))
    assert (code, "cannot connect to" in reason) == (1, True)


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "control"
    control = ControlSocket(str(path), {})
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            else:
                path.chmod(0)
            ControlClient(str(path))
        except ConfigurationError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 1000).decode() == f"no permission to use {path}: run this as the server's user or as root"
    os.close(reader)
    control.close()


def answering(path: Path, answer: bytes) -> threading.Thread:
    """A program that takes one connection at *path*, says *answer* and closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def answer_one() -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(answer)
        connection.close()
        listener.close()

    thread = threading.Thread(target=answer_one)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "answer, reason",
    [
        (b"", "closed the connection without an answer"),
        (b'{"mode": "pro', "closed the connection without an answer"),
        (b'{"mode": "proxy"}\n', "closed the connection without an answer"),
        (b"{nonsense}\n", "is not a control socket"),
        (b"SSH-2.0\r\n", "is not a control socket"),
        (b"\n", "is not a control socket"),
        (b'{"done": true, "queue": {"x": 1}}\n', "the server's answer makes no sense (KeyError('requests'))"),
        (b'{"done": true, "workers": 7}\n', "the server's answer makes no sense"),
    ],
)
def test_odd_answers(tmp_path: Path, answer: bytes, reason: str) -> None:
    thread = answering(tmp_path / "odd", answer)
    code, text = fails("--query", tmp_path / "odd")
    thread.join()
    assert (code, reason in text) == (1, True), text


def test_silent_server(tmp_path: Path) -> None:
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with ControlClient(str(path), timeout=1) as server, pytest.raises(ConfigurationError, match="does not answer"):
            server.ask(command="query")
        with pytest.raises(ConfigurationError, match="does not answer"):
            [ControlClient(str(path), timeout=1) for _ in range(3)]


COMMANDS = [["--query"], ["--switch"], ["--cache-all"], ["--cache-all2"], ["--snapshot"], ["--reconnect"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_waits_for_ever_for_a_server_that_is_stopped(tmp_path: Path, command: List[str]) -> None:
    path = tmp_path / "stopped"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(5)
        where = ["nbd://192.0.2.1"] if command == ["--reconnect"] else []
        code, reason = fails("--timeout", "0.2", *command, path, *where)
        assert (code, reason) == (1, f"the server at {path} does not answer: see whether it hangs or is stopped")


def test_a_command_that_takes_long_shows_signs_of_life(serve: Serve) -> None:
    def take_long(_request: Message) -> Reply:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            yield None
        yield {"done": True}

    assert "plain target" in bgctl("--timeout", "2.5", "--switch", serve({"switch": take_long}))


@pytest.mark.parametrize("time", ["0", "-1", "soon", "nan"])
def test_senseless_time_limit(tmp_path: Path, time: str) -> None:
    assert fails(f"--timeout={time}", "--query", tmp_path / "none")[0] == 2


# The command line


def test_help_names_every_option() -> None:
    text = bgctl("--help")
    for option in ("--query", "--switch", "--cache-all", "--cache-all2", "--reconnect", "--snapshot", "--limit-rate"):
        assert option in text


def test_version() -> None:
    assert bgctl("--version").startswith("xnbd-bgctl ")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--query"],
        ["-q"],
        ["--query", ""],
        ["--query", "--switch", "x"],
        ["-qs", "x"],
        ["-x", "x"],
        ["x", "host"],
        ["--nothing", "x"],
        ["--reconnect", "x"],
        ["--reconnect", "x", "host"],
        ["--reconnect", "x", "host", "port"],
        ["--reconnect", "x", "http://host"],
        ["--reconnect", "x", "nbd://host", "10809"],
        ["--cache-all", "--limit-rate", "fast", "x"],
        ["--cache-all", "--limit-rate", "0", "x"],
        ["--cache-all", "--blocks-per-request", "0", "x"],
        ["--cache-all", "--blocks-per-request", "many", "x"],
    ],
    ids=" ".join,
)
def test_senseless_command_line(words: List[str]) -> None:
    code, reason = fails(*words)
    assert code == 2
    assert reason


# What the C xNBD's xnbd-bgctl takes


@pytest.mark.parametrize("words", [[], ["-q"], ["--exportname", "disk one", "--query"]], ids=" ".join)
def test_query_is_what_is_done_without_a_command(serve: Serve, words: List[str]) -> None:
    """A C xNBD's wrapper asks for everything with the export's name before it."""
    _, out, _ = run(*command(*words, serve({"query": Canned(proxy_answer())})))
    assert out.startswith("disk.img: proxy, 16 GiB")


@pytest.mark.parametrize(
    ("letter", "arguments", "name", "answer"),
    [
        ("-s", [], "switch", {"done": True}),
        ("-C", [], "cache-all", {"done": True, "pid": 5}),
        ("-c", [], "cache-all", {"done": True, "cached_bytes": 1, "total_bytes": 1, "fetched_bytes": 0}),
        ("-r", ["192.0.2.1", "8520"], "reconnect", {"done": True, "address": "nbd://192.0.2.1:8520"}),
    ],
)
def test_letters_stand_for_commands(
    serve: Serve, letter: str, arguments: List[str], name: str, answer: Message
) -> None:
    canned = Canned(answer)
    bgctl(letter, serve({name: canned}), *arguments)
    assert [request["command"] for request in canned.requests] == [name]


@pytest.mark.parametrize(
    ("words", "name", "ignored"),
    [
        (["--exportname", "x", "--switch"], "switch", "--exportname is ignored: --switch has no use for it"),
        (["--exportname", "x", "--cache-all2"], "cache-all", "--exportname is ignored: --cache-all2 has no use for it"),
        (["--cache-all2", "--progress"], "cache-all", "--progress is ignored: --cache-all2 has no use for it"),
        (["--force", "--query"], "query", "--force is ignored: --query has no use for it"),
        (["--json", "--switch"], "switch", "--json is ignored: --switch has no use for it"),
        (["--blocks-per-request", "9"], "query", "--blocks-per-request is ignored: --query has no use for it"),
    ],
)
def test_options_that_do_not_matter_are_ignored_with_a_warning(
    serve: Serve, words: List[str], name: str, ignored: str
) -> None:
    canned = Canned({"done": True, "pid": 5})
    _, _, err = run(*command(*words, serve({name: canned})))
    assert err == f"xnbd-bgctl: {ignored}\n"
    assert not canned.requests[0].keys() & {"force", "exportname"} or canned.requests[0] == {
        "command": "switch",
        "force": False,
    }


@pytest.mark.parametrize("count", ["8193", "1000000000000"])
def test_more_blocks_per_request_than_the_server_takes_are_cut(serve: Serve, count: str) -> None:
    canned = Canned({"done": True, "pid": 5})
    _, _, err = run(*command("-C", "--blocks-per-request", count, serve({"cache-all": canned})))
    assert err == (
        f"xnbd-bgctl: --blocks-per-request {count} is cut to 8192, the most that a server asks for at once\n"
    )
    assert canned.requests[0]["blocks_per_request"] == 8192


@pytest.mark.parametrize("words", [["--reconnect", "x"], ["-r", "x"]], ids=" ".join)
def test_a_senseless_command_line_is_told_the_form_that_was_meant(words: List[str]) -> None:
    assert "expected xnbd-bgctl [options] [--origin URI]... --reconnect CONTROL_SOCKET" in fails(*words)[1]


def test_tqdm_and_psutil_are_imported_only_where_used(serve: Serve) -> None:
    path = serve({"query": Canned(proxy_answer())})
    _, _, err = run(PYTHON, "-X", "importtime", *command("--query", "--map", path)[1:])
    assert not re.search(r"\b(tqdm|psutil|asyncio|logging)\b", err)


# Quantities


@pytest.mark.parametrize(
    "count, text, short",
    [
        (0, "0 bytes", "0"),
        (1, "1 byte", "1"),
        (1023, "1023 bytes", "1023"),
        (1024, "1 KiB", "1K"),
        (1025, "1.0 KiB", "1.0K"),
        (GIB - 1, "1023.9 MiB", "1023M"),
        (64 * GIB, "64 GiB", "64G"),
        (1 << 60, "1 EiB", "1E"),
        (3 << 62, "12 EiB", "12E"),
    ],
)
def test_sizes_are_rounded_down(count: int, text: str, short: str) -> None:
    assert (quantities.size(count), quantities.short_size(count)) == (text, short)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (-1, "0.0 s"),
        (0.99, "0.9 s"),
        (9.99, "9.9 s"),
        (10, "10 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3659, "1 h"),
        (7999, "2 h 13 min"),
        (86400 * 400 + 7200, "400 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert quantities.duration(seconds) == text


@pytest.mark.parametrize(
    "part, whole, text",
    [
        (0, 10, "0.0 %"),
        (1, 10**6, "< 0.1 %"),
        (1, 3, "33.3 %"),
        (10**9 - 1, 10**9, "99.9 %"),
        (5, 5, "100 %"),
        (0, 0, "100 %"),
    ],
)
def test_percentages(part: int, whole: int, text: str) -> None:
    assert quantities.percentage(part, whole) == text


@given(st.integers(0, 1 << 80))
def test_short_numbers_are_short(count: int) -> None:
    assert len(quantities.short_count(count)) <= 5 or count > 10**20
    assert len(quantities.short_size(count)) <= 5 or count > 1 << 64
