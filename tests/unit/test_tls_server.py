"""The server's end of TLS by itself: who is at the other end, what is copied, and what a hurried send keeps."""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from certificates import Certificates, copy, make_psk
from tls_client import context_of

from xnbd.tls.credentials import ServerCredentials
from xnbd.tls.memory_stream import MemoryStream
from xnbd.tls.peer import rfc4514
from xnbd.tls.scratch import SIZE, Scratch
from xnbd.tls.server import ServerChannel

MIB = 1 << 20


def shake_hands(channel: ServerChannel) -> None:
    while events := channel.shake_hands():
        poll = select.poll()
        poll.register(channel.fileno(), events)
        assert poll.poll(60_000)


class CountingSocket(socket.socket):
    """Counts the calls that send and receive."""

    sends = receives = 0

    def send(self, *arguments: Any) -> int:
        self.sends += 1
        return super().send(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self.receives += 1
        return super().recv_into(*arguments)


@contextmanager
def channel_to(
    client: ssl.SSLContext, credentials: ServerCredentials, kind: type[socket.socket] = socket.socket
) -> Iterator[tuple[ServerChannel, ssl.SSLSocket]]:
    """Both ends of a connection, with their hands shaken; ours is of a certain *kind*."""
    ours, theirs = socket.socketpair()
    ours = kind(fileno=ours.detach())
    theirs.settimeout(60)
    wrapped: List[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: wrapped.append(client.wrap_socket(theirs, server_hostname="localhost")))
    thread.start()
    channel = ServerChannel(ours, credentials)
    try:
        shake_hands(channel)
        thread.join(60)
        with wrapped[0]:
            yield channel, wrapped[0]
    finally:
        channel.close()


@pytest.fixture
def credentials(certificates: Certificates) -> ServerCredentials:
    return ServerCredentials(str(certificates.server))


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_names_of_a_certificate(certificates: Certificates, credentials: ServerCredentials, version: str) -> None:
    context = context_of(certificates.alice)
    context.maximum_version = ssl.TLSVersion[version]
    with channel_to(context, credentials) as (channel, _):
        assert channel.identity.names == (
            "CN=alice,O=xnbd tests",
            "dns:alice.example",
            "uri:urn:xnbd:alice",
            "email:alice@example.org",
        )
        assert channel.description.startswith(version.replace("_", ".") + " ")


def test_an_anonymous_client_has_no_names(certificates: Certificates) -> None:
    credentials = ServerCredentials(str(certificates.server), anonymous=True)
    with channel_to(context_of(certificates.anonymous), credentials) as (channel, _):
        assert not channel.identity.names
    with channel_to(context_of(certificates.alice), credentials) as (channel, _):
        assert str(channel.identity) == "CN=alice,O=xnbd tests"


@pytest.mark.parametrize(
    "name, text",
    [
        ((), ""),
        (((("commonName", "alice"),),), "CN=alice"),
        (((("countryName", "GB"),), (("commonName", "a"), ("userId", "7"))), "CN=a+UID=7,C=GB"),
        (((("commonName", 'a,b+c"d\\e<f>g;h'),),), r"CN=a\,b\+c\"d\\e\<f\>g\;h"),
        (((("commonName", "#x #"),),), r"CN=\#x #"),
        (((("commonName", " x "),),), r"CN=\ x\ "),
        (((("commonName", "a\0b\n\x85é"),),), r"CN=a\00b\0A\C2\85é"),
        (((("emailAddress", "a@b"),), (("1.2.3", "x"),)), "1.2.3=x,emailAddress=a@b"),
        (((("x500UniqueIdentifier", b"\0a"),), (("commonName", "a"),)), "CN=a,x500UniqueIdentifier=#0061"),
    ],
)
def test_subjects_are_written_as_rfc_4514_says(name: tuple, text: str) -> None:  # type: ignore[type-arg]
    assert rfc4514(name) == text


def test_who_only_claims_a_pre_shared_key_does_not_get_its_name(certificates: Certificates, tmp_path: Path) -> None:
    """OpenSSL asks for the key, finds that it does not go with the cipher, and lets the client in without it."""
    directory = copy(certificates.server, tmp_path / "tls")
    make_psk(directory / "keys.psk", "alice")
    credentials = ServerCredentials(str(directory), anonymous=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        psk = ["-psk_identity", "alice", "-psk", "00" * 32, "-ciphersuites", "TLS_AES_256_GCM_SHA384"]
        words = ["openssl", "s_client", "-tls1_3", "-connect", where, *psk]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
            channel = ServerChannel(listener.accept()[0], credentials)
            shake_hands(channel)
            assert credentials.keys.user == "alice"
            assert not channel.identity.names
            channel.close()
            client.communicate(timeout=60)


def test_a_copy_ends_where_the_scratch_does() -> None:
    scratch = Scratch()
    body = os.urandom(SIZE)
    assert bytes(scratch.copy([b"h" * 16, memoryview(body), b"t" * 100])) == b"h" * 16 + body[:-16]
    assert bytes(scratch.copy([b"short"])) == b"short"
    scratch.close()


def test_a_page_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Python code that reads there would end by SIGBUS."""
    path = tmp_path / "image"
    path.write_bytes(b"d" * 16384)
    with open(path, "rb") as file:
        mapping = memoryview(mmap.mmap(file.fileno(), 16384, prot=mmap.PROT_READ))
    os.truncate(path, 4096)
    scratch = Scratch()
    assert bytes(scratch.copy([b"head", mapping])) == b"head" + b"d" * 4096
    with pytest.raises(OSError, match="Bad address") as caught:
        scratch.copy([mapping[4096:]])
    assert caught.value.errno == errno.EFAULT
    scratch.close()


def test_what_was_encrypted_before_a_wait_is_sent_as_it_was(
    certificates: Certificates, credentials: ServerCredentials
) -> None:
    """The caller comes again with the same bytes of the disk, which have changed meanwhile."""
    disk = bytearray(b"a" * (4 * MIB))
    received = bytearray()
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        view, waited = memoryview(disk), False
        with pytest.raises(BlockingIOError):
            while True:
                view = view[channel.send([view]) :]
        disk[:] = b"b" * len(disk)

        def read() -> None:
            while part := client.recv(1 << 16):
                received.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        while view:
            try:
                view = view[channel.send([view]) :]
            except BlockingIOError:
                waited = bool(select.select([], [channel.fileno()], [], 60))
        channel.shutdown()
        reader.join(60)
    assert waited
    assert len(received) == 4 * MIB
    middle = received.index(b"b")
    assert received == b"a" * middle + b"b" * (4 * MIB - middle)


def test_all_records_that_have_come_are_received_at_once(
    certificates: Certificates, credentials: ServerCredentials
) -> None:
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        assert channel.pending is not None
        view = memoryview(bytearray(MIB))
        with pytest.raises(BlockingIOError):
            channel.receive_into(view)
        for number in range(20):
            client.sendall(bytes([number]) * 100)
        assert channel.receive_into(view) == 2000
        client.sendall(b"x" * 5000)
        assert channel.receive_into(view[:1000]) == 1000
        assert channel.pending()
        assert channel.receive_into(view) == 4000
        assert not channel.pending()
        client.shutdown(socket.SHUT_WR)
        assert channel.receive_into(view) == 0


def test_a_batch_costs_one_receive_and_a_send_for_each_half(
    certificates: Certificates, credentials: ServerCredentials
) -> None:
    """Each send may be a wake-up of the client, which decrypts one half while the other one is encrypted."""
    with channel_to(context_of(certificates.alice), credentials, CountingSocket) as (channel, client):
        assert isinstance(channel._stream, MemoryStream)
        sock = channel._stream._sock
        assert isinstance(sock, CountingSocket)
        sock.sends = sock.receives = 0
        for _ in range(16):
            client.sendall(b"r" * 28)
        assert channel.receive_into(memoryview(bytearray(MIB))) == 16 * 28
        assert sock.receives == 1
        assert channel.send([b"h" * 16, memoryview(b"d" * 4096)] * 16) == 16 * 4112
        assert sock.sends == 2
        assert client.recv(100) == b"h" * 16 + b"d" * 84


def test_a_long_reply_leaves_in_parts(certificates: Certificates, credentials: ServerCredentials) -> None:
    """The client decrypts what has left already; nothing is lost or twice where the socket takes only some of them."""
    body = os.urandom(SIZE)
    received = bytearray()
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        view, parts = memoryview(body), 0
        while view:
            try:
                view, parts = view[channel.send([view]) :], parts + 1
            except BlockingIOError:
                received += client.recv(1 << 16)
        while len(received) < SIZE:
            received += client.recv(1 << 16)
    assert received == body
    assert parts > 1


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_end_is_told_after_all_that_came_before_it(
    certificates: Certificates, credentials: ServerCredentials, version: str
) -> None:
    """What has come with the goodbye of a client that does not close is not waited for."""
    context = context_of(certificates.alice)
    context.maximum_version = ssl.TLSVersion[version]
    with channel_to(context, credentials) as (channel, client):
        client.sendall(b"x" * 100)
        client.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()
        assert channel.receive_into(memoryview(bytearray(MIB))) == 100
        assert channel.pending is not None
        assert channel.pending()
        assert channel.receive_into(memoryview(bytearray(MIB))) == 0


def test_a_broken_record_is_told_after_all_that_came_before_it(
    certificates: Certificates, credentials: ServerCredentials
) -> None:
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        client.sendall(b"x" * 100)
        with socket.socket(fileno=os.dup(client.fileno())) as raw:
            raw.send(b"\x17\x03\x03\x00\x20" + b"?" * 32)
        assert channel.receive_into(memoryview(bytearray(MIB))) == 100
        assert channel.pending is not None
        assert channel.pending()
        with pytest.raises(OSError, match="TLS has failed"):
            channel.receive_into(memoryview(bytearray(MIB)))
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            client.recv(1)


def test_small_receives_get_every_byte(certificates: Certificates, credentials: ServerCredentials) -> None:
    """As the handshake of NBD does it: `pending` tells what poll(2) does not show."""
    body = os.urandom(50_000)
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        assert channel.pending is not None
        client.sendall(body)
        received, view = bytearray(), memoryview(bytearray(7000))
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while len(received) < len(body):
            assert channel.pending() or poll.poll(60_000)
            try:
                received += view[: channel.receive_into(view)]
            except BlockingIOError:
                assert not channel.pending()
        assert received == body


class KeyChanger:
    """openssl's client, which can be told to change its keys and to demand new ones; a relay is between it and us."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            files = ["-cert", str(directory / "client-cert.pem"), "-key", str(directory / "client-key.pem")]
            words = ["openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", *files]
            self.program = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self._theirs = listener.accept()[0]
        self.ours, self._relay = socket.socketpair()

    def say(self, words: bytes) -> None:
        """Let it say that, or do it: K changes both sides' keys."""
        assert self.program.stdin
        self.program.stdin.write(words + b"\n")
        self.program.stdin.flush()
        self._relay.sendall(self._theirs.recv(1 << 16))

    def pass_on(self, channel: ServerChannel) -> None:
        """Bytes both ways, until hands are shaken."""
        while channel.shake_hands():
            for source, sink in ((self._theirs, self._relay), (self._relay, self._theirs)):
                if select.select([source], [], [], 0.01)[0]:
                    sink.sendall(source.recv(1 << 16))

    def hear(self) -> None:
        """Let it hear what we have said."""
        self._theirs.sendall(self._relay.recv(1 << 16))

    def end(self) -> bytes:
        """What it has printed."""
        self._theirs.close()
        self._relay.close()
        return self.program.communicate(timeout=60)[0]


@pytest.fixture
def key_changer(certificates: Certificates) -> Iterator[KeyChanger]:
    changer = KeyChanger(certificates.alice)
    yield changer
    changer.program.kill()
    changer.end()


def test_keys_may_change(key_changer: KeyChanger, credentials: ServerCredentials) -> None:
    channel = ServerChannel(key_changer.ours, credentials)
    key_changer.pass_on(channel)
    view = memoryview(bytearray(100))
    for number in range(3):
        key_changer.say(b"K")
        with pytest.raises(BlockingIOError):
            channel.receive_into(view)
        key_changer.say(b"word %d" % number)
        assert view[: channel.receive_into(view)] == b"word %d\n" % number
        assert channel.send([b"answer %d." % number]) == 9
        key_changer.hear()
    channel.close()
    printed = key_changer.end()
    for number in range(3):
        assert b"answer %d." % number in printed


def test_who_asks_and_takes_no_answers_is_thrown_out(
    certificates: Certificates, credentials: ServerCredentials
) -> None:
    """What OpenSSL answers by itself, such as no to new handshakes of TLS 1.2, would fill the memory."""
    with channel_to(context_of(certificates.alice), credentials) as (channel, client):
        assert isinstance(channel._stream, MemoryStream)
        with pytest.raises(BlockingIOError):
            while True:
                channel.send([b"x" * SIZE])
        channel._stream._outgoing.write(b"no" * (64 << 10))
        client.sendall(b"next")
        view = memoryview(bytearray(MIB))
        assert channel.receive_into(view) == 4
        with pytest.raises(OSError, match="takes no answers"):
            channel.receive_into(view)
