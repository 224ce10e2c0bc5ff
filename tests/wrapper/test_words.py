"""What people ran into: each start, refusal and log line says what is so, in one line."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import List

import pytest
from conftest import MIB, Start, StartWrapper
from injection import injected
from launch import fails, launched, serving
from mounts import small_tmpfs
from proxies import Proxy, make_disk
from rawclient import RawClient
from server_process import PATIENCE, ROOT, command, run, wait_until
from wrapper_process import fails as wrapper_fails
from wrapper_process import program

from xnbd.scoreboard.layout import create_scoreboard, scoreboard_size
from xnbd.scoreboard.lines import clock
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.server.steward.progress import Pages
from xnbd.storage.bitmap import Bitmap, bitmap_size

needs_root = pytest.mark.root(reason="only root has namespaces of its own")

# Addresses


@pytest.mark.parametrize(
    ("addresses", "families"),
    [
        (["127.0.0.1", "localhost", "127.0.0.1"], ["127.0.0.1"]),
        (["::1", "[::1]", "0:0::1"], ["[::1]"]),
        (["0.0.0.0", "127.0.0.1"], ["0.0.0.0"]),
        (["127.0.0.1", "0.0.0.0", "::1"], ["0.0.0.0", "[::1]"]),
    ],
)
def test_each_address_is_listened_on_once(
    tmp_path: Path, image: Path, addresses: List[str], families: List[str]
) -> None:
    words = [word for address in addresses for word in ("--laddr", address)]
    with serving(tmp_path / "log", "--target", "--lport", "0", *words, image) as server:
        line = next(line for line in server.log().splitlines() if "INFO: serving " in line)
        assert [place.rpartition(":")[0] for place in line.rpartition(" on ")[2].split(", ")] == families


def test_wrapper_listens_on_each_address_once(start_wrapper: StartWrapper) -> None:
    assert start_wrapper("--laddr", "localhost").log().count("127.0.0.1:") == 1


def in_network(hosts: Path, *words: object) -> List[object]:
    """*words* where IPv6 is off and *hosts* says what names are."""
    script = (
        "ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 && "
        f'mount --bind {hosts} /etc/hosts && exec "$@"'
    )
    return ["unshare", "--net", "--mount", "sh", "-c", script, "sh", *words]


@needs_root
def test_name_of_which_this_computer_has_one_address(tmp_path: Path, image: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 localhost\n::1 other\n")
    words = command("--target", "--lport", "0", "--laddr", "localhost", image)
    with launched(in_network(hosts, *words), tmp_path / "log") as server:
        server.wait_for_log("on 127.0.0.1:")
    prefix = in_network(hosts)
    for address in ("other", "::1", "[::1]"):
        status, message = fails("--target", "--lport", "0", "--laddr", address, image, prefix=prefix)
        assert status == 1
        assert "::1 is no address of this computer: choose another --laddr" in message


# Files


@pytest.mark.parametrize("option", ["--logpath", "--pidfile"])
def test_fifo_is_refused_at_once(tmp_path: Path, image: Path, option: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    status, message = fails("--target", option, tmp_path / "fifo", "--lport", "0", image)
    assert (status, str(tmp_path / "fifo") in message) == (1, True)


def test_fifo_as_a_wrappers_log_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    status, message = wrapper_fails(tmp_path, "--dbpath", tmp_path / "db", "--logpath", tmp_path / "fifo")
    assert (status, "is a pipe or a socket: name a file" in message) == (1, True)


@pytest.mark.parametrize("suffix", ["", ".state"])
def test_fifo_as_a_bitmap_is_refused_at_once(start: Start, image: Path, tmp_path: Path, suffix: str) -> None:
    origin = start("--target", image)
    files = [tmp_path / "c.img", tmp_path / "c.bitmap", tmp_path / "ctl"]
    os.mkfifo(f"{files[1]}{suffix}")
    status, message = fails("--proxy", "--lport", "0", origin.uri, *files)
    assert (status, "not a regular file" in message) == (1, True)


@pytest.mark.parametrize("option", ["--logpath", "--pidfile", "--unix", "--control"])
def test_hard_link_does_not_make_one_file_two(tmp_path: Path, image: Path, option: str) -> None:
    content = image.read_bytes()
    os.link(image, tmp_path / "link")
    status, message = fails("--target", "--lport", "0", option, tmp_path / "link", image)
    assert (status, "are the same file" in message) == (2, True)
    assert image.read_bytes() == content


def test_hard_link_of_a_wrappers_image_is_no_log(tmp_path: Path, image: Path) -> None:
    os.link(image, tmp_path / "link")
    options = ["--dbpath", tmp_path / "db", "--logpath", tmp_path / "link"]
    status, message = wrapper_fails(tmp_path, *options, "--imgfile", image)
    assert (status, "are the same file" in message) == (2, True)
    database = {"version": 2, "images": {"d": {"mode": "target", "image_path": str(image)}}}
    (tmp_path / "db").write_text(json.dumps(database))
    status, message = wrapper_fails(tmp_path, *options)
    assert (status, "a file of the export 'd'" in message) == (2, True)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_log_on_a_standard_stream(tmp_path: Path, image: Path, stream: str) -> None:
    """A pipe, as container engines have it."""
    words = command("--target", "--lport", "0", "--logpath", f"/dev/{stream}", image)
    pipes = {stream: subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as server:  # type: ignore[call-overload]
        assert " INFO: serving " in getattr(server, stream).readline()
        server.terminate()
        assert " INFO: stopping" in getattr(server, stream).read()
    status, message = fails("--target", "--daemonize", "--logpath", f"/dev/{stream}", image)
    assert (status, "--daemonize lets go of" in message) == (2, True)


def test_pid_file_is_there_once_the_server_listens(tmp_path: Path, image: Path) -> None:
    pid_file, sock = tmp_path / "pid", tmp_path / "sock"
    for number in range(3):
        words = command("--target", "--control", tmp_path / "ctl", "--pidfile", pid_file, "--unix", sock, image)
        pid_file.write_text("1\n")  # a dead server's
        with launched(words, tmp_path / f"log{number}") as server:
            wait_until(lambda: not pid_file.exists() or pid_file.read_text() != "1\n", "the old one to go", 40)
            while not pid_file.exists():
                assert server.process.poll() is None, server.log()
            for path in (sock, tmp_path / "ctl"):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))


# What names and hosts may be


def test_hosts_that_are_no_utf8_are_refused_in_all_programs(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("c", "b", "s")]
    for words in (
        [*command("--proxy"), "nbd://%ff/", *files],
        [*command("--proxy"), b"\xff", "1", *files],
        [*program("xnbd-bgctl"), "--reconnect", files[2], "nbd://%ff/"],
        [*program("xnbd-wrapper-ctl"), "--socket", files[2], "--add-proxy", "d", "nbd://%ff/", *files],
    ):
        done = subprocess.run(
            [word if isinstance(word, bytes) else str(word) for word in words], capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
        assert b"Traceback" not in done.stderr


def test_halves_of_pairs_are_refused_by_a_wrapper(start_wrapper: StartWrapper, tmp_path: Path, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image)
    for field in ("name", "image_path", "command"):
        request = {"command": "add-target", "name": "d", "image_path": str(image), field: "\ud800"}
        assert "half of a UTF-16 pair" in wrapper.ask(**request)[-1]["error"]
    wrapper.stop()
    database = {"version": 2, "images": {"d": {"mode": "target", "image_path": "/\ud800"}}}
    (tmp_path / "other").write_text(json.dumps(database))
    status, message = wrapper_fails(tmp_path, "--dbpath", tmp_path / "other")
    assert (status, "half of a UTF-16 pair" in message) == (1, True)


def test_names_with_line_ends_stay_one_line_in_the_log(tmp_path: Path) -> None:
    image = make_disk(tmp_path, name="a\nb\x1b[2J\u202e.img")
    with serving(tmp_path / "log", "--target", "--unix", tmp_path / "s", image) as server:
        assert r"serving disk image a\nb\x1b[2J\u202e.img, " in server.log()
    assert "\x1b" not in server.log()
    assert all(" xnbd-server[" in line for line in server.log().splitlines())
    _, message = fails("--target", "--lport", "0", tmp_path / "no\nfile")
    assert r"no\nfile" in message


def test_export_whose_name_begins_with_a_dash(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper()
    wrapper.ctl("--add-target", "--", "-d", image)
    assert list(wrapper.listed()) == ["-d"]
    assert wrapper.ctl("--remove-by-exportname", "--", "-d") == "removed -d\n"


# Refusals


def test_dangling_link_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    status, message = fails("--target", "--create", "1M", "--lport", "0", tmp_path / "link")
    assert status == 1
    assert f"it is a link to {tmp_path}/nowhere, which does not exist" in message


def test_wrapper_gives_no_advice_that_is_none(start_wrapper: StartWrapper, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "--create" not in start_wrapper().refuses("--add-target", "d", tmp_path / "link")


def test_clear_refusal_of_an_origin_is_not_said_to_be_its_absence(start: Start, image: Path, tmp_path: Path) -> None:
    origin = start("--target", "--exportname", "other", image)
    files = [tmp_path / name for name in ("c", "b", "s")]
    status, message = fails("--proxy", "--lport", "0", "--target-exportname", "this", origin.uri, *files)
    assert status == 1
    assert "it has no export named 'this'" in message
    assert "first start" not in message


@needs_root
def test_missing_proc_is_named(image: Path) -> None:
    prefix = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    status, message = fails("--target", "--lport", "0", image, prefix=prefix)
    assert (status, "/proc is not mounted, and is needed" in message) == (1, True)


@pytest.mark.parametrize("descriptors", range(10, 40, 3))
def test_few_descriptors_are_enough_or_refused(tmp_path: Path, image: Path, descriptors: int) -> None:
    sock, limit = tmp_path / "sock", ["prlimit", f"--nofile={descriptors}"]
    with subprocess.Popen(
        [*limit, *command("--target", "--quiet", "--unix", sock, image)], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            wait_until(lambda: server.poll() is not None or sock.exists(), "the start", 40)
            if server.poll() is None:
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(PATIENCE)
                    client.connect(str(sock))
                    assert RawClient(client).negotiate().works()
        except (EOFError, ConnectionError):
            assert server.wait(PATIENCE) == 1  # it had just bound its socket, and found out then
        finally:
            server.terminate()
        _, err = server.communicate(timeout=PATIENCE)
    if server.returncode:
        assert err.count("\n") == 1
        assert "ulimit -n" in err
    else:
        assert err == ""


# While the server runs


@pytest.mark.parametrize("mode", ["target", "proxy"])
def test_ctrl_c_to_all_processes_is_no_error(start: Start, image: Path, tmp_path: Path, mode: str) -> None:
    origin = start("--target", "--readonly", image)
    for number in range(4):
        words = ["--target", "--control", tmp_path / "ctl", image]
        if mode == "proxy":
            words = ["--proxy", origin.uri, *(tmp_path / name for name in ("c", "b", "ctl"))]
        log = tmp_path / f"log{number}"
        with (
            open(log, "wb") as file,
            subprocess.Popen(command(*words, "--unix", tmp_path / "s"), stderr=file, start_new_session=True) as server,
        ):
            wait_until(lambda log=log: "INFO: serving" in log.read_text(), "the start", 40)
            os.killpg(server.pid, signal.SIGINT)
            assert server.wait(PATIENCE) == 0
        assert " ERROR: " not in log.read_text()
        assert "Traceback" not in log.read_text()


def test_ctrl_c_to_a_wrapper_and_its_processes_is_no_error(tmp_path: Path, image: Path) -> None:
    log = tmp_path / "log"
    words = ["--laddr", "127.0.0.1", "--lport", "0", "--dbpath", tmp_path / "db", "--socket", tmp_path / "c"]
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            [*program("xnbd-wrapper"), *map(str, words), "--imgfile", image], stderr=file, start_new_session=True
        ) as wrapper,
    ):
        wait_until(lambda: "INFO: serving" in log.read_text(), "the start", 40)
        port = int(log.read_text().rpartition(":")[2])
        with (
            RawClient(socket.create_connection(("127.0.0.1", port), 60)) as negotiating,
            RawClient(socket.create_connection(("127.0.0.1", port), 60)) as client,
        ):
            negotiating.greet()
            client.negotiate()
            os.killpg(wrapper.pid, signal.SIGINT)
            assert wrapper.wait(PATIENCE) == 0
    assert " ERROR: " not in log.read_text()


@needs_root
def test_failures_that_clients_get_are_in_the_log(start: Start, tmp_path: Path) -> None:
    """With their offsets; about one a second, and how many there were besides."""
    with small_tmpfs(tmp_path / "small", "4m"):
        image = tmp_path / "small" / "disk.img"
        image.touch()
        os.truncate(image, 64 * MIB)
        server = start("--target", image)
        began = time.monotonic()
        with RawClient(server.connect()) as client:
            client.negotiate()
            assert client.write(8 * MIB, bytes(8 * MIB)) == 28
            for number in range(200):
                assert client.write(32 * MIB + number * 4096, bytes(4096)) == 28
        server.wait_for_log(" more in the last ")
        failures = [line for line in server.log().splitlines() if " failed: " in line]
        server.stop()
    failure = "WRITE of 8388608 bytes at 8388608 failed: No space left on device (ENOSPC)"
    assert f"export 'disk.img': {failure}" in failures[0]
    assert len(failures) <= 2 + time.monotonic() - began


def test_beyond_the_end_is_the_clients_fault_and_not_in_the_log(start: Start, image: Path) -> None:
    server = start("--target", image)
    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.write(64 * MIB, b"x") == 28
        assert client.works()
    assert "failed" not in server.log()


def test_workers_that_cannot_start_are_tried_ever_more_seldom(start: Start, image: Path) -> None:
    server = start("--target", image)
    server.expected_errors += ["worker cannot work", "spare worker", "cannot start a worker", "worker failed"]
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (18, limits[1]))
    for pid in server.workers():
        os.kill(pid, signal.SIGKILL)
    server.wait_for_log("the next one starts in 2 s")
    server.wait_for_log("the next one starts in 4 s")
    assert server.log().count("spare worker ") <= 4
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    with RawClient(server.connect()) as client:
        assert client.negotiate().works()


def test_poll_without_memory_ends_nobody(start: Start, image: Path) -> None:
    server = start("--target", "--control", image.parent / "ctl", image)
    with injected(server.pid, "poll,ppoll:error=ENOMEM:when=1+2"), RawClient(server.connect()) as client:
        assert client.negotiate().works()
        wait_until(lambda: len(server.busy_workers()) == 1 and len(server.workers()) >= 6, "the next spare worker")
    with RawClient(server.connect()) as client:
        assert client.negotiate().works()


def test_exports_are_added_without_waiting_for_a_tick(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper()
    times = []
    for number in range(20):
        began = time.monotonic()
        assert "error" not in wrapper.ask(command="add-target", name=f"d{number}", image_path=str(image))[-1]
        times.append(time.monotonic() - began)
    assert min(times) < 0.095  # each took a tick of 0.1 s at least


def test_time_of_day_is_not_asked_how_long_something_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> float:
        raise AssertionError("the clock may be set back")

    monkeypatch.setattr(time, "time", wrong)
    fd = create_scoreboard(4)
    assert os.fstat(fd).st_size == scoreboard_size(4)
    scoreboard = Scoreboard(fd)
    scoreboard.take_place().welcome("x")
    scoreboard.note_checkpoint()
    _, last = scoreboard.checkpoints()
    assert last is not None
    assert 0 <= clock() - last < PATIENCE


# How much is cached of a large disk


def test_pages_are_counted_as_the_bitmap_is(tmp_path: Path) -> None:
    blocks = 5 * 32768 * 8 + 12345
    path = tmp_path / "bitmap"
    path.write_bytes(bytes(bitmap_size(blocks)))
    with open(path, "r+b") as file:
        bitmap = Bitmap(file.fileno(), blocks)
        pages = Pages(bitmap)
        edges = [0, 1, 32767, 32768, 3 * 32768 + 5, 200_000, 500_000, blocks]
        for first, end in zip(edges[::2], edges[1::2]):
            bitmap.set(first, end)
            pages.count()
            assert pages.total() == bitmap.count()
        assert pages.shares(1)[0] == pytest.approx(bitmap.shares(1)[0])
        bitmap.set(0, blocks)
        pages.count()
        assert pages.total() == blocks
        assert set(pages.shares(40)) == {1.0}
        bitmap.octets.close()


def test_query_of_a_large_proxy_does_not_stop_its_steward(start: Start, tmp_path: Path) -> None:
    """What it tells is right, with two servers on one cache too, and for the map."""
    size = 1 << 40
    disk = tmp_path / "origin.img"
    disk.touch()
    os.truncate(disk, size)
    origin = start("--target", disk)
    (tmp_path / "cache.bitmap").write_bytes(
        (b"\x00\xff\x55\xaa" * 1024 + bytes(4096)) * (bitmap_size(size >> 12) >> 13)
    )
    (tmp_path / "cache.img").touch()
    os.truncate(tmp_path / "cache.img", size)
    proxy = Proxy(start, tmp_path, origin.uri)
    second = start("--proxy", origin.uri, proxy.cache, proxy.bitmap, tmp_path / "second.ctl")
    blocks = proxy.query()["blocks"]
    assert blocks == {"total": size >> 12, "cached": size >> 14, "written": size >> 14}
    with RawClient(second.connect()) as client:
        client.negotiate().read(0, 4096)
    wait_until(lambda: proxy.query()["blocks"]["cached"] == (size >> 14) + 1, "the other server's block")
    words = [*program("xnbd-bgctl"), "--query", "--json", "--map", proxy.control]
    shares = json.loads(run(*words)[1])["map"]
    assert shares == pytest.approx([0.25] * 1024, abs=0.01)


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("page", ["xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"])
def test_manual_page_has_no_warnings(page: str, columns: int) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", ROOT / "contrib" / "man" / f"{page}.8"],
        env={**os.environ, "MANWIDTH": str(columns), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_silent_connections_take_no_places_of_a_wrapper(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--max-clients", "1", "--handshake-timeout", "600")
    with ExitStack() as crowd:
        for _ in range(400):
            crowd.enter_context(wrapper.connect())
        with wrapper.client("disk.img") as client:
            assert client.works()
            assert len(wrapper.servers()) == 1
        with wrapper.client("disk.img") as client:
            assert client.works()
