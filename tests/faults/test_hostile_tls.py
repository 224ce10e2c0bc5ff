"""Clients that misbehave in TLS: bytes in the clear behind STARTTLS, torn and forged records, silence, floods.

Every test has a bystander, who speaks TLS too and must notice nothing.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator, List

import pytest
from certificates import Certificates
from conftest import MIB, Start
from rawclient import (
    ACK,
    GO,
    READ,
    WRITE,
    RawClient,
    context_data,
    go_data,
    pack_option,
    pack_request,
)
from server_process import PATIENCE, Server, free_port, wait_until
from tls_client import (
    APPLICATION_DATA,
    HANDSHAKE,
    HEADER,
    STARTTLS,
    ask_for_tls,
    context_of,
    is_closed,
    record,
    record_client,
    start_tls,
    tls_client,
)

HANDSHAKE_TIME = 4
"""Seconds: short for who waits until they are over, and long enough for an honest client that has to wait its turn."""

FLIPS = int(os.environ.get("XNBD_FUZZ_ROUNDS", "40"))


@contextmanager
def tls_bystander(server: Server, certificates: Certificates) -> Iterator[RawClient]:
    with tls_client(server, certificates.alice) as client:
        assert client.works()
        yield client
        assert client.works()
        assert server.process.poll() is None, server.log()
    assert "Traceback" not in server.log()


@pytest.fixture
def server(start: Start, image: Path, certificates: Certificates) -> Iterator[Server]:
    server = start("--target", image, "--tls", certificates.server, "--handshake-timeout", HANDSHAKE_TIME)
    with tls_bystander(server, certificates):
        yield server


def serves_alice(server: Server, certificates: Certificates) -> bool:
    with RawClient(server.connect()) as newcomer:
        newcomer.sock.settimeout(60)
        start_tls(newcomer, context_of(certificates.alice)).go()
        return newcomer.works()


# Bytes in the clear


def test_bytes_behind_starttls_in_the_clear_end_the_connection(server: Server, certificates: Certificates) -> None:
    """CVE-2021-3716: somebody in the middle adds an option, which would count as the client's own over TLS."""
    with RawClient(server.connect()) as client:
        client.greet()
        client.send(pack_option(STARTTLS) + pack_option(GO, go_data("disk.img")))
        with suppress(EOFError, ConnectionResetError):
            assert client.receive_option_reply()[:2] == (STARTTLS, ACK)
        assert is_closed(client)
    server.wait_for_log("STARTTLS")


def test_client_flags_and_starttls_may_come_in_one_segment(server: Server, certificates: Certificates) -> None:
    with RawClient(server.connect()) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3) + pack_option(STARTTLS))
        assert client.receive_option_reply()[1] == ACK
        client.sock = context_of(certificates.alice).wrap_socket(client.sock, server_hostname="localhost")
        assert client.go()[-1][0] == ACK
        assert client.works()


def test_hello_in_one_segment_with_starttls_ends_the_connection(server: Server, certificates: Certificates) -> None:
    """Even a real ClientHello: nothing may come before the answer."""
    client = record_client(server, certificates.alice)
    hello = client.hello()
    with RawClient(server.connect()) as hasty:
        hasty.greet()
        hasty.send(pack_option(STARTTLS) + hello)
        with suppress(EOFError, ConnectionResetError):
            hasty.receive_option_reply()
        assert is_closed(hasty)
    client.sock.close()


def test_what_was_negotiated_in_the_clear_is_forgotten(start: Start, image: Path, certificates: Certificates) -> None:
    """Structured replies and contexts, where TLS is optional: somebody in the middle may have asked for them."""
    server = start("--target", image, "--tls", certificates.server, "--tls-optional")
    with RawClient(server.connect()) as client:
        client.greet()
        assert client.option(8) == [(ACK, b"")]
        assert client.option(10, context_data("", "base:allocation"))[-1][0] == ACK
        assert client.option(STARTTLS) == [(ACK, b"")]
        client.sock = context_of(certificates.alice).wrap_socket(client.sock, server_hostname="localhost")
        assert client.go()[-1][0] == ACK
        assert client.works()  # with a simple reply
        client.request(7, 0, 4096)
        assert client.simple_reply()[0] == 22


