"""A proxy of a file on a web server: nginx over HTTP and HTTPS, redirects, slow answers, passwords, and its loss."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Dict, Iterator, List

import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, ask, bgctl, connect, query
from certificates import Certificates
from conftest import MIB, Start, StartWrapper
from launch import fails
from ledger import Crowd, Ledger
from model import Model, read_all
from server_process import Server, command, title_of, wait_until
from web_server import PASSWORD, WebServer

SIZE = 6 * MIB + 1234


@pytest.fixture
def disk() -> bytes:
    return random.Random(19).randbytes(SIZE)


@pytest.fixture
def root(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "www"
    path.mkdir()
    (path / "a disk.raw").write_bytes(disk)
    return path


@pytest.fixture
def web(tmp_path: Path, root: Path, certificates: Certificates) -> Iterator[WebServer]:
    with WebServer(tmp_path, root, certificates.server) as server:
        yield server


@pytest.fixture
def proxy(start: Start, files: CacheFiles, web: WebServer) -> Server:
    return start(*files.arguments(web.tls_uri("a%20disk.raw")), env=web.env)


def test_two_servers_on_one_cache_agree_with_the_copy(
    start: Start, tmp_path: Path, files: CacheFiles, proxy: Server, web: WebServer, disk: bytes, root: Path, seed: int
) -> None:
    rng = random.Random(seed)
    second = tmp_path / "control2"
    options = ["--fetch-size", rng.choice(("4K", "64K", "256K"))]
    other = start(*files.arguments(web.tls_uri("a%20disk.raw"), *options, control=second), env=web.env)
    clients = [connect(server.uri) for server in (proxy, other, proxy, other)]
    model = Model(clients, disk, rng)
    model.play(30)
    assert ask(second, "cache-all", wait=False)["done"]
    model.run(30)
    for client in clients:
        client.shutdown()
    for server in (proxy, other):
        server.stop()
    assert files.is_clean()
    assert (root / "a disk.raw").read_bytes() == disk
    again = start(*files.arguments(web.tls_uri("a%20disk.raw")), env=web.env)
    assert read_all(connect(again.uri)) == model.content


def test_a_switch_under_load_is_seen_by_nobody(
    files: CacheFiles, proxy: Server, web: WebServer, disk: bytes, seed: int
) -> None:
    ledger = Ledger(disk[: SIZE // 512 * 512])
    crowd = Crowd([proxy.uri], 5, ledger, random.Random(seed))
    crowd.wait_for(50)
    bgctl("--cache-all", files.control)
    bgctl("--switch", files.control)
    web.stop()
    crowd.wait_for(50)
    crowd.finish()
    assert query(files.control)["mode"] == "target"
    ledger.check_files(files.image, files.bitmap)
    assert read_all(connect(proxy.uri))[: len(ledger.base)] == ledger.base
    web.start()


def test_a_wrapper_serves_it(start_wrapper: StartWrapper, files: CacheFiles, web: WebServer, disk: bytes) -> None:
    wrapper = start_wrapper(env=web.env)
    wrapper.ctl("--add-proxy", "disk", web.tls_uri("a%20disk.raw"), files.image, files.bitmap, files.control)
    client = connect(wrapper.uri("disk"))
    assert read_all(client) == disk
    assert web.tls_uri("a%20disk.raw") in wrapper.ctl("--list")
    client.shutdown()


def test_an_upgrade_under_a_client_is_not_noticed(files: CacheFiles, proxy: Server, disk: bytes) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    bgctl("--upgrade", files.control)
    assert read_all(client) == disk


def test_a_server_of_one_client_reads_it(files: CacheFiles, tmp_path: Path, web: WebServer, disk: bytes) -> None:
    client, log = nbd.NBD(), tmp_path / "inetd.log"
    arguments = files.arguments(web.uri("a%20disk.raw"), "--inetd", "--logpath", log)
    client.connect_command(command(*arguments))
    assert read_all(client) == disk
    client.shutdown()
    wait_until(files.is_clean, "the end of the server")
    assert " ERROR: " not in log.read_text()


@pytest.mark.parametrize("path", ["moved/a%20disk.raw", "slow/a%20disk.raw"])
def test_redirects_and_slow_answers_are_taken(
    start: Start, files: CacheFiles, web: WebServer, disk: bytes, path: str
) -> None:
    proxy = start(*files.arguments(web.uri(path)), env=web.env)
    client = connect(proxy.uri)
    for offset in (0, SIZE - 1234, 3 * MIB + 5):
        assert client.pread(1234, offset) == disk[offset : offset + 1234]


def test_its_loss_is_told_and_its_return_ends_the_wait(
    proxy: Server, files: CacheFiles, web: WebServer, disk: bytes
) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    web.stop()
    reading = Reading(client, 3 * MIB, BLOCK)
    proxy.wait_for_log(": Connection refused; 1 request waits for it, trying again")
    assert client.pread(BLOCK, BLOCK) == disk[BLOCK : 2 * BLOCK]
    assert query(files.control)["origin"]["state"] == "unreachable"
    web.start()
    assert reading.content() == disk[3 * MIB : 3 * MIB + BLOCK]
    proxy.wait_for_log(": answers again")


def test_what_waits_for_too_long_is_an_error(start: Start, files: CacheFiles, web: WebServer) -> None:
    proxy = start(*files.arguments(web.uri("a%20disk.raw"), "--origin-timeout", "3"), env=web.env)
    client = connect(proxy.uri)
    client.pread(1, 0)
    web.stop()
    assert Reading(client, 3 * MIB, BLOCK).wait() == 5
    assert client.pread(1, 0)
    web.start()


def test_a_start_without_it_serves_what_is_cached(
    start: Start, files: CacheFiles, proxy: Server, web: WebServer, disk: bytes
) -> None:
    connect(proxy.uri).pread(1, 0)
    proxy.stop()
    web.stop()
    again = start(*files.arguments(web.tls_uri("a%20disk.raw")), env=web.env)
    again.wait_for_log("Connection refused; cached blocks are served, the others wait")
    assert connect(again.uri).pread(256 << 10, 0) == disk[: 256 << 10]
    web.start()


def test_a_proxy_moves_between_an_nbd_server_and_a_web_server(
    start: Start, files: CacheFiles, web: WebServer, root: Path, disk: bytes
) -> None:
    far = start("--target", "--readonly", root / "a disk.raw")
    proxy = start(*files.arguments(far.uri, "--readahead", "0"), env=web.env)
    client = connect(proxy.uri)
    client.pread(1, 0)
    assert files.cached() == [0]
    bgctl("--reconnect", files.control, web.tls_uri("a%20disk.raw"))
    client.pread(1, BLOCK)  # what the worker does first after a move is still as before
    client.pread(1, MIB)
    assert files.cached() == [0, 1, *range(256, 320)]
    bgctl("--reconnect", files.control, far.uri)
    client.pread(1, 2 * BLOCK)
    client.pread(1, 2 * MIB)
    assert 512 in files.cached()
    assert 513 not in files.cached()
    bgctl("--reconnect", files.control, web.tls_uri("a%20disk.raw"))
    assert read_all(client) == disk


def test_a_reconnect_to_another_object_is_refused(
    files: CacheFiles, proxy: Server, web: WebServer, root: Path, disk: bytes
) -> None:
    replace(root / "a disk.raw", disk[::-1])
    answer = ask(files.control, "reconnect", uri=web.tls_uri("a%20disk.raw"))
    assert "was ETag" in answer["error"]
    assert "nothing was changed" in answer["error"]
    (root / "short.raw").write_bytes(disk[:MIB])
    answer = ask(files.control, "reconnect", uri=web.tls_uri("short.raw"))
    assert f"has {MIB} bytes, not {SIZE}" in answer["error"]
    answer = ask(files.control, "reconnect", uri=web.tls_uri("nothing.raw"))
    assert "404 Not Found: there is no such object" in answer["error"]


def env(variables: Dict[str, str]) -> List[str]:
    """A prefix that sets *variables*."""
    return ["env", *(f"{name}={value}" for name, value in variables.items())]


def replace(path: Path, content: bytes) -> None:
    """Put another object into its place, of another time: the ETag of nginx is made of time and size."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.utime(new, (1_000_000_000, 1_000_000_000 + len(content)))
    new.replace(path)


