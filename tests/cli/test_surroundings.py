"""Every command of the four programs in odd surroundings: closed and full streams, no working directory, few
descriptors, other locales, another user. One line, a sensible status, never a traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest
from control_loop import ControlLoop
from proxies import make_disk
from server_process import PYTHON, ROOT, START_TIME, STOP_TIME, children_of, wait_until

from xnbd.control.requests import Message
from xnbd.control.server import Reply

NOBODY = 65534
CLOSED, FULL = "stdout closed", "stdout full"
SURROUNDINGS = {
    CLOSED: "exec >&-",
    FULL: "exec >/dev/full",
    "all closed": "exec <&- >&- 2>&-",
    "stderr full": "exec 2>/dev/full",
    "no working directory": 'mkdir "$GONE" && cd "$GONE" && rmdir "$GONE"',
    "few descriptors": "ulimit -n 12",
    "small files": "ulimit -f 1",
    "stdin closed, locale C": "export LC_ALL=C; exec <&-",
    "locale that is missing": "export LC_ALL=de_DE.ISO-8859-1",
    "another user": "true",
}
STREAMS = (CLOSED, FULL, "all closed")
DEAF = ("all closed", "stderr full")


def in_surroundings(kind: str, words: List[object], directory: Path) -> List[str]:
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if kind == "another user" else []
    script = f'GONE={directory}/gone; {SURROUNDINGS[kind]}; exec "$@"'
    return [*user, "sh", "-c", script, "sh", *map(str, words)]


def program(name: str, *words: object) -> List[object]:
    return [PYTHON, "-W", "error", ROOT / "bin" / name, *words]


def run_in(kind: str, words: List[object], directory: Path) -> Tuple[int, str, str]:
    done = subprocess.run(in_surroundings(kind, words, directory), capture_output=True, timeout=60, cwd=directory)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def skip_without_root(kind: str) -> None:
    if kind == "another user" and os.geteuid():
        pytest.skip("only root can become somebody else")


# xnbd-bgctl and xnbd-wrapper-ctl

PROGRESS = {"cached_bytes": 4096, "total_bytes": 4096, "fetched_bytes": 0, "rate": None}
REPLIES: Dict[str, List[Message]] = {
    "query": [{"done": True, "mode": "target", "name": "d", "disk_size": 4096, "workers": []}],
    "switch": [{"done": True, "workers": 1, "longest_pause_ms": 1.0}],
    "cache-all": [{"done": True, "pid": 7, **PROGRESS}],
    "reconnect": [{"done": True, "address": "nbd://h:1/"}],
    "snapshot": [{"done": True, "path": "/d.snapshot.1", "seconds": 1.0}],
    "list": [{"export": {"index": 1, "name": "d", "mode": "target", "clients": 0, "image_path": "/d"}}],
    "add-target": [],
    "add-proxy": [],
    "remove-by-exportname": [{"removed": "d"}],
    "remove-by-file": [{"removed": "d"}],
    "bgctl-query": [{"output": "d: proxy\n", "errors": "", "status": 0}],
    "bgctl-cache-all": [{"output": "100 % cached\n", "errors": "", "status": 0}],
    "bgctl-switch": [{"output": "the server is a target\n", "errors": "", "status": 0}],
    "bgctl-reconnect": [{"output": "the origin is another\n", "errors": "", "status": 0}],
    "save": [{"saved": "/db"}],
}
ANSWERS = {"--query", "--snapshot", "--list", "--bgctl-query", "--help", "--version"}
SILENT = {"--add-target", "--add-proxy", "--save"}
CTL = ["xnbd-wrapper-ctl", "--socket", "SOCKET"]
COMMANDS: List[List[str]] = [
    *(["xnbd-bgctl", command, "SOCKET"] for command in ("--query", "--switch", "--cache-all", "--cache-all2")),
    ["xnbd-bgctl", "--snapshot", "SOCKET"],
    ["xnbd-bgctl", "--reconnect", "SOCKET", "h", "1"],
    [*CTL, "--list"],
    [*CTL, "--save"],
    [*CTL, "--add-target", "d", "/d"],
    [*CTL, "--add-proxy", "d", "h", "1", "/c", "/b", "/s"],
    [*CTL, "--remove-by-exportname", "d"],
    [*CTL, "--remove-by-file", "/d"],
    [*CTL, "--bgctl-query", "d"],
    [*CTL, "--bgctl-cache-all", "d"],
    [*CTL, "--bgctl-switch", "d"],
    [*CTL, "--bgctl-reconnect", "d", "h", "1"],
    *([name, "--help"] for name in ("xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl")),
]


BEGINNINGS = ("--query", "--switch", "--list", "--add-target", "--help")
"""Commands that stand for all, where only the beginning of a program meets what is odd."""

CASES = [
    pytest.param(words, kind, id=f"{' '.join(words)}-{kind}")
    for words in COMMANDS
    for kind in SURROUNDINGS
    if kind in STREAMS or not {*BEGINNINGS}.isdisjoint(words)
]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Answers every command."""

    def canned(lines: List[Message]) -> object:
        def command(_request: Message) -> Reply:
            yield from lines

        return command

    loop = ControlLoop(
        tmp_path_factory.mktemp("control") / "socket",
        {name: canned(lines) for name, lines in REPLIES.items()},  # type: ignore[misc]
    )
    yield loop.path
    loop.stop()


