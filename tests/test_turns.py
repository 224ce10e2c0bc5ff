"""When those who were locked out may try again; the clocks are numbers."""

from __future__ import annotations

from typing import List

from xnbd.storage.turns import Turns

SHORT, LONG = 0.0005, 0.008
TENTH = 9


class Locked:
    """*names* try again and again, each for *effort* seconds; their locks are never free."""

    def __init__(self, names: List[str], effort: float = 0.0) -> None:
        self.turns: Turns[str] = Turns()
        self.now, self.used, self._effort = 100.0, 5.0, effort
        for name in names:
            self.turns.lock_out(name)

    def next_turn(self) -> float:
        """The pause before the next turn, which everybody tries in vain; in seconds."""
        assert self.turns.take(self.now, self.used) == []
        assert self.turns.deadline is not None
        pause = self.turns.deadline - self.now
        self.now = self.turns.deadline
        for name in self.turns.take(self.now, self.used):
            self.now += self._effort
            self.used += self._effort
            self.turns.lock_out(name)
        return pause


def about(seconds: float, expected: float) -> bool:
    return abs(seconds - expected) < 1e-6


def test_nobody_is_locked_out_at_first() -> None:
    turns: Turns[str] = Turns()
    assert not turns.busy
    assert turns.deadline is None
    assert turns.take(100.0, 5.0) == []


def test_who_is_locked_out_has_a_turn_in_half_a_millisecond() -> None:
    turns: Turns[str] = Turns()
    turns.lock_out("a")
    assert turns.busy
    assert turns.deadline == 0.0  # at once, to know when
    assert turns.take(100.0, 5.0) == []
    assert turns.deadline == 100.0 + SHORT
    assert turns.take(100.0 + SHORT / 2, 5.0) == []
    assert turns.take(100.0 + SHORT, 5.0) == ["a"]


def test_all_who_are_locked_out_have_one_turn_in_their_order() -> None:
    turns: Turns[str] = Turns()
    turns.lock_out("a")
    assert turns.take(100.0, 5.0) == []
    turns.lock_out("b")
    turns.lock_out("c")
    assert turns.take(100.0 + SHORT, 5.0) == ["a", "b", "c"]


def test_pauses_double_while_nobody_gets_through_up_to_a_limit() -> None:
    locked = Locked(["a", "b"])
    pauses = [locked.next_turn() for _ in range(7)]
    expected = [SHORT, 2 * SHORT, 4 * SHORT, 8 * SHORT, LONG, LONG, LONG]
    assert all(map(about, pauses, expected)), pauses


def test_pauses_are_short_again_once_somebody_has_got_through() -> None:
    turns: Turns[str] = Turns()
    for name in "ab":
        turns.lock_out(name)
    now = 100.0
    for _ in range(6):
        turns.take(now, 5.0)
        now += LONG
        for name in turns.take(now, 5.0):
            turns.lock_out(name)
    turns.take(now, 5.0)
    now += LONG
    assert turns.take(now, 5.0) == ["a", "b"]
    turns.lock_out("b")
    turns.take(now, 5.0)
    assert turns.deadline is not None
    assert about(turns.deadline - now, SHORT)


def test_trying_takes_a_tenth_of_the_time_however_many_try() -> None:
    locked = Locked([str(number) for number in range(1000)], effort=2e-5)
    locked.next_turn()
    pauses = [locked.next_turn() for _ in range(5)]
    assert all(about(pause, TENTH * 1000 * 2e-5) for pause in pauses), pauses


def test_time_in_which_the_process_stood_still_does_not_lengthen_a_pause() -> None:
    locked = Locked(["a"])
    locked.next_turn()
    locked.now += 3600
    assert about(locked.next_turn(), 2 * SHORT)


def test_a_turn_in_which_something_long_was_done_lengthens_the_next_pause_to_a_second_at_most() -> None:
    locked = Locked(["a"])
    locked.next_turn()
    locked.now += 60
    locked.used += 60
    assert about(locked.next_turn(), 1.0)


def test_time_after_a_turn_in_which_all_got_through_does_not_lengthen_a_pause() -> None:
    """The end of such a turn has to be noticed before anybody sleeps."""
    turns: Turns[str] = Turns()
    turns.lock_out("a")
    turns.take(100.0, 5.0)
    assert turns.take(101.0, 5.0) == ["a"]
    assert turns.busy
    assert turns.take(101.0, 5.0) == []
    assert not turns.busy
    turns.lock_out("b")
    turns.take(500.0, 105.0)
    assert turns.deadline == 500.0 + SHORT
