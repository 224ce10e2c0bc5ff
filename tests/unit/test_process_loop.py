"""Where a process sleeps: what wakes it, and its companion's work meanwhile."""

from __future__ import annotations

import os
import select
import signal
from time import monotonic
from typing import Iterator, List, Optional, Tuple

import pytest

from xnbd.server.process_loop import Companion, Interests, ProcessLoop, Stop
from xnbd.system.forking import SIGNALS

Pipe = Tuple[int, int]


class Counting(Companion):
    """Reads from *fd*; has results once it has read a full stop."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.read = b""
        self.calls: List[str] = []
        self.wants_call_at: Optional[float] = None

    def fall_asleep(self) -> None:
        self.calls.append("asleep")

    def wake_up(self) -> None:
        self.calls.append("awake")

    def progress(self) -> bool:
        self.calls.append("progress")
        if self.wants_call_at is not None and monotonic() >= self.wants_call_at:
            self.wants_call_at = None
            self.read += b"."
        if select.select([self.fd], [], [], 0)[0]:
            self.read += os.read(self.fd, 1)
        return b"." in self.read

    def interests(self) -> Interests:
        return [(self.fd, select.POLLIN)]

    def deadline(self) -> Optional[float]:
        return self.wants_call_at


@pytest.fixture
def pipes() -> Iterator[Tuple[Pipe, Pipe]]:
    """A client's, and a companion's."""
    both = os.pipe(), os.pipe()
    yield both
    for pipe in both:
        for fd in pipe:
            os.close(fd)


@pytest.fixture
def loop() -> ProcessLoop:
    return ProcessLoop(handle_signals=False)


def dispositions() -> Tuple[object, ...]:
    """What signals do in this process, and the descriptor that Python writes them to."""
    signal.set_wakeup_fd(wake := signal.set_wakeup_fd(-1))
    return (wake, *map(signal.getsignal, SIGNALS))


def test_a_loop_without_handlers_leaves_signals_alone() -> None:
    before = dispositions()
    ProcessLoop(handle_signals=False)
    assert dispositions() == before


def test_a_sleep_ends_by_what_it_waits_for_or_its_time(loop: ProcessLoop, pipes: Tuple[Pipe, Pipe]) -> None:
    (reading, writing), _ = pipes
    assert not loop.wait((reading,), select.POLLIN, 0.01)
    os.write(writing, b"x")
    assert loop.wait((reading,), select.POLLIN)


def test_a_companion_works_while_the_process_sleeps(loop: ProcessLoop, pipes: Tuple[Pipe, Pipe]) -> None:
    (reading, _), (other, others) = pipes
    companion = loop.companion = Counting(other)
    os.write(others, b"abc.")
    assert not loop.wait((reading,), select.POLLIN, results=True)
    assert companion.read == b"abc."
    assert companion.calls == ["asleep", *4 * ["progress"], "awake"]


def test_results_end_no_sleep_that_does_not_wait_for_them(loop: ProcessLoop, pipes: Tuple[Pipe, Pipe]) -> None:
    (reading, writing), (other, others) = pipes
    companion = loop.companion = Counting(other)
    os.write(others, b".")
    os.write(writing, b"x")
    assert loop.wait((reading,), select.POLLIN)
    assert companion.read == b"."


def test_a_companion_is_called_at_its_time(loop: ProcessLoop, pipes: Tuple[Pipe, Pipe]) -> None:
    (reading, _), (other, _) = pipes
    companion = loop.companion = Counting(other)
    companion.wants_call_at = monotonic() + 0.05
    assert not loop.wait((reading,), select.POLLIN, 60, results=True)
    assert companion.read == b"."


def test_a_companion_is_told_of_the_end_of_a_sleep_that_fails(loop: ProcessLoop, pipes: Tuple[Pipe, Pipe]) -> None:
    (reading, _), (other, _) = pipes
    companion = loop.companion = Counting(other)
    loop.stopping = True
    with pytest.raises(Stop):
        loop.wait((reading,), select.POLLIN)
    assert companion.calls == ["asleep", "awake"]
