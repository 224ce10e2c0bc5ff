"""The limits that processes share: how buckets are paid for, and by whom."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Iterator

import pytest

from xnbd.scoreboard.rates import (
    NO_LIMITS,
    Bucket,
    RateBoard,
    Rates,
    create_rates,
    inherited_rates,
    merged,
    read_rates,
    rescaled,
)

BURST = 0.1


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_rates(64)
    yield fd
    os.close(fd)


class Client:
    """Does requests of *size* bytes as soon as it may, in a time of the test's own."""

    def __init__(self, fd: int, size: int, rate: int) -> None:
        self.board = RateBoard(fd, "disk", Rates(rate_total=rate))
        self.parts = (Bucket(), Bucket())
        self.parts[0].change(rate, 0.0)
        self.size = size
        self.go_at = 0.0
        self.done = 0
        self.longest_wait = 0.0

    def step(self) -> None:
        now = self.go_at
        paid = self.board.charge((self.size, 1), self.parts, now)
        assert paid is not None
        self.done += self.size
        self.go_at = max(now, paid - BURST)
        self.longest_wait = max(self.longest_wait, self.go_at - now)


def run(clients: list[Client], until: float) -> None:
    while True:
        client = min(clients, key=lambda one: one.go_at)
        if client.go_at > until:
            return
        client.step()


def test_all_together_get_the_rate_whatever_they_ask_for(fd: int) -> None:
    clients = [Client(fd, size, 1 << 20) for size in (2048, 4096, 65536, 1 << 20)]
    run(clients, 300.0)
    total = sum(client.done for client in clients)
    assert 0.97 < total / (300 << 20) < 1.03
    assert all(client.done > 0.2 * total for client in clients)  # a quarter each, about


def test_a_hundred_clients_that_are_slow_get_no_more_than_the_rate(fd: int) -> None:
    clients = [Client(fd, 65536, 1 << 20) for _ in range(100)]
    run(clients, 100.0)
    assert 0.97 < sum(client.done for client in clients) / (100 << 20) < 1.1  # each has done one at the start


def test_a_client_that_takes_less_than_its_part_never_waits(fd: int) -> None:
    floods = [Client(fd, 1 << 18, 1 << 20) for _ in range(3)]
    modest = Client(fd, 4096, 1 << 20)
    for tick in range(1, 600):
        run(floods, tick / 20)
        modest.go_at = max(modest.go_at, tick / 20)  # 80 KiB a second, of 256 KiB
        modest.step()
    assert modest.longest_wait == 0.0
    assert sum(flood.done for flood in floods) + modest.done < 1.03 * (30 << 20) + (1 << 20)


def test_one_client_may_take_all_that_others_leave(fd: int) -> None:
    flood, modest = Client(fd, 16384, 1 << 20), Client(fd, 4096, 1 << 20)
    for tick in range(1, 200):
        run([flood], tick / 10)
        modest.go_at = max(modest.go_at, tick / 10)
        modest.step()
    assert flood.done + modest.done > 0.96 * (20 << 20)


def test_a_dead_client_is_soon_not_counted_any_more(fd: int) -> None:
    clients = [Client(fd, 16384, 1 << 20) for _ in range(4)]
    run(clients, 10.0)
    for client in clients[1:]:
        client.board.close()  # in the middle of its sleep
    before = clients[0].done
    run(clients[:1], 20.0)
    assert clients[0].done - before > 0.9 * (10 << 20)


def test_a_process_that_holds_the_lock_stops_nobody(fd: int) -> None:
    client = Client(fd, 4096, 1 << 20)
    with closing(RateBoard(fd, "disk", NO_LIMITS)) as stopped:
        assert stopped._locks.try_acquire(stopped._at, 1)
        assert client.board.charge((4096, 1), client.parts, 0.0) is None
    assert client.board.charge((4096, 1), client.parts, 0.0) is not None


def test_a_debt_takes_its_time_at_the_new_rate(fd: int) -> None:
    assert rescaled(110.0, 1000, 10_000, 100.0) == pytest.approx(101.0)
    assert rescaled(90.0, 1000, 10_000, 100.0) == 0.0
    assert rescaled(110.0, 1000, 0, 100.0) == 0.0
    bucket = Bucket()
    bucket.change(10, 0.0)
    assert bucket.charge(20, 5.0) == 2.0
    bucket.change(20, 6.0)
    assert bucket.until == 6.5


def test_exports_have_limits_of_their_own(fd: int) -> None:
    default = Rates(rate=5)
    names = [f"disk{number}" for number in range(40)]
    assert read_rates(fd, names[0]) is None
    for number, name in enumerate(names):
        with closing(RateBoard(fd, name, default)) as board:
            before = board.generation
            board.change(board.rates._replace(iops=number))
            assert board.generation != before
    assert [read_rates(fd, name) for name in names] == [Rates(rate=5, iops=number) for number in range(40)]
    assert inherited_rates(fd, 64) == fd


def test_no_more_exports_than_there_is_room_for() -> None:
    fd = create_rates(2)
    for name in ("a", "b"):
        RateBoard(fd, name, NO_LIMITS).close()
    with pytest.raises(OSError, match="more exports"):
        RateBoard(fd, "c", NO_LIMITS)
    os.close(fd)


def test_what_is_no_file_of_limits_is_not_inherited() -> None:
    fd = os.memfd_create("other")
    new = inherited_rates(fd, 1)
    assert new != fd
    for each in (fd, new):
        os.close(each)


def test_what_changed_replaces_what_an_operator_has_set() -> None:
    before, after = Rates(rate=1, iops=2), Rates(rate=1, iops=3, burst=0.5)
    assert merged(Rates(rate=7, iops=8, rate_total=9), before, after) == Rates(7, 3, 9, 0, 0.5)


def test_who_has_had_what_others_left_is_not_punished_for_long(fd: int) -> None:
    flood, newcomer = Client(fd, 16384, 1 << 20), Client(fd, 16384, 1 << 20)
    run([flood], 50.0)
    newcomer.go_at = 50.0
    before = flood.done
    run([flood, newcomer], 60.0)
    assert flood.parts[0].until < 63.0
    assert flood.done - before > 0.3 * (10 << 20)
    assert newcomer.done > 0.3 * (10 << 20)
