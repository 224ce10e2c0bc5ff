"""The waiting room of a session: limits, and the order in which replies leave."""

from __future__ import annotations

import random
from typing import Dict, List

import pytest

from xnbd.server.session.parking import ParkedRequest, Parking, QueueLimits
from xnbd.server.session.replies import Piece
from xnbd.storage.image import Ticket


def request(number: int, buffered: int = 0) -> ParkedRequest:
    waiting = ParkedRequest(0, b"cookie", lambda _answer: None, (0, 0), buffered)
    waiting.answer.append(b"%d" % number)
    return waiting


@pytest.fixture
def replies() -> List[Piece]:
    return []


def test_nobody_waits_at_first(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(1, 1), ordered=True)
    assert (len(room), room.full, room.blocked, room.buffered, room.tickets()) == (0, False, False, 0, [])


def test_request_leaves_with_its_ticket_once(replies: List[Piece]) -> None:
    room, ticket, waiting = Parking(replies, QueueLimits(), ordered=False), Ticket(), request(1, 100)
    room.enter(ticket, waiting)
    assert (len(room), room.buffered, room.tickets()) == (1, 100, [ticket])
    assert room.leave(Ticket()) is None
    assert room.leave(ticket) is waiting
    assert room.leave(ticket) is None
    assert (len(room), room.buffered) == (0, 0)


def test_answers_leave_at_once_where_order_does_not_matter(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(), ordered=False)
    requests = [request(number) for number in range(3)]
    for waiting in requests:
        room.enter(Ticket(), waiting)
    assert not room.blocked
    for waiting in reversed(requests):
        room.answered(waiting)
    assert replies == [b"2", b"1", b"0"]


def test_answers_keep_their_order_where_it_matters(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(), ordered=True)
    requests = [request(number) for number in range(4)]
    for waiting in requests:
        room.enter(Ticket(), waiting)
    assert room.blocked
    room.answered(requests[2])
    room.answered(requests[1])
    assert replies == []
    room.answered(requests[0])
    assert replies == [b"0", b"1", b"2"]
    assert room.blocked
    room.answered(requests[3])
    assert replies == [b"0", b"1", b"2", b"3"]
    assert not room.blocked


def test_request_that_has_to_wait_again_keeps_its_place(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(), ordered=True)
    first, second, ticket = request(1), request(2), Ticket()
    room.enter(ticket, first)
    room.stand_in_line(second)
    room.answered(second)
    assert room.leave(ticket) is first
    room.enter(Ticket(), first)
    assert replies == []
    room.answered(first)
    assert replies == [b"1", b"2"]


@pytest.mark.parametrize("ordered", [False, True])
def test_full_at_so_many_requests(replies: List[Piece], ordered: bool) -> None:
    room, tickets = Parking(replies, QueueLimits(requests=3), ordered=ordered), [Ticket() for _ in range(3)]
    for number, ticket in enumerate(tickets):
        assert not room.full
        room.enter(ticket, request(number))
    assert room.full
    waiting = room.leave(tickets[0])
    assert waiting is not None
    room.answered(waiting)
    assert not room.full


def test_ready_replies_in_line_count_for_the_limit(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(requests=3), ordered=True)
    room.enter(Ticket(), request(0))
    for number in (1, 2):
        waiting = request(number)
        room.stand_in_line(waiting)
        room.answered(waiting)
    assert len(room) == 1
    assert room.full


def test_full_at_so_many_bytes(replies: List[Piece]) -> None:
    room, tickets = Parking(replies, QueueLimits(buffered=1000), ordered=False), [Ticket() for _ in range(3)]
    for number, ticket in enumerate(tickets):
        assert not room.full
        room.enter(ticket, request(number, 400))
    assert (room.full, room.buffered) == (True, 1200)
    room.leave(tickets[1])
    assert (room.full, room.buffered) == (False, 800)


def test_no_limits(replies: List[Piece]) -> None:
    room = Parking(replies, QueueLimits(0, 0), ordered=False)
    for number in range(10_000):
        room.enter(Ticket(), request(number, 10))
    assert not room.full


def test_any_order_of_answers_comes_out_in_the_order_of_requests(replies: List[Piece], seed: int) -> None:
    rng = random.Random(seed)
    room = Parking(replies, QueueLimits(), ordered=True)
    waiting: Dict[Ticket, ParkedRequest] = {}
    numbers = iter(range(2000))
    number = 0
    while number < 1999 or waiting:
        if number < 1999 and rng.random() < 0.6:
            number = next(numbers)
            one = request(number)
            if rng.random() < 0.5 or not room.blocked:
                ticket = Ticket()
                waiting[ticket] = one
                room.enter(ticket, one)
            else:
                room.stand_in_line(one)
                room.answered(one)
        elif waiting:
            ticket = rng.choice(list(waiting))
            one = waiting.pop(ticket)
            assert room.leave(ticket) is one
            if rng.random() < 0.2:
                again = Ticket()
                waiting[again] = one
                room.enter(again, one)
            else:
                room.answered(one)
    assert replies == [b"%d" % n for n in range(2000)]
    assert (room.blocked, len(room)) == (False, 0)
