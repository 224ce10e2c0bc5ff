"""The control socket: its protocol, its clients' faults, and its file."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, List

import pytest
from control_loop import Client, ControlLoop, Message
from server_process import ROOT, wait_until

from xnbd.control.requests import flag_argument, integer_argument, text_argument
from xnbd.control.server import MAXIMUM_CONNECTIONS, MAXIMUM_LINE, CommandTable, ControlSocket, Reply
from xnbd.errors import CommandError, ConfigurationError
from xnbd.system.usage import UsageMeter, began

Serve = Callable[..., ControlLoop]

closed: List[str] = []
"""The commands whose generator was closed before its end, of the test that runs."""


def echo(request: Message) -> Reply:
    yield {"done": True, "request": request}


def count(request: Message) -> Reply:
    """Says numbers, with a wait before each, and ends without saying that it is done."""
    for number in range(request["to"]):
        yield None
        yield {"number": number}


def flood(request: Message) -> Reply:
    for number in range(request.get("lines", 1 << 40)):
        yield {"number": number, "padding": "x" * 1000}


def forever(request: Message) -> Reply:
    try:
        yield {"started": True}
        while True:
            yield None
    except GeneratorExit:
        closed.append(request.get("name", "forever"))
        raise


def refuse(_request: Message) -> Reply:
    yield {"number": 1}
    raise CommandError("3 of 8 blocks are missing")


def refuse_at_once(_request: Message) -> Reply:
    raise ConfigurationError("there is nothing to do")


def break_down(_request: Message) -> Reply:
    yield {"number": 1}
    raise ZeroDivisionError("a bug")


def say_nonsense(_request: Message) -> Reply:
    yield {"number": float("nan")}


def break_at_the_end(_request: Message) -> Reply:
    try:
        while True:
            yield None
    finally:
        raise ZeroDivisionError("a bug at the end")


COMMANDS: CommandTable = {
    "echo": echo,
    "count": count,
    "flood": flood,
    "forever": forever,
    "refuse": refuse,
    "refuse at once": refuse_at_once,
    "break down": break_down,
    "say nonsense": say_nonsense,
    "break at the end": break_at_the_end,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def serve(path: Path) -> Iterator[Serve]:
    """Starts control sockets, at *path* if the test names no other; stops them after the test."""
    loops: List[ControlLoop] = []
    closed.clear()

    def serve_one(where: Path = path) -> ControlLoop:
        loops.append(ControlLoop(where, COMMANDS))
        return loops[-1]

    yield serve_one
    for loop in loops:
        loop.stop()


@pytest.fixture
def loop(serve: Serve) -> ControlLoop:
    return serve()


@pytest.fixture
def client(loop: ControlLoop) -> Iterator[Client]:
    with Client(loop.path) as client:
        yield client


def assert_works(path: Path) -> None:
    with Client(path) as client:
        assert client.ask("echo", x=1) == {"done": True, "request": {"command": "echo", "x": 1}}


# Requests and replies


def test_command_gets_the_whole_request(client: Client) -> None:
    assert client.ask("echo", a=[1, {"b": None}], text="ü\udcff")["request"] == {
        "command": "echo",
        "a": [1, {"b": None}],
        "text": "ü\udcff",
    }


def test_lines_come_as_they_are_yielded_and_the_last_one_is_marked(client: Client) -> None:
    client.request("count", to=3)
    assert client.reply() == [{"number": 0}, {"number": 1}, {"number": 2}, {"done": True}]


def test_replies_are_ascii(client: Client) -> None:
    client.request("echo", text="ü")
    assert client.lines.readline().isascii()


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    client.send(b"".join(b'{"command": "count", "to": %d}\n' % number for number in (2, 0, 1)))
    assert [len(client.reply()) for _ in range(3)] == [3, 1, 2]


def test_several_clients_run_commands_at_once(loop: ControlLoop, client: Client) -> None:
    client.request("forever")
    assert client.line() == {"started": True}
    with Client(loop.path) as other:
        other.request("forever")
        assert other.line() == {"started": True}
        assert_works(loop.path)


def test_request_split_anywhere_is_put_together(client: Client) -> None:
    line = b'{"command": "echo", "text": "\xc3\xbc"}\r\n'
    for position in range(len(line)):
        client.send(line[:position])
        client.send(line[position:])
        assert client.reply()[0]["request"]["text"] == "ü"


def test_a_thousand_requests_in_one_write(client: Client) -> None:
    sender = threading.Thread(target=client.send, args=(b'{"command": "echo"}\n' * 1000,))
    sender.start()
    for _ in range(1000):
        assert client.reply()[0]["request"] == {"command": "echo"}
    sender.join()


def test_client_that_finishes_sending_gets_all_replies(loop: ControlLoop, client: Client) -> None:
    """As ``printf ... | nc -N -U`` does, its last line without a newline."""
    client.send(b'{"command": "count", "to": 2}\n{"command": "echo"}')
    client.sock.shutdown(socket.SHUT_WR)
    assert len(client.reply()) == 3
    assert client.reply() == [{"done": True, "request": {"command": "echo"}}]
    assert client.is_closed()


def test_command_that_waits_is_called_again_about_every_tenth_of_a_second(loop: ControlLoop, client: Client) -> None:
    client.request("forever")
    client.line()
    start = time.monotonic()
    before = loop.wake_ups
    wait_until(lambda: loop.wake_ups >= before + 5, "ticks")
    assert loop.wake_ups - before <= (time.monotonic() - start) / 0.1 + 2


def test_idle_control_socket_never_wakes_up(loop: ControlLoop, client: Client) -> None:
    client.request("count", to=1)
    client.reply()
    assert loop.control.deadline() is None
    loop.wait_until_it_sleeps()


# Errors


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"{}",
        b'{"command": null}',
        b'{"command": ["echo"]}',
        b'{"command": "nothing"}',
        b'{"command": "\\u001b[2J"}',
        b'{"command": "echo", "x": NaN}',
        b'{"command": "echo", "x": "\xff"}',
        b'{"command": "echo"}{"command": "echo"}',
        b'{"command": "echo", "x": "\\ud800"}',
        b'{"command": "echo", "\\udfff": 1}',
        b'{"a":' * 10000,
    ],
    ids=lambda line: repr(line[:20]),
)
def test_nonsense_is_answered_with_an_error_and_the_connection_goes_on(client: Client, line: bytes) -> None:
    client.send(line + b"\n")
    (answer,) = client.reply()
    assert answer["error"].isprintable()
    assert len(answer["error"]) < 300
    assert client.ask("echo")["done"]


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"query\n",
        b"null\n",
        b"[" * 60000,
        b'"query"\n',
        b'\xef\xbb\xbf{"command": "echo"}\n',
        b"\0\0\0\3",
        b"NBDMAGICIHAVEOPT",
        "{}\n".encode("utf-16"),
        b"9" * 60000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_object_is_answered_at_once_and_the_connection_closed(client: Client, data: bytes) -> None:
    """Other programs speak first, as C's xnbd-bgctl does, or wait for an answer to what has no line end."""
    client.send(data)
    (answer,) = client.reply()
    assert "this is a control socket, which speaks JSON lines" in answer["error"]
    assert client.is_closed()


