"""Which answer of several origins counts, who is asked, and when one is late: without any connection."""

from __future__ import annotations

import errno
from typing import Any, Dict, List, Optional, Tuple

import pytest

from xnbd.errors import ConfigurationError
from xnbd.origin.address import members_of, overrules, parse_origin, places_of
from xnbd.origin.base import Data, Origin, OriginLost, Sink, Terms
from xnbd.origin.objects.address import ObjectAddress
from xnbd.origin.several import dispatch, member
from xnbd.origin.several.address import MOST, SeveralAddresses
from xnbd.origin.several.latency import FLOOR, Latency
from xnbd.origin.several.origin import SeveralOrigins
from xnbd.proxy.origin_link import contradiction
from xnbd.scoreboard.layout import ORIGINS

BLOCK = 4096


class Keeper:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.told: List[Tuple[Any, ...]] = []

    def on_data(self, token: Any, offset: int, data: Data) -> None:
        self.told.append(("data", token, offset, bytes(data)))

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        self.told.append(("hole", token, offset, length))

    def on_extents(self, token: Any, extents: List[Tuple[int, bool]]) -> None:
        self.told.append(("extents", token, extents))

    def on_done(self, token: Any, error: int) -> None:
        self.told.append(("done", token, error))


class Puppet(Origin):
    """An origin whose answers the test gives."""

    size = 1 << 30
    maximum_read = 1 << 20
    deadline = None
    can_tell_zeros = True
    ready = True

    def __init__(self, address: PuppetAddress, sink: Sink) -> None:
        self.heard_at = 0.0
        self.asked: List[Any] = []
        self.lost: Optional[str] = None
        self.sink = sink
        self.can_tell_zeros = address.zeros

    @property
    def outstanding(self) -> int:
        return len(self.asked)

    def unfinished(self) -> List[Any]:
        return self.asked

    def interests(self) -> List[Tuple[int, int]]:
        return []

    def start(self) -> None:
        self.progress()

    def read(self, token: Any, offset: int, length: int) -> None:
        self.asked.append(token)

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        self.asked.append(token)

    def push(self) -> None:
        pass

    def progress(self) -> None:
        if self.lost is not None:
            raise OriginLost(self.lost)

    def close(self) -> None:
        self.ready = False

    def answer(self, *pieces: Tuple[int, bytes], error: int = 0) -> None:
        """The oldest request."""
        token = self.asked.pop(0)
        for offset, data in pieces:
            self.sink.on_data(token, offset, data)
        self.sink.on_done(token, error)


class PuppetAddress:
    """Each origin opened here is in ``opened``."""

    fetch_size = BLOCK
    starts_threads = False
    local_files: Dict[str, int] = {}

    def __init__(self, name: str, *, zeros: bool = True) -> None:
        self.place = self.name = name
        self.zeros = zeros
        self.opened: List[Puppet] = []
        self.refuses: Optional[str] = None

    def __str__(self) -> str:
        return self.name

    def overrules(self, noted: object) -> bool:
        return False

    def common(self, version: str) -> str:
        return ""

    def warnings(self) -> List[str]:
        return []

    def open(self, sink: Sink, terms: Terms) -> Origin:
        if self.refuses:
            raise OriginLost(self.refuses)
        self.opened.append(Puppet(self, sink))
        return self.opened[-1]

    @property
    def puppet(self) -> Puppet:
        return self.opened[-1]


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    for module in ("dispatch", "member", "origin", "reads"):
        monkeypatch.setattr(f"xnbd.origin.several.{module}.monotonic", time)
    return time


class Stage:
    """Several puppets, and what owns them; both are known to be quick."""

    def __init__(self, clock: Time, count: int = 2, *, zeros: bool = True) -> None:
        self.clock = clock
        self.addresses = [PuppetAddress(f"p{number}", zeros=zeros) for number in range(count)]
        self.sink = Keeper()
        self.origin = SeveralOrigins(SeveralAddresses(tuple(self.addresses)), self.sink, Terms())
        self.origin.start()
        self.origin.progress()

    @property
    def puppets(self) -> List[Puppet]:
        return [address.puppet for address in self.addresses]

    def measure(self, *seconds: float) -> None:
        """Each origin is known to take so long."""
        for one, took in zip(self.origin._members, seconds):
            one.latency.begin(took)

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.origin.progress()

    def asked(self) -> List[int]:
        return [len(puppet.asked) for puppet in self.puppets]


@pytest.fixture
def stage(clock: Time) -> Stage:
    made = Stage(clock)
    made.measure(0.01, 0.02)
    return made


def test_one_read_goes_to_the_quickest_and_many_go_to_all_by_their_speed(stage: Stage) -> None:
    stage.origin.read("a", 0, BLOCK)
    assert stage.asked() == [1, 0]
    for number in range(29):
        stage.origin.read(number, BLOCK, BLOCK)
    assert stage.asked() == [20, 10]


