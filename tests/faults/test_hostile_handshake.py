"""Clients that misbehave in the handshake: silence, nonsense, floods, and leaving at any byte.

Every test has a bystander: a client that connected before and must be served after,
by a master that is still there.
"""

from __future__ import annotations

import resource
import select
import signal
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import Start
from rawclient import (
    ABORT,
    ACK,
    ERR_INVALID,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    FLUSH,
    GO,
    INFO,
    LIST,
    LIST_META_CONTEXT,
    REP_META_CONTEXT,
    REP_SERVER,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    RawClient,
    bystander,
    context_data,
    go_data,
    pack_option,
    string,
)
from server_process import PATIENCE, STOP_TIME, Server, wait_until

GIB = 1 << 30

HANDSHAKE_TIME = 4
"""Seconds: short for who waits until they are over, and long enough for an honest client that has to wait its turn."""


@pytest.fixture
def server(server: Server) -> Iterator[Server]:
    """The plain server, with a bystander."""
    with bystander(server):
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    """A client that has only connected."""
    with RawClient(server.connect()) as client:
        yield client


def error_of(client: RawClient, option: int, data: bytes = b"") -> int:
    """The error that is the only reply to an option."""
    ((kind, _),) = client.option(option, data)
    return kind


def serves_a_newcomer(server: Server) -> bool:
    with RawClient(server.connect()) as newcomer:
        newcomer.sock.settimeout(60)  # there may be a crowd before it
        return newcomer.negotiate().works()


# Silence


def test_silent_client_is_dropped_after_the_timeout(start: Start, image: Path) -> None:
    server = start("--target", image, "--handshake-timeout", HANDSHAKE_TIME)
    with bystander(server), RawClient(server.connect()) as silent:
        silent.receive(18)
        assert silent.closed()
    server.wait_for_log("handshake took too long")


def test_timeout_is_for_the_whole_handshake_not_for_each_byte(start: Start, image: Path) -> None:
    server = start("--target", image, "--handshake-timeout", HANDSHAKE_TIME)
    with bystander(server), RawClient(server.connect()) as dripping:
        dripping.receive(18)
        for byte in bytes([0, 0, 0, 3]) + pack_option(GO, go_data("x" * 400)):
            if select.select([dripping.sock], [], [], 0.05)[0]:
                break
            with suppress(BrokenPipeError, ConnectionResetError):
                dripping.send(bytes([byte]))
        assert dripping.closed()


def test_timeout_ends_a_client_that_never_reads_the_answers(start: Start, image: Path) -> None:
    server = start("--target", image, "--handshake-timeout", HANDSHAKE_TIME)
    with bystander(server), RawClient(server.connect()) as deaf:
        deaf.greet()
        deaf.send(pack_option(INFO, go_data("", 1, 2, 3)) * 990)
        server.wait_for_log("handshake took too long")


# Many small queries, and the most data in as many queries as are allowed.
LABORIOUS = {
    "16,000 queries": context_data("", *[""] * 16_000),
    "100 queries": context_data("", *["x" * 640] * 100),
}


@contextmanager
def flooding(client: RawClient, data: bytes) -> Iterator[None]:
    """*client* sends SET_META_CONTEXT with *data* again and again without a pause."""
    option = pack_option(SET_META_CONTEXT, data)

    def flood() -> None:
        try:
            while True:
                client.sock.sendall(option)
        except OSError:
            pass

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        client.sock.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def receive_until_closed(client: RawClient) -> None:
    try:
        while client.sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass


@pytest.mark.parametrize("data", LABORIOUS.values(), ids=LABORIOUS.keys())
def test_client_that_never_pauses_is_dropped_after_the_timeout(start: Start, image: Path, data: bytes) -> None:
    server = start("--target", image, "--handshake-timeout", HANDSHAKE_TIME)
    with bystander(server), RawClient(server.connect()) as client:
        client.greet()
        client.option(STRUCTURED_REPLY)
        with flooding(client, data):
            client.sock.settimeout(None)
            dropped = threading.Thread(target=receive_until_closed, args=(client,))
            dropped.start()
            dropped.join(30)
            assert not dropped.is_alive(), "the client is still served"
    log = server.log()
    assert "handshake took too long" in log or "more than 1000 options" in log


