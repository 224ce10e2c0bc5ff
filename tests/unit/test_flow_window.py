"""How much is asked for at once, on lines of which everything is known: the clock is a number."""

from __future__ import annotations

from collections import deque
from typing import Deque, NamedTuple, Tuple

import pytest

from xnbd.origin.flow_window import FlowWindow

PIECE = 256 << 10
LEAST = 512 << 10
MBIT = 1e6 / 8


class Outcome(NamedTuple):
    """*used* of the line's rate, and how many seconds a request stood in the queue at the end."""

    used: float
    queue: float


class Line:
    """Replies come one after the other at *rate* bytes per second, *round_trip* seconds after the first byte's turn."""

    def __init__(self, rate: float, round_trip: float) -> None:
        self.rate = rate
        self.round_trip = round_trip
        self.now = 0.0
        self._free_at = 0.0
        self._sent: Deque[Tuple[float, float]] = deque()  # when it was asked for, when it comes

    def run(self, window: FlowWindow, seconds: float) -> Outcome:
        """Ask for pieces as *window* allows."""
        begin, end, pieces, queue = self.now, self.now + seconds, 0, 0.0
        while self.now < end:
            while len(self._sent) * PIECE < window.size:
                turn = max(self.now, self._free_at)
                queue = turn - self.now
                self._free_at = turn + PIECE / self.rate
                self._sent.append((self.now, self._free_at + self.round_trip))
            asked_at, self.now = self._sent.popleft()
            window.on_reply(asked_at, self.now, PIECE, (len(self._sent) + 1) * PIECE)
            pieces += 1
        return Outcome(pieces * PIECE / self.rate / (self.now - begin), queue)


@pytest.mark.parametrize(
    ("rate", "round_trip"),
    [(20 * MBIT, 0.02), (200 * MBIT, 0.02), (1000 * MBIT, 0.05), (2 * MBIT, 0.6), (10_000 * MBIT, 0.0002)],
)
def test_a_line_is_filled_and_its_queue_kept_short(rate: float, round_trip: float) -> None:
    line, window = Line(rate, round_trip), FlowWindow(LEAST)
    line.run(window, 10)
    outcome = line.run(window, 15)
    assert outcome.used > 0.95
    assert outcome.queue < 0.06 + LEAST / rate


def test_where_8_mib_are_on_their_way_no_more_is_asked_for() -> None:
    line, window = Line(1000 * MBIT, 0.2), FlowWindow(LEAST)
    line.run(window, 5)
    assert line.run(window, 5).used == pytest.approx((8 << 20) / (1000 * MBIT * 0.2), rel=0.1)


def test_a_line_that_becomes_slower_is_asked_for_less() -> None:
    line, window = Line(500 * MBIT, 0.02), FlowWindow(LEAST)
    line.run(window, 5)
    before = window.size
    line.rate /= 20
    line.run(window, 5)
    assert window.size < before / 2


def test_a_longer_way_is_not_taken_for_a_queue_for_ever() -> None:
    line, window = Line(500 * MBIT, 0.005), FlowWindow(LEAST)
    line.run(window, 5)
    line.round_trip = 0.08
    line.run(window, 65)
    assert line.run(window, 20).used > 0.9


def test_all_that_came_late_together_counts_once() -> None:
    window = FlowWindow(LEAST)
    window.on_reply(0.0, 0.02, PIECE, PIECE)
    for _ in range(8):
        window.on_reply(1.0, 4.0, PIECE, 8 * PIECE)
    assert window.size == FlowWindow(LEAST).size // 2


def test_an_hour_does_not_let_the_queue_grow() -> None:
    line, window = Line(100 * MBIT, 0.02), FlowWindow(LEAST)
    line.run(window, 3600)
    assert line.run(window, 10).queue < 0.1


def test_short_replies_tell_nothing() -> None:
    window = FlowWindow(LEAST)
    for took in (0.001, 10.0):
        window.on_reply(0.0, took, 4096, 8 << 20)
    assert window.size == FlowWindow(LEAST).size


def test_who_asks_for_little_gets_no_larger_window() -> None:
    window = FlowWindow(LEAST)
    for second in range(100):
        window.on_reply(second, second + 0.01, PIECE, PIECE)
        assert window.size <= FlowWindow(LEAST).size
