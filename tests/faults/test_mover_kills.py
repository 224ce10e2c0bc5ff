"""A wrapper's proxy is upgraded, and the process that waits for its client is killed at a system call, or its steward.

At worst this client is lost; what was flushed is there. The steward's death costs no client anything. The calls are
drawn by chance from those that such a process makes; XNBD_ROUNDS sets how many times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest
from caching import CacheFiles, descendants
from conftest import MIB, Start, StartWrapper
from injection import injected, listed_calls
from rawclient import FLUSH, RawClient
from server_process import is_alive, state_of, title_of, wait_until
from upgrades import STOPPED_STEWARD, build
from wrapper_process import Wrapper, program

ROUNDS = int(os.environ.get("XNBD_ROUNDS", "2"))
BLOCK = 4096


class Field:
    """A wrapper with a proxy called "far", and what its disk holds."""

    def __init__(self, wrapper: Wrapper, content: bytearray, rng: random.Random) -> None:
        self.wrapper = wrapper
        self._content = content
        self._rng = rng

    def flush_something(self, client: RawClient) -> None:
        at, data = self._rng.randrange(len(self._content) - 100), self._rng.randbytes(100)
        assert client.write(at, data) == 0
        client.request(FLUSH, cookie=1)
        assert client.simple_reply() == (0, 1, b"")
        self._content[at : at + 100] = data

    @contextmanager
    def mover(self) -> Iterator[Tuple[int, Callable[[], object]]]:
        """The process that waits for the only client, and what has that come; it returns when the upgrade is over."""
        wrapper = self.wrapper
        wait_until(lambda: len(self._titled(": serving ")) == 1, "one client's process")
        (old,) = self._titled(": serving ")
        os.kill(old, signal.SIGSTOP)
        words = [*program("xnbd-wrapper-ctl"), "--socket", str(wrapper.control), "--upgrade"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as upgrading:
            wait_until(lambda: bool(self._titled("waits for a client")), "a process that waits")

            def go_on() -> object:
                os.kill(old, signal.SIGCONT)
                return upgrading.communicate()

            yield self._titled("waits for a client")[0], go_on

    @contextmanager
    def steward(self, path: Path) -> Iterator[Tuple[int, Callable[[], object]]]:
        """The steward of the process that waits for the only client, as `mover`; *path* is the next program."""
        wrapper = self.wrapper
        words = [*program("xnbd-wrapper-ctl"), "--socket", str(wrapper.control), "--upgrade", "--program", str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as upgrading:
            wait_until(lambda: bool(self._stopped()), "the next steward")
            (pid,) = self._stopped()

            def go_on() -> object:
                os.kill(pid, signal.SIGCONT)
                assert "1 client moved" in upgrading.communicate()[0]
                return None

            yield pid, go_on

    def _stopped(self) -> List[int]:
        return [pid for pid in descendants(self.wrapper.process.pid) if state_of(pid) == "T"]

    def _titled(self, text: str) -> List[int]:
        return [pid for pid in self.wrapper.servers() if text in title_of(pid)]

    def is_right(self, client: RawClient) -> bool:
        """Whether the client is there still; what it reads is right."""
        try:
            at = self._rng.randrange(len(self._content) - BLOCK)
            assert client.read(at, BLOCK) == self._content[at : at + BLOCK]
            return client.works()
        except (EOFError, ConnectionError):
            return False

    def check(self) -> None:
        with self.wrapper.client("far") as client:
            assert client.read(0, len(self._content)) == self._content
        wait_until(lambda: not self._titled(": serving "), "the end of the clients' processes")


@pytest.fixture
def field(start_wrapper: StartWrapper, start: Start, tmp_path: Path, seed: int) -> Field:
    rng, path, files = random.Random(seed), tmp_path / "origin.img", CacheFiles(tmp_path)
    path.write_bytes(rng.randbytes(2 * MIB))
    origin, wrapper = start("--target", "--readonly", path), start_wrapper()
    wrapper.expected_errors += [
        "died: killed by SIGKILL",
        "died while it negotiated",
        "waited for a client to move, died",
    ]
    uri = f"nbd+unix:///?socket={origin.socket}"
    wrapper.ctl("--add-proxy", "far", uri, files.image, files.bitmap, files.control)
    return Field(wrapper, bytearray(path.read_bytes()), rng)


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_at_worst_the_client_that_has_come_is_lost(field: Field, tmp_path: Path, seed: int) -> None:
    with field.wrapper.client("far") as client:
        field.flush_something(client)
        with field.mover() as (mover, go_on), listed_calls(mover, tmp_path / "calls") as calls:
            go_on()
        assert field.is_right(client)
    assert len(calls) > 30, calls
    field.check()
    died = lost = 0
    for name, count in random.Random(seed).choices(calls, k=ROUNDS):
        with field.wrapper.client("far") as client:
            field.flush_something(client)
            with field.mover() as (mover, go_on), injected(mover, f"{name}:signal=KILL:when={count}"):
                go_on()
            has_died, is_lost = not is_alive(mover), not field.is_right(client)
            assert has_died or not is_lost, (name, count)
        died, lost = died + has_died, lost + is_lost
        field.check()
    print(f"\n{died} of {ROUNDS} have died, {lost} clients were lost")


STOPPING = [
    (
        "server/single.py",
        "    with _stewarded(service, close_first) as give_way:\n",
        "    os.environ['XNBD_STOP'] = '1'\n    with _stewarded(service, close_first) as give_way:\n",
    ),
    STOPPED_STEWARD,
]


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_no_client_is_lost_with_the_next_steward(field: Field, tmp_path: Path, seed: int) -> None:
    path = build(tmp_path / "next", "99.0", *STOPPING, name="xnbd-wrapper")
    with field.wrapper.client("far") as client:
        field.flush_something(client)
        with field.steward(path) as (steward, go_on), listed_calls(steward, tmp_path / "calls") as calls:
            go_on()
            assert field.is_right(client)
    field.check()
    assert len(calls) > 30, calls
    died = 0
    for name, count in random.Random(seed).choices(calls, k=ROUNDS):
        with field.wrapper.client("far") as client:
            field.flush_something(client)
            with field.steward(path) as (steward, go_on), injected(steward, f"{name}:signal=KILL:when={count}"):
                go_on()
                assert field.is_right(client)
            died += not is_alive(steward)
        field.check()
    print(f"\n{died} of {ROUNDS} have died")
