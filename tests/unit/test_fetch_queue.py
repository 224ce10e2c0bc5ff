"""Which fetches are made of what is needed, and what becomes of them."""

from __future__ import annotations

import random
from typing import Dict, Iterable, List, Set, Tuple

import pytest

from xnbd.proxy.fetch_queue import PIECE, Fetch, FetchQueue
from xnbd.storage.image import Ticket


@pytest.fixture
def fetches() -> FetchQueue:
    return FetchQueue(timed=False)


def need(fetches: FetchQueue, first: int, end: int) -> Ticket:
    ticket = Ticket()
    fetches.need(ticket, first, end)
    return ticket


def runs(queue: Iterable[Fetch]) -> List[Tuple[int, int]]:
    return [(fetch.first, fetch.end) for fetch in queue]


def test_neighbours_are_asked_for_together(fetches: FetchQueue) -> None:
    for block in (3, 4, 5, 9):
        fetches.need_block(block)
    assert runs(fetches.wanted) == [(3, 6), (9, 10)]


def test_no_fetch_goes_across_a_piece(fetches: FetchQueue) -> None:
    ticket = need(fetches, PIECE - 2, 2 * PIECE + 1)
    assert runs(fetches.wanted) == [(PIECE - 2, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 1)]
    assert ticket.pending == 3


def test_a_block_that_is_fetched_already_is_not_fetched_twice(fetches: FetchQueue) -> None:
    first = need(fetches, 10, 12)
    fetch = fetches.wanted.popleft()
    second = need(fetches, 8, 14)
    assert runs(fetches.wanted) == [(8, 10), (12, 14)]
    assert fetches.finish(fetch, 0) == [first]
    assert fetches.finish(fetches.wanted.popleft(), 0) == []
    assert fetches.finish(fetches.wanted.popleft(), 0) == [second]
    assert not fetches


def test_an_error_is_told_to_all_who_need_the_fetch(fetches: FetchQueue) -> None:
    tickets = [need(fetches, 1, 2), fetches.need_block(1)]
    assert fetches.finish(fetches.wanted.popleft(), 5) == tickets
    assert [ticket.error for ticket in tickets] == [5, 5]


def test_what_is_fetched_ahead_goes_before_others_once_somebody_needs_it(fetches: FetchQueue) -> None:
    fetches.bring_ahead(0, 3 * PIECE)
    need(fetches, PIECE + 1, PIECE + 2)
    assert runs(fetches.wanted) == [(PIECE, 2 * PIECE)]
    assert runs(fetches.ahead) == [(0, PIECE), (2 * PIECE, 3 * PIECE)]


def test_what_is_put_back_comes_first(fetches: FetchQueue) -> None:
    need(fetches, 0, 1)
    fetch = fetches.wanted.popleft()
    need(fetches, 5, 6)
    fetches.put_back(fetch)
    assert runs(fetches.wanted) == [(0, 1), (5, 6)]


def test_who_needs_a_fetch_that_is_split_waits_for_both_parts(fetches: FetchQueue) -> None:
    ticket = need(fetches, 0, 10)
    fetch = fetches.wanted.popleft()
    fetches.split(fetch, 4)
    assert runs(fetches.wanted) == [(4, 10)]
    assert fetches.finish(fetch, 0) == []
    assert fetches.finish(fetches.wanted.popleft(), 0) == [ticket]


@pytest.mark.parametrize("written", [(2, 4), (0, 1000)])
def test_fetches_whose_blocks_were_written_are_mixed(fetches: FetchQueue, written: Tuple[int, int]) -> None:
    for block in (1, 3, 5):
        fetches.need_block(block)
    fetches.note_written(*written)
    assert [fetch.mixed for fetch in fetches.wanted] == [written[0] <= block < written[1] for block in (1, 3, 5)]


def test_a_damaged_piece_is_asked_for_block_by_block_until_the_origin_is_another_one(fetches: FetchQueue) -> None:
    assert fetches.note_damage(0, 8)
    need(fetches, 10, 12)
    need(fetches, PIECE, PIECE + 2)
    assert runs(fetches.wanted) == [(10, 11), (11, 12), (PIECE, PIECE + 2)]
    fetches.forget_damage()
    need(fetches, 20, 22)
    assert runs(fetches.wanted)[-1] == (20, 22)


def test_of_a_damaged_block_is_told_once(fetches: FetchQueue) -> None:
    assert fetches.note_damage(7, 8)
    assert fetches.note_damage(8, 9)
    assert not fetches.note_damage(7, 8)


def test_those_who_wait_for_too_long_are_taken_out() -> None:
    fetches = FetchQueue(timed=True)
    need(fetches, 0, 1)
    need(fetches, 5, 6)
    old, new = fetches.wanted
    old.since, new.since = 100.0, 102.0
    assert fetches.waits_since() == 100.0
    assert fetches.take_older(101.0) == [old]
    assert fetches.waits_since() == 102.0
    assert fetches.take_older(101.0) == []


