"""The link that the benchmark and tests of the proxy use: it must do what it says."""

from __future__ import annotations

import select
import socket
import sys
import time
from contextlib import closing
from typing import Iterator, Tuple

import pytest
from relay import Relay
from server_process import ROOT, free_port, run

Ends = Tuple[socket.socket, socket.socket]


@pytest.fixture
def target() -> Iterator[socket.socket]:
    """A listening socket for the relay to connect to."""
    with listening() as sock:
        yield sock


def listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.settimeout(60)
    return sock


def connect(relay: Relay, target: socket.socket) -> Ends:
    """A connection through *relay*: the client's end and the target's."""
    client = socket.create_connection(("127.0.0.1", relay.port), timeout=60)
    there, _ = target.accept()
    there.settimeout(60)
    return client, there


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def is_silent(sock: socket.socket, seconds: float = 0.2) -> bool:
    return not select.select([sock], [], [], seconds)[0]


def receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, f"the end after {len(data)} bytes"
        data += part
    return bytes(data)


def test_bytes_arrive_unchanged_both_ways(target: socket.socket) -> None:
    data = bytes(range(256)) * 400
    with Relay(port_of(target)) as relay:
        client, there = connect(relay, target)
        with client, there:
            client.sendall(data)
            assert receive(there, len(data)) == data
            there.sendall(data[::-1])
            assert receive(client, len(data)) == data[::-1]
        assert relay.moved() == (len(data), len(data))


def test_an_end_arrives_after_the_data_and_leaves_the_other_way_open(target: socket.socket) -> None:
    with Relay(port_of(target), delay=0.02) as relay:
        client, there = connect(relay, target)
        with client, there:
            client.sendall(b"last")
            client.shutdown(socket.SHUT_WR)
            assert receive(there, 4) == b"last"
            assert there.recv(1) == b""
            there.sendall(b"answer")
            assert receive(client, 6) == b"answer"


def test_delay_holds_back_each_way(target: socket.socket) -> None:
    with Relay(port_of(target), delay=0.05) as relay:
        client, there = connect(relay, target)
        with client, there:
            start = time.monotonic()
            client.sendall(b"?")
            receive(there, 1)
            there.sendall(b"!")
            receive(client, 1)
            assert time.monotonic() - start >= 0.1


def test_delay_does_not_limit_what_is_on_the_way(target: socket.socket) -> None:
    data = bytes(4 << 20)
    with Relay(port_of(target), delay=5.0) as relay:
        client, there = connect(relay, target)
        with client, there:
            client.settimeout(4.5)  # shorter than the delay: nothing has arrived when all of it has left
            client.sendall(data)
            assert receive(there, len(data)) == data


def test_rate_is_shared_by_all_connections(target: socket.socket) -> None:
    data = bytes(250_000)
    with Relay(port_of(target), rate=8) as relay:
        first, second = connect(relay, target), connect(relay, target)
        start = time.monotonic()
        for client, _ in (first, second):
            client.sendall(data)
        for client, there in (first, second):
            with client, there:
                receive(there, len(data))
        assert time.monotonic() - start >= 0.45


def test_stall_moves_nothing_until_resume(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        client, there = connect(relay, target)
        with client, there:
            relay.stall()
            client.sendall(b"waits")
            assert is_silent(there)
            relay.resume()
            assert receive(there, 5) == b"waits"


def test_stall_accepts_nobody_until_resume(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        relay.stall()
        with closing(socket.create_connection(("127.0.0.1", relay.port), timeout=60)):
            assert is_silent(target)
            relay.resume()
            target.accept()[0].close()


def test_cut_resets_both_ends_and_new_connections_work(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        client, there = connect(relay, target)
        with client, there:
            relay.cut()
            for sock in (client, there):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
        client, there = connect(relay, target)
        with client, there:
            client.sendall(b"again")
            assert receive(there, 5) == b"again"


def test_cut_after_lets_just_so_many_bytes_back(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        client, there = connect(relay, target)
        with client, there:
            relay.cut_after(1000)
            there.sendall(bytes(3000))
            receive(client, 1000)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        client, there = connect(relay, target)
        with client, there:
            there.sendall(bytes(3000))
            receive(client, 3000)


def test_refuse_until_accept(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        relay.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", relay.port), timeout=60)
        relay.accept()
        for sock in connect(relay, target):
            sock.close()


def test_retarget_leads_new_connections_elsewhere_and_old_ones_stay(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay, listening() as other:
        client, there = connect(relay, target)
        relay.retarget(port_of(other))
        new_client, new_there = connect(relay, other)
        with client, there, new_client, new_there:
            for sender, receiver in ((client, there), (new_client, new_there)):
                sender.sendall(b"here")
                assert receive(receiver, 4) == b"here"


def test_a_target_that_refuses_resets_the_client() -> None:
    def visit() -> None:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=60) as client:
            client.recv(1)

    with Relay(free_port()) as relay, pytest.raises(ConnectionResetError):
        visit()


def test_a_target_that_resets_resets_the_client(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        client, there = connect(relay, target)
        with client:
            client.sendall(b"unread")
            assert not is_silent(there, 20)
            there.close()  # with data unread, so that TCP sends RST
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_an_unknown_command_is_an_error_and_not_the_end(target: socket.socket) -> None:
    with Relay(port_of(target)) as relay:
        with pytest.raises(AssertionError, match="there is no command 'slow'"):
            relay._command("slow")
        relay.stall()


@pytest.mark.parametrize("wrong", [["--delay", "-1"], ["--rate", "fast"]])
def test_wrong_options_are_refused_in_one_line(wrong: list[str]) -> None:
    program = [ROOT / "contrib" / "bench" / "wanrelay.py", *wrong, 0, "127.0.0.1", 1]
    status, out, err = run(sys.executable, *program, check=False)
    assert (status, out, err.count("\n")) == (1, "", 1), err
