"""What two processes say to each other about a client, one step at a time, and what a session is as data."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import socket
import threading
import time
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_process import wait_until

from xnbd.access.identity import Identity
from xnbd.errors import Disconnected
from xnbd.protocol import constants as c
from xnbd.protocol.server_handshake import Agreement, Export
from xnbd.scoreboard.counters import Counts, new_counts
from xnbd.scoreboard.place import Visit
from xnbd.server.handover import frozen
from xnbd.server.handover.arrival import Arrival, Terms, receive_client, take_offer
from xnbd.server.handover.departure import Departure, Telling
from xnbd.server.handover.frozen import FrozenRequest, FrozenSession, Sections, pack_letter, parse_session
from xnbd.server.handover.letters import (
    READY,
    REFUSED,
    SESSION,
    Enclosed,
    Kit,
    Letter,
    claim,
    pack_offer,
    parse_offer,
    receive_letter,
    send_letter,
    unfold,
)
from xnbd.server.process_loop import ProcessLoop, Stop
from xnbd.server.reports import SIZE, Report, parse_report

DISK = (1, 2, 3)
AGREEMENT = Agreement(Export("ärger", 4096, c.FLAG_READ_ONLY, "a disk"), structured=True, ordered=False, readonly=True)
ALICE = Identity(("CN=älice,O=\udcff", "dns:alice", "uid:7"))
VISIT = Visit(123.5, Counts(range(len(new_counts()))))
TERMS = Terms(DISK, 4096, readonly=False)


# A session as data

requests = st.builds(
    FrozenRequest,
    st.integers(0, 7),
    st.integers(0, 31),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 1 << 63),
    st.integers(0, (1 << 32) - 1),
    st.lists(st.tuples(st.integers(0, 1 << 63), st.binary(max_size=20)), max_size=3),
    st.none() | st.binary(max_size=20),
    st.floats(0, 1e9),
)


def session_file(data: bytes = frozen.MAGIC) -> int:
    """A descriptor of a session's file."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    return fd


@contextmanager
def frozen_session(
    waiting: List[FrozenRequest], received: bytes = b"", replies: bytes = b""
) -> Iterator[Tuple[bytes, int]]:
    """Its letter and its file."""
    data = b"".join(request.pack() for request in waiting)
    fd = session_file(frozen.MAGIC + data + received + replies)
    try:
        sections, arrived = Sections(len(data), len(received), len(replies)), [request.arrived for request in waiting]
        yield pack_letter("peer", ALICE, AGREEMENT, VISIT, 77.25, sections, arrived=arrived), fd
    finally:
        os.close(fd)


@given(st.lists(requests, max_size=5), st.binary(max_size=50), st.binary(max_size=50))
def test_a_session_is_read_as_it_was_written(waiting: List[FrozenRequest], received: bytes, replies: bytes) -> None:
    with frozen_session(waiting, received, replies) as (letter, fd):
        session = parse_session(letter, fd)
    assert session == FrozenSession("peer", ALICE, AGREEMENT, VISIT, 77.25, waiting, received, replies)


def test_requests_of_a_program_that_does_not_say_when_they_came() -> None:
    with frozen_session(REQUESTS) as (letter, fd):
        fields = json.loads(letter)
        del fields["arrived"]
        session = parse_session(json.dumps(fields).encode(), fd)
    assert [request.arrived for request in session.requests] == [77.25, 77.25]


REQUESTS = [
    FrozenRequest(1, 0, b"12345678", 5, 3, [(5, b"abc")]),
    FrozenRequest(0, 0, b"12345678", 9, 1, [], b"answer"),
]


def test_what_is_cut_anywhere_is_refused() -> None:
    with frozen_session(REQUESTS, b"received", b"replies") as (letter, fd):
        for end in range(len(letter)):
            with pytest.raises(ValueError):
                parse_session(letter[:end], fd)
        for end in range(os.fstat(fd).st_size - 1, -1, -1):
            os.ftruncate(fd, end)
            with pytest.raises(ValueError):
                parse_session(letter, fd)