def test_what_nobody_waits_for_has_no_time(fetches: FetchQueue) -> None:
    need(fetches, 0, 1)
    assert fetches.waits_since() is None


class Model:
    """All tickets with the blocks they wait for, beside *fetches*."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.fetches = FetchQueue(timed=False)
        self.waiting: Dict[Ticket, Set[int]] = {}
        self.asked: List[Fetch] = []

    def need(self) -> None:
        first = self.rng.randrange(4 * PIECE)
        end = first + self.rng.choice([1, 1, 3, PIECE, 2 * PIECE])
        ticket = self.fetches.need_block(first) if end - first == 1 else need(self.fetches, first, end)
        self.waiting[ticket] = set(range(first, end))

    def bring_ahead(self) -> None:
        first = self.rng.randrange(4 * PIECE)
        self.fetches.bring_ahead(first, first + self.rng.randrange(1, 2 * PIECE))

    def ask(self) -> None:
        queue = self.fetches.wanted or self.fetches.ahead
        if queue:
            fetch = queue.popleft()
            if fetch.end - fetch.first > 1 and self.rng.random() < 0.2:
                self.fetches.split(fetch, self.rng.randrange(fetch.first + 1, fetch.end))
            self.asked.append(fetch)

    def put_back(self) -> None:
        if self.asked:
            self.fetches.put_back(self.asked.pop(self.rng.randrange(len(self.asked))))

    def damage(self) -> None:
        first = self.rng.randrange(4 * PIECE)
        self.fetches.note_damage(first, first + self.rng.choice([1, 2]))

    def finish(self) -> None:
        if not self.asked:
            return
        fetch = self.asked.pop(self.rng.randrange(len(self.asked)))
        done = self.fetches.finish(fetch, 0)
        for blocks in self.waiting.values():
            blocks.difference_update(range(fetch.first, fetch.end))
        for ticket in done:
            assert not self.waiting.pop(ticket)

    def check(self) -> None:
        known = [*self.fetches.wanted, *self.fetches.ahead, *self.asked]
        blocks = [block for fetch in known for block in range(fetch.first, fetch.end)]
        assert len(blocks) == len(set(blocks)), "a block is in two fetches"
        assert all(fetch.first // PIECE == (fetch.end - 1) // PIECE for fetch in known)
        assert all(not fetch.ahead for fetch in self.fetches.wanted)
        assert all(fetch.ahead and not fetch.tickets for fetch in self.fetches.ahead)
        assert set().union(*self.waiting.values()) <= set(blocks)
        assert bool(self.fetches) == bool(known)


@pytest.mark.parametrize("seed", range(20))
def test_every_ticket_is_done_in_the_end_and_not_before_its_blocks_are_there(seed: int) -> None:
    model = Model(random.Random(seed))
    for _ in range(300):
        model.rng.choice([model.need, model.bring_ahead, model.ask, model.put_back, model.damage, model.finish])()
        model.check()
    while model.fetches:
        model.ask()
        model.finish()
        model.check()
    assert not model.waiting


# At least so many blocks


@pytest.fixture
def wide() -> FetchQueue:
    """Of a disk of 100 blocks; 20 and 40 to 49 are local."""
    queue = FetchQueue(timed=False, is_local=lambda block: block == 20 or 40 <= block < 50, blocks=100)
    queue.least = 16
    return queue


def test_a_fetch_is_widened_to_whole_units_as_far_as_blocks_are_missing(wide: FetchQueue) -> None:
    for block in (5, 18, 21, 50, 98):
        wide.need_block(block)
    assert runs(wide.wanted) == [(0, 20), (21, 32), (50, 64), (96, 100)]


def test_a_block_that_another_fetch_has_is_not_fetched_twice(wide: FetchQueue) -> None:
    ticket, other = wide.need_block(5), wide.need_block(9)
    fetch = wide.wanted.popleft()
    assert fetch.tickets == [ticket, other]
    wide.least = 1
    wide.need_block(60)
    wide.least = 16
    wide.need_block(55)
    wide.need_block(62)
    assert runs(wide.wanted) == [(60, 61), (50, 60), (61, 64)]


def test_runs_and_what_is_read_ahead_are_widened_too(wide: FetchQueue) -> None:
    ticket = Ticket()
    wide.need(ticket, 14, 18)
    wide.bring_ahead(70, 75)
    assert runs(wide.wanted) == [(0, 20)]
    assert runs(wide.ahead) == [(64, 80)]


def test_a_damaged_piece_is_asked_for_block_by_block(wide: FetchQueue) -> None:
    wide.note_damage(0, 16)
    wide.need_block(5)
    wide.need_block(66)
    assert runs(wide.wanted) == [(5, 6), (64, 80)]