def test_stop_is_not_held_up_by_a_client_that_never_pauses(start: Start, image: Path) -> None:
    server = start("--target", image, "--handshake-timeout", "600")
    with RawClient(server.connect()) as client:
        client.greet()
        client.option(STRUCTURED_REPLY)
        with flooding(client, LABORIOUS["16,000 queries"]):
            client.receive(20)
            server.process.send_signal(signal.SIGTERM)
            receive_until_closed(client)
            assert server.process.wait(STOP_TIME) == 0


def test_client_is_not_timed_out_once_it_has_negotiated(start: Start, image: Path) -> None:
    server = start("--target", image, "--handshake-timeout", HANDSHAKE_TIME)
    with RawClient(server.connect()) as patient, RawClient(server.connect()) as silent:
        patient.negotiate()
        silent.receive(18)
        assert silent.closed()
        assert patient.works()


@pytest.mark.parametrize("places", [1, 2, 200])
def test_1000_silent_clients_keep_nobody_from_being_served(start: Start, image: Path, places: int) -> None:
    """They take no places and no processes; those that have been silent for longest give way."""
    server = start("--target", image, "--handshake-timeout", "600", "--max-clients", places)
    with ExitStack() as crowd:
        for _ in range(1000):
            crowd.enter_context(RawClient(server.connect()))
        began = time.monotonic()
        for _ in range(3):
            assert serves_a_newcomer(server)
        assert time.monotonic() - began < PATIENCE
        assert len(server.workers()) <= 12


def test_silent_clients_are_handed_on_when_one_of_them_speaks(start: Start, image: Path) -> None:
    """One process may have them all; each is served when it speaks, whoever has it then."""
    server = start("--target", image, "--spare-workers", "1", "--handshake-timeout", "600")
    with ExitStack() as crowd:
        clients = [crowd.enter_context(RawClient(server.connect())) for _ in range(20)]
        for client in reversed(clients):
            assert client.negotiate().works()
        wait_until(lambda: len(server.busy_workers()) == len(clients), "a worker for each of them")


def test_silent_client_waits_for_a_place_when_it_has_spoken(start: Start, image: Path) -> None:
    server = start("--target", image, "--max-clients", "1", "--handshake-timeout", "600")
    with RawClient(server.connect()) as first, RawClient(server.connect()) as second:
        second.receive(18)  # both are greeted by the one process that is there
        assert first.negotiate().works()
        second.send(struct.pack(">I", 3))
        assert not select.select([second.sock], [], [], 0.2)[0]  # it has spoken, and its place is taken
        first.sock.close()
        assert second.go()[-1][0] == ACK
        assert second.works()


# Client flags


def test_unknown_client_flags_drop_the_client(server: Server) -> None:
    for flags in (4, 1 << 31, 0xFFFFFFFF):
        with RawClient(server.connect()) as client:
            client.greet(flags)
            assert client.closed()


# Option headers


def test_wrong_option_magic_drops_the_client(client: RawClient) -> None:
    client.greet()
    client.send(b"IHAVEOPS" + struct.pack(">II", LIST, 0))
    assert client.closed()


def test_something_else_than_nbd_drops_the_client(client: RawClient) -> None:
    client.receive(18)
    client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.closed()


@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 20])
def test_announcing_more_data_than_an_option_needs_drops_the_client(server: Server, length: int) -> None:
    for option in (EXPORT_NAME, ABORT, LIST, GO, SET_META_CONTEXT, 99):
        # With so little memory an attempt to allocate what is announced would show as an error in the log.
        for worker in server.workers():
            resource.prlimit(worker, resource.RLIMIT_AS, (GIB, GIB))
        with RawClient(server.connect()) as client:
            client.greet()
            client.send_option(option, length=length)
            assert client.closed()
        server.wait_for_log(f"option {option} announces {length} bytes")