def test_requests_that_are_cut_are_refused_however_long_the_file_is() -> None:
    data = b"".join(request.pack() for request in REQUESTS)
    whole = {0, len(REQUESTS[0].pack()), len(data)}
    for end in range(len(data)):
        with frozen_session([], data[:end]) as (letter, fd):
            fields = json.loads(letter)
            fields["requests"], fields["received"] = end, 0
            if end in whole:
                parse_session(json.dumps(fields).encode(), fd)
                continue
            with pytest.raises(ValueError, match="session"):
                parse_session(json.dumps(fields).encode(), fd)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"received": -1},
        {"received": 1 << 40},
        {"received": "x"},
        {"agreement": {"export": None, "compressed": True}},
        {"agreement": {"structured": 1}},
        {"agreement": {"contexts": "base:allocation"}},
        {"agreement": {"contexts": ["base:allocation", "x:y"]}},
        {"agreement": {"contexts": [1]}},
        {"agreement": {"structured": True, "allocation": True}},
        {"agreement": {"export": {"name": "x"}}},
        {"agreement": []},
        {"counters": 5},
        {"counters": {"requests": "many"}},
        {"since": "yesterday"},
        {"identity": None},
        {"identity": "alice"},
        {"identity": ["alice", ""]},
    ],
)
def test_a_letter_that_this_program_does_not_understand_is_refused(change: Dict[str, object]) -> None:
    with frozen_session([]) as (letter, fd), pytest.raises(ValueError):
        parse_session(json.dumps({**json.loads(letter), **change}).encode(), fd)


def test_noise_is_refused() -> None:
    rng = random.Random(16)
    with frozen_session([]) as (_, fd):
        for _ in range(200):
            with pytest.raises(ValueError):
                parse_session(rng.randbytes(rng.randint(0, 60)), fd)


def test_counters_that_this_program_does_not_have_are_left_out() -> None:
    with frozen_session([]) as (letter, fd):
        fields = json.loads(letter)
        fields["counters"] = {"requests": 5, "sneezes": 7}
        session = parse_session(json.dumps(fields).encode(), fd)
    assert session.visit.counts.by_name()["requests"] == 5
    assert sum(session.visit.counts) == 5


# The old process


class Traveller:
    """A session that is frozen at once; ``client`` is its socket."""

    def __init__(self, client: socket.socket) -> None:
        self.stays = ""
        self.client = client
        self.has_origin = False
        self.failure: Optional[OSError] = None

    def fileno(self) -> int:
        return self.client.fileno()

    def freeze(self) -> Tuple[bytes, int]:
        if self.failure is not None:
            raise self.failure
        return pack_letter("peer", ALICE, AGREEMENT, VISIT, 77.25, Sections(0, 0, 0)), session_file()

    def let_go(self) -> None:
        self.client.close()


class Old:
    """The old process, whose client is asked to go; the test is the other one."""

    def __init__(self) -> None:
        self.loop = ProcessLoop(handle_signals=False)
        self.offers, self.offering = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far, client = socket.socketpair()
        self.traveller = Traveller(client)
        self.told: List[object] = []
        self.departure = Departure(self.loop, self.offering, DISK, Telling(self.told.append, self.told.append))
        self.loop.ordered = True

    def go_on(self) -> bool:
        return self.departure.go_on(self.traveller)

    def channel(self) -> socket.socket:
        """What it has offered."""
        offer = take_offer(self.offers)
        assert offer is not None
        assert offer.data == pack_offer(DISK)
        return socket.socket(fileno=offer.fds[0])

    def has_offer(self) -> bool:
        return bool(select.select([self.offers], [], [], 0)[0])

    def channel_of_next_offer(self) -> socket.socket:
        """It offers the client again, after a while."""

        def offers() -> bool:
            assert not self.go_on()
            return self.has_offer()

        wait_until(offers, "the next offer")
        return self.channel()

    def has_client(self) -> bool:
        return self.traveller.client.fileno() >= 0

    def close(self) -> None:
        self.departure.cancel()
        for sock in (self.offers, self.offering, self.far, self.traveller.client):
            sock.close()


@pytest.fixture
def old() -> Iterator[Old]:
    process = Old()
    yield process
    process.close()


def letter_on(channel: socket.socket) -> Letter:
    letter = receive_letter(channel)
    assert letter is not None
    letter.close()
    return letter


@contextmanager
def session_awaited(
    channel: socket.socket, answer: bytes = b"", *, claimed: bool = False, closed: bool = True
) -> Iterator[None]:
    """In a thread: wait for the session, claim it perhaps, give this *answer* perhaps, and close the channel."""

    def run() -> None:
        select.select([channel], [], [])
        letter = receive_letter(channel)
        assert letter is not None
        assert letter.data[:1] == SESSION
        assert not claimed or claim(letter.fds[1])
        letter.close()
        if answer:
            channel.send(answer)
        if closed:
            channel.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


