"""What must not trouble the wrapper: hostile handshakes, killed processes, shortages, signals, broken files."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import List

import pytest
from conftest import StartWrapper
from mounts import small_tmpfs
from rawclient import ABORT, ACK, ERR_UNKNOWN, GO, INFO, LIST, RawClient, go_data, pack_option, string
from server_process import free_port, is_alive, run, title_of, wait_until
from wrapper_process import Wrapper, fails, program, wait_for_end


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path) -> Wrapper:
    """A wrapper with the export disk.img, on a port that nobody else is given while there is no wrapper."""
    return start_wrapper("--imgfile", image, port=free_port())


def serves(wrapper: Wrapper) -> bool:
    with wrapper.client("disk.img") as client:
        return client.works()


# Hostile handshakes


def test_two_hundred_silent_clients_delay_nobody_and_are_dropped(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--handshake-timeout", 5)
    silent = [socket.create_connection(("127.0.0.1", wrapper.port), timeout=60) for _ in range(200)]
    assert serves(wrapper)
    for sock in silent:
        assert sock.recv(18, socket.MSG_WAITALL)
        assert sock.recv(1) == b""
        sock.close()
    wait_until(lambda: not wrapper.servers(), "the ends of all their processes")


def test_a_client_that_sends_byte_by_byte_is_dropped_in_time(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--handshake-timeout", 2)
    handshake = iter(struct.pack(">I", 3) + pack_option(INFO, bytes(4000)))  # only that it lasts
    with wrapper.connect() as client:
        client.receive(18)
        wait_until(lambda: _dropped_after_a_byte(client, next(handshake)), "the deadline")
    wrapper.wait_for_log("handshake took too long")


def _dropped_after_a_byte(client: RawClient, byte: int) -> bool:
    client.sock.settimeout(0.1)
    try:
        client.send(bytes([byte]))
        return client.sock.recv(1) == b""
    except socket.timeout:
        return False
    except (BrokenPipeError, ConnectionResetError):
        return True


GOOD = struct.pack(">I", 3) + pack_option(LIST) + pack_option(INFO, go_data("disk.img"))
LAST = pack_option(GO, go_data("disk.img"))


def test_leaving_at_every_byte_of_the_handshake_harms_nobody(wrapper: Wrapper) -> None:
    whole = GOOD + LAST
    for length in range(len(whole) + 1):
        with wrapper.connect() as client:
            client.send(whole[:length])
            if length % 2:
                client.reset()
    assert serves(wrapper)
    wait_until(lambda: not wrapper.servers(), "the ends of all their processes")


ATTACKS = [
    b"\xff" * 64,
    struct.pack(">I", 7),
    struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, LIST, 0xFFFFFFFF),
    struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5050, LIST, 0),
    struct.pack(">I", 3) + pack_option(1, b"no such export"),
    struct.pack(">I", 3) + pack_option(1, b"\xff\xfe"),
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a browser\r\n\r\n",
]


def test_nonsense_is_dropped(wrapper: Wrapper) -> None:
    for attack in ATTACKS:
        with wrapper.connect() as client:
            client.receive(18)
            client.send(attack)
            assert client.closed(), attack
    assert serves(wrapper)


def test_wrong_options_are_answered_and_the_next_one_works(wrapper: Wrapper) -> None:
    with wrapper.connect() as client:
        client.greet()
        for option, data in [(77, b"x"), (LIST, b"x"), (GO, b""), (GO, string("disk.img")), (INFO, b"\xff" * 8)]:
            assert client.option(option, data)[-1][0] & 0x80000000
        for name in ("x" * 4096, "/etc/passwd", "../disk.img"):
            assert client.go(name)[-1][0] == ERR_UNKNOWN
        assert client.option(GO, struct.pack(">I", 2) + b"\xff\xfe" + b"\0\0")[-1][0] == ERR_UNKNOWN
        assert client.go("disk.img")[-1][0] == ACK
        assert client.works()


def test_aborting_is_acknowledged(wrapper: Wrapper) -> None:
    with wrapper.connect() as client:
        client.greet()
        assert client.option(ABORT) == [(ACK, b"")]
        assert client.closed()


def test_random_handshakes_do_not_trouble_a_connected_client(wrapper: Wrapper, seed: int) -> None:
    chance = random.Random(seed)
    with wrapper.client("disk.img") as bystander:
        for _ in range(60):
            data = bytearray(GOOD + LAST)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with wrapper.connect() as client:
                client.send(bytes(data[: chance.randrange(len(data) + 1)]))
        assert bystander.works()
    assert serves(wrapper)


# Killed processes


def test_a_killed_server_takes_its_own_client_only(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("died: killed by SIGKILL")
    with wrapper.client("disk.img") as bystander:
        (other,) = wrapper.servers()
        with wrapper.client("disk.img") as victim:
            assert victim.works()
            peer = victim.sock.getsockname()[1]
            (pid,) = set(wrapper.servers()) - {other}
            os.kill(pid, signal.SIGKILL)
            assert victim.closed()
        wrapper.wait_for_log(f"server {pid} of export 'disk.img' for client 127.0.0.1:{peer} died: killed by SIGKILL")
        assert bystander.works()
    assert serves(wrapper)


def test_a_storm_of_dying_servers_is_survived(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("died: killed by SIGKILL")
    clients = [wrapper.client("disk.img") for _ in range(30)]
    with wrapper.client("disk.img") as bystander:
        assert bystander.works()
        (survivor,) = (pid for pid in wrapper.servers() if _serves(pid, bystander))
        for pid in set(wrapper.servers()) - {survivor}:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: wrapper.servers() == [survivor], "the burials")
        assert bystander.works()
        assert wrapper.listed()["disk.img"]["clients"] == 1
    for client in clients:
        client.sock.close()


def _serves(pid: int, client: RawClient) -> bool:
    return f":{client.sock.getsockname()[1]} " in title_of(pid)


def test_after_the_wrapper_was_killed_its_servers_live_and_the_next_one_starts(
    wrapper: Wrapper, start_wrapper: StartWrapper, image: Path
) -> None:
    wrapper.ctl("--add-target", "second", image)
    port = wrapper.port
    with wrapper.client("disk.img") as old:
        pids = wrapper.servers()
        wrapper.stop(signal.SIGKILL)
        again = start_wrapper(port=port)
        assert set(again.listed()) == {"disk.img", "second"}
        with again.client("second") as new:
            assert old.write(0, b"still here") == 0
            assert new.read(0, 10) == b"still here"
        assert all(map(is_alive, pids))
    wait_for_end(pids)


def test_bursts_of_signals_change_nothing(wrapper: Wrapper) -> None:
    with wrapper.client("disk.img") as client:
        for _ in range(100):
            wrapper.process.send_signal(signal.SIGHUP)
            wrapper.process.send_signal(signal.SIGCHLD)
            wrapper.process.send_signal(signal.SIGUSR1)
            wrapper.process.send_signal(signal.SIGUSR2)
        assert client.works()
        assert serves(wrapper)


def negotiating(wrapper: Wrapper, client: RawClient) -> int:
    """The process of *client*, which it has begun to negotiate with."""
    client.greet()
    wait_until(lambda: len(wrapper.servers()) == 1, "the client's process")
    (pid,) = wrapper.servers()
    wait_until(lambda: title_of(pid).startswith("xnbd-wrapper: negotiating"), "the title")
    return pid


def test_what_servers_are_told_by_signals_does_not_end_a_handshake(wrapper: Wrapper) -> None:
    with wrapper.connect() as client:
        pid = negotiating(wrapper, client)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        assert client.go("disk.img")[-1][0] == ACK
        assert client.works()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_the_wrapper_ends_a_handshake_at_once(wrapper: Wrapper, number: int) -> None:
    with wrapper.connect() as client:
        os.kill(negotiating(wrapper, client), number)
        assert client.closed()
    assert serves(wrapper)


# Shortages


def test_without_descriptors_clients_wait_until_there_are_some(wrapper: Wrapper) -> None:
    wrapper.expected_errors.append("cannot accept a client")
    pid = wrapper.process.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # without the first client's, which is about to be closed
    with wrapper.client("disk.img") as before:
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, used + 1000))
        with wrapper.connect() as waiting:
            wrapper.wait_for_log("cannot accept a client, trying again every second: Too many open files")
            assert before.works()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, used + 1000), used + 1000))
            waiting.negotiate("disk.img")
            assert waiting.works()
    assert wrapper.log().count("cannot accept a client") == 1
    assert serves(wrapper)


def test_above_the_limit_clients_wait(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--max-clients", 2)
    with wrapper.client("disk.img"):
        with wrapper.client("disk.img") as second:
            assert second.works()
            third = wrapper.connect()
            wrapper.wait_for_log("2 clients are connected, which is the limit")
            third.sock.settimeout(0.2)
            with pytest.raises(socket.timeout):
                third.receive(1)
        third.sock.settimeout(60)
        with third:
            third.negotiate("disk.img")
            assert third.works()


@pytest.mark.root(reason="mounting needs root")
def test_a_full_disk_leaves_database_and_exports_as_they_were(
    start_wrapper: StartWrapper, image: Path, tmp_path: Path
) -> None:
    with small_tmpfs(tmp_path / "small", "64k") as small:
        wrapper = start_wrapper("--imgfile", image, database=small / "db")
        before = (small / "db").read_bytes()
        with open(small / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        assert "No space left" in wrapper.refuses("--add-target", "x" * 4000, image)
        assert (small / "db").read_bytes() == before
        assert set(wrapper.listed()) == {"disk.img"}
        assert sorted(path.name for path in small.iterdir()) == ["db", "filler"]
        (small / "filler").unlink()
        wrapper.ctl("--add-target", "x" * 4000, image)
        assert wrapper.stop() == 0


# Files


@pytest.mark.parametrize("content", [b"", b'{"version": 2, "images": {"disk.img": {"mode": "tar', b"disk.img /srv\n"])
def test_a_broken_database_ends_the_start_and_stays_as_it_is(tmp_path: Path, image: Path, content: bytes) -> None:
    database = tmp_path / "db"
    database.write_bytes(content)
    status, message = fails(tmp_path, "--dbpath", database, "--imgfile", image)
    assert (status, "left alone" in message) == (1, True)
    assert database.read_bytes() == content


def test_a_file_at_the_control_socket_s_place_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "wrapper.ctl").write_text("precious")
    status, _ = fails(tmp_path, "--dbpath", tmp_path / "db")
    assert status == 1
    assert (tmp_path / "wrapper.ctl").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--imgfile", "/no/such/image"], 1, "/no/such/image"),
        (["--lport", "99999"], 2, "--lport"),
        (["--handshake-timeout", "no"], 2, "--handshake-timeout"),
        (["--max-queue-size", "many"], 2, "--max-queue-size"),
        (["--xnbd-server", "'"], 2, "--xnbd-server"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_a_start_that_cannot_be_says_why_in_one_line(
    tmp_path: Path, arguments: List[str], status: int, words: str
) -> None:
    found, message = fails(tmp_path, "--dbpath", tmp_path / "db", *arguments)
    assert (found, words in message) == (status, True)


def test_an_image_whose_names_others_have_is_refused(tmp_path: Path, image: Path) -> None:
    other = {"mode": "target", "image_path": "/other"}
    (tmp_path / "db").write_text(json.dumps({"version": 2, "images": {"disk.img": other, str(image): other}}))
    status, message = fails(tmp_path, "--dbpath", tmp_path / "db", "--imgfile", image)
    assert (status, f"there is an export '{image}' already" in message) == (1, True)


def test_a_port_in_use_is_named(wrapper: Wrapper, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    status, message = fails(tmp_path / "b", "--dbpath", tmp_path / "b" / "db", "--lport", wrapper.port)
    assert (status, str(wrapper.port) in message) == (1, True)


# In the background


def test_daemonize_returns_when_the_wrapper_serves(image: Path, tmp_path: Path) -> None:
    where = ["--socket", tmp_path / "ctl", "--dbpath", tmp_path / "db", "--logpath", tmp_path / "log"]
    command = [*program("xnbd-wrapper"), "--daemonize", "--laddr", "127.0.0.1", "--lport", "0", *where]
    run(*command, "--imgfile", image)
    control = [*program("xnbd-wrapper-ctl"), "--socket", tmp_path / "ctl"]
    try:
        port = (tmp_path / "log").read_text().splitlines()[0].rpartition(":")[2]
        assert int(run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}/disk.img")[1]) == image.stat().st_size
        status, _, err = run(*command, check=False)
        assert (status, err.count("\n")) == (1, 1), err
    finally:
        run(*control, "--shutdown")
    assert "xnbd-server[" in (tmp_path / "log").read_text()


def test_socket_activation(image: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        command = [*program("xnbd-wrapper"), "--socket", tmp_path / "ctl", "--dbpath", tmp_path / "db"]
        script = f'exec 3<&{listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        with subprocess.Popen(
            ["bash", "-c", script, "bash", *map(str, command), "--imgfile", str(image)], pass_fds=[listener.fileno()]
        ) as process:
            try:
                with RawClient(socket.create_connection(listener.getsockname(), timeout=60)) as client:
                    assert client.negotiate("disk.img").works()
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_two_operators_at_once_lose_nothing(wrapper: Wrapper, image: Path) -> None:
    def add(first: int) -> None:
        for number in range(first, first + 10):
            wrapper.ask(command="add-target", name=str(number), image_path=str(image))

    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(wrapper.stored()) == {"disk.img", *map(str, range(30))}