def test_export_name_longer_than_4096_bytes_drops_the_client(client: RawClient) -> None:
    client.greet()
    client.send_option(EXPORT_NAME, length=4097)
    assert client.closed()


# Options that are refused, after which the next one works


@pytest.mark.parametrize("option", [GO, INFO, SET_META_CONTEXT, LIST_META_CONTEXT])
def test_name_longer_than_4096_bytes_is_too_big(client: RawClient, option: int) -> None:
    client.greet()
    client.option(STRUCTURED_REPLY)
    assert error_of(client, option, string("n" * 5000) + bytes(4)) == ERR_TOO_BIG
    assert client.go()[-1][0] == ACK
    assert client.works()


@pytest.mark.parametrize("option", [GO, INFO, SET_META_CONTEXT, LIST_META_CONTEXT])
def test_name_longer_than_the_data_is_invalid(client: RawClient, option: int) -> None:
    client.greet()
    client.option(STRUCTURED_REPLY)
    for inner in (5, 4096, 0xFFFFFFFF):
        assert error_of(client, option, struct.pack(">I", inner) + b"name") == ERR_INVALID
    assert client.go()[-1][0] == ACK
    assert client.works()


@pytest.mark.parametrize("option", [GO, INFO])
def test_go_with_too_little_data_is_invalid(client: RawClient, option: int) -> None:
    client.greet()
    for data in (b"", b"\0\0\0", string(""), string("") + b"\0", string("") + b"\0\5\0\1"):
        assert error_of(client, option, data) == ERR_INVALID
    assert client.go()[-1][0] == ACK
    assert client.works()


@pytest.mark.parametrize("option", [LIST, STRUCTURED_REPLY])
def test_data_for_an_option_without_data_is_invalid(client: RawClient, option: int) -> None:
    client.greet()
    assert error_of(client, option, b"data") == ERR_INVALID
    assert client.go()[-1][0] == ACK
    assert client.works()


def test_unknown_option_is_unsupported(client: RawClient) -> None:
    client.greet()
    for option in (0, 4, 5, 11, 12345, 0xFFFFFFFF):
        for length in (0, 1, 4096):
            assert error_of(client, option, bytes(length)) == ERR_UNSUP
    assert client.go()[-1][0] == ACK
    assert client.works()


@pytest.mark.parametrize("option", [GO, INFO])
def test_unknown_export_is_an_error_and_the_client_may_try_another(client: RawClient, option: int) -> None:
    client.greet()
    assert error_of(client, option, go_data("no such disk")) == ERR_UNKNOWN
    assert client.go("disk.img")[-1][0] == ACK
    assert client.works()


def test_unknown_export_name_disconnects(server: Server) -> None:
    for name in (b"no such disk", b"\xff\xfe\n\x1b[2J\0", b"x" * 4096):
        with RawClient(server.connect()) as client:
            client.greet()
            client.send_option(EXPORT_NAME, name)
            assert client.closed()
    server.wait_for_log("unknown export")
    assert "\x1b" not in server.log()
    assert serves_a_newcomer(server)


def test_abort_is_acknowledged_and_ends_the_connection(client: RawClient) -> None:
    client.greet()
    assert client.option(ABORT) == [(ACK, b"")]
    assert client.closed()


def test_abort_with_data_ends_the_connection_as_well(client: RawClient) -> None:
    client.greet()
    client.send_option(ABORT, b"why not")
    assert client.receive_option_reply()[1] == ACK
    assert client.closed()


# Meta contexts


def block_status_works(client: RawClient) -> bool:
    """Whether ``base:allocation`` is active, in a session with structured replies."""
    client.request(7, 0, 4096)
    return client.chunks()[-1].kind == 5


def test_contexts_before_structured_replies_are_invalid(client: RawClient) -> None:
    client.greet()
    assert error_of(client, SET_META_CONTEXT, context_data("", "base:allocation")) == ERR_INVALID
    client.option(STRUCTURED_REPLY)
    client.go()
    assert not block_status_works(client)