@pytest.mark.parametrize(("words", "kind"), CASES)
def test_steering_programs(control: Path, tmp_path: Path, words: List[str], kind: str) -> None:
    skip_without_root(kind)
    name, *rest = (str(control) if word == "SOCKET" else word for word in words)
    status, out, err = run_in(kind, program(name, *rest), tmp_path)
    assert "Traceback" not in out + err
    assert err.count("\n") <= 1, err
    command = next(word for word in rest if word.startswith("--") and word != "--socket")
    if kind in (CLOSED, FULL):
        assert status == int(command in ANSWERS), err
        assert bool(err) == (command not in SILENT), err
    elif kind == "all closed":
        assert status == int(command in ANSWERS)
    elif kind == "another user" and "SOCKET" in words:
        assert status == 1
        assert "permission" in err
    elif kind == "few descriptors":
        assert status in (0, 1)
    else:
        assert (status, err) == (0, ""), err


def test_relative_paths_without_a_working_directory(control: Path, tmp_path: Path) -> None:
    words = program("xnbd-wrapper-ctl", "--socket", control, "--add-target", "d", "d.img")
    status, _, err = run_in("no working directory", words, tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert "d.img: the working directory does not exist any more: give the whole path" in err


# xnbd-server and xnbd-wrapper

MODES = {
    "target": ["--target", "--control", "{dir}/ctl", "{dir}/d.img"],
    "cow": ["--cow-target", "{dir}/d.img"],
    "proxy": ["--proxy", "nbd+unix:///?socket={origin}", "{dir}/c.img", "{dir}/c.bitmap", "{dir}/ctl"],
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a server that proxies start with."""
    directory = tmp_path_factory.mktemp("origin")
    sock = directory / "sock"
    directory.chmod(0o755)
    words = program("xnbd-server", "--target", "--readonly", "--quiet", "--unix", sock, make_disk(directory))
    with subprocess.Popen([str(word) for word in words], umask=0) as server:
        try:
            wait_until(lambda: serves(sock), "the origin", START_TIME)
            yield sock
        finally:
            server.terminate()


def serves(path: Path) -> bool:
    """Whether a client gets a greeting there."""
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.settimeout(60)
        sock.connect(str(path))
        return len(sock.recv(18)) == 18
    return False


def start_and_stop(kind: str, words: List[object], directory: Path, sock: Path) -> Tuple[int, str]:
    """Until it serves or ends: its status, and what it said."""
    with subprocess.Popen(
        in_surroundings(kind, words, directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=directory
    ) as process:
        try:
            wait_until(lambda: process.poll() is not None or serves(sock), "the start", START_TIME)
            served = process.poll() is None
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=STOP_TIME)
        finally:
            for pid in [*children_of(process.pid), process.pid] if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
    assert b"Traceback" not in out + err
    assert served == (process.returncode == 0), err
    return process.returncode, err.decode()


def check_start(kind: str, status: int, err: str, log: Path) -> None:
    text = log.read_text() if log.exists() else ""
    assert "Traceback" not in text
    assert err.count("\n") == (0 if status == 0 or kind in DEAF else 1), err
    if kind not in ("few descriptors", "small files", "another user"):
        assert status == 0, err + text
    elif kind == "few descriptors":
        assert status == 1
        assert "ulimit -n" in err
    if status == 0:
        assert " ERROR: " not in text


@pytest.mark.parametrize("kind", SURROUNDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_server(tmp_path: Path, origin: Path, mode: str, kind: str) -> None:
    skip_without_root(kind)
    make_disk(tmp_path, name="d.img")
    mode_words = [word.format(dir=tmp_path, origin=origin) for word in MODES[mode]]
    log, sock = tmp_path / "log", tmp_path / "sock"
    words = program("xnbd-server", "--unix", sock, "--logpath", log, *mode_words)
    status, err = start_and_stop(kind, words, tmp_path, sock)
    check_start(kind, status, err, log)


@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_wrapper(tmp_path: Path, kind: str) -> None:
    skip_without_root(kind)
    log, control = tmp_path / "log", tmp_path / "ctl"
    where = ["--laddr", "127.0.0.1", "--lport", "0", "--dbpath", tmp_path / "db", "--socket", control, "--logpath", log]
    with subprocess.Popen(
        in_surroundings(kind, program("xnbd-wrapper", *where), tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or (log.exists() and " INFO: serving " in log.read_text()),
                "the start",
                START_TIME,
            )
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=STOP_TIME)
        finally:
            if process.poll() is None:
                process.kill()
    assert b"Traceback" not in out + err
    check_start(kind, process.returncode, err.decode(), log)
