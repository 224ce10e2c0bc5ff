"""xnbd-bgctl --top, the real program: on a real terminal (tmux), and where there is none, with real servers."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import resource
import select
import shlex
import signal
import struct
import subprocess
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from conftest import Start
from control_loop import ControlLoop, Message
from proxies import Proxy, make_disk
from rawclient import RawClient
from screen import Screen
from server_process import PATIENCE, PYTHON, ROOT, Server, run, wait_until
from snapshots import steward_of
from upgrades import upgrade

from xnbd.control.server import Reply

INTERVAL = "0.2"


def command(*arguments: object) -> List[str]:
    program = [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl")]
    return [*program, "--top", "--interval", INTERVAL, *map(str, arguments)]


def line(*arguments: object) -> str:
    """For a shell."""
    return shlex.join(command(*arguments))


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    made = Screen(tmp_path)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def reading(server: Server, length: int = 4096) -> Iterator[None]:
    """A client that reads all the time."""
    ended = threading.Event()

    def read() -> None:
        with RawClient(server.connect()) as client:
            client.negotiate()
            while not ended.wait(0.001):
                client.read(0, length)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join()


def controlled(start: Start, directory: Path, image: Path, *options: object, name: str = "disk") -> Server:
    """A target with the control socket *name*.ctl."""
    server = start("--target", "--readonly", "--control", directory / f"{name}.ctl", *options, image)
    server.wait_for_log("INFO: serving ")
    return server


# On a terminal


def test_several_servers_in_80_columns(start: Start, tmp_path: Path, image: Path, screen: Screen) -> None:
    counted = controlled(start, tmp_path, image, "--metrics", 0, name="counted")
    controlled(start, tmp_path, image, name="plain")
    proxy = Proxy(start, tmp_path, start("--target", "--readonly", make_disk(tmp_path)).uri, "--metrics", 0)
    with reading(counted), reading(proxy.server):
        screen.type(line("counted.ctl", "plain.ctl", "none.ctl", proxy.control.name))
        screen.wait_for(r"^counted\.ctl +[1-9]\S* +0 +[1-9]\d* +\d+us +\S+ +- ")
        screen.wait_for(r"^cache\d+\.ctl +[1-9]\S* +0 +[1-9]\d* +\d+us +\S+ +100% ")
        screen.wait_for(r"^plain\.ctl +0 +0 +0 +- +- +- ")
        screen.wait_for(r"^none\.ctl +away .*: there is no control socket none\.ctl: ")
        screen.wait_for(r"^4 servers \(1 away\), read [1-9].*, 2 clients$")
        screen.wait_for(r"^counted\.ctl, unix:\S+ +[1-9]\S* .* - +0")
        screen.wait_for(r"^no P50 and P99, for want of --metrics: plain\.ctl$")
    screen.press("q")
    screen.wait_for(rf"^{re.escape('ready:')}$")


def test_one_server_with_its_clients_and_its_map(start: Start, tmp_path: Path, image: Path, screen: Screen) -> None:
    proxy = Proxy(start, tmp_path, start("--target", "--readonly", make_disk(tmp_path)).uri, "--metrics", 0)
    controlled(start, tmp_path, image)
    with reading(proxy.server):
        screen.type(line("disk.ctl", proxy.control.name))
        screen.wait_for(r"by SERVER")
        screen.press("Up", "Enter")  # cache... comes before disk
        screen.wait_for(r"^cache\d+\.ctl: cache\.img: proxy, 4\.0 MiB ")
        screen.wait_for(r"^  now +read [1-9].*/s, write 0/s, [1-9]\d* requests/s, fetch 0/s$")
        screen.wait_for(r"^  p50/p99 +read \d+us/\S+$")
        screen.wait_for(r"^ +0 bytes \|[░▒▓█]·+")
        screen.wait_for(r"^unix:\S+ +[1-9]\S* +[1-9]\S* +0 +[1-9]\d* +100% +0 +\S+$")
        screen.press("Down")
        screen.wait_for(r"^disk\.ctl: disk\.img: target, ")
        screen.wait_for(r"^  p50/p99 +nobody counts that: it needs --metrics$")
        screen.press("Escape")
        screen.wait_for(r"^SERVER, CLIENT ")


def test_clients_that_limits_hold_are_told(start: Start, tmp_path: Path, image: Path, screen: Screen) -> None:
    server = controlled(start, tmp_path, image, "--metrics", 0, "--limit-rate", "64K")
    with reading(server):
        screen.type(line("disk.ctl"))
        screen.wait_for(r"^disk\.ctl: limits hold 1 client now \(--limit\)$")
        screen.press("Enter")
        screen.wait_for(r"^  held +limits hold 1 client now \(--limit\)$")


def test_it_follows_the_size_of_the_terminal(start: Start, tmp_path: Path, screen: Screen) -> None:
    proxy = Proxy(start, tmp_path, start("--target", "--readonly", make_disk(tmp_path)).uri)
    with proxy.raw() as client:
        client.read(0, 4096)
    screen.type(line(proxy.control.name))
    screen.wait_for(r"^cache\d+\.ctl +0 ")
    assert " MAP" not in screen.text()
    screen.resize(120, 40)
    screen.wait_for(r" MAP$")
    screen.wait_for(r"^cache\d+\.ctl .*\|[░▒▓█]·+\|$")
    assert "q quit" in screen.text().splitlines()[39]
    screen.resize(30, 6)
    screen.wait_for(r"\A1 server, read 0/s, write 0/s~\n(.*\n){4}Up/Down select  Enter look at~\n\Z")
    screen.resize(80, 24)
    screen.wait_for(r"^Up/Down select  Enter look at it  < > by SERVER  r reverse  q quit$")


def test_servers_that_go_away_and_come_back(start: Start, tmp_path: Path, image: Path, screen: Screen) -> None:
    server = controlled(start, tmp_path, image)
    screen.type(line("disk.ctl"))
    screen.wait_for(r"^disk\.ctl +0 ")
    steward = steward_of(server)
    assert steward is not None
    os.kill(steward, signal.SIGSTOP)
    screen.wait_for(r"^disk\.ctl +silent \d")
    os.kill(steward, signal.SIGCONT)
    screen.wait_for(r"^disk\.ctl +0 ")
    server.stop()
    screen.wait_for(r"^disk\.ctl +away .*: there is no control socket disk\.ctl: start the server")
    controlled(start, tmp_path, image)
    screen.wait_for(r"^disk\.ctl +0 ")
    screen.wait_for(r"^disk\.ctl: is back, it was away for \d")


ENDINGS = {
    "q": ("q", 0),
    "Ctrl-C": ("C-c", 130),
    "Ctrl-backslash": ("C-\\", 128 + signal.SIGQUIT),
    "SIGTERM": (signal.SIGTERM, 128 + signal.SIGTERM),
    "SIGHUP": (signal.SIGHUP, 128 + signal.SIGHUP),
}


@pytest.fixture
def idle(start: Start, tmp_path: Path, image: Path) -> Server:
    return controlled(start, tmp_path, image)


def end(screen: Screen, how: object) -> None:
    if isinstance(how, str):
        screen.press(how)
    else:
        os.kill(screen.program(), int(how))  # type: ignore[call-overload]


def test_the_terminal_is_as_it_was_at_every_end(idle: Server, tmp_path: Path, screen: Screen) -> None:
    screen.type("stty ixon -ixany; stty -g > before; echo what was there")
    for name, (how, status) in ENDINGS.items():
        screen.type(f"{line('disk.ctl')}; echo {shlex.quote(name)} has status $?, && stty -g > after")
        screen.wait_for(r"^disk\.ctl +0 ")
        assert not screen.is_as_before()
        end(screen, how)
        screen.wait_for(rf"^{re.escape(name)} has status {status},$")
        assert screen.is_as_before()
        wait_until(lambda: (tmp_path / "after").exists(), "what the terminal is like")
        wait_until(lambda: (tmp_path / "after").read_text() == (tmp_path / "before").read_text(), "the same")
        (tmp_path / "after").unlink()
    assert "what was there" in screen.text()
    assert "Traceback" not in screen.text()


def test_an_error_leaves_the_terminal_as_it_was(idle: Server, tmp_path: Path, screen: Screen) -> None:
    screen.type("stty -g > before")
    screen.type(f"{line('disk.ctl')}; echo status $?,; stty -g > after")
    screen.wait_for(r"^disk\.ctl +0 ")
    resource.prlimit(screen.program(), resource.RLIMIT_NOFILE, (4, 4))
    screen.wait_for(r"^xnbd-bgctl: cannot go on: Too many open files \(ulimit -n is too low\)\n+status 1,$")
    assert screen.is_as_before()
    wait_until(lambda: (tmp_path / "after").exists(), "what the terminal is like")
    wait_until(lambda: (tmp_path / "after").read_text() == (tmp_path / "before").read_text(), "the same")


def test_ctrl_z_gives_the_terminal_back_for_a_while(idle: Server, screen: Screen) -> None:
    screen.type(line("disk.ctl"))
    screen.wait_for(r"^disk\.ctl +0 ")
    screen.press("C-z")
    screen.wait_for(r"Stopped")
    assert screen.is_as_before()
    screen.type("fg")
    screen.wait_for(r"^disk\.ctl +0 ")
    assert not screen.is_as_before()
    screen.press("Down", "Enter")
    screen.wait_for(r"^disk\.ctl: disk\.img: target")


def test_it_waits_for_the_terminal_in_the_background(idle: Server, screen: Screen) -> None:
    screen.type(line("disk.ctl"))
    screen.wait_for(r"^disk\.ctl +0 ")
    screen.press("C-z")
    screen.wait_for(r"Stopped")
    screen.type("clear; bg")
    screen.wait_for(r"disk\.ctl &$")
    program = screen.program()
    wait_until(lambda: state_of(program) == "T", "that it stops again")
    assert screen.is_as_before()
    screen.type("fg")
    screen.wait_for(r"^disk\.ctl +0 ")
    screen.press("q")
    wait_until(screen.is_as_before, "the end")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


# On a terminal that only this test reads


class Canned:
    """A control socket whose server tells what *answer* has."""

    def __init__(self, directory: Path, answer: Message) -> None:
        self._answer = answer
        self.loop = ControlLoop(directory / "canned.ctl", {"query": self._query})

    def _query(self, _request: Message) -> Reply:
        yield {"done": True, **self._answer}


@contextmanager
def on_pty(*arguments: object, **environment: str) -> Iterator[Tuple[subprocess.Popen[bytes], int]]:
    """The program on a terminal that is its own, and the other end of that."""
    other, slave = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment},
    )
    os.close(slave)
    try:
        yield process, other
    finally:
        with suppress(OSError):
            os.close(other)
        process.terminate()
        process.wait(PATIENCE)


def read_until(fd: int, pattern: bytes) -> bytes:
    """All that comes until there is *pattern*."""
    shown, deadline = b"", time.monotonic() + PATIENCE
    while not re.search(pattern, shown):
        assert time.monotonic() < deadline, shown
        if select.select([fd], [], [], 0.1)[0]:
            shown += os.read(fd, 65536)
    return shown


HOSTILE = "\x1b]0;owned\x07\x1b[31m\r\n\x9b2J\u202e\udcff"
FIGURES = {"bytes_read": 0, "bytes_written": 0, "requests": 0, "hits": 0, "misses": 0, "bytes_fetched": 0}


def test_names_from_elsewhere_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    worker = {**FIGURES, "pid": 1, "client": HOSTILE, "identity": HOSTILE, "connected_seconds": 1, "queued_requests": 0}
    origin = {"address": HOSTILE, "state": "unreachable", "error": HOSTILE, "connections": 0}
    told = {
        "mode": HOSTILE, "name": HOSTILE, "description": HOSTILE, "version": HOSTILE, "disk_size": 4096,
        "counters": FIGURES, "workers": [worker], "origin": origin, "warnings": [HOSTILE], "durations": None,
        "blocks": {"total": 1, "cached": 0}, "queue": {"requests": 0, "bytes": 0},
    }  # fmt: skip
    canned = Canned(tmp_path, told)
    try:
        with on_pty(canned.loop.path) as (_, terminal):
            shown = read_until(terminal, rb"\\x1b\]0;owned")
            os.write(terminal, b"\r")
            shown += read_until(terminal, b"nobody counts that")
            shown += read_until(terminal, b"another server")
    finally:
        canned.loop.stop()
    ours = re.sub(rb"\x1b\[(\?1049h|\?25l|2J|\d+;1H|K|[0127]?m)", b"", shown)
    assert set(re.findall(rb"[\x00-\x1f\x7f]", ours)) == set()
    assert "\x9b".encode() not in shown
    assert "\u202e".encode() not in shown


def test_a_terminal_of_few_letters_is_shown_what_it_can(start: Start, tmp_path: Path, image: Path) -> None:
    proxy = Proxy(start, tmp_path, start("--target", "--readonly", make_disk(tmp_path)).uri)
    named = tmp_path / "d\xefsk.ctl"
    named.symlink_to(proxy.control)
    with on_pty(named, PYTHONIOENCODING="ascii") as (_, terminal):
        read_until(terminal, rb"d\\xefsk\.ctl +0 ")
        os.write(terminal, b"\r")
        read_until(terminal, rb"0 bytes \|\.+\|")


def test_a_server_whose_answer_makes_no_sense_harms_no_other(tmp_path: Path, idle: Server) -> None:
    canned = Canned(tmp_path, {"counters": FIGURES, "workers": [{}], "disk_size": 1, "origin": {}})
    try:
        with on_pty(canned.loop.path, tmp_path / "disk.ctl") as (_, terminal):
            read_until(terminal, b"makes no sense")
            read_until(terminal, rb"disk\.ctl +0 ")
    finally:
        canned.loop.stop()


def test_a_terminal_that_hangs_up_ends_it(idle: Server, tmp_path: Path) -> None:
    with on_pty(tmp_path / "disk.ctl") as (process, terminal):
        read_until(terminal, rb"disk\.ctl +0 ")
        os.close(terminal)
        assert process.wait(PATIENCE) == 0


def test_a_signal_ends_it_while_the_terminal_takes_nothing(idle: Server, tmp_path: Path) -> None:
    with on_pty(tmp_path / "disk.ctl") as (process, terminal):
        read_until(terminal, rb"disk\.ctl +0 ")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 2000, 80, 0, 0))
        process.send_signal(signal.SIGWINCH)
        held = [-1]

        def is_full() -> bool:
            """Nothing more comes, for longer than a frame takes to follow the one before."""
            held.append(struct.unpack("i", fcntl.ioctl(terminal, termios.FIONREAD, bytes(4)))[0])
            return len(held) > 50 and held[-50] == held[-1] > 0

        wait_until(is_full, "a terminal that is full")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == -signal.SIGTERM
        usual = termios.ICANON | termios.ECHO
        assert termios.tcgetattr(terminal)[3] & usual == usual


# Where there is no terminal


def lines_of(process: subprocess.Popen[str], count: int) -> List[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def lines_until(process: subprocess.Popen[str], *patterns: str) -> List[str]:
    """All lines, until each of *patterns* is in one of them."""
    lines: List[str] = []
    deadline = time.monotonic() + PATIENCE
    while not all(any(re.search(pattern, text) for text in lines) for pattern in patterns):
        assert time.monotonic() < deadline, "".join(lines)
        lines += lines_of(process, 1)
    return lines


@contextmanager
def piped(directory: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(*arguments), cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def test_without_a_terminal_there_is_a_line_for_each_server_and_interval(
    start: Start, tmp_path: Path, image: Path
) -> None:
    counted = controlled(start, tmp_path, image, "--metrics", 0, name="counted")
    controlled(start, tmp_path, image, name="plain")
    with reading(counted), piped(tmp_path, "counted.ctl", "plain.ctl", "none.ctl") as process:
        lines = lines_until(
            process,
            r"counted\.ctl  READ/s [1-9]\S* .*REQS/s [1-9]\d* +P50 \S+us .*CLIENTS 1 +busiest \S",
            r"plain\.ctl    READ/s 0 .* P50 - .* CLIENTS 0$",
            r"none\.ctl     away .*: there is no control socket none\.ctl",
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == "plain.ctl tells no P50 and P99: it runs without --metrics\n"
    for number, text in enumerate(lines):
        name = ("counted", "plain", "none")[number % 3]
        assert re.match(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d {name}\.ctl +\S", text)


def test_servers_that_do_not_answer_and_other_programs_are_told_apart(idle: Server, tmp_path: Path) -> None:
    steward = steward_of(idle)
    assert steward is not None
    with piped(tmp_path, "--timeout", "0.5", idle.socket, "disk.ctl") as process:
        lines_until(
            process,
            rf"{idle.socket.name} +away .*: {idle.socket} is not a control socket: another program answers there$",
            r"disk\.ctl +READ/s 0 ",
        )
        os.kill(steward, signal.SIGSTOP)
        lines_until(process, r"disk\.ctl +away .*: the server at disk\.ctl does not answer: see whether it hangs")
        os.kill(steward, signal.SIGCONT)
        lines_until(process, r"disk\.ctl +READ/s 0 .* is back, it was away for ")


def test_it_ends_when_nobody_reads_its_lines(idle: Server, tmp_path: Path) -> None:
    words = f"{line('disk.ctl')} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert re.fullmatch(r".* disk\.ctl  .*\n0\n", done.stdout)
    assert "Error" not in done.stderr


def test_a_full_standard_output_is_said(idle: Server, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("disk.ctl"), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
    assert done.returncode == 1
    assert "xnbd-bgctl: cannot write the answer: No space left on device" in done.stderr


def test_an_upgrade_is_no_absence(start: Start, tmp_path: Path, image: Path) -> None:
    server = controlled(start, tmp_path, image, "--metrics", 0)
    with reading(server), piped(tmp_path, "disk.ctl") as process:
        lines_of(process, 2)
        upgrade(tmp_path / "disk.ctl")
        lines = lines_of(process, 8)
    assert [text for text in lines if "away" in text] == []


def test_an_empty_path_is_refused() -> None:
    status, _, errors = run(*command("a.ctl", ""), check=False)
    assert (status, errors) == (2, "xnbd-bgctl: CONTROL is empty (xnbd-bgctl --help shows the usage)\n")


def test_intervals_are_checked(tmp_path: Path) -> None:
    for given, reason in (("0", "expected a number of seconds above 0"), ("0.05", "expected at least 0.1 seconds")):
        words = [PYTHON, str(ROOT / "bin" / "xnbd-bgctl"), "--top", "--interval", given, tmp_path / "x"]
        status, _, errors = run(*words, check=False)
        assert (status, errors) == (2, f"xnbd-bgctl: --interval {given}: {reason}\n")