def test_nothing_happens_without_an_order(old: Old) -> None:
    old.loop.ordered = False
    assert not old.go_on()
    assert take_offer(old.offers) is None


def test_the_client_goes_when_the_other_process_has_taken_it(old: Old) -> None:
    assert not old.go_on()
    channel = old.channel()
    send_letter(channel, READY + b"4711")
    with session_awaited(channel, claimed=True):
        assert old.go_on()
    assert old.told == [4711]
    assert old.departure.taken_by == 4711
    assert not old.has_client()


def test_the_client_that_was_taken_is_not_served_however_its_new_process_ends(old: Old) -> None:
    """It may be stopped, or say what it likes."""
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
        with session_awaited(channel, REFUSED + b"no", claimed=True, closed=False):
            assert old.go_on()
    assert not old.has_client()


def test_a_stop_ends_the_wait_for_one_who_does_not_take_the_client(old: Old) -> None:
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
        old.loop.lifeline, masters_end = os.pipe()
        os.close(masters_end)
        with pytest.raises(Stop):
            old.go_on()
        os.close(old.loop.lifeline)
        letter = receive_letter(channel)
        assert letter is not None
        assert not claim(letter.fds[1])
        letter.close()
    assert old.has_client()


def test_the_client_is_served_until_somebody_is_ready(old: Old) -> None:
    for _ in range(5):
        assert not old.go_on()
    with old.channel():
        assert take_offer(old.offers) is None
        assert old.has_client()


def test_a_client_that_cannot_move_stays_and_the_reason_is_told(old: Old) -> None:
    old.traveller.stays = "TLS"
    assert not old.go_on()
    assert old.told == ["TLS"]
    assert take_offer(old.offers) is None


def test_a_refusal_is_told(old: Old) -> None:
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, REFUSED + b"another disk is served here")
        assert not old.go_on()
    assert old.told == ["another disk is served here"]


def test_a_session_that_is_refused_is_taken_back(old: Old) -> None:
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
        with session_awaited(channel, REFUSED + b"no", closed=False):
            assert not old.go_on()
    assert old.told == ["no"]
    assert old.has_client()


def test_when_the_other_process_dies_the_client_is_offered_again(old: Old) -> None:
    assert not old.go_on()
    old.channel().close()
    channel = old.channel_of_next_offer()
    send_letter(channel, READY + b"4711")
    with session_awaited(channel):
        assert not old.go_on()
    assert old.has_client()
    assert old.told == []
    old.channel_of_next_offer().close()


def test_one_that_was_ready_and_has_died_gets_no_session(old: Old) -> None:
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
    channel = old.channel_of_next_offer()
    assert old.has_client()
    channel.close()


def test_a_kit_of_many_descriptors_comes_whole(old: Old) -> None:
    """A cache with checksums and a limit has eleven; a letter that was cut would be no offer."""
    with open(os.devnull, "rb") as file:
        old.departure = Departure(old.loop, old.offering, DISK, kit=Kit({}, [file.fileno()] * 16))
        old.loop.ordered = True
        assert not old.go_on()
        offer = take_offer(old.offers, with_kit=True)
    assert offer is not None
    assert len(offer.fds) == 17
    offer.close()


def test_offers_that_nobody_can_take_are_some_way_apart(old: Old) -> None:
    until, offers = time.monotonic() + 0.2, 0
    while time.monotonic() < until:
        assert not old.go_on()
        if old.has_offer():
            old.channel().close()
            offers += 1
    assert 1 <= offers <= 11