def test_another_object_in_its_place_is_an_error_for_what_is_missing_until_the_former_one_is_back(
    start: Start, files: CacheFiles, proxy: Server, web: WebServer, root: Path, disk: bytes
) -> None:
    former = (root / "a disk.raw").stat()
    client, other = connect(proxy.uri), connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    client.pwrite(b"w" * 100, MIB)
    replace(root / "a disk.raw", disk[::-1])
    proxy.expected_errors = ["THE DISK THERE HAS CHANGED"]
    assert Reading(client, 3 * MIB, BLOCK).wait() == 5
    assert Reading(other, 4 * MIB, BLOCK).wait() == 5
    assert Reading(client, 5 * MIB, BLOCK).wait() == 5
    assert client.pread(BLOCK, BLOCK) == disk[BLOCK : 2 * BLOCK]
    assert client.pread(100, MIB) == b"w" * 100
    assert query(files.control)["origin"]["changed"] is True
    assert "the origin has another disk now" in bgctl("--cache-all", files.control, check=False)[2]
    assert proxy.log().count("THE DISK THERE HAS CHANGED") == 1
    proxy.stop()
    again = start(*files.arguments(web.tls_uri("a%20disk.raw")), env=web.env)
    again.expected_errors = ["THE DISK THERE HAS CHANGED"]
    client = connect(again.uri)
    assert client.pread(100, MIB) == b"w" * 100
    assert Reading(client, 3 * MIB, BLOCK).wait() == 5
    assert again.log().count("THE DISK THERE HAS CHANGED") == 1
    replace(root / "a disk.raw", disk)
    os.utime(root / "a disk.raw", ns=(former.st_atime_ns, former.st_mtime_ns))
    wait_until(lambda: Reading(client, 3 * MIB, BLOCK).wait() == 0, "the former disk")
    assert client.pread(BLOCK, 3 * MIB) == disk[3 * MIB : 3 * MIB + BLOCK]
    again.wait_for_log("the disk there is the one again that is cached")
    assert query(files.control)["origin"]["changed"] is False


