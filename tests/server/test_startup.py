"""Starting: images that cannot be served, --create, the background, pid files, logs."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import MIB, Start
from launch import fails, launched, serving, stop_daemon
from origin_programs import is_listening
from rawclient import LIST, RawClient
from server_process import START_TIME, children_of, command, free_port, is_alive, run, title_of, wait_until

from xnbd.system.process import PidFile

NOBODY = 65534


def connect(path: Path) -> RawClient:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(path))
    return RawClient(sock)


# Images that cannot be served


def test_missing_image_is_told_how_to_make_it(tmp_path: Path) -> None:
    status, message = fails("--target", "--lport", 0, tmp_path / "missing.img")
    assert status == 1
    assert f"{tmp_path}/missing.img: No such file" in message
    assert "--create" in message


def test_empty_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.img").touch()
    status, message = fails("--target", "--lport", 0, tmp_path / "empty.img")
    assert status == 1
    assert "empty.img is empty" in message


@pytest.mark.parametrize("readonly", [[], ["--readonly"]])
@pytest.mark.parametrize("path", ["/", "/dev/null"])
def test_what_is_no_disk_is_refused(path: str, readonly: List[str]) -> None:
    status, message = fails("--target", *readonly, "--lport", 0, path)
    assert status == 1
    assert path in message


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for options in ([], ["--readonly"]):
        status, message = fails("--target", *options, "--lport", 0, tmp_path / "fifo", timeout=10)
        assert status == 1
        assert "fifo" in message


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that everybody may enter, unlike pytest's own, and write to."""
    directory = Path(tempfile.mkdtemp(prefix="xnbd-test-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def unprivileged() -> List[str]:
    """What has to stand before a command so that permissions apply to it: root stays root, without its capabilities."""
    if os.geteuid():
        return []
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]


@pytest.mark.parametrize("mode, readonly", [(0, []), (0, ["--readonly"]), (0o444, [])])
def test_image_without_permission_is_refused(public_directory: Path, mode: int, readonly: List[str]) -> None:
    image = public_directory / "disk.img"
    image.write_bytes(bytes(MIB))
    image.chmod(mode)
    status, message = fails("--target", *readonly, "--lport", 0, image, prefix=unprivileged())
    assert status == 1
    assert f"{image}: Permission denied" in message
    assert ("--readonly" in message) != bool(readonly)


def test_unwritable_image_is_served_with_readonly(public_directory: Path) -> None:
    image = public_directory / "disk.img"
    image.write_bytes(b"x" * MIB)
    image.chmod(0o444)
    sock = public_directory / "sock"
    log = public_directory / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [*unprivileged(), *command("--target", "--readonly", "--unix", sock, image)], stdout=output, stderr=output
        )
    try:
        wait_until(lambda: "serving" in log.read_text() or server.poll() is not None, "the server's start")
        with connect(sock) as client:
            assert client.negotiate().read(0, 4) == b"xxxx"
    finally:
        server.terminate()
        server.wait(60)


def test_directory_of_a_new_image_is_missing(tmp_path: Path) -> None:
    status, message = fails("--target", "--create", "1M", "--lport", 0, tmp_path / "no" / "disk.img")
    assert status == 1
    assert "No such file" in message


# Ports