def test_a_silent_process_does_not_get_the_client(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xnbd.server.handover.departure.PATIENCE", 0.05)
    assert not old.go_on()
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
        assert not old.go_on()
        letter = receive_letter(channel)
        assert letter is not None
        assert not claim(letter.fds[1])
        letter.close()
        assert letter_on(channel).data == b""
    assert old.has_client()
    assert old.told == ["the process that was to take it does not answer"]


def test_if_nobody_takes_it_the_client_stays(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xnbd.server.handover.departure.PATIENCE", 0.05)
    assert not old.go_on()
    assert not old.loop.wait((), 0, 5.0, calls=True)
    assert not old.go_on()
    assert old.told == ["no other process takes it"]


def test_a_session_that_cannot_be_frozen_stays(old: Old) -> None:
    assert not old.go_on()
    old.traveller.failure = OSError(errno.EFBIG, "too much")
    with old.channel() as channel:
        send_letter(channel, READY + b"4711")
        assert not old.go_on()
        assert letter_on(channel).data == b""
    assert old.told == ["too much"]
    assert old.has_client()


def test_a_doubt_about_who_has_the_client_ends_the_connection(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> bool:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr("xnbd.server.handover.departure.claim", fail)
    assert not old.go_on()
    channel = old.channel()
    send_letter(channel, READY + b"4711")
    with session_awaited(channel), pytest.raises(Disconnected, match="no memory"):
        old.go_on()


def test_too_many_offers_are_made_later(old: Old) -> None:
    while True:
        try:
            send_letter(old.offering, b"x")
        except BlockingIOError:
            break
    assert not old.go_on()
    assert not old.loop.wait((), 0, 5.0, calls=True)
    while receive_letter(old.offers) is not None:
        pass
    assert not old.go_on()
    old.channel().close()


# The new process


class New:
    """The new process, in a thread; the test is the old one."""

    def __init__(self, terms: Terms = TERMS, offer: bytes = b"") -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = ours
        self.arrivals: List[Optional[Arrival]] = []
        letter = Letter(offer or pack_offer(DISK), [theirs.detach()])
        loop = ProcessLoop(handle_signals=False)
        self._thread = threading.Thread(target=lambda: self.arrivals.append(receive_client(letter, loop, terms)))
        self._thread.start()

    def hear(self) -> bytes:
        self.channel.settimeout(30)
        return self.channel.recv(1 << 16)

    def send(
        self, *, agreement: Agreement = AGREEMENT, data: bytes = frozen.MAGIC, claimed: bool = False
    ) -> socket.socket:
        """A session with a client, whose other end is returned; the old process may have *claimed* it back already."""
        far, client = socket.socketpair()
        fd = session_file(data)
        assert not claimed or claim(fd)
        letter = pack_letter("peer", ALICE, agreement, VISIT, 77.25, Sections(0, 0, 0))
        send_letter(self.channel, SESSION + letter, (client.fileno(), fd))
        client.close()
        os.close(fd)
        return far

    def arrival(self) -> Optional[Arrival]:
        self._thread.join(30)
        (arrival,) = self.arrivals
        return arrival

    def outcome(self) -> Optional[Arrival]:
        try:
            return self.arrival()
        finally:
            self.channel.close()


def test_a_client_is_taken_at_once_and_the_old_process_is_told_when_there_is_time() -> None:
    new = New()
    assert new.hear() == READY + str(os.getpid()).encode()
    with new.send() as far:
        arrival = new.arrival()
        assert arrival is not None
        assert arrival.session.agreement == AGREEMENT
        assert arrival.pid == os.getpid()
        assert select.select([new.channel], [], [], 0)[0] == []
        arrival.rest.close()
        assert new.hear() == b""
        arrival.sock.send(b"x")
        assert far.recv(1) == b"x"
        arrival.sock.close()
        new.outcome()


def test_a_client_that_is_taken_back_is_left_alone() -> None:
    new = New()
    new.hear()
    with new.send(claimed=True) as far:
        assert new.hear() == b""
        assert new.outcome() is None
        assert far.recv(1) == b""  # nobody has it open any more


def test_a_client_whose_old_process_has_died_is_served() -> None:
    """The kernel tells of the reset first, and of the letter then."""
    new = New()
    new.hear()
    with new.send():
        new.channel.close()
        arrival = new.arrival()
        assert arrival is not None
        arrival.rest.close()
        arrival.sock.close()


def test_only_one_has_a_client() -> None:
    fd = session_file()
    with os.fdopen(os.dup(fd), "r+b", closefd=True) as there:
        assert claim(there.fileno())
    assert not claim(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        claim(fd)


def test_an_offer_that_is_withdrawn_is_nothing() -> None:
    new = New()
    new.channel.close()
    assert new.outcome() is None


@pytest.mark.parametrize(
    "offer, reason",
    [
        (b"noise", b"this is no offer of a client"),
        (b"XNBDMOVE{}", b"the offer is in the format of another version"),
        (b'XNBDMOVE{"format": 2}', b"the offer is in the format of another version"),
        (pack_offer((7, 8, 9)), b"another disk is served here"),
    ],
)
def test_other_offers_are_refused(offer: bytes, reason: bytes) -> None:
    new = New(offer=offer)
    assert new.hear() == REFUSED + reason
    assert new.outcome() is None


@pytest.mark.parametrize("offer", [b"XNBDMOVE", b"XNBDMOVE[]", b"XNBDMOVE5", b"XNBDMOVE\xff", b""])
def test_an_offer_that_makes_no_sense_is_refused(offer: bytes) -> None:
    new = New(offer=offer or b"?")
    assert new.hear()[:1] == REFUSED
    assert new.outcome() is None


def test_a_disk_of_another_size_is_refused() -> None:
    new = New(Terms(DISK, 8192, readonly=False))
    new.hear()
    with new.send():
        assert new.hear() == REFUSED + b"the disk has 8192 bytes here, and 4096 there"
        assert new.outcome() is None


def test_a_client_that_may_write_is_refused_where_it_cannot() -> None:
    writer = AGREEMENT._replace(export=Export("", 4096, 0, ""), readonly=False)
    new = New(Terms(DISK, 4096, readonly=True))
    new.hear()
    with new.send(agreement=writer):
        assert new.hear() == REFUSED + b"the disk is read-only here"
        assert new.outcome() is None


@pytest.mark.parametrize("data", [b"", b"XNBDSES", b"XNBDSESSx"])
def test_a_session_that_cannot_be_read_is_refused(data: bytes) -> None:
    new = New()
    new.hear()
    with new.send(data=data):
        assert new.hear()[:1] == REFUSED
        assert new.outcome() is None


def test_a_letter_without_descriptors_is_refused() -> None:
    new = New()
    new.hear()
    send_letter(new.channel, SESSION + b"{}")
    assert new.hear() == REFUSED + b"what has come is no session"
    assert new.outcome() is None


def test_an_offer_without_a_channel_is_left_alone() -> None:
    offers, offering = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with offers, offering:
        send_letter(offering, pack_offer(DISK))
        assert take_offer(offers) is None


# What the master is told


@given(
    st.builds(
        Report,
        st.integers(1, 1 << 22),
        st.sampled_from(["", "unix:pid=5,uid=0", "[2001:db8::1]:65535", "a client that has left"]),
        st.integers(0, 1 << 22),
        st.integers(0, 1 << 22),
        st.sampled_from([0.0, 0.000125, 3.5]),
        st.sampled_from(["", "TLS", "no other process takes it"]),
    )
)
def test_a_report_is_read_as_it_was_written(report: Report) -> None:
    assert len(report.pack()) == SIZE
    assert parse_report(report.pack()) == report


def test_a_report_of_another_version_is_read_as_far_as_it_is_known() -> None:
    assert parse_report(b"12\tpeer".ljust(SIZE)) == Report(12, "peer")
    assert parse_report(b"12\tpeer\t0\t5\t0.5\t\tsomething new".ljust(SIZE)) == Report(12, "peer", 0, 5, 0.5)


def test_a_long_reason_is_cut() -> None:
    report = parse_report(Report(1, "peer", stays="x" * 500).pack())
    assert report.stays == "x" * 100


def test_a_kit_goes_along_with_its_descriptors_and_finds_them_again() -> None:
    enclosed = Enclosed()
    kit = {
        "disk": {"image": enclosed(70), "fds": [enclosed(50), enclosed(60)], "size": 1 << 62, "punch": True},
        "no": None,
    }
    fields = parse_offer(pack_offer(DISK, kit))
    assert fields["disk"] == list(DISK)
    assert enclosed.fds == [70, 50, 60]
    there = unfold(fields["kit"], [7, 5, 6])
    assert there == {"disk": {"image": 7, "fds": [5, 6], "size": 1 << 62, "punch": True}, "no": None}
    with pytest.raises(IndexError):
        unfold(fields["kit"], [7, 5])


def test_an_offer_with_a_kit_is_for_those_who_expect_one() -> None:
    offers, offering = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with offers, offering:
        for with_kit in (False, True):
            send_letter(offering, pack_offer(DISK, {"disk": -1}), (0, 1))
            offer = take_offer(offers, with_kit=with_kit)
            assert (offer is not None) == with_kit
            if offer is not None:
                assert len(offer.fds) == 2
                offer.close()