def test_an_object_of_another_size_leaves_what_is_cached(
    start: Start, files: CacheFiles, proxy: Server, web: WebServer, root: Path, disk: bytes
) -> None:
    connect(proxy.uri).pread(1, 0)
    proxy.stop()
    replace(root / "a disk.raw", disk[:MIB])
    again = start(*files.arguments(web.tls_uri("a%20disk.raw")), env=web.env)
    again.expected_errors = ["THE DISK THERE HAS CHANGED"]
    again.wait_for_log(f"it has {MIB} bytes, not {SIZE} as before")
    client = connect(again.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    assert Reading(client, 3 * MIB, BLOCK).wait() == 5


def test_who_vouches_for_another_object_gets_it(
    start: Start, files: CacheFiles, proxy: Server, web: WebServer, root: Path, disk: bytes
) -> None:
    connect(proxy.uri).pread(1, 0)
    proxy.stop()
    replace(root / "a disk.raw", disk)
    again = start(*files.arguments(web.tls_uri("a%20disk.raw"), "--adopt-cache"), env=web.env)
    assert read_all(connect(again.uri)) == disk


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.raw", "HTTP status 404 Not Found: there is no such object"),
        ("forbidden/x", "HTTP status 403 Forbidden: wrong credentials, or no right to it"),
        ("private/a%20disk.raw", "HTTP status 401 Unauthorized: wrong credentials, or none"),
        ("round/x", "it redirects again and again"),
        ("unsafe/x", "it leads from https to http, which would not be encrypted"),
    ],
)
def test_what_cannot_be_had_is_told_at_the_start(files: CacheFiles, web: WebServer, path: str, message: str) -> None:
    uri = web.tls_uri(path)
    assert fails(*files.arguments(uri), prefix=env(web.env)) == (1, f"xnbd-server: origin {uri}: {message}\n")


