"""How the wrapper starts servers and xnbd-bgctl: command lines, foreign programs, proxies without and with clients."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from conftest import MIB, Start, StartWrapper
from rawclient import ACK, ERR_UNKNOWN, ERR_UNSUP, INFO, STRUCTURED_REPLY
from server_process import ROOT, is_alive, run, title_of, wait_until
from wrapper_process import Wrapper, fails, program

from xnbd.protocol.server_handshake import Agreement
from xnbd.wrapper.exports import ProxyExport, StoredExport, TargetExport
from xnbd.wrapper.servers import ForeignServer

TESTS = ROOT / "tests" / "support"
FOREIGN = f"{sys.executable} {TESTS / 'foreign_server.py'}"
BGCTL = f"{sys.executable} {TESTS / 'foreign_bgctl.py'}"
PROXY = ProxyExport("/cache", "/bitmap", "/p.ctl", "origin", "8520")


TARGET = TargetExport("/disk")
PLAIN = Agreement()


def words(export: StoredExport = TARGET, agreement: Agreement = PLAIN, **options: Any) -> str:
    """The arguments of a server for *export*, as they would be typed."""
    return " ".join(ForeignServer(["x"], **options).arguments(export, 7, agreement))


# Command lines


def test_command_lines_are_those_of_a_c_wrapper() -> None:
    assert words(knows=()) == "--target --connected-fd 7 /disk"
    assert words(knows=(), cow=True, readonly=True, syslog=True) == (
        "--cow-target --readonly --syslog --connected-fd 7 /disk"
    )
    assert words(PROXY, knows=(), cow=True) == "--proxy --connected-fd 7 origin 8520 /cache /bitmap /p.ctl"
    everything = PROXY._replace(remote_export_name="there")
    assert words(everything, knows=(), readonly=True, syslog=True, max_queue_size="9", max_buf_size="8") == (
        "--proxy --readonly --syslog --connected-fd 7 --max-queue-size 9 --max-buf-size 8 --target-exportname there"
        " origin 8520 /cache /bitmap /p.ctl"
    )


def test_a_file_mode_is_passed_on_to_servers_that_know_it() -> None:
    assert "--file-mode 0640 " in words(file_mode="0640")
    assert "--file-mode" not in words(file_mode="0640", knows=())


def test_an_origin_on_a_unix_socket_is_a_uri_on_the_command_line() -> None:
    proxy = ProxyExport("/cache", "/bitmap", "/p.ctl", "", "", remote_uri="nbd+unix:///x?socket=/s")
    assert words(proxy).endswith(" nbd+unix:///x?socket=/s /cache /bitmap /p.ctl")


@pytest.mark.parametrize(
    ("structured", "allocation", "features"),
    [(False, False, "newstyle"), (True, False, "newstyle,structured"), (True, True, "newstyle,structured,allocation")],
)
def test_our_own_server_is_told_what_was_negotiated(structured: bool, allocation: bool, features: str) -> None:
    agreement = Agreement(structured=structured, contexts=("base:allocation",) if allocation else ())
    assert words(agreement=agreement) == f"--target --connected-fd 7 --negotiated {features} /disk"


# Programs of the user's choice


def test_an_explicit_xnbd_server_is_executed_and_told_what_was_negotiated(
    start_wrapper: StartWrapper, image: Path
) -> None:
    command = f"{sys.executable} {ROOT / 'bin' / 'xnbd-server'}"
    wrapper = start_wrapper("--imgfile", image, "--xnbd-server", command)
    with wrapper.client("disk.img", allocation=True) as client:
        (pid,) = wrapper.servers()
        client.request(0, 5, 10)
        assert client.chunks()[0].payload[8:] == image.read_bytes()[5:15]
        assert title_of(pid).startswith("xnbd-server: serving")
        assert os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
    assert run("nbdinfo", "--size", wrapper.uri("disk.img"))[1].strip() == str(image.stat().st_size)


def calls(path: Path) -> List[List[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_foreign_server_gets_clients_that_expect_simple_replies(
    start_wrapper: StartWrapper, image: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    wrapper = start_wrapper("--imgfile", image, "--xnbd-server", FOREIGN, env={"FOREIGN_LOG": str(log)})
    with wrapper.connect() as client:
        client.greet()
        assert client.option(STRUCTURED_REPLY)[0][0] == ERR_UNSUP
        assert client.go("disk.img")[-1][0] == ACK
        assert client.flags == 1 | 4, "reading, writing and flushing is all it knows"
        assert client.read(MIB, 100) == image.read_bytes()[MIB:][:100]
        assert client.works()
    asked, called = calls(log)
    assert asked == ["--help"]
    assert called[:2] == ["--target", "--connected-fd"]
    assert called[3:] == [str(image)]


def test_nbdcopy_with_a_foreign_server(start_wrapper: StartWrapper, image: Path, tmp_path: Path) -> None:
    wrapper = start_wrapper("--imgfile", image, "--xnbd-server", FOREIGN, env={"FOREIGN_LOG": str(tmp_path / "calls")})
    run("nbdcopy", wrapper.uri("disk.img"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("option", ["--xnbd-server", "--xnbd-bgctl"])
def test_a_program_that_is_not_there_ends_the_start(tmp_path: Path, option: str) -> None:
    status, message = fails(tmp_path, "--dbpath", tmp_path / "db", option, "/no/such/program")
    assert (status, "/no/such/program" in message) == (1, True)


def test_an_executed_server_logs_to_the_wrapper_s_file(
    start_wrapper: StartWrapper, image: Path, tmp_path: Path
) -> None:
    command = f"{sys.executable} {ROOT / 'bin' / 'xnbd-server'}"
    log = tmp_path / "file.log"
    where = ["--lport", "0", "--laddr", "127.0.0.1", "--socket", tmp_path / "c", "--dbpath", tmp_path / "d"]
    arguments = [*where, "--imgfile", image, "--logpath", log, "--xnbd-server", command]
    with subprocess.Popen([*program("xnbd-wrapper"), *map(str, arguments)]) as process:
        try:
            wait_until(lambda: log.exists() and "serving 1 export " in log.read_text(), "the start")
            port = log.read_text().split()[-1].rpartition(":")[2]
            run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}/disk.img")
            wait_until(lambda: "xnbd-server[" in log.read_text(), "the server's line")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


# Proxies: what the handshake tells, from a real origin


def add_proxy(wrapper: Wrapper, directory: Path, port: int, *, name: str = "far", options: List[str] = []) -> None:  # noqa: B006
    files = [directory / "cache.img", directory / "cache.bitmap", directory / "far.ctl"]
    wrapper.ctl(*options, "--add-proxy", name, "127.0.0.1", port, *files)


def test_a_proxy_has_the_size_of_its_origin(
    start_wrapper: StartWrapper, start: Start, image: Path, tmp_path: Path
) -> None:
    origin = start("--target", image, tcp=True)
    wrapper = start_wrapper()
    add_proxy(wrapper, tmp_path, origin.port)
    with wrapper.connect() as client:
        client.greet()
        assert client.go("far", option=INFO)[-1][0] == ACK
        assert client.size == image.stat().st_size


def test_a_proxy_whose_origin_is_away_is_listed_and_unavailable(
    start_wrapper: StartWrapper, start: Start, image: Path, tmp_path: Path
) -> None:
    origin = start("--target", image, tcp=True)
    wrapper = start_wrapper()
    add_proxy(wrapper, tmp_path, origin.port)
    origin.stop()
    with wrapper.connect() as client:
        client.greet()
        assert client.go("far", option=INFO)[-1][0] == ERR_UNKNOWN
        assert b"far" in client.option(3)[0][1]


def test_a_proxy_with_a_state_file_needs_no_origin_to_tell_its_size(
    start_wrapper: StartWrapper, tmp_path: Path
) -> None:
    from xnbd.origin.address import parse_origin
    from xnbd.proxy.state.opening import open_state

    cache = tmp_path / "cache.img"
    cache.write_bytes(bytes(3 * MIB))
    fd = os.open(cache, os.O_RDWR)
    origin = str(parse_origin("127.0.0.1", "9"))
    open_state(str(tmp_path / "cache.bitmap"), fd, disk_size=3 * MIB, origin=origin).close()
    os.close(fd)
    wrapper = start_wrapper()
    add_proxy(wrapper, tmp_path, 9)
    with wrapper.connect() as client:
        client.greet()
        assert client.go("far", option=INFO)[-1][0] == ACK
        assert client.size == 3 * MIB


def test_proxies_with_a_file_in_common_are_refused(start_wrapper: StartWrapper, tmp_path: Path) -> None:
    wrapper = start_wrapper()
    add_proxy(wrapper, tmp_path, 9)
    message = wrapper.refuses("--add-proxy", "b", "host", 9, tmp_path / "other", tmp_path / "cache.bitmap", "/b.ctl")
    assert "in use by the export 'far'" in message
    assert "port" in wrapper.refuses("--add-proxy", "c", "host", "port", "/c/1", "/c/2", "/c/3")


# Steering proxies, with stand-ins for a C xnbd-server and xnbd-bgctl


class Steered:
    """A wrapper with the proxy export ``far``, whose server and bgctl are stand-ins."""

    def __init__(self, start_wrapper: StartWrapper, start: Start, image: Path, tmp_path: Path) -> None:
        self.origin = start("--target", image, tcp=True)
        self.behaviour, self.go, self.calls = tmp_path / "behaviour", tmp_path / "go", tmp_path / "calls"
        self.linger = tmp_path / "linger"
        self.control = tmp_path / "far.ctl"
        self.cache = tmp_path / "cache.img"
        self.cache.write_bytes(random.Random(1).randbytes(image.stat().st_size))
        self.behaviour.write_text("ok")
        environment: Dict[str, str] = {
            "FOREIGN_LOG": str(self.calls),
            "BGCTL": str(self.behaviour),
            "BGCTL_GO": str(self.go),
            "FOREIGN_LINGER": str(self.linger),
        }
        self.wrapper = start_wrapper("--xnbd-server", FOREIGN, "--xnbd-bgctl", BGCTL, env=environment)
        add_proxy(self.wrapper, tmp_path, self.origin.port)

    def bgctl(self, *arguments: object) -> subprocess.Popen[str]:
        """xnbd-wrapper-ctl in the background."""
        command = [*program("xnbd-wrapper-ctl"), "--socket", str(self.wrapper.control), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def steered(start_wrapper: StartWrapper, start: Start, image: Path, tmp_path: Path) -> Steered:
    return Steered(start_wrapper, start, image, tmp_path)


def test_query_hands_back_output_of_bgctl(steered: Steered) -> None:
    with steered.wrapper.client("far") as client:
        assert client.works()
        assert steered.wrapper.ctl("--bgctl-query", "far") == f"called: --query {steered.control}\ndone\n"


def test_a_proxy_without_clients_gets_a_server_for_as_long_as_bgctl_runs(steered: Steered) -> None:
    assert steered.wrapper.ctl("--bgctl-cache-all", "far") == f"called: --cache-all {steered.control}\ndone\n"
    wait_until(lambda: not steered.control.exists(), "the end of that server")
    assert calls(steered.calls)[1][0] == "--proxy"


def test_a_server_that_is_about_to_leave_is_not_asked(steered: Steered) -> None:
    steered.linger.touch()
    steered.wrapper.ctl("--bgctl-query", "far")
    with steered.bgctl("--bgctl-query", "far") as second:
        steered.wrapper.ctl("--list")
        assert second.poll() is None
        steered.linger.unlink()
        assert second.wait(30) == 0
    assert [words[0] for words in calls(steered.calls)].count("--proxy") == 2


def test_who_leaves_before_the_answer_is_replaced(steered: Steered) -> None:
    steered.behaviour.write_text("lose")
    with steered.wrapper.client("far") as client:
        assert client.works()
        wait_until(steered.control.exists, "the server to listen")
        with steered.bgctl("--bgctl-query", "far") as asking:
            wait_until(steered.go.exists, "the question")
            client.sock.close()
            assert asking.wait(30) == 0
            assert asking.stdout
            assert asking.stdout.read().splitlines()[-1] == "done"


def test_failure_of_bgctl_is_handed_back(steered: Steered) -> None:
    steered.behaviour.write_text("fail")
    for option in ("--bgctl-query", "--bgctl-switch"):
        command = [*program("xnbd-wrapper-ctl"), "--socket", steered.wrapper.control, option, "far"]
        status, _, err = run(*command, check=False)
        assert (status, err) == (3, "xnbd-bgctl: it cannot be done\n")
    assert steered.wrapper.stored()["far"]["mode"] == "proxy"


def test_after_a_switch_the_export_is_a_target(steered: Steered) -> None:
    with steered.wrapper.client("far") as old:
        steered.wrapper.ctl("--bgctl-switch", "far")
        assert steered.wrapper.stored() == {"far": {"mode": "target", "image_path": str(steered.cache)}}
        with steered.wrapper.client("far") as new:
            assert old.write(0, b"hello") == 0
            assert new.read(0, 5) == b"hello"
    assert calls(steered.calls)[-1][0] == "--target"


def test_reconnect_changes_the_address_in_the_database(steered: Steered) -> None:
    with steered.wrapper.client("far") as client:
        assert client.works()
        output = steered.wrapper.ctl("--target-exportname", "n", "--bgctl-reconnect", "far", "::1", 99)
    assert output == f"called: --exportname n --reconnect {steered.control} ::1 99\ndone\n"
    stored = steered.wrapper.stored()["far"]
    assert (stored["remote_host"], stored["remote_port"], stored["remote_export_name"]) == ("::1", "99", "n")


def test_a_server_that_knows_no_uris_gets_no_origin_on_a_unix_socket_or_with_tls(steered: Steered) -> None:
    message = "knows no URIs: it can only use an origin on TCP, without TLS"
    for uri in ("nbd+unix:///?socket=/s", "nbds://h/?tls-certificates=/c"):
        assert message in steered.wrapper.refuses("--add-proxy", "near", uri, "/c/1", "/c/2", "/c/3")
        assert message in steered.wrapper.refuses("--bgctl-reconnect", "far", uri)
    steered.wrapper.ctl("--add-proxy", "near", "nbd://origin", "/c/1", "/c/2", "/c/3")


def test_reconnect_of_a_proxy_that_was_never_used_changes_the_database_only(steered: Steered) -> None:
    assert "its first server" in steered.wrapper.ctl("--bgctl-reconnect", "far", "192.0.2.9", 100)
    assert steered.wrapper.stored()["far"]["remote_host"] == "192.0.2.9"
    assert len(calls(steered.calls)) == 1, "only --help was asked for"


def test_a_long_cache_all_delays_nobody_and_its_output_comes_as_it_is_written(steered: Steered, image: Path) -> None:
    steered.behaviour.write_text("wait")
    with steered.bgctl("--bgctl-cache-all", "far") as copying:
        assert copying.stdout
        assert copying.stdout.readline().startswith("called: --cache-all")
        steered.wrapper.ctl("--add-target", "another", image)
        with steered.wrapper.client("another") as client:
            assert client.works()
        steered.go.touch()
        assert copying.stdout.read() == "done\n"
    assert copying.returncode == 0


def bgctl_processes(wrapper: Wrapper) -> List[int]:
    return [pid for pid in wrapper.servers() if "foreign_bgctl" in title_of(pid)]


def test_cache_all_ends_with_the_operator(steered: Steered) -> None:
    steered.behaviour.write_text("wait")
    with steered.bgctl("--bgctl-cache-all", "far") as copying:
        assert copying.stdout
        copying.stdout.readline()
        copying.send_signal(signal.SIGINT)
        assert copying.wait(60) == 130
    wait_until(lambda: not bgctl_processes(steered.wrapper), "the end of xnbd-bgctl")
    wait_until(lambda: not steered.control.exists(), "the end of the server that was started for it")


def test_a_switch_is_booked_even_if_the_operator_left(steered: Steered) -> None:
    steered.behaviour.write_text("wait")
    with steered.bgctl("--bgctl-switch", "far") as switching:
        assert switching.stdout
        switching.stdout.readline()
        switching.kill()
    steered.go.touch()
    wait_until(lambda: steered.wrapper.stored()["far"]["mode"] == "target", "the booking")


def test_shutdown_ends_a_cache_all(steered: Steered) -> None:
    steered.behaviour.write_text("wait")
    with steered.bgctl("--bgctl-cache-all", "far") as copying:
        assert copying.stdout
        copying.stdout.readline()
        pids = steered.wrapper.servers()
        steered.wrapper.ctl("--shutdown")
        assert copying.wait(60) == 1
    assert steered.wrapper.process.wait(60) == 0
    wait_until(lambda: not any(map(is_alive, pids)), "all ends")
