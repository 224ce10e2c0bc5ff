"""When those who were locked out may try again; the clocks are numbers."""

from __future__ import annotations

from typing import Dict, List, Tuple

from xnbd.proxy.lock_retry import LockRetry

SHORT, LONG = 0.0005, 0.25
TENTH = 9
LOCK, OTHER = (0, 1), (5, 7)


class Locked:
    """Some try again and again, each for *effort* seconds; their *locks* are never free."""

    def __init__(self, locks: Dict[str, Tuple[int, int]], effort: float = 0.0) -> None:
        self.turns: LockRetry[str] = LockRetry()
        self.now, self.used, self._effort, self._locks = 100.0, 5.0, effort, locks
        self.tried: List[str] = []
        for name, lock in locks.items():
            self.turns.lock_out(name, lock)

    def next_turn(self) -> float:
        """The pause before the next turn, in which everybody who has one tries in vain; in seconds."""
        assert self.turns.take(self.now, self.used) == []
        assert self.turns.deadline is not None
        pause = self.turns.deadline - self.now
        self.now = self.turns.deadline
        self.tried = self.turns.take(self.now, self.used)
        for name in self.tried:
            self.now += self._effort
            self.used += self._effort
            self.turns.lock_out(name, self._locks[name])
        return pause


def about(seconds: float, expected: float) -> bool:
    return abs(seconds - expected) < 1e-6


def test_nobody_is_locked_out_at_first() -> None:
    turns: LockRetry[str] = LockRetry()
    assert not turns.busy
    assert turns.deadline is turns.oldest is None
    assert turns.take(100.0, 5.0) == []


def test_who_is_locked_out_has_a_turn_in_half_a_millisecond() -> None:
    turns: LockRetry[str] = LockRetry()
    turns.lock_out("a", LOCK)
    assert turns.busy
    assert turns.deadline == 0.0  # at once, to know when
    assert turns.take(100.0, 5.0) == []
    assert turns.deadline == 100.0 + SHORT
    assert turns.take(100.0 + SHORT / 2, 5.0) == []
    assert turns.take(100.0 + SHORT, 5.0) == ["a"]


def test_the_first_tries_for_all_who_want_the_same_and_the_others_follow_it() -> None:
    turns: LockRetry[str] = LockRetry()
    for name in "abc":
        turns.lock_out(name, LOCK)
    turns.lock_out("d", OTHER)
    assert turns.take(100.0, 5.0) == []
    assert turns.take(100.0 + SHORT, 5.0) == ["a", "d"]
    turns.lock_out("d", OTHER)
    assert turns.deadline == 0.0
    assert turns.take(100.0 + SHORT, 5.0) == ["b", "c"]
    turns.lock_out("c", LOCK)
    assert turns.take(100.0 + SHORT, 5.0) == []
    assert turns.take(100.0 + 2 * SHORT, 5.0) == ["c"]  # which found it taken for the first time
    assert turns.take(100.0 + 4 * SHORT, 5.0) == ["d"]


def test_who_was_in_vain_stands_behind_those_who_wait_for_the_same() -> None:
    locked = Locked(dict.fromkeys("abc", LOCK))
    order = []
    for _ in range(4):
        locked.next_turn()
        order += locked.tried
    assert order == ["a", "b", "c", "a"]


def test_pauses_double_at_first_and_grow_by_an_eighth_up_to_a_limit() -> None:
    locked = Locked({"a": LOCK})
    pauses = [locked.next_turn() for _ in range(7)]
    expected = [SHORT, 2 * SHORT, 4 * SHORT, 8 * SHORT, 16 * SHORT, 18 * SHORT, 20.25 * SHORT]
    assert all(map(about, pauses, expected)), pauses
    for _ in range(30):
        waited = locked.now - 100.0
        assert locked.next_turn() <= min(LONG, waited / 8 + 0.008)
    assert about(locked.next_turn(), LONG)


def test_a_lock_that_stays_taken_delays_nobody_who_wants_another() -> None:
    locked = Locked({"a": LOCK})
    for _ in range(50):
        locked.next_turn()
    locked.turns.lock_out("b", OTHER)
    locked.turns.take(locked.now, locked.used)
    assert locked.turns.take(locked.now + SHORT, locked.used) == ["b"]


def test_pauses_are_short_again_once_somebody_has_got_through() -> None:
    locked = Locked({"a": LOCK})
    for _ in range(10):
        locked.next_turn()
    locked.turns.take(locked.now, 5.0)
    assert locked.turns.take(locked.now + LONG, 5.0) == ["a"]
    assert locked.turns.take(locked.now + LONG, 5.0) == []
    locked.turns.lock_out("a", LOCK)
    locked.now += 1.0
    assert about(locked.next_turn(), SHORT)


def test_trying_takes_a_tenth_of_the_time_however_many_try() -> None:
    locked = Locked({str(number): (number, number + 1) for number in range(1000)}, effort=2e-5)
    locked.next_turn()
    pauses = [locked.next_turn() for _ in range(5)]
    assert all(about(pause, TENTH * 1000 * 2e-5) for pause in pauses), pauses


def test_time_in_which_the_process_stood_still_does_not_lengthen_a_pause() -> None:
    locked = Locked({"a": LOCK})
    locked.next_turn()
    locked.now += 3600
    assert about(locked.next_turn(), 2 * SHORT)


def test_a_turn_in_which_something_long_was_done_lengthens_the_next_pause_to_a_second_at_most() -> None:
    locked = Locked({"a": LOCK})
    locked.next_turn()
    locked.now += 60
    locked.used += 60
    assert about(locked.next_turn(), 1.0)


def test_time_after_a_turn_in_which_all_got_through_does_not_lengthen_a_pause() -> None:
    """The end of such a turn has to be noticed before anybody sleeps."""
    turns: LockRetry[str] = LockRetry()
    turns.lock_out("a", LOCK)
    turns.take(100.0, 5.0)
    assert turns.take(101.0, 5.0) == ["a"]
    assert turns.busy
    assert turns.take(101.0, 5.0) == []
    assert not turns.busy
    turns.lock_out("b", LOCK)
    turns.take(500.0, 105.0)
    assert turns.deadline == 500.0 + SHORT


def test_who_is_locked_out_for_too_long_waits_no_more() -> None:
    locked = Locked({"a": LOCK, "b": LOCK})
    for _ in range(5):
        locked.next_turn()
    locked.turns.take(locked.now, locked.used)
    locked.turns.lock_out("c", OTHER)
    locked.turns.take(locked.now, locked.used)
    assert locked.turns.oldest == 100.0
    assert locked.turns.take_older(99.0) == []
    assert sorted(locked.turns.take_older(100.0)) == ["a", "b"]
    assert locked.turns.oldest == locked.now
    assert locked.turns.take(locked.now + SHORT, locked.used) == ["c"]
