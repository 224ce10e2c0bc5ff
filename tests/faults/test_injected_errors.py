"""System calls of a proxy's processes that fail once: nobody waits for ever, nothing wrong is read.

In the normal run some are tried; with ``XNBD_ERRORS=1`` (contrib/soak) each error of each
call, at the first to the 60th of them.
"""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress
from errno import EIO
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Set, Tuple

import pytest
from caching import BLOCK, CacheFiles, bgctl, by_kind, query
from conftest import MIB, Start
from injection import injected
from rawclient import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawClient
from relay import Relay
from server_process import Server, wait_until

ROUND = 64
"""Blocks that one round works on; no other round does."""

READS = (READ,)
CHANGES = (WRITE, WRITE_ZEROES, TRIM)
ALL = (*3 * READS, WRITE, *CHANGES)
"""Writes lock first: what only reads has locks for what it fetches from the first call on."""

CALLS = ("fcntl", "pwrite64", "fdatasync", "msync", "poll", "recvfrom", "sendto", "connect", "setsockopt", "pread64")
ERRORS = ("ENOLCK", "EINTR", "EAGAIN", "EIO")
NUMBERS = (1, 2, 3, 5, 8, 13, 21, 34, 60)
LONG = bool(os.environ.get("XNBD_ERRORS"))
SEED = int(os.environ.get("XNBD_SEED", "41"))
SIZE = (128 if LONG else 8) * MIB


def cases(calls: str) -> List[Tuple[str, str, int]]:
    """In the normal run one for each of the *calls*, and the one that had lost a fetch for good."""
    if LONG:
        return [(calls, error, when) for error in ERRORS for when in range(1, 61)]
    rng = random.Random(SEED)
    return [("fcntl", "ENOLCK", 1), *((call, rng.choice(ERRORS), rng.choice(NUMBERS)) for call in calls.split())]