def test_a_late_one_is_helped_and_the_first_answer_counts(stage: Stage) -> None:
    stage.origin.read("a", 0, 2 * BLOCK)
    first, second = stage.puppets
    first.sink.on_data(first.asked[0], 0, b"1" * BLOCK)
    first.heard_at = stage.clock.now + FLOOR
    stage.later(FLOOR + 0.01)
    assert stage.asked() == [1, 1]
    second.sink.on_data(second.asked[0], 0, b"1" * BLOCK)
    assert stage.sink.told == [("data", "a", 0, b"1" * BLOCK)]
    second.answer((BLOCK, b"2" * BLOCK))
    whole = [("data", "a", 0, b"1" * BLOCK), ("data", "a", BLOCK, b"2" * BLOCK), ("done", "a", 0)]
    assert stage.sink.told == [("data", "a", 0, b"1" * BLOCK), *whole]
    first.answer((BLOCK, b"2" * BLOCK))
    assert len(stage.sink.told) == 4
    assert not stage.origin.outstanding


def test_of_many_late_ones_few_are_asked_twice_unless_the_origin_is_silent(stage: Stage) -> None:
    stage.measure(0.01, 10)
    for number in range(30):
        stage.origin.read(number, 0, BLOCK)
    assert stage.asked() == [30, 0]
    stage.puppets[0].heard_at = stage.clock.now + FLOOR
    stage.later(FLOOR + 0.01)
    assert stage.asked() == [30, dispatch._MOST_SECONDS]
    stage.puppets[1].heard_at = stage.clock.now + 1
    stage.later(1)
    assert stage.asked() == [30, 30]
    stage.origin.read("new", 0, BLOCK)
    assert stage.asked() == [30, 31]


def test_an_error_is_one_only_if_nobody_can_read_it(stage: Stage) -> None:
    stage.origin.read("a", 0, BLOCK)
    first, second = stage.puppets
    first.answer(error=errno.EIO)
    assert not stage.sink.told
    second.answer(error=errno.ENOMEM)
    assert stage.sink.told == [("done", "a", errno.ENOMEM)]


def test_who_is_lost_is_replaced_and_tried_again(stage: Stage) -> None:
    stage.origin.read("a", 0, BLOCK)
    first, second = stage.puppets
    first.lost = "origin p0: gone"
    stage.later(0)
    assert stage.asked() == [0, 1] or stage.asked() == [1, 1]
    second.answer((0, b"x" * BLOCK))
    assert stage.sink.told[-1] == ("done", "a", 0)
    stage.later(member._FIRST_DELAY + 0.01)
    stage.later(0)
    assert stage.addresses[0].puppet is not first
    assert stage.origin.deadline is None


def test_the_loss_of_the_last_one_is_the_loss_of_all(stage: Stage) -> None:
    stage.origin.read("a", 0, BLOCK)
    stage.origin.read("b", 0, BLOCK)
    for number, puppet in enumerate(stage.puppets):
        puppet.lost = f"origin p{number}: gone"
    with pytest.raises(OriginLost, match="origin p0 p1: p0: gone; p1: gone"):
        stage.later(0)
    assert stage.origin.unfinished() == ["a", "b"]


