"""Upgrades in a row under eight busy clients and many idle ones: nobody loses a byte or the connection.

fio checks what it has written, nbdcopy copies both ways, the model test does all commands; each has a part of the disk.
The long form is ``XNBD_UPGRADES=100 XNBD_IDLE=1000``; with ``-s`` its figures are printed.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import nbd
import pytest
from caching import Reading, connect
from conftest import MIB, Start
from model import Model
from proxies import Proxy
from rawclient import RawClient
from relay import Relay
from server_process import Server, run, title_of, wait_until
from upgrades import IDLE, UPGRADES, Figures, Outcome, descriptors_of, upgrade

COPIED, CHECKED, MODELLED = slice(0, 8 * MIB), slice(8 * MIB, 16 * MIB), slice(24 * MIB, 27 * MIB)
"""Parts of nbdcopy, of the first fio (the second one has the next 8 MiB), and of the model test."""

UNREAD = slice(32 * MIB, 96 * MIB)
"""What nobody has read before."""

BLOCK = 4096
_NAP = 0.005

CROWD = IDLE if "XNBD_IDLE" in os.environ else 20
"""Clients that do nothing."""

MODES = ["target", "cow", "cold", "copying", "away"]


class Field(NamedTuple):
    """A server with its disk's first *content*, and the link to its origin, if it has one."""

    server: Server
    control: Path
    content: bytes
    relay: Optional[Relay] = None


@pytest.fixture
def field(start: Start, tmp_path: Path, seed: int, mode: str) -> Iterator[Field]:
    """The proxy is cold, is copied all the while, or its origin goes away."""
    image, control = tmp_path / "disk.img", tmp_path / "ctl"
    content = random.Random(seed).randbytes(UNREAD.stop)
    image.write_bytes(content)
    if mode in ("target", "cow"):
        server = start("--target" if mode == "target" else "--cow-target", "--control", control, image)
        yield Field(server, control, content)
        return
    origin = start("--target", "--readonly", image, tcp=True)
    with Relay(origin.port, delay=0.005) as relay:
        proxy = Proxy(start, tmp_path, relay.uri)
        if mode == "copying":
            proxy.bgctl("--cache-all2", "--limit-rate", "1M")
        if mode == "away":
            run("qemu-io", "-f", "raw", proxy.uri, "-r", "-c", f"read 0 {UNREAD.start}")
            relay.refuse()
            relay.cut()
        yield Field(proxy.server, proxy.control, content, relay)


class Part(nbd.NBD):  # type: ignore[misc]
    """A client for which the disk is `MODELLED`."""

    def get_size(self) -> int:
        return MODELLED.stop - MODELLED.start

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(super().pread(length, MODELLED.start + offset))

    def aio_pread_structured(self, buffer: nbd.Buffer, offset: int, *rest: object) -> int:
        return int(super().aio_pread_structured(buffer, MODELLED.start + offset, *rest))

    def aio_pwrite(self, buffer: nbd.Buffer, offset: int, *rest: object) -> int:
        return int(super().aio_pwrite(buffer, MODELLED.start + offset, *rest))

    def aio_zero(self, length: int, offset: int, *rest: object) -> int:
        return int(super().aio_zero(length, MODELLED.start + offset, *rest))

    def aio_trim(self, length: int, offset: int, *rest: object) -> int:
        return int(super().aio_trim(length, MODELLED.start + offset, *rest))

    def block_status(self, length: int, offset: int, collect: Callable[..., Any], *rest: object) -> None:
        def shifted(context: str, at: int, *found: object) -> Any:
            return collect(context, at - MODELLED.start, *found)

        super().block_status(length, MODELLED.start + offset, shifted, *rest)


