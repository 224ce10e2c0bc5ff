"""Where clients reach the server, how many are served at once, and what the processes look like."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Set, Tuple

import psutil
import pytest
from conftest import Start
from launch import fails, launched, serving
from rawclient import RawClient
from server_process import Server, children_of, command, free_port, run, title_of, wait_until

from xnbd.system.listen import UnixSocket

_PIDFD_GETFD = 438
"""System call number, the same on all architectures (``pidfd_getfd(2)``)."""


def connect_tcp(address: str, port: int) -> RawClient:
    return RawClient(socket.create_connection((address, port), timeout=60))


def connect_unix(path: Path) -> RawClient:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(60)
    sock.connect(str(path))
    return RawClient(sock)


def assert_served(client: RawClient, image: Path) -> None:
    with client:
        assert client.negotiate().read(1, 1000) == image.read_bytes()[1:1001]


def listening_ports(pid: int) -> Set[str]:
    """The TCP addresses that the process listens on, as ``ss`` shows them."""
    lines = run("ss", "-Htlnp")[1].splitlines()
    return {line.split()[3] for line in lines if f"pid={pid}," in line}


# TCP


def test_all_addresses_are_the_default(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path / "log", "--target", "--lport", 0, image) as server:
        ports = listening_ports(server.process.pid)
        (port,) = {int(address.rpartition(":")[2]) for address in ports}
        assert ports == {f"0.0.0.0:{port}", f"[::]:{port}"}
        assert_served(connect_tcp("127.0.0.1", port), image)
        assert_served(connect_tcp("::1", port), image)


def test_log_names_what_is_listened_on(tmp_path: Path, image: Path) -> None:
    port = free_port()
    with serving(tmp_path / "log", "--target", "--lport", port, "--unix", tmp_path / "sock", image) as server:
        assert f"on 0.0.0.0:{port}, [::]:{port}, unix:{tmp_path}/sock\n" in server.log()


def test_laddr_limits_to_one_address(tmp_path: Path, image: Path) -> None:
    port = free_port()
    with serving(tmp_path / "log", "--target", "--laddr", "::1", "--lport", port, image) as server:
        assert listening_ports(server.process.pid) == {f"[::1]:{port}"}
        assert_served(connect_tcp("::1", port), image)
        with pytest.raises(ConnectionRefusedError):
            connect_tcp("127.0.0.1", port)


def test_laddr_can_be_repeated(tmp_path: Path, image: Path) -> None:
    port = free_port()
    where = ["--laddr", "127.0.0.1", "--laddr", "::1", "--laddr", "127.0.0.2", "--lport", port]
    with serving(tmp_path / "log", "--target", *where, image) as server:
        assert listening_ports(server.process.pid) == {f"127.0.0.1:{port}", f"[::1]:{port}", f"127.0.0.2:{port}"}
        for address in ("127.0.0.1", "::1", "127.0.0.2"):
            assert_served(connect_tcp(address, port), image)


def test_laddr_can_be_a_name(tmp_path: Path, image: Path) -> None:
    port = free_port()
    with serving(tmp_path / "log", "--target", "--laddr", "localhost", "--lport", port, image):
        assert_served(connect_tcp("localhost", port), image)


def test_port_is_free_again_at_once(tmp_path: Path, image: Path) -> None:
    """Connections that the server closed linger in TIME_WAIT, which must not stop the next one."""
    port = free_port()
    for number in range(2):
        with serving(tmp_path / f"log{number}", "--target", "--laddr", "127.0.0.1", "--lport", port, image) as server:
            client = connect_tcp("127.0.0.1", port).negotiate()
            server.stop()
            assert client.closed()
            client.sock.close()


# TCP options of a client's connection


@contextmanager
def descriptor_of(pid: int, fd: int) -> Iterator[socket.socket]:
    """Socket *fd* of another process."""
    process = os.pidfd_open(pid)
    copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
    os.close(process)
    assert copy >= 0, os.strerror(ctypes.get_errno())
    with socket.socket(fileno=copy) as sock:
        yield sock


def client_descriptor(pid: int) -> int:
    """The descriptor of a worker's only connection."""
    (connection,) = (c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED)
    return int(connection.fd)