def test_a_loss_is_told_once_and_only_while_others_are_there(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    addresses = tuple(PuppetAddress(f"p{number}") for number in range(3))
    told: Dict[str, str] = {}

    def attempt() -> SeveralOrigins:
        origin = SeveralOrigins(SeveralAddresses(addresses), Keeper(), Terms(told=told))
        origin.start()
        origin.progress()
        return origin

    for address in addresses:
        address.refuses = f"origin {address}: away"
    for _ in range(3):
        with pytest.raises(OriginLost, match="p0: away; p1: away; p2: away"):
            attempt()
    assert not caplog.messages
    addresses[1].refuses = None
    for _ in range(3):
        attempt().close()
    assert caplog.messages == [f"origin {name}: away; the others are asked" for name in ("p0", "p2")]
    addresses[0].refuses = None
    attempt()
    assert caplog.messages[2:] == ["origin p0: is there again"]


def test_who_is_silent_is_asked_for_nothing_until_it_has_shown_that_it_answers(stage: Stage) -> None:
    stage.origin.read("a", 0, BLOCK)
    stage.later(1)
    first, second = stage.puppets
    second.answer((0, b"x" * BLOCK))
    assert [standing.health.name for standing in stage.origin.news() or ()] == ["SLOW", "REACHED"]
    stage.origin.read("b", 0, BLOCK)
    assert stage.asked() == [1, 1]
    first.answer((0, b"x" * BLOCK))
    assert stage.sink.told.count(("done", "a", 0)) == 1
    assert [standing.health.name for standing in stage.origin.news() or ()] == ["REACHED", "REACHED"]


def test_zeros_are_asked_only_of_who_can_tell_them(clock: Time) -> None:
    stage = Stage(clock, zeros=False)
    assert not stage.origin.can_tell_zeros
    stage.puppets[1].can_tell_zeros = True
    stage.measure(0.01, 5)
    stage.origin.query_extents("z", 0, BLOCK)
    assert stage.asked() == [0, 1]
    stage.puppets[1].sink.on_extents(stage.puppets[1].asked[0], [(BLOCK, True)])
    assert not stage.sink.told
    stage.puppets[1].answer()
    assert stage.sink.told == [("extents", "z", [(BLOCK, True)]), ("done", "z", 0)]


def test_a_question_that_nobody_left_can_answer_is_an_error(clock: Time) -> None:
    stage = Stage(clock, zeros=False)
    stage.puppets[1].can_tell_zeros = True
    stage.origin.query_extents("z", 0, BLOCK)
    stage.puppets[1].lost = "origin p1: gone"
    stage.addresses[1].refuses = "origin p1: not there"
    for _ in range(4):
        stage.later(3)
    assert stage.sink.told == [("done", "z", errno.EIO)]


# Latency


def test_late_is_what_takes_far_longer_than_usual() -> None:
    latency = Latency()
    assert latency.late_after == pytest.approx(0.5)
    for _ in range(50):
        latency.add(0.001)
    assert latency.late_after == FLOOR
    for _ in range(50):
        latency.add(2.0)
    assert 2 < latency.late_after < 3
    latency.add(0.001)
    latency.add(0.001)
    assert latency.mean is not None
    assert latency.mean < 1


def test_silence_is_measured_by_the_usual_gaps() -> None:
    latency = Latency()
    assert latency.silent_after == pytest.approx(0.5)
    for _ in range(50):
        latency.add_gap(1.0)
    assert latency.silent_after > 5


# Addresses


def test_several_addresses_are_one_text_and_back() -> None:
    text = "nbd://a:10809/disk nbds://b:1/x%20y?tls-hostname=z https://c/d.raw s3://bucket/key?region=eu"
    address = parse_origin(text)
    assert str(address) == text
    assert parse_origin(str(address)) == address
    assert [str(one) for one in members_of(address)] == text.split(" ")
    assert places_of(text)[1] == "nbd://b:1/x%20y"
    assert members_of(parse_origin("nbd://a/disk")) == [parse_origin("nbd://a/disk")]
    assert address.fetch_size == 256 << 10
    assert address.starts_threads


def test_a_blank_in_a_uri_is_still_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="write special characters as %20"):
        parse_origin("nbd://a/my disk")


def test_no_place_is_named_twice() -> None:
    with pytest.raises(ConfigurationError, match="is named twice"):
        parse_origin("nbd://a/x nbds://a/x")
    with pytest.raises(ConfigurationError, match=f"at most {MOST} origins, not {MOST + 1}"):
        parse_origin(" ".join(f"nbd://h/{number}" for number in range(MOST + 1)))
    assert MOST == ORIGINS


@pytest.mark.parametrize(
    ("wanted", "noted", "counts"),
    [
        ("nbd://a/x nbd://b/x", "nbd://a:10809/x", True),
        ("nbd://a/x nbd://b/x", "nbd://c/x", False),
        ("nbd://a/x nbds://b/x", "nbd://b/x", True),
        ("nbd://a/x nbd://b/x", "nbds://b/x", False),
        ("nbd://a/x", "nbd://a/x nbd://b/x", False),
    ],
)
def test_a_command_line_counts_if_it_only_adds_places(wanted: str, noted: str, counts: bool) -> None:
    assert overrules(wanted, noted) is counts


def test_versions_contradict_each_other_only_where_both_tell_the_same() -> None:
    one, two = ObjectAddress("s3", "a", "k"), ObjectAddress("s3", "b", "k")
    here, there = f'ETag "{"a" * 32}"', f'ETag "{"b" * 32}"'
    assert "it has another disk" in contradiction(one, here, two, there)
    assert not contradiction(one, here, two, here)
    assert not contradiction(one, here, two, f'ETag "{"b" * 32}-7"')
    assert not contradiction(one, here, ObjectAddress("https", "w", "k"), 'ETag "1-2"')
    web = ObjectAddress("https", "w", "k"), ObjectAddress("http", "v", "k")
    assert contradiction(web[0], 'ETag "1-2"', web[1], 'ETag "1-3"')
    assert not contradiction(web[0], 'ETag W/"1-2"', web[1], 'ETag "1-3"')