def test_port_in_use_is_named_with_its_holder(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    status, message = fails("--target", "--laddr", "127.0.0.1", "--lport", server.port, image)
    assert status == 1
    assert f"port {server.port} is in use" in message
    assert f" by xnbd-server: master {image.name} (process {server.pid})" in message
    assert "--lport" in message


def test_port_in_use_on_one_address_only_is_in_use(image: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as holder:
        port = holder.getsockname()[1]
        status, message = fails("--target", "--lport", port, image)
    assert status == 1
    assert f"port {port} is in use" in message


@pytest.mark.parametrize("address", ["192.0.2.1", "no-such-host.invalid", "2001:db8::1"])
def test_address_that_is_not_ours_is_named(image: Path, address: str) -> None:
    status, message = fails("--target", "--laddr", address, "--lport", 0, image)
    assert status == 1
    assert address in message


def test_port_reserved_for_root(public_directory: Path) -> None:
    """Containers often allow every port to everybody; there is nothing to refuse then."""
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1023:
        pytest.skip("this system reserves no ports for root")
    image = public_directory / "disk.img"
    image.write_bytes(bytes(MIB))
    image.chmod(0o666)
    status, message = fails("--target", "--laddr", "127.0.0.1", "--lport", 1023, image, prefix=unprivileged())
    assert status == 1
    assert "1023 is reserved for root" in message


# --create


@pytest.mark.parametrize(
    "text, size",
    [("1", 1), ("4097", 4097), ("3K", 3 << 10), ("2m", 2 << 20), ("1G", 1 << 30), ("1GiB", 1 << 30), ("2T", 2 << 40)],
)
def test_create_makes_a_sparse_image_of_exactly_that_size(start: Start, tmp_path: Path, text: str, size: int) -> None:
    image = tmp_path / "new.img"
    server = start("--target", "--create", text, image)
    assert image.stat().st_size == size
    assert image.stat().st_blocks == 0
    with RawClient(server.connect()) as client:
        assert client.negotiate().size == size
        assert client.read(size - 1, 1) == b"\0"


def test_create_leaves_an_existing_image_alone(start: Start, image: Path) -> None:
    before = image.read_bytes()
    start("--target", "--create", "1G", image)
    assert image.read_bytes() == before


def test_create_fills_no_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.img").touch()
    status, message = fails("--target", "--create", "1G", "--lport", 0, tmp_path / "empty.img")
    assert (status, "is empty" in message) == (1, True)
    assert (tmp_path / "empty.img").stat().st_size == 0


def test_create_of_more_than_the_file_system_can_leaves_nothing(tmp_path: Path) -> None:
    status, message = fails("--target", "--create", "7E", "--lport", 0, tmp_path / "huge.img")
    assert status == 1
    assert "huge.img" in message
    assert not (tmp_path / "huge.img").exists()


# The background


@contextmanager
def daemon(directory: Path, *arguments: object, mode: str = "--target") -> Iterator[int]:
    """The process id of a daemon that was started in *directory*; it is stopped at the end."""
    pid_file = directory / "pid"
    try:
        done = subprocess.run(
            command(mode, "--daemonize", "--pidfile", "pid", "--logpath", "log", "--unix", "sock", *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIME,
            cwd=directory,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        yield int(pid_file.read_text())
    finally:
        stop_daemon(pid_file)
    log = (directory / "log").read_text()
    assert "Traceback" not in log, log
    assert " ERROR: " not in log, log


def test_daemon_listens_when_its_parent_returns(image: Path) -> None:
    with daemon(image.parent, image.name), connect(image.parent / "sock") as client:
        client.negotiate()
        assert client.read(0, 100) == image.read_bytes()[:100]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_daemon_started_without_standard_streams_serves_and_logs(image: Path, closed: str) -> None:
    """What is opened first must not get the number of one of them: the daemon gives them away."""
    pid_file, log = image.parent / "pid", image.parent / "log"
    line = command("--target", "--daemonize", "--pidfile", pid_file, "--logpath", log, "--unix", image.parent / "sock")
    try:
        assert subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *line, image], timeout=30).returncode == 0
        with connect(image.parent / "sock") as client:
            client.negotiate()
            assert client.read(0, 100) == image.read_bytes()[:100]
    finally:
        stop_daemon(pid_file)
    assert "stopping" in log.read_text()


def test_daemon_is_on_its_own(image: Path) -> None:
    """No terminal, no directory and no stream of its parent keeps it."""
    with daemon(image.parent, image.name) as pid:
        process = Path(f"/proc/{pid}")
        assert os.getsid(pid) not in (os.getsid(0), pid)
        assert (process / "cwd").readlink() == Path("/")
        assert [os.fspath((process / "fd" / str(fd)).readlink()) for fd in range(3)] == ["/dev/null"] * 3


def test_no_process_of_a_daemon_keeps_what_its_starter_reads(image: Path) -> None:
    """The steward is started before the terminal is let go: ``$(xnbd-server --daemonize ...)`` waited for its end."""
    with daemon(image.parent, "--control", "ctl", image.name) as pid:
        for process in (pid, *children_of(pid)):
            streams = [os.fspath(Path(f"/proc/{process}/fd/{fd}").readlink()) for fd in range(3)]
            assert streams == ["/dev/null"] * 3


def test_daemon_finds_its_origin_where_it_was_started(start: Start, image: Path) -> None:
    origin = start("--target", "--readonly", image)
    proxy = f"nbd+unix:///?socket={origin.socket.name}", "cache", "bitmap", "ctl"
    with daemon(image.parent, *proxy, mode="--proxy"), connect(image.parent / "sock") as client:
        client.negotiate()
        assert client.read(0, 100) == image.read_bytes()[:100]


def test_daemon_logs_to_its_file(image: Path) -> None:
    with daemon(image.parent, image.name) as pid:
        log = (image.parent / "log").read_text()
        assert f"[{pid}] INFO: serving disk image {image.name}" in log


def test_daemon_finds_relative_paths_after_it_has_left_the_directory(image: Path) -> None:
    with daemon(image.parent, image.name):
        for name in ("pid", "log", "sock"):
            assert (image.parent / name).exists()
        with connect(image.parent / "sock") as client:
            client.negotiate()


def test_daemon_reopens_a_log_that_was_moved_away(image: Path) -> None:
    log = image.parent / "log"
    with daemon(image.parent, image.name):
        log.rename(image.parent / "log.1")
        with connect(image.parent / "sock") as client:
            client.negotiate()
        wait_until(lambda: log.exists() and ": connected" in log.read_text(), "the client in the new log")


def test_daemon_removes_its_pid_file_and_socket(image: Path) -> None:
    with daemon(image.parent, image.name) as pid:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        assert not (image.parent / "pid").exists()
        assert not (image.parent / "sock").exists()


def test_daemon_that_cannot_start_says_so_and_fails(tmp_path: Path) -> None:
    status, message = fails(
        "--target", "--daemonize", "--logpath", tmp_path / "log", "--unix", tmp_path / "sock", tmp_path / "missing.img"
    )
    assert status == 1
    assert "missing.img" in message
    assert "missing.img" in (tmp_path / "log").read_text()


def test_daemon_with_a_bad_option_fails_with_usage_status(image: Path) -> None:
    status, message = fails("--target", "--daemonize", "--logpath", image.parent / "log", "--spin", "x", image)
    assert status == 2
    assert "--spin" in message


def test_daemon_whose_port_is_in_use_fails(image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        log = image.parent / "log"
        arguments = ["--daemonize", "--laddr", "127.0.0.1", "--lport", port, "--logpath", log]
        status, message = fails("--target", *arguments, image)
    assert status == 1
    assert f"port {port} is in use" in message


# Pid files


def test_pid_file_names_the_master(start: Start, image: Path) -> None:
    pid_file = image.parent / "pid"
    server = start("--target", "--pidfile", pid_file, image)
    assert pid_file.read_text() == f"{server.pid}\n"
    assert server.stop() == 0
    assert not pid_file.exists()


def test_pid_file_of_a_live_server_is_refused(start: Start, image: Path) -> None:
    pid_file = image.parent / "pid"
    server = start("--target", "--pidfile", pid_file, image)
    status, message = fails("--target", "--pidfile", pid_file, "--unix", image.parent / "other", image)
    assert status == 1
    assert f"{pid_file} is held by a running server" in message
    assert pid_file.read_text() == f"{server.pid}\n"
    assert not (image.parent / "other").exists()


def test_pid_file_that_may_not_be_made_is_not_said_to_be_held(image: Path) -> None:
    status, message = fails("--target", "--pidfile", "/sys/kernel/xnbd.pid", "--lport", 0, image)  # not even root may
    assert status == 1
    assert "cannot write pid file /sys/kernel/xnbd.pid: Permission denied" in message


def test_pid_file_that_finds_no_space_is_no_traceback(image: Path) -> None:
    pid_file = image.parent / "pid"
    status, message = fails("--target", "--pidfile", pid_file, "--lport", 0, image, prefix=["prlimit", "--fsize=0"])
    assert status == 1
    assert "File too large (ulimit -f is too low)" in message
    assert not pid_file.exists()


def test_pid_file_of_a_dead_server_is_taken_over(start: Start, image: Path) -> None:
    pid_file = image.parent / "pid"
    pid_file.write_text("123456789\n")
    server = start("--target", "--pidfile", pid_file, image)
    assert pid_file.read_text() == f"{server.pid}\n"


@pytest.mark.parametrize("content", ["", "\0" * 6])
def test_pid_file_that_a_power_failure_has_emptied_is_taken_over(start: Start, image: Path, content: str) -> None:
    pid_file = image.parent / "pid"
    pid_file.write_text(content)
    server = start("--target", "--pidfile", pid_file, image)
    assert pid_file.read_text() == f"{server.pid}\n"


@pytest.mark.parametrize("content", ["precious", "1234 and more", "1" * 33, "\0" * 512])
def test_file_that_is_no_pid_file_is_left_alone(image: Path, content: str) -> None:
    victim = image.parent / "victim"
    victim.write_text(content)
    status, message = fails("--target", "--pidfile", victim, "--lport", 0, image)
    assert (status, victim.read_text()) == (1, content)
    assert f"{victim} is no pid file: remove it, or choose another --pidfile" in message


def test_pid_file_that_goes_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that had it was just ending."""
    path, lockf = tmp_path / "pid", fcntl.lockf
    path.write_text("123456789\n")
    pid_file = PidFile(str(path))
    assert not path.exists()  # who waits for it must not find a dead server's

    def lock_late(fd: int, how: int) -> None:
        monkeypatch.undo()
        path.unlink()
        lockf(fd, how)

    monkeypatch.setattr(fcntl, "lockf", lock_late)
    pid_file.write()
    assert path.read_text() == f"{os.getpid()}\n"
    pid_file.remove()
    assert not path.exists()


def test_a_child_that_is_none_of_the_server_s_is_no_worker_that_died(tmp_path: Path, image: Path) -> None:
    """Process 1 of a container gets the children of a dead steward, a program that was executed those of the shell."""
    os.mkfifo(tmp_path / "fifo")
    words = shlex.join(command("--target", "--unix", str(tmp_path / "sock"), str(image)))
    with launched(["sh", "-c", f"(read -r _; exit 3) < {tmp_path}/fifo & exec {words}"], tmp_path / "log") as server:
        wait_until(lambda: bool(children_of(server.process.pid)), "the shell's child")
        stranger = children_of(server.process.pid)[0]
        server.wait_for_log("INFO: serving ")
        (tmp_path / "fifo").write_text("end\n")
        wait_until(lambda: stranger not in children_of(server.process.pid), "the end of the shell's child")


def test_files_of_a_killed_server_do_not_stop_the_next(start: Start, image: Path) -> None:
    pid_file, sock = image.parent / "pid", image.parent / "sock"
    with serving(image.parent / "log", "--target", "--pidfile", pid_file, "--unix", sock, image) as server:
        server.stop(signal.SIGKILL)
        wait_until(lambda: not is_listening(sock), "the workers' end")
        assert pid_file.exists()
        assert sock.exists()
    with serving(image.parent / "log2", "--target", "--pidfile", pid_file, "--unix", sock, image) as server:
        assert pid_file.read_text() == f"{server.process.pid}\n"
        with connect(sock) as client:
            client.negotiate()


def test_pid_file_of_a_server_that_cannot_start_is_removed(image: Path) -> None:
    fails("--target", "--pidfile", image.parent / "pid", "--lport", 0, image.parent / "missing.img")
    assert not (image.parent / "pid").exists()


@pytest.mark.parametrize("option", ["--pidfile", "--logpath"])
def test_symbolic_link_is_not_followed(image: Path, option: str) -> None:
    victim = image.parent / "victim"
    victim.write_text("precious")
    (image.parent / "link").symlink_to(victim)
    status, message = fails("--target", option, image.parent / "link", "--lport", 0, image)
    assert status == 1
    assert "symbolic link" in message
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("option", ["--pidfile", "--logpath"])
def test_file_that_cannot_be_written_is_named(image: Path, option: str) -> None:
    status, message = fails("--target", option, image.parent / "no" / "file", "--lport", 0, image)
    assert status == 1
    assert f"{image.parent}/no/file: No such file" in message


# Logs


def test_log_goes_to_the_file_alone_if_there_is_one(tmp_path: Path, image: Path) -> None:
    log, sock = tmp_path / "server.log", tmp_path / "sock"
    with open(tmp_path / "streams", "wb") as streams:
        server = subprocess.Popen(
            command("--target", "--logpath", log, "--unix", sock, image), stdout=streams, stderr=streams
        )
    try:
        wait_until(lambda: log.exists() and "serving" in log.read_text(), "the log file")
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert (tmp_path / "streams").read_bytes() == b""


@contextmanager
def the_only_syslog() -> Iterator[None]:
    """Tests that run at once stand in for the syslog daemon one after the other."""
    with open(Path(tempfile.gettempdir()) / "xnbd-test-syslog.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def syslog() -> Iterator[socket.socket]:
    """A stand-in for the syslog daemon, if the machine has none."""
    path = Path("/dev/log")
    if os.geteuid():
        pytest.skip("only root can stand in for the syslog daemon")
    with the_only_syslog(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if path.exists() or path.is_symlink():
            pytest.skip("a real syslog daemon listens on /dev/log")
        sock.bind(str(path))
        sock.settimeout(60)
        try:
            yield sock
        finally:
            path.unlink()


def syslog_line(syslog: socket.socket, text: str) -> str:
    """The first line that contains *text*; other programs may log at the same time."""
    while True:
        line = syslog.recv(4096).decode(errors="replace")
        if text in line:
            return line


def test_syslog(syslog: socket.socket, start: Start, image: Path) -> None:
    server = start("--target", "--syslog", image)
    line = syslog_line(syslog, f"xnbd-server[{server.pid}]: serving disk image disk.img")
    assert line.startswith("<30>")  # daemon.info
    assert server.log() == ""


def test_syslog_and_file_both_get_everything(syslog: socket.socket, start: Start, image: Path) -> None:
    log = image.parent / "file.log"
    server = start("--target", "--syslog", "--logpath", log, image)
    assert syslog_line(syslog, f"xnbd-server[{server.pid}]: serving disk image")
    assert "serving disk image" in log.read_text()


def test_daemon_logs_to_syslog_unless_told_otherwise(syslog: socket.socket, image: Path) -> None:
    sock, pid_file = image.parent / "sock", image.parent / "pid"
    try:
        run(*command("--target", "--daemonize", "--pidfile", pid_file, "--unix", sock, image))
        assert syslog_line(syslog, f"xnbd-server[{pid_file.read_text().strip()}]: serving")
    finally:
        stop_daemon(pid_file)


def test_daemon_that_cannot_start_tells_syslog_too(syslog: socket.socket, tmp_path: Path) -> None:
    fails("--target", "--daemonize", "--lport", free_port(), tmp_path / "missing.img")
    assert syslog_line(syslog, f"{tmp_path}/missing.img: No such file").startswith("<27>")  # daemon.err


# Names that are no UTF-8, and values beyond all measure


@pytest.fixture
def oddly_named(tmp_path: Path) -> Path:
    path = tmp_path / os.fsdecode(b"disk-\xff.img")
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def test_image_whose_name_is_no_utf8_is_served(start: Start, oddly_named: Path) -> None:
    server = start("--target", oddly_named)
    server.wait_for_log(r"serving disk image disk-\udcff.img")
    wait_until(lambda: title_of(server.pid) == r"xnbd-server: master disk-\udcff.img", "the master's title")
    with RawClient(server.connect()) as client:
        assert client.negotiate().read(0, 256) == bytes(range(256))
    with RawClient(server.connect()) as client:
        client.greet()
        assert client.option(LIST)[0][1][4:14] == b"disk-\xff.img"


def test_daemon_serves_an_image_whose_name_is_no_utf8(oddly_named: Path) -> None:
    with daemon(oddly_named.parent, oddly_named.name), connect(oddly_named.parent / "sock") as client:
        assert client.negotiate().read(0, 256) == bytes(range(256))
        assert r"serving disk image disk-\udcff.img" in (oddly_named.parent / "log").read_text()


def test_name_that_is_no_utf8_goes_to_syslog(syslog: socket.socket, oddly_named: Path) -> None:
    sock, pid_file = oddly_named.parent / "sock", oddly_named.parent / "pid"
    try:
        run(*command("--target", "--daemonize", "--pidfile", pid_file, "--unix", sock, oddly_named))
        said = f"xnbd-server[{pid_file.read_text().strip()}]: serving disk image "
        assert r"disk-\udcff.img" in syslog_line(syslog, said)
        with connect(sock) as client:
            assert client.negotiate().works()
    finally:
        stop_daemon(pid_file)


@pytest.mark.parametrize("option, value", [("--exportname", "x" * 5000), ("--lport", "8" * 5000)])
def test_value_beyond_all_measure_is_refused(image: Path, option: str, value: str) -> None:
    status, message = fails("--target", option, value, image)
    assert status == 2
    assert message.startswith(f"xnbd-server: {option}")
