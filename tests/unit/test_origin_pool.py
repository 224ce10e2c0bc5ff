"""The threads that make calls which wait, for an origin."""

from __future__ import annotations

import os
import select
import signal
import threading
from queue import SimpleQueue
from typing import Iterator, List, Tuple

import pytest
from server_process import wait_until

from xnbd.origin.pool import Inbox, Pool


@pytest.fixture
def pool() -> Iterator[Pool[int]]:
    pool: Pool[int] = Pool(4)
    yield pool
    pool.close()


def collect(pool: Pool[int], count: int) -> List[Tuple[int, int]]:
    results: List[Tuple[int, int]] = []
    poll = select.poll()
    poll.register(pool.fileno(), select.POLLIN)
    while len(results) < count:
        assert poll.poll(30_000)
        results += pool.take()
    return results


def test_results_come_with_their_numbers(pool: Pool[int]) -> None:
    for number in range(1000):
        pool.call(number, lambda number=number: 2 * number)  # type: ignore[misc]
    assert sorted(collect(pool, 1000)) == [(number, 2 * number) for number in range(1000)]
    poll = select.poll()
    poll.register(pool.fileno(), select.POLLIN)
    assert not poll.poll(0)


def test_there_are_as_many_threads_as_calls_and_no_more_than_allowed(pool: Pool[int]) -> None:
    go = threading.Event()
    pool.call(0, threading.get_ident)
    ((_, first),) = collect(pool, 1)
    entered: List[int] = []

    def wait() -> int:
        entered.append(1)
        go.wait(30)
        return threading.get_ident()

    for number in range(9):
        pool.call(number, wait)
    wait_until(lambda: len(entered) == 4, "the threads")
    go.set()
    used = {thread for _, thread in collect(pool, 9)}
    assert len(used) == 4
    assert first in used


def test_the_threads_take_no_signal(pool: Pool[int]) -> None:
    pool.call(0, lambda: len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    ((_, blocked),) = collect(pool, 1)
    assert blocked >= 60
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_call_that_ends_after_the_close_writes_to_nobodys_file(pool: Pool[int]) -> None:
    go, threads = threading.Event(), SimpleQueue[threading.Thread]()

    def job() -> int:
        threads.put(threading.current_thread())
        return int(go.wait(30))

    pool.call(0, job)
    thread = threads.get(timeout=30)
    pool.close()
    reading, writing = os.pipe2(os.O_NONBLOCK)  # it may have the number that the pool's pipe had
    go.set()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    os.close(reading)
    os.close(writing)


def test_a_thread_ends_with_what_it_was_told() -> None:
    go = threading.Event()
    told: List[str] = []
    other: Pool[int] = Pool(1, at_end=lambda: told.append("end"))
    other.call(0, lambda: told.append("call") or int(go.wait(30)))  # type: ignore[func-returns-value]
    other.call(1, lambda: told.append("forgotten") or 1)  # type: ignore[func-returns-value]
    wait_until(lambda: bool(told), "the call")
    other.close()
    go.set()
    wait_until(lambda: len(told) == 2, "the end")
    assert told == ["call", "end"]


def test_the_end_waits_for_the_last_thread() -> None:
    go, began, before = threading.Event(), threading.Event(), {*threading.enumerate()}
    told: List[str] = []

    def job() -> int:
        began.set()
        go.wait(30)
        told.append("call")
        return 1

    other: Pool[int] = Pool(2, at_end=lambda: told.append("end"))
    other.call(0, job)
    other.call(1, lambda: 2)
    began.wait(30)
    wait_until(lambda: other.take() == [(1, 2)], "the quick thread's result")
    others = {*threading.enumerate()} - before
    other.close()
    wait_until(lambda: sum(thread.is_alive() for thread in others) < len(others), "the end of the quick thread")
    assert told == []
    go.set()
    wait_until(lambda: len(told) == 2, "the end")
    assert told == ["call", "end"]


def test_what_is_put_into_a_closed_inbox_is_nobodys() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.put(3, "three")
    assert select.select([inbox.fileno()], [], [], 0)[0]
    assert inbox.take() == [(3, "three")]
    inbox.close()
    inbox.put(4, "four")
    inbox.close()