def test_contexts_set_for_the_name_of_go_are_active(client: RawClient) -> None:
    client.negotiate("disk.img", allocation=True)
    assert block_status_works(client)


def test_contexts_set_for_another_name_are_not_active(client: RawClient) -> None:
    client.greet()
    client.option(STRUCTURED_REPLY)
    assert client.option(SET_META_CONTEXT, context_data("disk.img", "base:allocation"))[0][0] == REP_META_CONTEXT
    client.go("")
    assert not block_status_works(client)


def test_failed_set_clears_the_contexts(client: RawClient) -> None:
    client.greet()
    client.option(STRUCTURED_REPLY)
    client.option(SET_META_CONTEXT, context_data("", "base:allocation"))
    assert error_of(client, SET_META_CONTEXT, b"\0") == ERR_INVALID
    client.go("")
    assert not block_status_works(client)


# Order and number


@pytest.mark.parametrize("option", [LIST_META_CONTEXT, SET_META_CONTEXT])
def test_more_than_100_queries_are_too_big_and_the_next_option_works(client: RawClient, option: int) -> None:
    client.greet()
    client.option(STRUCTURED_REPLY)
    assert error_of(client, option, context_data("", *["base:allocation"] * 101)) == ERR_TOO_BIG
    replies = client.option(option, context_data("", *["base:allocation"] * 100))
    assert [kind for kind, _ in replies] == [REP_META_CONTEXT, ACK]
    client.go()
    client.request(FLUSH)
    assert client.simple_reply()[0] == 0


def test_options_in_odd_order_and_repeated(client: RawClient) -> None:
    client.greet()
    first = client.go(option=INFO)
    assert client.go(option=INFO) == first
    (kind, listed), acknowledged = client.option(LIST)
    assert (kind, listed, acknowledged) == (REP_SERVER, string("disk.img"), (ACK, b""))
    assert client.go() == first
    assert client.works()


def test_ten_thousand_options_end_in_a_disconnect(client: RawClient) -> None:
    client.greet()
    with pytest.raises((EOFError, ConnectionError)):
        for _ in range(10_000):
            client.option(LIST)


# Leaving


def handshake_bytes() -> bytes:
    """All that a client with structured replies and block status sends."""
    return (
        struct.pack(">I", 3)
        + pack_option(STRUCTURED_REPLY)
        + pack_option(SET_META_CONTEXT, context_data("", "base:allocation"))
        + pack_option(LIST)
        + pack_option(GO, go_data("", 1, 3))
    )


def leave_at_every_byte(server: Server, *, tcp: bool, reset: bool) -> None:
    said = handshake_bytes()
    for length in range(len(said) + 1):
        with RawClient(server.connect(tcp=tcp)) as client:
            client.send(said[:length])
            if reset:
                client.reset()


def all_have_left(server: Server) -> bool:
    return len(server.busy_workers()) <= 1


def test_disconnect_at_every_byte(server: Server) -> None:
    leave_at_every_byte(server, tcp=False, reset=False)
    wait_until(lambda: all_have_left(server), "the workers' end")
    assert serves_a_newcomer(server)


def test_disconnect_at_every_byte_with_the_greeting_read(server: Server) -> None:
    said = handshake_bytes()
    for length in range(len(said)):
        with RawClient(server.connect()) as client:
            client.receive(18)
            client.send(said[:length])
    wait_until(lambda: all_have_left(server), "the workers' end")
    assert serves_a_newcomer(server)


def test_reset_at_every_byte(start: Start, image: Path) -> None:
    server = start("--target", image, tcp=True)
    with bystander(server):
        leave_at_every_byte(server, tcp=True, reset=True)
        wait_until(lambda: all_have_left(server), "the workers' end")
        assert serves_a_newcomer(server)


def test_half_closed_in_the_handshake_is_answered_and_let_go(client: RawClient) -> None:
    client.greet()
    client.send(pack_option(LIST))
    client.finish_sending()
    replies: List[int] = []
    while not replies or replies[-1] != ACK:
        replies.append(client.receive_option_reply()[1])
    assert replies == [REP_SERVER, ACK]
    assert client.closed()
