"""What a steward asks of its master, over the pair of sockets that they have."""

from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

import pytest

from xnbd.control.requests import Message
from xnbd.errors import CommandError
from xnbd.server.master_link import MasterLink, StewardLink, link

Link = Tuple[MasterLink, StewardLink]


class Master:
    """Answers some requests at once and others later."""

    def __init__(self) -> None:
        self.asked: List[Message] = []

    def now(self, request: Message) -> Message:
        self.asked.append(request)
        return {"done": True, "asked": len(self.asked)}

    def later(self, request: Message) -> Optional[Message]:
        self.asked.append(request)
        return None

    def never(self, _request: Message) -> Message:
        raise CommandError("not today")


@pytest.fixture
def master() -> Master:
    return Master()


@pytest.fixture
def ends(master: Master) -> Iterator[Link]:
    ours, masters = link()
    commands = {"now": master.now, "later": master.later, "never": master.never}
    stewards = MasterLink(ours), StewardLink(masters, commands)
    yield stewards
    for end in stewards:
        end.close()


def test_request_is_answered(ends: Link, master: Master) -> None:
    steward, masters = ends
    reply = steward.ask({"command": "now", "more": [1]})
    assert next(reply) is None
    assert masters.progress()
    assert next(reply) is None
    steward.receive()
    assert list(reply) == [{"done": True, "asked": 1}]
    assert master.asked == [{"command": "now", "more": [1]}]


def test_refusal_is_the_operators(ends: Link) -> None:
    steward, masters = ends
    for command, reason in (("never", "not today"), ("what", "the master knows no command 'what'")):
        reply = steward.ask({"command": command})
        next(reply)
        masters.progress()
        steward.receive()
        with pytest.raises(CommandError, match=reason):
            next(reply)


def test_answer_can_come_later_and_in_several_lines(ends: Link) -> None:
    steward, masters = ends
    heard = []
    steward.on_answer = lambda: heard.append(1)
    reply = steward.ask({"command": "later"})
    next(reply)
    assert masters.progress()
    number = masters.number
    masters.answer(number, {"moved": 1})
    steward.receive()
    assert next(reply) == {"moved": 1}
    assert next(reply) is None
    masters.answer(number, {"done": True})
    steward.receive()
    assert list(reply) == [{"done": True}]
    assert len(heard) == 2


def test_several_requests_wait_at_once(ends: Link) -> None:
    steward, masters = ends
    replies = [steward.ask({"command": name}) for name in ("later", "now", "now")]
    for reply in replies:
        next(reply)
    masters.progress()
    steward.receive()
    assert [next(reply) for reply in replies] == [None, {"done": True, "asked": 2}, {"done": True, "asked": 3}]


def test_answer_that_nobody_waits_for_is_dropped(ends: Link) -> None:
    steward, masters = ends
    given_up = steward.ask({"command": "now"})
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    masters.progress()
    reply = steward.ask({"command": "now"})
    next(reply)
    masters.progress()
    steward.receive()
    assert list(reply) == [{"done": True, "asked": 2}]


def test_dead_steward_is_noticed_and_its_requests_are_done(ends: Link, master: Master) -> None:
    steward, masters = ends
    next(steward.ask({"command": "now"}))
    steward.close()
    assert not masters.progress()
    assert len(master.asked) == 1
    masters.answer(1, {"done": True})


def test_dead_master_leaves_the_steward_alone(ends: Link) -> None:
    steward, masters = ends
    masters.close()
    steward.receive()
    assert not steward.interests()
    with pytest.raises(OSError, match="Bad file descriptor"):
        next(steward.ask({"command": "now"}))