def test_starttls_over_tls_is_invalid(server: Server, certificates: Certificates) -> None:
    with start_tls(RawClient(server.connect()), context_of(certificates.alice)) as client:
        assert [kind for kind, _ in client.option(STARTTLS)] == [0x80000003]
        assert client.go()[-1][0] == ACK
        assert client.works()


def test_starttls_with_data_is_invalid(server: Server) -> None:
    with RawClient(server.connect()) as client:
        client.greet()
        assert [kind for kind, _ in client.option(STARTTLS, b"data")] == [0x80000003]
        assert client.option(STARTTLS) == [(ACK, b"")]


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", pack_option(GO, go_data("")), bytes(1000), b"\x80\x2e\x01\x00\x02"],
    ids=["http", "nbd", "zeros", "sslv2"],
)
def test_something_else_than_tls_ends_the_connection(server: Server, said: bytes) -> None:
    with RawClient(server.connect()) as client:
        ask_for_tls(client)
        client.send(said)
        assert is_closed(client)


# The handshake


def flipped(rng: random.Random, data: bytes, first: int = 0) -> bytes:
    """*data* with one to four bits changed from byte *first* on."""
    torn = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        torn[rng.randrange(first, len(torn))] ^= 1 << rng.randrange(8)
    return bytes(torn)