def test_a_certificate_that_nobody_vouches_for_is_refused(files: CacheFiles, web: WebServer) -> None:
    told = fails(*files.arguments(web.tls_uri("a%20disk.raw")))[1]
    assert "its certificate is not of an authority that is trusted here (SSL_CERT_FILE may name a file" in told


def test_what_is_wrong_with_a_certificate_is_told(
    tmp_path: Path, root: Path, files: CacheFiles, certificates: Certificates
) -> None:
    for place, (directory, message) in enumerate(
        [
            (certificates.server_elsewhere, "is for elsewhere.example, and not for the host of the address"),
            (certificates.server_expired, "has expired"),
        ]
    ):
        where = tmp_path / str(place)
        where.mkdir()
        with WebServer(where, root, directory) as web:
            told = fails(*files.arguments(web.tls_uri("a%20disk.raw")), prefix=env(web.env))[1]
        assert f": its certificate {message}" in told


def test_a_password_comes_from_a_file_and_is_seen_nowhere(
    start: Start, tmp_path: Path, files: CacheFiles, web: WebServer, disk: bytes
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine localhost login alice password {PASSWORD}\n")
    netrc.chmod(0o600)
    uri = web.tls_uri("private/a%20disk.raw")
    proxy = start(*files.arguments(uri, "--verbose"), env={**web.env, "NETRC": str(netrc)})
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    wait_until(proxy.busy_workers, "the worker's title")
    processes = [proxy.pid, *proxy.workers()]
    seen = [
        proxy.log(),
        str(query(files.control)),
        *map(title_of, processes),
        files.state.read_bytes().decode("latin1"),
    ]
    assert not any(PASSWORD in text for text in seen)


@pytest.mark.parametrize("where", ["http://alice:{}@127.0.0.1/x", "https://h/x?X-Amz-Signature={}", "s3://b/k?key={}"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, files: CacheFiles, where: str) -> None:
    status, told = fails(*files.arguments(where.format(PASSWORD)))
    assert status == 2
    assert PASSWORD not in told
    assert "belong in" in told or "no credentials" in told


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, files: CacheFiles, web: WebServer) -> None:
    (tmp_path / "obstore.py").write_text("raise ImportError\n")
    told = fails(*files.arguments(web.uri("a%20disk.raw")), prefix=env({"PYTHONPATH": str(tmp_path)}))
    assert told[1].endswith("needs the package obstore: pip install 'xnbd[objects]'\n")


def test_small_requests_become_few_larger_reads(start: Start, files: CacheFiles, web: WebServer, disk: bytes) -> None:
    proxy = start(*files.arguments(web.uri("a%20disk.raw"), "--readahead", "0"), env=web.env)
    before = web.requests()
    client = connect(proxy.uri)
    client.pwrite(b"w" * BLOCK, 10 * BLOCK)
    for block in (9, 63, 12, 0):
        assert client.pread(BLOCK, block * BLOCK) == disk[block * BLOCK : (block + 1) * BLOCK]
    assert client.pread(BLOCK, 10 * BLOCK) == b"w" * BLOCK
    wait_until(lambda: web.requests() - before >= 3, "the requests in nginx's log")
    assert web.requests() - before == 3  # of the worker's start, before the written block, and after it
    assert files.cached() == list(range(64))


def test_bgctl_shows_which_version_is_cached(files: CacheFiles, proxy: Server) -> None:
    proxy.wait_for_log("INFO: serving ")
    assert 'version ETag "' in bgctl("--query", files.control)[1]