@pytest.mark.parametrize(
    "level, option", [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_nodelay_and_keepalive_are_on(tmp_path: Path, image: Path, address: str, level: int, option: int) -> None:
    port = free_port()
    target = ["--target", "--lport", port, image]
    with serving(tmp_path / "log", *target) as server, connect_tcp(address, port) as client:
        client.negotiate()
        server.wait_for_log(": connected")
        (worker,) = busy_workers(server.process.pid)
        with descriptor_of(worker, client_descriptor(worker)) as sock:
            assert sock.getsockopt(level, option) == 1


def test_keepalive_timer_runs(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with RawClient(server.connect(tcp=True)) as client:
        client.negotiate()
        show = ["ss", "-Htno", "state", "established", f"sport = :{server.port}"]
        # Until the client's acknowledgment is here, another timer stands in its place.
        wait_until(lambda: "timer:(keepalive," in run(*show)[1], "the keepalive timer")


# Unix sockets


def test_unix_socket_alone(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path / "log", "--target", "--unix", tmp_path / "sock", image) as server:
        assert listening_ports(server.process.pid) == set()
        assert_served(connect_unix(tmp_path / "sock"), image)


def test_unix_socket_besides_tcp(tmp_path: Path, image: Path) -> None:
    port = free_port()
    where = ["--unix", tmp_path / "sock", "--laddr", "127.0.0.1", "--lport", port]
    with serving(tmp_path / "log", "--target", *where, image):
        assert_served(connect_unix(tmp_path / "sock"), image)
        assert_served(connect_tcp("127.0.0.1", port), image)


def test_unix_socket_is_removed_at_the_end(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path / "log", "--target", "--unix", tmp_path / "sock", image) as server:
        assert stat.S_ISSOCK((tmp_path / "sock").stat().st_mode)
        assert server.stop() == 0
    assert not (tmp_path / "sock").exists()


def test_unix_socket_of_a_dead_server_is_replaced(tmp_path: Path, image: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "sock"))
        dead.listen()
    with serving(tmp_path / "log", "--target", "--unix", tmp_path / "sock", image):
        assert_served(connect_unix(tmp_path / "sock"), image)


def test_unix_socket_of_a_live_server_is_refused(server: Server, image: Path) -> None:
    status, message = fails("--target", "--unix", server.socket, image)
    assert status == 1
    assert f"a running server listens on {server.socket}" in message
    assert_served(RawClient(server.connect()), image)


def test_unix_socket_of_a_successor_is_not_removed_at_the_end(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "sock"
    with serving(tmp_path / "log1", "--target", "--unix", path, image) as server:
        path.unlink()
        with serving(tmp_path / "log2", "--target", "--unix", path, image) as successor:
            assert server.stop() == 0
            assert_served(connect_unix(path), image)
            assert successor.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, image: Path, kind: str) -> None:
    path, precious = tmp_path / "sock", tmp_path / "precious"
    precious.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(precious)
    else:
        path.mkdir()
    before = path.lstat()
    status, message = fails("--target", "--unix", path, image)
    assert status == 1
    assert f"{path} exists and is no socket" in message
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert precious.read_text() == "precious"


def test_path_too_long_for_a_unix_socket_is_named(tmp_path: Path, image: Path) -> None:
    status, message = fails("--target", "--unix", tmp_path / ("x" * 200), image)
    assert status == 1
    assert "too long" in message


# systemd


@contextmanager
def activated(tmp_path: Path, image: Path, *options: object) -> Iterator[int]:
    """``systemd-socket-activate`` in front of a server: the process id, which the server takes over."""
    program = ["systemd-socket-activate", *options, *command("--target", image)]
    with launched(program, tmp_path / "log") as activator:
        activator.wait_for_log("Listening on")
        yield activator.process.pid


def test_socket_activation_by_tcp(tmp_path: Path, image: Path) -> None:
    port = free_port()
    with activated(tmp_path, image, "-l", f"127.0.0.1:{port}") as pid:
        assert_served(connect_tcp("127.0.0.1", port), image)
        assert_served(connect_tcp("127.0.0.1", port), image)
        assert listening_ports(pid) == {f"127.0.0.1:{port}"}


def test_socket_activation_by_unix_socket(tmp_path: Path, image: Path) -> None:
    with activated(tmp_path, image, "-l", tmp_path / "sock") as pid:
        assert_served(connect_unix(tmp_path / "sock"), image)
        assert listening_ports(pid) == set()
    assert (tmp_path / "sock").exists(), "the socket belongs to the service manager"


def test_socket_activation_with_several_sockets(tmp_path: Path, image: Path) -> None:
    port = free_port()
    with activated(tmp_path, image, "-l", f"127.0.0.1:{port}", "-l", tmp_path / "sock"):
        assert_served(connect_tcp("127.0.0.1", port), image)
        assert_served(connect_unix(tmp_path / "sock"), image)


def test_sockets_passed_to_another_process_are_not_ours(tmp_path: Path, image: Path) -> None:
    where = ["--unix", tmp_path / "sock"]
    with serving(tmp_path / "log", "--target", *where, image, LISTEN_FDS="1", LISTEN_PID="1"):
        assert_served(connect_unix(tmp_path / "sock"), image)


@pytest.mark.parametrize("abstract", [False, True])
def test_service_manager_is_notified_once_the_server_listens(tmp_path: Path, image: Path, abstract: bool) -> None:
    name = f"xnbd-test-{os.getpid()}" if abstract else f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(60)
        notify = f"@{name}" if abstract else name
        where = ["--unix", tmp_path / "sock"]
        with launched(command("--target", *where, image), tmp_path / "log", env={"NOTIFY_SOCKET": notify}):
            assert manager.recv(1000).splitlines()[0] == b"READY=1"
            assert_served(connect_unix(tmp_path / "sock"), image)


# Clients and workers


def busy_workers(pid: int) -> List[int]:
    return [child for child in children_of(pid) if "worker for" in title_of(child)]


def test_client_over_the_limit_waits_for_one_to_leave(start: Start, image: Path) -> None:
    server = start("--target", "--max-clients", 2, image)
    first, second = (RawClient(server.connect()).negotiate() for _ in range(2))
    server.wait_for_log("2 clients are connected, which is the limit")
    with RawClient(server.connect()) as third:
        assert len(server.workers()) == 2
        assert not select.select([third.sock], [], [], 0)[0]
        first.sock.close()
        assert third.negotiate().read(0, 10) == image.read_bytes()[:10]
    second.sock.close()


def test_silent_client_is_dropped_after_the_handshake_timeout(start: Start, image: Path) -> None:
    server = start("--target", "--handshake-timeout", 0.3, image)
    with RawClient(server.connect()) as silent:
        silent.receive(18)
        assert silent.closed()
    server.wait_for_log("handshake took too long")


def test_handshake_timeout_does_not_concern_a_client_that_is_served(start: Start, image: Path) -> None:
    server = start("--target", "--handshake-timeout", 4, image)
    with RawClient(server.connect()) as served, RawClient(server.connect()) as silent:
        served.negotiate()
        silent.receive(18)
        assert silent.closed()
        assert served.works()


def spare_workers(server: Server) -> List[int]:
    return [pid for pid in server.workers() if title_of(pid) == "xnbd-server: spare worker disk.img"]


@pytest.mark.parametrize("count", [1, 7])
def test_spare_workers_wait_for_clients(start: Start, image: Path, count: int) -> None:
    server = start("--target", "--spare-workers", count, image)
    with RawClient(server.connect()) as client:
        client.negotiate()
        wait_until(lambda: len(server.busy_workers()) == 1, "the client's worker")
        wait_until(lambda: count <= len(spare_workers(server)) <= 2 * count, f"{count} spare workers")


def test_workers_that_nobody_needs_any_more_leave(start: Start, image: Path) -> None:
    server = start("--target", "--spare-workers", 1, image)
    clients = [RawClient(server.connect()).negotiate() for _ in range(6)]
    wait_until(lambda: len(server.busy_workers()) == 6, "a worker for each client")
    for client in clients:
        client.sock.close()
    wait_until(lambda: 1 <= len(spare_workers(server)) <= 2 and not server.busy_workers(), "one or two spare workers")
    wait_until(lambda: len(server.workers()) <= 2, "the end of the others")


def test_titles_name_role_client_and_image(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    wait_until(lambda: title_of(server.pid) == "xnbd-server: master disk.img", "the master's title")
    with RawClient(server.connect(tcp=True)) as client:
        client.negotiate()
        host, port = client.sock.getsockname()
        wait_until(lambda: server.busy_workers() != [], "the client's worker")
        expected = f"xnbd-server: worker for {host}:{port} disk.img"
        wait_until(lambda: expected in map(title_of, server.workers()), expected)


def test_title_names_the_process_behind_a_unix_socket(server: Server) -> None:
    with RawClient(server.connect()) as client:
        client.negotiate()
        expected = f"xnbd-server: worker for unix:pid={os.getpid()},uid={os.getuid()} disk.img"
        wait_until(lambda: expected in map(title_of, server.workers()), expected)


def test_idle_server_uses_no_processor_time(start: Start, image: Path) -> None:
    """With a client that is connected and says nothing, and spare workers that have none."""
    server = start("--target", image)

    def activity() -> Tuple[float, int]:
        """Processor time, and how often master and workers were woken up."""
        processes = [psutil.Process(pid) for pid in (server.pid, *server.workers())]
        seconds = sum(process.cpu_times().user + process.cpu_times().system for process in processes)
        return seconds, sum(process.num_ctx_switches().voluntary for process in processes)

    with RawClient(server.connect()) as client:
        client.negotiate()
        assert client.works()
        wait_until(lambda: len(spare_workers(server)) >= 4 and len(server.busy_workers()) == 1, "the spare workers")

        def slept_for_a_second() -> bool:
            before = activity()
            assert not select.select([client.sock], [], [], 1.0)[0]
            return activity() == before

        # The first attempts may see workers that were forked a moment ago on their way to sleep.
        wait_until(slept_for_a_second, "a second without any activity")


def test_a_unix_socket_is_removed_once(tmp_path: Path) -> None:
    """What is there later is a successor's, also if its file has the same inode number by chance."""
    path, kept = tmp_path / "socket", tmp_path / "kept"
    listener = UnixSocket(str(path), 1)
    os.link(path, kept)
    listener.close()
    assert not path.exists()
    kept.rename(path)
    listener.close()
    assert path.exists()