def each_of(*calls: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("calls", CALLS if LONG else [" ".join(calls)])


if LONG:
    pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def disk() -> bytes:
    return random.Random(41).randbytes(SIZE)


@pytest.fixture
def relay(start: Start, tmp_path: Path, disk: bytes) -> Iterator[Relay]:
    image = tmp_path / "origin.img"
    image.write_bytes(disk)
    with Relay(start("--target", image, tcp=True).port) as link:
        yield link


@pytest.fixture
def proxy(start: Start, files: CacheFiles, relay: Relay) -> Server:
    server = start(*files.arguments(relay.uri, "--readahead", "256K", "--spare-workers", "2"))
    server.expected_errors.append("ERROR: (?!.*(Traceback|internal error))")
    query(files.control)
    return server


class Round:
    """What one client reads and writes of the blocks from *first* on, and what may be there in the end."""

    def __init__(self, disk: bytes, first: int, rng: random.Random) -> None:
        self._disk = disk
        self._first = first
        self._rng = rng
        self._possible: Dict[int, Set[bytes]] = {}
        self._sent: Dict[int, Tuple[int, int, int, bytes]] = {}

    def old(self, block: int) -> Set[bytes]:
        at = (self._first + block) * BLOCK
        return self._possible.get(block) or {self._disk[at : at + BLOCK]}

    def send(self, client: RawClient, kinds: Sequence[int]) -> None:
        """Requests of these *kinds* at once; no block is in two of them, and seldom two can be fetched together."""
        for block in self._rng.sample(range(ROUND), ROUND):
            kind = self._rng.choice(kinds)
            start, length = self._rng.choice([(0, BLOCK), (0, BLOCK), (100, 200)])
            flags = FUA if kind in (WRITE, WRITE_ZEROES) and block % 16 == 0 else 0
            data = self._rng.randbytes(length) if kind == WRITE else b""
            offset = (self._first + block) * BLOCK + start
            client.request(kind, offset, length, data=data, flags=flags, cookie=block)
            self._sent[block] = kind, start, length, data
        if WRITE in kinds:
            self._sent[ROUND] = FLUSH, 0, 0, b""
            client.request(FLUSH, cookie=ROUND)

    def take_replies(self, client: RawClient) -> None:
        """All of them, or an end of the connection; a reply that does not come at all is an error."""
        while self._sent:
            magic_and_rest = client.receive(16)
            error, block = int.from_bytes(magic_and_rest[4:8], "big"), int.from_bytes(magic_and_rest[8:], "big")
            kind, start, length, data = self._sent.pop(block)
            if kind == READ and not error:
                assert client.receive(length) in {old[start : start + length] for old in self.old(block)}
            elif kind in CHANGES:
                self._note(block, kind, start, length, data, done=not error)

    def give_up(self) -> None:
        """Writes without a reply may have been done or not."""
        for block, (kind, start, length, data) in self._sent.items():
            if kind in CHANGES:
                self._note(block, kind, start, length, data, done=False)
        self._sent.clear()

    def _note(self, block: int, kind: int, start: int, length: int, data: bytes, *, done: bool) -> None:
        old = self.old(block)
        stop = start + length
        new = {content[:start] + (data or bytes(length)) + content[stop:] for content in old}
        if kind == TRIM and (start or length < BLOCK):
            new |= old  # what is less than a block need not be done
        self._possible[block] = new if done else new | old

    def check(self, client: RawClient) -> None:
        for block in range(ROUND):
            found = client.read((self._first + block) * BLOCK, BLOCK)
            assert found in self.old(block), f"block {self._first + block}"


def clients_on_all_workers(proxy: Server, stack: ExitStack) -> List[RawClient]:
    """As many as there are workers."""
    wait_until(lambda: len(proxy.workers()) >= 3, "spare workers")
    return [stack.enter_context(RawClient(proxy.connect())).negotiate() for _ in range(4)]


@each_of(*CALLS)
def test_a_call_of_a_worker_that_fails_once_keeps_nobody_waiting(
    proxy: Server, relay: Relay, disk: bytes, calls: str
) -> None:
    rng = random.Random(SEED)
    twice = [(case, kinds) for case in cases(calls) for kinds in (READS, ALL)]
    for number, ((call, error, when), kinds) in enumerate(twice):
        work = Round(disk, number * ROUND, rng)
        relay.cut()
        with RawClient(proxy.connect()).negotiate() as client:
            (worker,) = proxy.busy_workers()
            with injected(worker, f"{call}:error={error}:when={when}"):
                with suppress(EOFError, ConnectionError):
                    work.send(client, kinds)
                    work.take_replies(client)
                work.give_up()
        check_all(proxy, work, f"seed {SEED}: {call} {error} {when}")


def check_all(proxy: Server, work: Round, case: str) -> None:
    """Whatever worker a client comes to, it finds what may be there, in time."""
    try:
        with ExitStack() as stack:
            for client in clients_on_all_workers(proxy, stack):
                work.check(client)
        wait_until(lambda: not proxy.busy_workers(), "idle workers")
    except (AssertionError, OSError) as failure:
        raise AssertionError(f"{case}: {failure!r}\n{proxy.log()[-3000:]}") from failure


@each_of("fcntl", "pwrite64", "fdatasync", "poll", "recvfrom")
def test_a_call_of_the_steward_or_its_children_that_fails_once_keeps_nobody_waiting(
    proxy: Server, files: CacheFiles, disk: bytes, calls: str
) -> None:
    """They make checkpoints, and copy, and answer operators meanwhile.

    A sync that has failed is not forgotten: from then on what has to be durable fails, but is written.
    """
    rng = random.Random(SEED)
    written: Dict[int, bytes] = {}
    failed_sync = False
    with RawClient(proxy.connect()).negotiate() as client:
        for call, error, when in cases(calls):
            case = f"seed {SEED}: {call} {error} {when}"
            wait_until(lambda: "steward" in by_kind(proxy), "a steward")
            with injected(by_kind(proxy)["steward"][0], f"{call}:error={error}:when={when}", children=True):
                copy_for_a_moment(files)
                block = rng.randrange(SIZE // BLOCK)
                written[block] = rng.randbytes(BLOCK)
                failed_sync = failed_sync or call == "fdatasync"
                assert client.write(block * BLOCK, written[block], FUA) in ((0, EIO) if failed_sync else (0,)), case
                with suppress(OSError, ValueError, AssertionError):
                    query(files.control)
            assert "blocks" in query(files.control), case
            assert client.works(), case
            for block in [*rng.sample(range(SIZE // BLOCK), 50), *written]:
                at = block * BLOCK
                assert client.read(at, BLOCK) == written.get(block, disk[at : at + BLOCK]), case
        bgctl("--cache-all", files.control)
        for block in range(0, SIZE // BLOCK, 256):
            expected = bytearray(disk[block * BLOCK : (block + 256) * BLOCK])
            for one in set(written) & set(range(block, block + 256)):
                expected[(one - block) * BLOCK : (one - block + 1) * BLOCK] = written[one]
            assert client.read(block * BLOCK, 256 * BLOCK) == expected


def copy_for_a_moment(files: CacheFiles) -> None:
    """Begin a copy that is slow, and leave as soon as it has got on, or has failed; a steward that ends is no error."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(files.control))
        sock.sendall(b'{"command": "cache-all", "wait": true, "limit_rate": 8000000}\n')
        with sock.makefile("rb") as lines:
            for _, line in zip(range(3), lines):
                if b'"done"' in line:
                    return


def test_a_poll_of_the_master_that_fails_once_ends_nobody(proxy: Server, disk: bytes) -> None:
    for error in ("ENOMEM", "EAGAIN"):
        with injected(proxy.pid, f"poll:error={error}:when=1..3"):
            for _ in range(3):
                with RawClient(proxy.connect()).negotiate() as client:
                    assert client.read(0, BLOCK) == disk[:BLOCK]
    assert proxy.process.poll() is None
