"""Who moves next in an upgrade, and what is made of what the processes tell of it."""

from __future__ import annotations

import os
from typing import Dict, List, Set

import pytest

from xnbd.server.reports import Report
from xnbd.server.upgrade import moves as module
from xnbd.server.upgrade.moves import Moves


class Roster:
    """*old* workers with clients, and four new ones that wait; nobody has these process ids."""

    def __init__(self, *old: int) -> None:
        self.spares: Set[int] = {901, 902, 903, 904}
        self.unproven: Set[int] = set()
        self.moves: List[Report] = []
        self.dismissed: Set[int] = set(old)
        self.clients: Dict[int, str] = dict.fromkeys(old, "client")

    def __contains__(self, pid: int) -> bool:
        return pid in self.spares or pid in self.clients or pid in self.dismissed

    def tell(self, *reports: Report) -> None:
        """As the master books it."""
        for report in reports:
            self.moves.append(report)
            if report.moved_from:
                self.clients.pop(report.moved_from, None)
                self.spares.discard(report.pid)
                self.clients[report.pid] = "client"
            elif report.moved_to:
                self.clients.pop(report.pid, None)


class Clock:
    """Monotonic seconds, and the workers that were ordered to move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.ordered: List[int] = []
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "kill", lambda pid, _: self.ordered.append(pid))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


CAME, WENT = Report(901, "client", moved_from=1, pause=0.007), Report(1, moved_to=901)


@pytest.mark.parametrize("told", [(CAME, WENT), (WENT, CAME)])
def test_it_does_not_matter_who_tells_first(clock: Clock, told: List[Report]) -> None:
    crew = Roster(1)
    moves = Moves(crew)
    moves.progress()
    assert clock.ordered == [1]
    for report in told:
        assert not moves.are_over
        crew.tell(report)
        moves.progress()
    crew.dismissed.clear()
    assert moves.are_over
    assert (moves.moved, moves.longest_pause, moves.staying) == (1, 0.007, {})


def test_an_upgrade_is_not_over_before_the_new_process_has_told(clock: Clock) -> None:
    """Or has died."""
    crew = Roster(1)
    moves = Moves(crew)
    moves.progress()
    crew.tell(WENT)
    crew.dismissed.clear()
    moves.progress()
    assert moves.remaining == 1
    crew.spares.discard(901)
    moves.progress()
    assert moves.remaining == 0
    assert moves.moved == 0


def test_one_moves_after_the_other(clock: Clock) -> None:
    crew = Roster(1, 2)
    moves = Moves(crew)
    moves.progress()
    clock.now += 0.05
    moves.progress()
    assert clock.ordered == [1]
    crew.tell(CAME)
    moves.progress()
    assert clock.ordered == [1, 2]


def look(moves: Moves, clock: Clock, seconds: float) -> None:
    """Every tenth of a second."""
    for _ in range(round(10 * seconds)):
        clock.now += 0.1
        moves.progress()


def test_one_that_takes_long_holds_up_no_others(clock: Clock) -> None:
    """As many as there are processes to go to; and after a while as many as that again."""
    crew = Roster(*range(1, 10))
    moves = Moves(crew)
    look(moves, clock, 3)
    assert clock.ordered == [1, 2, 3, 4]
    look(moves, clock, 6)
    assert clock.ordered == [*range(1, 9)]
    assert moves.staying == {}


def test_patience_ends_when_nobody_has_said_anything_for_long(clock: Clock) -> None:
    crew = Roster(1, 2)
    moves = Moves(crew)
    look(moves, clock, 9)
    crew.tell(CAME)
    look(moves, clock, 9)
    assert moves.staying == {}
    assert not moves.are_over
    look(moves, clock, 2)
    assert moves.staying == {2: "busy"}
    crew.tell(Report(902, "client", moved_from=2))
    moves.progress()
    assert moves.outcome("1.0", {}).staying == {}


def test_time_in_which_the_master_could_not_look_is_not_held_against_others(clock: Clock) -> None:
    """It was stopped, or the computer was."""
    crew = Roster(1)
    moves = Moves(crew)
    moves.progress()
    for _ in range(5):
        clock.now += 1000
        moves.progress()
    assert moves.staying == {}


def test_who_has_failed_comes_after_all_others(clock: Clock) -> None:
    crew = Roster(1, 2, 3)
    moves = Moves(crew)
    look(moves, clock, 0.1)
    crew.tell(Report(1, "client", stays="no other process takes it"))
    look(moves, clock, 1)
    assert clock.ordered == [1, 2, 3, 1]


def test_a_worker_that_is_refused_three_times_stays(clock: Clock) -> None:
    crew = Roster(1)
    moves = Moves(crew)
    for _ in range(3):
        moves.progress()
        crew.tell(Report(1, "client", stays="no other process takes it"))
    moves.progress()
    assert clock.ordered == [1, 1, 1]
    assert moves.staying == {1: "no other process takes it"}