class Busy:
    """Eight clients at work until `stop`, and one that measures; what any of them finds wrong is raised.

    nbdcopy has two connections, fio runs twice, the model has four.
    """

    def __init__(self, field: Field, directory: Path, seed: int) -> None:
        self._field = field
        self._directory = directory
        self._seed = seed
        self._over = threading.Event()
        self.latencies: List[float] = []
        """Seconds that small reads took, one at a time."""
        self.rounds = 0
        self._executor = ThreadPoolExecutor(8)
        work = [self._copy, self._model, self._probe, *([self._miss] if field.relay else [])]
        self._jobs: List[Future[None]] = [self._executor.submit(one) for one in work]
        self._jobs += [self._executor.submit(self._check, number) for number in range(2)]

    def stop(self) -> None:
        self._over.set()
        for job in self._jobs:
            job.result()

    def check(self) -> None:
        """None has failed yet."""
        for job in self._jobs:
            if job.done():
                job.result()
                raise AssertionError("a client has come to its end")

    def _copy(self) -> None:
        """There and back; of a proxy only what was copied comes back, for all else would take too long."""
        uri, rng = self._field.server.uri, random.Random(self._seed)
        there, back = self._directory / "there.img", self._directory / "back.img"
        while not self._over.is_set():
            there.write_bytes(rng.randbytes(COPIED.stop))
            run("nbdcopy", "--connections=2", there, uri, timeout=300)
            if self._field.relay is None:
                run("nbdcopy", "--connections=2", uri, back, timeout=300)
                assert back.read_bytes()[COPIED] == there.read_bytes()
            assert self._read(COPIED) == there.read_bytes()
            self.rounds += 1

    def _read(self, part: slice) -> bytes:
        client = connect(self._field.server.uri)
        data = b"".join(bytes(client.pread(MIB, at)) for at in range(part.start, part.stop, MIB))
        client.shutdown()
        return data

    def _check(self, number: int) -> None:
        """fio with verification."""
        size, log = CHECKED.stop - CHECKED.start, self._directory / f"fio{number}.log"
        words = f"--name=x{number} --ioengine=nbd --uri={self._field.server.uri} --rw=randrw --bs=4k --iodepth=16"
        words += f" --offset={CHECKED.start + number * size} --size={size} --io_size={4 * size}"
        words += f" --verify=crc32c --verify_state_save=0 --aux-path={self._directory} --output={log}"
        while not self._over.is_set():
            done = subprocess.run(["fio", *words.split()], cwd=self._directory, check=False)
            assert done.returncode == 0, log.read_text()

    def _model(self) -> None:
        """Four connections, all commands."""
        clients = []
        for number in range(4):
            client = Part()
            client.set_request_structured_replies(number != 0)
            client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
            client.set_uri_allow_local_file(True)
            client.connect_uri(self._field.server.uri)
            clients.append(client)
        model = Model(clients, self._field.content[MODELLED], random.Random(self._seed))
        while not self._over.is_set():
            model.play(10)
        model.run(5)
        for client in clients:
            client.shutdown()

    def _probe(self) -> None:
        """Small reads of what is cached, one after the other."""
        with RawClient(self._field.server.connect()).negotiate() as client:
            while not self._over.is_set():
                began = time.monotonic()
                client.read(MODELLED.stop, 512)
                self.latencies.append(time.monotonic() - began)

    def _miss(self) -> None:
        """What is not cached: one block after the other, or, if the origin is away, some that are waited for."""
        client, relay = connect(self._field.server.uri), self._field.relay
        blocks = list(range(UNREAD.start, UNREAD.stop, BLOCK))
        random.Random(self._seed).shuffle(blocks)
        assert relay is not None
        while blocks and not self._over.is_set():
            at = [blocks.pop() for _ in range(min(8, len(blocks)))]
            readings = [Reading(client, offset, BLOCK) for offset in at]
            while not all(reading.is_done() for reading in readings):
                if self._over.wait(_NAP):
                    relay.accept()
            for offset, reading in zip(at, readings):
                assert reading.content() == self._field.content[offset : offset + BLOCK]
        self._over.wait()
        client.shutdown()


def stewards_descriptors(server: Server) -> int:
    (steward,) = (pid for pid in server.workers() if "steward" in title_of(pid))
    return descriptors_of(steward)


def figures_after_one(field: Field) -> Tuple[Figures, int]:
    """What there is after an upgrade of idle clients: a first start, and who was busy, have more or less.

    And the descriptors of the steward.
    """
    settle(field.server, CROWD)
    upgrade(field.control)
    settle(field.server, CROWD)
    return Figures.of(field.server.pid, field.server.workers()), stewards_descriptors(field.server)


def settle(server: Server, clients: int) -> None:
    """Until there are the usual processes again."""

    def settled() -> bool:
        titles = [title_of(pid) for pid in server.workers()]
        spares, stewards = (sum(kind in title for title in titles) for kind in ("spare worker", "steward"))
        return stewards == 1 and 4 <= spares <= 8 and len(titles) == spares + stewards + clients

    wait_until(settled, "the usual processes", 60)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
def test_nobody_notices(field: Field, tmp_path: Path, seed: int, mode: str) -> None:
    server, control = field.server, field.control
    with ExitStack() as stack:
        idle = [stack.enter_context(RawClient(server.connect()).negotiate()) for _ in range(CROWD)]
        settle(server, CROWD)
        before, stewards_before = figures_after_one(field)
        busy = Busy(field, tmp_path, seed)
        outcomes: List[Outcome] = []
        began = time.monotonic()
        while len(outcomes) < UPGRADES or not busy.rounds:
            outcomes.append(upgrade(control))
            busy.check()
        took = time.monotonic() - began
        busy.stop()
        assert {outcome.rest for outcome in outcomes} == {""}, outcomes
        after, stewards_after = figures_after_one(field)
        for client in idle:
            assert len(client.read(MODELLED.stop, 512)) == 512
    assert after.descriptors == before.descriptors
    assert abs(stewards_after - stewards_before) <= 2  # as long as a child of its copies
    assert after.memory < 1.1 * before.memory + 20
    assert "connection lost" not in server.log()
    tell(mode, outcomes, took, before, after, busy.latencies)


def tell(
    mode: str, outcomes: List[Outcome], took: float, before: Figures, after: Figures, latencies: List[float]
) -> None:
    pauses = sorted(outcome.pause or 0 for outcome in outcomes)
    slowest = sorted(latencies)
    print(
        f"\n{mode}: {len(outcomes)} upgrades in {took:.0f} s, {outcomes[-1].moved} clients; longest pauses: "
        f"median {pauses[len(pauses) // 2]} ms, worst {pauses[-1]} ms; {len(slowest)} small reads: median "
        f"{1000 * slowest[len(slowest) // 2]:.2f} ms, 99.9 % {1000 * slowest[int(len(slowest) * 0.999)]:.0f} ms, "
        f"worst {1000 * slowest[-1]:.0f} ms; memory {before.memory:.0f} -> {after.memory:.0f} MiB; "
        f"descriptors {before.descriptors} -> {after.descriptors}"
    )
