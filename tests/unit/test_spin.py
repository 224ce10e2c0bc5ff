"""When a worker polls for the next request: as long as it pays."""

from __future__ import annotations

import random

from xnbd.server.session.spin import Spin

LONGEST = 50e-6
LATER = 300e-6
"""A wait that polling would not have shortened, but no long one."""


def miss(spin: Spin, times: int, waited: float = LATER) -> None:
    for _ in range(times):
        spin.missed(waited)


def given_up() -> Spin:
    spin = Spin(LONGEST)
    while spin.seconds:
        spin.missed(LATER)
    return spin


def tries(spin: Spin, waits: int, waited: float) -> int:
    """Of so many *waits*, in how many it polls in vain."""
    polled = 0
    for _ in range(waits):
        polled += bool(spin.seconds)
        spin.missed(waited)
    return polled


def test_it_polls_from_the_start_and_goes_on_while_requests_come() -> None:
    spin = Spin(LONGEST)
    for _ in range(100):
        assert spin.seconds == LONGEST
        spin.hit()


def test_misses_alone_end_it() -> None:
    spin = Spin(LONGEST)
    miss(spin, 100)
    assert not spin.seconds


def test_a_neighbour_that_spoils_half_of_the_waits_does_not_end_it() -> None:
    spin = Spin(LONGEST)
    chance = random.Random(1)
    for _ in range(10_000):
        spin.hit() if chance.random() < 0.5 else spin.missed(3e-3)
        assert spin.seconds


def test_it_is_tried_again_ever_more_rarely() -> None:
    assert 8 < tries(given_up(), 20_000, LATER) < 250


def test_a_try_is_not_ended_by_one_miss() -> None:
    spin = given_up()
    while not spin.seconds:
        spin.missed(LATER)
    miss(spin, 3)
    assert spin.seconds
    for _ in range(20):
        spin.hit()
    miss(spin, 10)
    assert spin.seconds


def test_it_is_tried_soon_where_waits_are_short() -> None:
    assert tries(given_up(), 10, LONGEST) > 0


def test_short_waits_that_polling_never_shortens_cost_little_in_the_long_run() -> None:
    assert tries(given_up(), 20_000, LONGEST) < 600


def test_what_has_worked_is_tried_again_as_soon_as_at_first() -> None:
    spin = given_up()
    tries(spin, 20_000, LATER)
    while not spin.seconds:
        spin.missed(LATER)
    for _ in range(100):
        spin.hit()
    miss(spin, 100)
    assert tries(spin, 30, LATER) > 0


def test_a_slow_client_is_never_polled_for_again() -> None:
    assert tries(given_up(), 10_000, 0.01) == 0


def test_none_at_all_when_told_so() -> None:
    spin = Spin(0.0)
    miss(spin, 100)
    assert spin.seconds == 0
