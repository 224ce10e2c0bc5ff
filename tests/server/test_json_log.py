"""``--log-format json``: each line of each process is one object, whatever names have in them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from caching import CacheFiles, bgctl
from conftest import MIB, Start, StartWrapper
from json_log import parse_log, with_words
from rawclient import FLUSH, READ, RawClient
from server_process import command, run, wait_until
from upgrades import upgrade

JSON = ("--log-format", "json")


def test_lines_of_a_server_say_what_they_are_about(start: Start, image: Path) -> None:
    server = start("--target", *JSON, "--verbose", "--exportname", 'the "disk"', image, tcp=True)
    with RawClient(server.connect(tcp=True)).negotiate() as client:
        host, port = client.sock.getsockname()
        client.request(READ, 1 << 40, 4096)
        assert client.simple_reply()[0] == 22
    server.wait_for_log(": left")
    (connected,) = with_words(server.log(), ": connected")
    assert (connected["export"], connected["peer"]) == ('the "disk"', f"{host}:{port}")
    assert connected["message"] == f"{host}:{port}: connected"
    (refused,) = with_words(server.log(), " refused: ")
    about = [refused[name] for name in ("level", "command", "offset", "length", "errno")]
    assert about == ["DEBUG", "READ", 1 << 40, 4096, "EINVAL"]
    server.stop()
    assert "peer" not in parse_log(server.log())[-1]


@pytest.mark.parametrize("name", [b"two\nlines.img", b"no \xff text \x1b[31m.img", "“Ä\u2028\x85”.img".encode()])
def test_names_do_not_break_a_line(start: Start, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(bytes(MIB))
    server = start("--target", *JSON, "--logpath", tmp_path / "log", os.fsdecode(path))
    with RawClient(server.connect()).negotiate() as client:
        assert client.works()
    log = tmp_path / "log"
    wait_until(lambda: ": left" in log.read_text(), "the client's end in the log")
    raw = log.read_bytes()
    assert raw.isascii() and b"\x1b" not in raw
    exports = {line["export"] for line in parse_log(raw.decode())}
    assert exports == {os.fsdecode(name).encode("utf-8", "backslashreplace").decode()}


def test_a_log_that_was_moved_goes_on_in_json(start: Start, tmp_path: Path, image: Path) -> None:
    log, old = tmp_path / "log", tmp_path / "log.1"
    server = start("--target", *JSON, "--logpath", log, image)
    log.rename(old)
    with RawClient(server.connect()).negotiate():
        wait_until(lambda: log.exists() and ": connected" in log.read_text(), "a new log")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "configuration read again" in log.read_text(), "the reload in the log")
    assert with_words(old.read_text(), "serving ") and parse_log(log.read_text())


def test_why_a_server_does_not_start_is_json_where_its_log_is(tmp_path: Path) -> None:
    missing = tmp_path / "mi\nssing"
    status, _, err = run(*command("--target", *JSON, missing), check=False)
    (line,) = parse_log(err)
    assert status == 1 and line["level"] == "ERROR"
    assert line["message"].startswith("cannot open ") and "\\n" in line["message"]
    log = tmp_path / "log"
    status, _, err = run(*command("--target", *JSON, "--daemonize", "--logpath", log, missing), check=False)
    assert err.startswith("xnbd-server: cannot open ") and err.count("\n") == 1
    assert [line["level"] for line in parse_log(log.read_text())] == ["ERROR"]


def test_another_format_is_refused(tmp_path: Path, image: Path) -> None:
    answer = run(*command("--target", "--log-format", "xml", image), check=False)
    assert answer == (2, "", "xnbd-server: --log-format xml: expected text or json\n")


def test_a_daemon_goes_on_in_json(tmp_path: Path, image: Path) -> None:
    log, pid_file, socket = tmp_path / "log", tmp_path / "pid", tmp_path / "socket"
    words = ("--target", *JSON, "--daemonize", "--pidfile", pid_file, "--logpath", log, "--unix", socket, image)
    assert run(*command(*words)) == (0, "", "")
    os.kill(int(pid_file.read_text()), signal.SIGTERM)
    wait_until(lambda: not pid_file.exists(), "the daemon's end")
    assert len(parse_log(log.read_text())) >= 2


def test_a_proxy_all_of_whose_processes_speak(start: Start, tmp_path: Path, image: Path, files: CacheFiles) -> None:
    """Master, worker, steward, its children, an upgrade, and the clients that it moves."""
    origin = start("--target", "--readonly", image)
    proxy = start(*files.arguments(origin.uri, *JSON, "--verbose", "--exportname", "far"))
    with RawClient(proxy.connect()).negotiate() as client:
        client.read(0, 4096)
        upgrade(files.control)
        bgctl("--cache-all", files.control)
        assert client.works()
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_for_log("configuration read again")
    bgctl("--switch", files.control)
    proxy.wait_for_log(": left")
    proxy.stop()
    lines = parse_log(proxy.log())
    assert {"upgraded", "switched to", "goes on where", "goes over to"} <= {
        words
        for words in ("upgraded", "switched to", "goes on where", "goes over to")
        if with_words(proxy.log(), words)
    }
    assert len({line["pid"] for line in lines}) >= 3
    assert {line["export"] for line in lines[-5:]} == {"far"}


def test_a_wrapper_and_its_servers(start_wrapper: StartWrapper, start: Start, tmp_path: Path, image: Path) -> None:
    origin = start("--target", "--readonly", image, tcp=True)
    wrapper = start_wrapper(*JSON)
    wrapper.ctl("--add-target", "a disk", image)
    paths = [tmp_path / name for name in ("cache", "bitmap", "proxy.ctl")]
    wrapper.ctl("--add-proxy", "far", "127.0.0.1", origin.port, *paths)
    for name in ("a disk", "far"):
        with wrapper.client(name) as client:
            client.request(FLUSH)
            assert client.simple_reply()[0] == 0
    wait_until(lambda: len(with_words(wrapper.log(), ": left")) == 2, "both clients' end in the log")
    assert [line["export"] for line in with_words(wrapper.log(), ": left")] == ["a disk", "far"]
    wrapper.stop()
    assert {line["program"] for line in parse_log(wrapper.log())} == {"xnbd-wrapper", "xnbd-server"}
    assert [line["export"] for line in with_words(wrapper.log(), " added: ")] == ["a disk", "far"]


def test_servers_of_another_program_are_told(start_wrapper: StartWrapper, image: Path) -> None:
    wrapper = start_wrapper(*JSON, "--slow-log", "60000", "--xnbd-server", subprocess.list2cmdline(command()))
    wrapper.ctl("--add-target", "disk", image)
    with wrapper.client("disk") as client:
        assert client.works()
    wait_until(lambda: bool(with_words(wrapper.log(), ": left")), "the client's end in the log")
    assert json.loads(wrapper.log().splitlines()[-1])["program"] == "xnbd-server"


def test_a_program_that_does_not_know_the_format_is_named(start_wrapper: StartWrapper, tmp_path: Path) -> None:
    old = tmp_path / "old-server"
    old.write_text("#!/bin/sh\necho --negotiated\n")
    old.chmod(0o755)
    wrapper = start_wrapper(*JSON, "--xnbd-server", old)
    (line,) = with_words(wrapper.log(), "does not know --log-format")
    assert line["level"] == "WARNING"
