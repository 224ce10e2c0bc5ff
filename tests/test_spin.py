"""When a worker polls for the next request: as long as it pays."""

from __future__ import annotations

from xnbd.server.spin import Spin

LONGEST = 50e-6


def miss(spin: Spin, times: int, waited: float = 100e-6) -> None:
    for _ in range(times):
        spin.missed(waited)


def test_it_polls_from_the_start_and_goes_on_while_requests_come() -> None:
    spin = Spin(LONGEST)
    for _ in range(100):
        assert spin.seconds == LONGEST
        spin.hit()


def test_a_few_misses_in_a_row_end_it() -> None:
    spin = Spin(LONGEST)
    miss(spin, 4)
    assert spin.seconds == 0


def test_a_hit_now_and_then_keeps_it_going() -> None:
    spin = Spin(LONGEST)
    for _ in range(50):
        miss(spin, 3)
        spin.hit()
    assert spin.seconds == LONGEST


def test_it_is_tried_again_ever_more_rarely() -> None:
    spin = Spin(LONGEST)
    attempts = 0
    for _ in range(20_000):
        attempts += bool(spin.seconds)
        spin.missed(100e-6)
    assert 4 < attempts < 30


def test_a_try_that_brings_a_request_turns_it_on_again() -> None:
    spin = Spin(LONGEST)
    miss(spin, 4)
    while not spin.seconds:
        spin.missed(100e-6)
    spin.hit()
    miss(spin, 3)
    assert spin.seconds == LONGEST


def test_a_slow_client_is_never_polled_for_again() -> None:
    spin = Spin(LONGEST)
    miss(spin, 4)
    for _ in range(10_000):
        spin.missed(0.01)
        assert spin.seconds == 0


def test_none_at_all_when_told_so() -> None:
    spin = Spin(0.0)
    miss(spin, 100)
    assert spin.seconds == 0