def test_a_torn_client_hello_is_nobody_else_s_trouble(server: Server, certificates: Certificates, seed: int) -> None:
    """It may be refused at once, or look like one that is longer: then time is its limit."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        clients = []
        for number in range(FLIPS):
            client = record_client(server, certificates.alice)
            stack.callback(client.sock.close)
            clients.append(client)
            client.sock.sendall(flipped(rng, client.hello(), 0 if number % 2 else HEADER))
        for client in clients:
            drain(client.sock)
    assert serves_alice(server, certificates)


def drain(sock: socket.socket) -> None:
    """Until the server closes the connection, or has answered a hello that still made sense."""
    with suppress(ConnectionResetError):
        while True:
            data = sock.recv(1 << 16)
            if not data or data[:1] == bytes([HANDSHAKE]):
                return


def test_a_client_that_stops_in_the_middle_of_the_handshake_gives_its_place_back(
    start: Start, image: Path, certificates: Certificates
) -> None:
    arguments = ["--tls", certificates.server, "--handshake-timeout", HANDSHAKE_TIME, "--max-clients", 1]
    server = start("--target", image, *arguments)
    for part in (0, 1, HEADER, 100):
        client = record_client(server, certificates.alice)
        with client.sock:
            client.sock.sendall(client.hello()[:part])
            if part == 0:
                client.sock.settimeout(PATIENCE)
            drain(client.sock)
        assert serves_alice(server, certificates)
    server.wait_for_log("handshake took too long")


def test_a_client_that_stops_after_the_hello_is_dropped(server: Server, certificates: Certificates) -> None:
    client = record_client(server, certificates.alice)
    with client.sock:
        client.sock.sendall(client.hello())
        with suppress(ConnectionResetError):
            while client.sock.recv(1 << 16):
                pass
    server.wait_for_log("handshake took too long")


def test_a_client_that_drips_its_hello_is_dropped(server: Server, certificates: Certificates) -> None:
    client = record_client(server, certificates.alice)
    began = time.monotonic()
    with client.sock, suppress(BrokenPipeError, ConnectionResetError):
        for byte in client.hello():
            client.sock.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - began > PATIENCE:
                raise AssertionError("still there")
        drain(client.sock)
    server.wait_for_log("handshake took too long")


def test_200_half_open_handshakes_keep_nobody_from_being_served(
    start: Start, image: Path, certificates: Certificates
) -> None:
    server = start("--target", image, "--tls", certificates.server, "--handshake-timeout", 60)
    context = context_of(certificates.alice)
    with tls_bystander(server, certificates) as busy, ExitStack() as crowd:
        for number in range(200):
            client = record_client(server, certificates.alice)
            crowd.callback(client.sock.close)
            client.sock.sendall(client.hello()[: None if number % 2 else 60])
            if number % 20 == 0:
                assert busy.read(0, 4096) == image.read_bytes()[:4096]
        began = time.monotonic()
        for _ in range(3):
            with start_tls(RawClient(server.connect()), context) as newcomer:
                newcomer.go()
                assert newcomer.works()
        assert time.monotonic() - began < PATIENCE
    assert serves_alice(server, certificates)


def test_leaving_at_any_byte_of_the_handshake(server: Server, certificates: Certificates, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        client = record_client(server, certificates.alice)
        hello = client.hello()
        client.sock.sendall(hello[: rng.randrange(len(hello))])
        if rng.random() < 0.5:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()
    assert serves_alice(server, certificates)


# Records


def test_a_torn_record_ends_its_connection_only(
    server: Server, image: Path, certificates: Certificates, seed: int
) -> None:
    before, rng = image.read_bytes(), random.Random(seed)
    for number in range(FLIPS // 2):
        client = record_client(server, certificates.alice).shake_hands().go()
        with client.sock:
            sealed = client.sealed(pack_request(WRITE, 0, 8192) + bytes(8192))
            client.sock.sendall(flipped(rng, sealed, 0 if number % 2 else HEADER))
            client.sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while client.sock.recv(1 << 16):
                    pass
    assert image.read_bytes() == before
    assert serves_alice(server, certificates)


FORGED = {
    "a record of 64 KiB": record(APPLICATION_DATA, bytes(100), length=0xFFFF),
    "a record longer than is allowed": record(APPLICATION_DATA, bytes(16_384 + 257)),
    "an empty record": record(APPLICATION_DATA, b""),
    "application data in the clear": record(APPLICATION_DATA, pack_request(READ, 0, 4096)),
    "a handshake record in the clear": record(HANDSHAKE, b"\1\0\0\0"),
    "an unknown type": record(99, bytes(100)),
    "an alert in the clear": record(21, b"\1\0"),
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_forged_record_ends_its_connection(server: Server, certificates: Certificates, forged: bytes) -> None:
    client = record_client(server, certificates.alice).shake_hands().go()
    with client.sock:
        client.sock.sendall(forged)
        client.sock.shutdown(socket.SHUT_WR)
        client.sock.settimeout(PATIENCE)
        with suppress(ConnectionResetError):
            while client.sock.recv(1 << 16):
                pass
    assert serves_alice(server, certificates)


def test_a_write_that_is_cut_off_without_goodbye_is_not_made(
    server: Server, image: Path, certificates: Certificates
) -> None:
    """No close_notify: somebody in the middle may have cut the connection."""
    before = image.read_bytes()
    client = record_client(server, certificates.alice).shake_hands().go()
    with client.sock:
        sealed = client.sealed(pack_request(WRITE, 0, 100_000) + b"x" * 60_000)
        client.sock.sendall(sealed[:-1000])
        client.sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while client.sock.recv(1 << 16):
                pass
    assert image.read_bytes() == before


def test_a_large_write_that_is_cut_off_leaves_a_beginning_only(
    server: Server, image: Path, certificates: Certificates
) -> None:
    """As without TLS: it is written piece by piece as it comes."""
    before, data = image.read_bytes(), random.Random(1).randbytes(5 * MIB)
    with tls_client(server, certificates.alice) as client:
        client.request(WRITE, 4096, len(data), data=data[: 4 * MIB])
        client.sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError, ssl.SSLError):
            while client.sock.recv(1 << 16):
                pass
    now = image.read_bytes()
    last = next(at for at in range(4096 + len(data), 4095, -1) if at == 4096 or now[at - 1] != before[at - 1])
    assert now[4096:last] == data[: last - 4096]
    assert last - 4096 <= 4 * MIB
    assert now[:4096] == before[:4096]


def test_many_small_records_make_one_request(server: Server, image: Path, certificates: Certificates) -> None:
    with tls_client(server, certificates.alice) as client:
        for byte in pack_request(READ, 4096, 512, cookie=5):
            client.send(bytes([byte]))
        assert client.simple_reply(512) == (0, 5, image.read_bytes()[4096:4608])


def test_a_client_that_reads_no_replies_holds_nobody_up(
    server: Server, image: Path, certificates: Certificates
) -> None:
    with tls_client(server, certificates.alice) as deaf:
        deaf.sock.settimeout(1)
        with suppress(ssl.SSLError, OSError):
            for _ in range(200):
                deaf.send(pack_request(READ, 0, MIB) * 10)
        assert serves_alice(server, certificates)


# Versions' own tricks


class Tunnel:
    """``127.0.0.1:port``, where a client finds TLS at once: what comes before was said for it. For one client."""

    def __init__(self, server: Server) -> None:
        self.port = free_port()
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            sock, _ = self._listener.accept()
            with sock, ask_for_tls(RawClient(self._server.connect())) as client:
                there = threading.Thread(target=self._pump, args=(sock, client.sock))
                there.start()
                self._pump(client.sock, sock)
                there.join(60)

    def _pump(self, source: socket.socket, destination: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(60)


@pytest.fixture
def tunnel(server: Server) -> Iterator[Tunnel]:
    tunnel = Tunnel(server)
    yield tunnel
    tunnel.close()


def test_renegotiation_in_tls_1_2_is_refused(server: Server, certificates: Certificates, tunnel: Tunnel) -> None:
    files = ["-CAfile", "ca-cert.pem", "-cert", "client-cert.pem", "-key", "client-key.pem"]
    words = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{tunnel.port}", *files]
    with subprocess.Popen(
        words, cwd=certificates.alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as client:
        assert client.stdin and client.stdout
        heard: List[bytes] = []
        reader = threading.Thread(target=lambda: heard.extend(client.stdout))  # type: ignore[arg-type]
        reader.start()
        wait_until(lambda: any(b"Verify return code" in line for line in heard), "the handshake")
        client.stdin.write(b"R\n")
        client.stdin.flush()
        wait_until(lambda: any(b"no renegotiation" in line for line in heard), "the refusal")
        client.kill()
        reader.join(60)
    assert b"RENEGOTIATING" in b"".join(heard)
    assert serves_alice(server, certificates)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_no_session_is_resumed(server: Server, certificates: Certificates, version: str) -> None:
    """Who was let in once has to be looked at again: it may have been revoked."""
    context = context_of(certificates.alice)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    session = None
    for _ in range(2):
        with start_tls(RawClient(server.connect()), context, session=session) as client:
            client.go()
            assert client.works()
            assert not client.sock.session_reused  # type: ignore[attr-defined]
            session = client.sock.session  # type: ignore[attr-defined]


def test_compression_is_not_negotiated(server: Server, certificates: Certificates) -> None:
    with start_tls(RawClient(server.connect()), context_of(certificates.alice)) as client:
        assert client.sock.compression() is None  # type: ignore[attr-defined]


def test_a_shortened_image_is_an_error_and_not_the_end_of_the_worker(
    server: Server, image: Path, certificates: Certificates
) -> None:
    """Mapped pages that are gone: user space must not touch them."""
    with tls_client(server, certificates.alice) as client:
        os.truncate(image, MIB)
        client.request(READ, 4 * MIB, 4096, cookie=9)
        assert client.simple_reply()[:2] == (5, 9)
        assert client.works()
    assert "killed by" not in server.log()