def test_client_that_says_nothing_is_told_and_closed(
    loop: ControlLoop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of NBD waits for a greeting."""
    monkeypatch.setattr("xnbd.control.server._FIRST_REQUEST_TIME", 0.2)
    client.ask("echo")
    with Client(loop.path) as silent, Client(loop.path) as slow:
        slow.send(b'{"command"')
        for late in (silent, slow):
            (answer,) = late.reply()
            assert answer["error"].startswith("no request came in 0.2 s; this is a control socket")
            assert late.is_closed()
    assert client.ask("echo")["done"]  # who has asked something may be idle


def test_longest_line_is_served(client: Client) -> None:
    head, tail = b'{"command": "echo", "text": "', b'"}'
    client.send(head + b"x" * (MAXIMUM_LINE - len(head) - len(tail)) + tail + b"\n")
    assert "request" in client.reply()[0]


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_longer_line_is_refused_and_the_connection_closed(loop: ControlLoop, client: Client, ending: bytes) -> None:
    client.send(b"{" + b"x" * MAXIMUM_LINE + ending)
    assert "65536 bytes" in client.reply()[0]["error"]
    assert client.is_closed()
    assert_works(loop.path)


def test_line_without_end_is_cut_off(loop: ControlLoop, client: Client) -> None:
    with pytest.raises(OSError):
        for _ in range(1000):
            client.send(b"{" * 65536)
    assert_works(loop.path)


def test_failed_command_says_why(client: Client) -> None:
    client.request("refuse")
    assert client.reply() == [{"number": 1}, {"done": True, "error": "3 of 8 blocks are missing"}]
    assert client.ask("refuse at once") == {"done": True, "error": "there is nothing to do"}
    assert client.ask("echo")["done"]


@pytest.mark.parametrize("command", ["break down", "say nonsense"])
def test_bug_in_a_command_is_logged_and_not_told(
    client: Client, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    client.request(command)
    assert client.reply()[-1] == {"done": True, "error": "internal error"}
    assert client.ask("echo")["done"]
    assert "a command on the control socket failed\nTraceback" in caplog.text


def test_bug_at_a_commands_end_is_logged(loop: ControlLoop, caplog: pytest.LogCaptureFixture) -> None:
    with Client(loop.path) as client:
        client.request("break at the end")
        loop_ticks(loop)
    wait_until(lambda: "a bug at the end" in caplog.text, "the log line")
    assert_works(loop.path)


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "1", [], -1, 1 << 100])
def test_integer_argument_is_checked(value: object) -> None:
    with pytest.raises(CommandError, match="n: expected a whole number from 1 to 10"):
        integer_argument({"n": value}, "n", 1, 10)


def test_arguments() -> None:
    request = {"n": 10, "text": "x", "flag": True, "null": None}
    assert [integer_argument(request, name, 1, 10) for name in ("n", "null", "none")] == [10, None, None]
    assert [text_argument(request, name) for name in ("text", "null", "none")] == ["x", None, None]
    assert [flag_argument(request, name) for name in ("flag", "none")] == [True, False]
    for check in (text_argument, flag_argument):
        with pytest.raises(CommandError, match="n: expected"):
            check(request, "n")


# Clients that go, stall or flood


def loop_ticks(loop: ControlLoop) -> None:
    """Wait until a running command was called a few times."""
    before = loop.wake_ups
    wait_until(lambda: loop.wake_ups > before + 2, "ticks")


def test_disconnect_closes_the_command(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.request("forever")
        client.line()
    wait_until(lambda: closed == ["forever"], "the command's end")
    loop.wait_until_it_sleeps()


def test_disconnect_is_seen_behind_pipelined_requests(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.request("forever")
        client.line()
        client.send(b'{"command": "echo"}\n' * 1000)
    wait_until(lambda: closed == ["forever"], "the command's end")


def test_half_closed_client_keeps_its_command(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.request("forever")
        client.line()
        client.sock.shutdown(socket.SHUT_WR)
        loop_ticks(loop)
        assert closed == []
    wait_until(lambda: closed == ["forever"], "the command's end")


def test_stopping_the_server_closes_the_commands(serve: Serve, path: Path) -> None:
    loop = ControlLoop(path, COMMANDS)
    with Client(path) as client:
        client.request("forever")
        client.line()
        loop.stop()
        assert closed == ["forever"]
        assert client.is_closed()


def test_slow_reader_gets_everything(loop: ControlLoop, client: Client) -> None:
    client.request("flood", lines=2000)
    loop.wait_until_it_sleeps()
    assert [line.get("number") for line in client.reply()] == [*range(2000), None]


def test_client_that_never_reads_stops_its_command_only(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.request("flood")
        loop.wait_until_it_sleeps()
        assert_works(loop.path)
    loop.wait_until_it_sleeps()


def test_fast_reader_of_an_endless_reply_does_not_lock_others_out(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.request("flood")
        reader = threading.Thread(target=drain, args=(client.sock,))
        reader.start()
        for _ in range(10):
            assert_works(loop.path)
        client.sock.shutdown(socket.SHUT_RDWR)
        reader.join()


def drain(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def test_errors_that_nobody_reads_are_bounded(loop: ControlLoop) -> None:
    with Client(loop.path) as client:
        client.sock.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 20
        while select.select([], [client.sock], [], 0.5)[1]:
            sent += client.sock.send(b"{\n" * 32768)
            assert time.monotonic() < deadline
        assert sent < 4 << 20
        assert_works(loop.path)


def test_idle_clients_make_room_for_new_ones(loop: ControlLoop) -> None:
    clients = [Client(loop.path) for _ in range(2 * MAXIMUM_CONNECTIONS)]
    assert_works(loop.path)
    assert clients[0].is_closed()
    assert clients[-1].ask("echo")["done"]
    assert len(loop.control.interests()) <= MAXIMUM_CONNECTIONS + 1
    for client in clients:
        client.close()


def test_busy_clients_are_not_driven_out(loop: ControlLoop) -> None:
    clients = [Client(loop.path) for _ in range(MAXIMUM_CONNECTIONS)]
    for client in clients:
        client.request("forever")
        assert client.line() == {"started": True}
    with Client(loop.path) as late:
        assert "64 clients are connected already" in late.line()["error"]
        assert late.is_closed()
    assert closed == []
    clients.pop().close()
    wait_until(lambda: len(closed) == 1, "the command's end")
    assert_works(loop.path)
    for client in clients:
        client.close()


def test_disconnect_at_every_byte(loop: ControlLoop) -> None:
    line = b'{"command": "echo", "text": "\xc3\xbc"}\n'
    for length in range(len(line) + 1):
        with Client(loop.path) as client:
            client.send(line[:length])
    assert_works(loop.path)
    loop.wait_until_it_sleeps()


def test_noise_after_every_prefix(loop: ControlLoop, seed: int) -> None:
    chance = random.Random(seed)
    line = b'{"command": "count", "to": 1}\n'
    for length in range(1, len(line) + 1):
        with Client(loop.path) as client:
            client.send(line[:length] + chance.randbytes(chance.randrange(1, 300)) + b'\n{"command": "echo"}\n')
            replies = iter(client.reply, None)
            assert any("request" in reply[-1] or "control socket" in reply[-1].get("error", "") for reply in replies)


def descriptors() -> List[int]:
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


def test_connections_without_end_leave_nothing_behind(loop: ControlLoop) -> None:
    before = len(descriptors())
    for number in range(500):
        with Client(loop.path) as client:
            client.send(b'{"command": "forever"}\n' if number % 2 else b"")
    assert_works(loop.path)
    wait_until(lambda: len(descriptors()) <= before, "all descriptors to be closed")  # fewer: an earlier test's


def test_out_of_descriptors(loop: ControlLoop, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = Client(loop.path)
    assert client.ask("echo")["done"]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()), hard))
    spare = []
    try:
        while True:
            spare.append(os.dup(0))
    except OSError:
        pass
    try:
        start = time.monotonic()
        before = loop.wake_ups
        sock.connect(str(loop.path))
        wait_until(lambda: "cannot accept on the control socket" in caplog.text, "the log line")
        assert client.ask("echo")["done"]
        assert loop.wake_ups - before < 10 + (time.monotonic() - start)  # it tries again every second
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    sock.sendall(b'{"command": "echo"}\n')
    assert b'"done"' in sock.recv(1000)
    sock.close()
    client.close()


# The file


def test_socket_belongs_to_its_user_only(serve: Serve, path: Path) -> None:
    previous = os.umask(0)
    try:
        serve()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_socket_is_never_open_to_others(path: Path) -> None:
    """The mode at the moment of bind, as the system calls tell: no chmod of the path comes after it."""
    script = "import sys; from xnbd.control.server import ControlSocket; ControlSocket(sys.argv[1], {}).close()"
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=%file,bind,fchmod,listen", sys.executable, "-c", script, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    calls = [line.split("(")[0] for line in done.stderr.splitlines()]
    assert [call for call in calls if call.endswith(("bind", "chmod", "fchmodat", "listen"))] == [
        "fchmod",
        "bind",
        "listen",
    ]


def test_file_is_removed_at_the_end(path: Path) -> None:
    ControlLoop(path, COMMANDS).stop()
    assert not path.exists()


def test_successors_file_is_not_removed(serve: Serve, path: Path) -> None:
    loop = ControlLoop(path, COMMANDS)
    path.unlink()
    serve()
    loop.stop()
    assert_works(path)


def test_no_successor_starts_between_the_last_look_at_a_file_and_its_removal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, unlink = ControlSocket(str(path), COMMANDS), os.unlink

    def unlink_locked(target: str) -> None:
        directory = os.open(path.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(directory)
        unlink(target)

    monkeypatch.setattr(os, "unlink", unlink_locked)
    control.close()
    assert not path.exists()


def test_stale_socket_is_replaced(serve: Serve, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    serve()
    assert_works(path)


def test_killed_servers_socket_is_replaced(serve: Serve, path: Path) -> None:
    script = "import sys; from xnbd.control.server import ControlSocket; c = ControlSocket(sys.argv[1], {}); input()"
    process = subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, stdin=subprocess.PIPE)
    wait_until(path.exists, "the socket")
    process.kill()
    process.communicate()
    assert path.exists()
    serve()
    assert_works(path)


def test_live_socket_is_refused(loop: ControlLoop, path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"a running server listens on {path}: stop it"):
        ControlSocket(str(path), COMMANDS)
    assert_works(path)


@pytest.mark.parametrize("kind", ["file", "empty file", "directory", "symlink", "dangling symlink", "fifo"])
def test_other_kinds_of_file_are_refused_and_kept(serve: Serve, tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "here", tmp_path / "target"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling symlink":
        path.symlink_to(target)
    elif kind == "symlink":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(target))
        path.symlink_to(target)
    else:
        path.write_text("precious" if kind == "file" else "")
    before = path.lstat()
    with pytest.raises(ConfigurationError, match="exists and is no socket: remove it, or choose another path"):
        ControlSocket(str(path), COMMANDS)
    after = path.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert target.is_socket() == (kind == "symlink")


@pytest.mark.parametrize("name", ["missing/control.sock", "x" * 200])
def test_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        ControlSocket(str(tmp_path / name), COMMANDS)


def test_of_many_that_start_at_once_on_a_stale_socket_one_wins(path: Path) -> None:
    script = """if 1:
        import sys
        from xnbd.errors import ConfigurationError
        from xnbd.control.server import ControlSocket
        for _ in sys.stdin:
            try:
                control = ControlSocket(sys.argv[1], {})
                print("listens", flush=True)
            except ConfigurationError:
                print("refused", flush=True)
            sys.stdin.readline()
            control = None
            print("ended", flush=True)
        """
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", script, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]

    def all_say() -> List[str]:
        for starter in starters:
            assert starter.stdin
            starter.stdin.write("\n")
            starter.stdin.flush()
        return sorted(starter.stdout.readline().strip() for starter in starters if starter.stdout)

    try:
        for _ in range(100):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
                dead.bind(str(path))
            assert all_say() == ["listens", "refused", "refused", "refused"]
            assert all_say() == ["ended"] * 4
    finally:
        for starter in starters:
            starter.communicate(timeout=60)


def test_lock_of_the_directory_does_not_stop_the_start(serve: Serve, path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    serve()
    assert_works(path)
    os.close(fd)


def test_forked_process_leaves_socket_and_commands_alone(path: Path) -> None:
    """A worker that is forked while a command runs closes what it inherited, and nothing else happens."""
    closed.clear()
    control = ControlSocket(str(path), COMMANDS)
    with Client(path) as client:
        client.request("forever")
        while not select.select([client.sock], [], [], 0)[0]:
            control.progress()
        pid = os.fork()
        if not pid:
            control.close()
            os._exit(len(closed))
        assert os.waitpid(pid, 0)[1] == 0
        assert client.line() == {"started": True}
        assert path.exists()
        control.close()
        assert client.is_closed()
    assert closed == ["forever"]
    assert not path.exists()


# What processes take


def test_usage_of_a_busy_process() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "x = bytearray(50 << 20)\nwhile True: pass"])
    try:
        meter = UsageMeter()
        wait_until(lambda: meter.usage([busy.pid])[busy.pid].memory_bytes > 50 << 20, "the memory")
        wait_until(lambda: meter.usage([busy.pid])[busy.pid].cpu_seconds > 0.3, "some CPU time")
        assert meter.usage([busy.pid])[busy.pid].memory_bytes < 100 << 20
        wait_until(lambda: 5 < meter.usage([busy.pid])[busy.pid].cpu_percent < 150, "a share of the CPU")
        busy.send_signal(signal.SIGSTOP)
        wait_until(lambda: meter.usage([busy.pid])[busy.pid].cpu_percent < 1, "the CPU time of the last second only")
    finally:
        busy.kill()
        busy.wait()


def test_usage_of_processes_that_are_gone() -> None:
    gone = subprocess.Popen(["true"])
    meter = UsageMeter()
    meter.usage([gone.pid, os.getpid()])
    gone.wait()
    assert set(meter.usage([gone.pid, os.getpid()])) == {os.getpid()}
    assert meter.usage([]) == {}


def test_who_waits_for_longest_is_measured_first() -> None:
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    try:
        pids, meter, found = [child.pid for child in children], UsageMeter(most=0), []
        for _ in pids:
            found.append(set(meter.usage(pids)))
        assert [len(those) for those in found] == [1, 2, 3, 4]
        meter.usage(pids[:2])
        assert len(meter.usage(pids)) == 3
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_process_has_its_age_whatever_it_executes() -> None:
    child = subprocess.Popen(["sh", "-c", "read x; exec sleep 60"], stdin=subprocess.PIPE)
    try:
        before = began(child.pid)
        assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - before < 60
        assert child.stdin is not None
        child.stdin.write(b"x\n")
        child.stdin.flush()
        wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n", "the next program")
        assert began(child.pid) == before
    finally:
        child.kill()
        child.communicate()


def test_mapped_disk_is_not_counted_as_memory(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 << 20))
    script = (
        "import mmap, sys\nm = mmap.mmap(open(sys.argv[1], 'rb+').fileno(), 0)\nm[:]\nprint(1, flush=True)\ninput()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    try:
        assert UsageMeter().usage([process.pid])[process.pid].memory_bytes < 32 << 20
    finally:
        process.communicate("\n", timeout=60)


@pytest.fixture(autouse=True)
def log_propagates() -> Iterator[None]:
    """Another test may have sent the log elsewhere; here pytest looks at it."""
    log = logging.getLogger("xnbd")
    previous, log.propagate = log.propagate, True
    yield
    log.propagate = previous


def test_reply_is_one_json_object_a_line(client: Client) -> None:
    client.request("count", to=2)
    lines = [client.lines.readline() for _ in range(3)]
    assert all(isinstance(json.loads(line), dict) for line in lines)
