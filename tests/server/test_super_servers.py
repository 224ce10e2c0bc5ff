"""One client on a descriptor that somebody else has accepted: a real inetd, systemd, and --connected-fd."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from conftest import MIB
from launch import fails, launched
from rawclient import BLOCK_STATUS, DISC, FLUSH, READ, RawClient, pack_request
from server_process import ROOT, command, free_port, run, wait_until

INETD = shutil.which("inetd", path="/usr/sbin:/usr/bin") or "inetd"


@contextmanager
def inetd(tmp_path: Path, *arguments: object) -> Iterator[int]:
    """A port of 127.0.0.1 behind which inetd starts xnbd-server with *arguments*."""
    port = free_port()
    program = command("--inetd", *arguments)
    configuration = tmp_path / "inetd.conf"
    configuration.write_text(
        f"127.0.0.1:{port} stream tcp nowait {getpass.getuser()} {program[0]} {' '.join(program)}\n"
    )
    with launched([INETD, "-i", configuration], tmp_path / "inetd.log"):
        wait_until(lambda: answers(port), "inetd's port")
        yield port


def answers(port: int) -> bool:
    """Whether somebody listens; asked without connecting, which would start a server."""
    return f"127.0.0.1:{port} " in run("ss", "-Htln")[1]


def connect(port: int) -> RawClient:
    return RawClient(socket.create_connection(("127.0.0.1", port), timeout=60))


# inetd


def test_nbdinfo_by_inetd(tmp_path: Path, image: Path) -> None:
    with inetd(tmp_path, "--target", "--logpath", tmp_path / "log", image) as port:
        assert int(run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}")[1]) == image.stat().st_size
        assert 'export="disk.img"' in run("nbdinfo", "--list", f"nbd://127.0.0.1:{port}")[1]
        wait_until(lambda: ": connected" in (tmp_path / "log").read_text(), "the client in the log")


def test_nbdcopy_by_inetd_in_and_out(tmp_path: Path, image: Path) -> None:
    copy, again = tmp_path / "copy.img", tmp_path / "again.img"
    size = image.stat().st_size
    with inetd(tmp_path, "--target", "--logpath", tmp_path / "log", "--create", size, copy) as port:
        uri = f"nbd://127.0.0.1:{port}"
        run("nbdcopy", "--connections=3", image, uri)
        run("nbdcopy", "--connections=3", uri, again)
    assert copy.read_bytes() == image.read_bytes() == again.read_bytes()


def test_inetd_without_a_log_file_puts_nothing_on_the_client_s_socket(tmp_path: Path, image: Path) -> None:
    with inetd(tmp_path, "--target", "--verbose", image) as port, connect(port) as client:
        assert client.negotiate().read(0, 100) == image.read_bytes()[:100]
        assert client.works()
        client.request(DISC)
        assert client.closed()


@pytest.mark.parametrize("wrong", [["--spin", "x"], ["--no-such-option"], ["--create", "0"], []])
def test_failure_under_inetd_puts_nothing_on_the_client_s_socket(tmp_path: Path, wrong: List[str]) -> None:
    with inetd(tmp_path, "--target", *wrong, tmp_path / "missing.img") as port, connect(port) as client:
        assert client.closed()


def test_failure_under_inetd_is_in_the_log(tmp_path: Path) -> None:
    with inetd(tmp_path, "--target", "--logpath", tmp_path / "log", tmp_path / "missing.img") as port:
        with connect(port) as client:
            assert client.closed()
        assert "missing.img: No such file" in (tmp_path / "log").read_text()


def test_inetd_s_server_leaves_with_its_client(tmp_path: Path, image: Path) -> None:
    log = tmp_path / "log"
    with inetd(tmp_path, "--target", "--logpath", log, image) as port:
        connect(port).negotiate().sock.close()
        wait_until(lambda: log.exists() and ": left" in log.read_text(), "the server's end")


def test_inetd_takes_a_socket_only(image: Path) -> None:
    status, message = fails("--target", "--inetd", image)
    assert status == 1
    assert "standard input is no socket" in message


def test_systemd_with_a_process_for_each_connection(tmp_path: Path, image: Path) -> None:
    port = free_port()
    server = command("--inetd", "--target", "--logpath", tmp_path / "log", image)
    program = ["systemd-socket-activate", "--accept", "--inetd", "-l", f"127.0.0.1:{port}", *server]
    with launched(program, tmp_path / "systemd.log") as activator:
        activator.wait_for_log("Listening on")
        for _ in range(2):
            assert int(run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}")[1]) == image.stat().st_size


# --connected-fd


class Wrapped:
    """A server on one end of a connected socket, and the raw client on the other."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, log_path: Path, *arguments: object) -> None:
        ours.settimeout(60)
        self.client = RawClient(ours)
        self._log_path = log_path
        with open(log_path, "wb") as log:
            self.process = subprocess.Popen(
                command("--target", "--connected-fd", theirs.fileno(), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()

    def status(self) -> int:
        """Exit status; waits for the end."""
        return self.process.wait(60)

    def stop(self) -> None:
        self.client.sock.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        log = self._log_path.read_text()
        assert "Traceback" not in log, log
        assert " ERROR: " not in log, log


@contextmanager
def wrapped(
    tmp_path: Path, *arguments: object, tcp: bool = False, blocking: bool = True, fd: int = -1
) -> Iterator[Wrapped]:
    """A server that is given its client's socket, as descriptor *fd* if that is given."""
    ours, theirs = tcp_pair() if tcp else socket.socketpair()
    theirs.setblocking(blocking)
    if fd >= 0:
        os.dup2(theirs.fileno(), fd)
        theirs.close()
        theirs = socket.socket(fileno=fd)
    server = Wrapped(ours, theirs, tmp_path / "wrapped.log", *arguments)
    try:
        yield server
    finally:
        server.stop()


def tcp_pair() -> Tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("blocking", [True, False])
def test_first_byte_is_a_request(tmp_path: Path, image: Path, tcp: bool, blocking: bool) -> None:
    before = image.read_bytes()
    with wrapped(tmp_path, image, tcp=tcp, blocking=blocking) as server:
        assert server.client.read(1000, 4097) == before[1000:5097]
        assert server.client.write(5, b"wrapped") == 0
        assert server.client.works()
    assert image.read_bytes() == before[:5] + b"wrapped" + before[12:]


def test_request_sent_before_the_server_started_is_served(tmp_path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(pack_request(READ, 7, 9, cookie=3))
    server = Wrapped(ours, theirs, tmp_path / "log", image)
    assert server.client.simple_reply(9) == (0, 3, image.read_bytes()[7:16])
    server.stop()


@pytest.mark.parametrize("blocking", [True, False])
def test_more_than_the_socket_holds_waits_for_the_client(tmp_path: Path, image: Path, blocking: bool) -> None:
    """A descriptor that was passed non-blocking must not make the server give up or lose bytes."""
    with wrapped(tmp_path, image, blocking=blocking) as server:
        for cookie in range(4):
            server.client.request(READ, cookie, 8 * MIB, cookie=cookie)
        server.client.send(b"".join(pack_request(READ, 0, 1, cookie=cookie) for cookie in range(4, 8)))
        content = image.read_bytes()
        for cookie in range(4):
            assert server.client.simple_reply(8 * MIB) == (0, cookie, content[cookie : cookie + 8 * MIB])
        for cookie in range(4, 8):
            assert server.client.simple_reply(1) == (0, cookie, content[:1])


def test_replies_come_in_the_order_of_the_requests(tmp_path: Path, image: Path) -> None:
    """Old peers use one cookie for everything."""
    with wrapped(tmp_path, image) as server:
        requests = [(FLUSH, 0, 0), (READ, 0, MIB), (READ, 5, 1), (FLUSH, 0, 0), (READ, 4096, 70_000), (READ, 1, 2)]
        server.client.send(b"".join(pack_request(*request, cookie=9) for request in requests * 5))
        content = image.read_bytes()
        for command_, offset, length in requests * 5:
            length = length if command_ == READ else 0
            assert server.client.simple_reply(length) == (0, 9, content[offset : offset + length])


def test_requests_above_the_advertised_size_and_fua_are_served(tmp_path: Path) -> None:
    """What was negotiated is unknown here, so nothing is refused that costs nothing."""
    path = tmp_path / "large.img"
    data = os.urandom(MIB) * 50
    with wrapped(tmp_path, "--create", "64M", path) as server:
        assert server.client.write(3, data, flags=1) == 0
        assert server.client.read(3, len(data)) == data


@pytest.mark.parametrize("politely", [True, False])
def test_server_leaves_when_the_client_leaves(tmp_path: Path, image: Path, politely: bool) -> None:
    with wrapped(tmp_path, image) as server:
        assert server.client.works()
        if politely:
            server.client.request(DISC)
            assert server.client.closed()
        else:
            server.client.sock.close()
        assert server.status() == 0


def test_server_leaves_at_sigterm(tmp_path: Path, image: Path) -> None:
    with wrapped(tmp_path, image) as server:
        assert server.client.works()
        server.process.send_signal(signal.SIGTERM)
        assert server.client.closed()
        server.client.sock.close()
        assert server.status() == 0


def test_server_leaves_at_once_if_the_client_has_gone_before(tmp_path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    server = Wrapped(ours, theirs, tmp_path / "log", image)
    ours.close()
    assert server.status() == 0
    server.stop()


def test_read_only_disk_disconnects_a_writer(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with wrapped(tmp_path, "--readonly", image) as server:
        assert server.client.read(0, 10) == before[:10]
        server.client.request(1, 0, 4, data=b"evil")
        assert server.client.closed()
        assert server.status() == 0
    assert image.read_bytes() == before


def test_any_descriptor_number_will_do(tmp_path: Path, image: Path) -> None:
    with wrapped(tmp_path, image, fd=200) as server:
        assert server.client.works()


def test_standard_input_will_do(tmp_path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command("--target", "--connected-fd", 0, image), stdin=theirs.fileno(), stdout=log, stderr=log
        )
    theirs.close()
    with RawClient(ours) as client:
        assert client.works()
    assert process.wait(60) == 0


def test_what_the_wrapper_has_negotiated_is_spoken(tmp_path: Path, image: Path) -> None:
    with wrapped(tmp_path, "--negotiated", "newstyle,structured,allocation", image) as server:
        server.client.request(READ, 0, 100)
        (data,) = server.client.chunks()
        assert data.payload[8:] == image.read_bytes()[:100]
        server.client.request(BLOCK_STATUS, 0, 4096)
        assert server.client.chunk().kind == 5


@pytest.mark.parametrize(
    "features", ["structure", "allocation", "newstyle,written", "structured,", "newstyle structured"]
)
def test_negotiated_features_that_make_no_sense_are_refused(image: Path, features: str) -> None:
    status, message = fails("--target", "--connected-fd", 0, "--negotiated", features, image)
    assert status == 2
    assert "--negotiated" in message


def test_descriptor_that_is_not_open_is_refused(image: Path) -> None:
    status, message = fails("--target", "--connected-fd", 99, image)
    assert status == 1
    assert "descriptor" in message


@pytest.mark.parametrize("kind", ["file", "listening", "datagram", "pipe"])
def test_descriptor_that_is_no_client_is_refused(tmp_path: Path, image: Path, kind: str) -> None:
    fds: List[int] = []
    if kind == "file":
        fds.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
    elif kind == "pipe":
        fds.extend(os.pipe())
    elif kind == "listening":
        fds.append(socket.create_server(("127.0.0.1", 0)).detach())
    else:
        fds.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())
    done = subprocess.run(
        command("--target", "--connected-fd", fds[0], image), capture_output=True, text=True, timeout=60, pass_fds=fds
    )
    for fd in fds:
        os.close(fd)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("xnbd-server: the client's descriptor is no ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_inetd_and_connected_fd_do_not_go_together(image: Path) -> None:
    status, message = fails("--target", "--inetd", "--connected-fd", 0, image)
    assert status == 2
    assert "--inetd and --connected-fd do not go together" in message


@pytest.mark.parametrize("streams", [(0,), (1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_client_on_standard_streams_gets_replies_and_no_log(
    tmp_path: Path, image: Path, streams: Tuple[int, ...]
) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with open(tmp_path / "log", "wb") as log:
        stdin, stdout, stderr = ((theirs if stream in streams else log).fileno() for stream in range(3))
        line = command("--target", "--verbose", "--connected-fd", streams[-1], image)
        process = subprocess.Popen(line, stdin=stdin, stdout=stdout, stderr=stderr)
    theirs.close()
    with stopped_in_the_end(process), RawClient(ours) as client:
        client.send(pack_request(READ, 0, 512, cookie=1) + pack_request(99, 0, 0, cookie=2))
        assert client.simple_reply(512) == (0, 1, image.read_bytes()[:512])
        assert client.simple_reply() == (22, 2, b"")
        client.request(DISC)
        assert client.closed()
        assert process.wait(60) == 0


@contextmanager
def stopped_in_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with process:
        try:
            yield
        finally:
            process.kill()


def test_version_goes_to_a_socket_if_standard_error_is_elsewhere() -> None:
    """Programs that run others often give them a socket for a pipe, as Node.js does."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fd = theirs.fileno()
            process = subprocess.Popen(command("--version"), stdin=fd, stdout=fd, stderr=subprocess.DEVNULL)
        ours.settimeout(60)
        with stopped_in_the_end(process):
            assert ours.recv(1000).startswith(b"xnbd-server ")
            assert process.wait(60) == 0


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    install_units(tmp_path)
    assert run("systemd-analyze", "verify", "--man=no", *tmp_path.iterdir()) == (0, "", "")


def install_units(directory: Path) -> None:
    for unit in (ROOT / "contrib" / "systemd").glob("xnbd*"):
        text = unit.read_text()
        assert "ExecStart=/opt/xnbd/bin/xnbd-" in text or unit.suffix == ".socket"
        name = unit.name.replace("@", "@8520")
        (directory / name).write_text(re.sub("/opt/xnbd/bin/[a-z-]+", "/bin/true", text))


def test_systemd_understands_the_units_with_tls(tmp_path: Path) -> None:
    """With all lines of the drop-in, those that a site may want too."""
    install_units(tmp_path)
    drop_in = re.sub("(?m)^#(?=[A-Z])", "", (ROOT / "contrib" / "systemd" / "tls.conf").read_text())
    units = list(tmp_path.glob("*.service"))
    assert len(units) == 2
    for unit in units:
        (tmp_path / f"{unit.name}.d").mkdir()
        (tmp_path / f"{unit.name}.d" / "tls.conf").write_text(drop_in)
    assert run("systemd-analyze", "verify", "--man=no", *units) == (0, "", "")
