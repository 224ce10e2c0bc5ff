"""Clients that write numbered stamps, and the proof that a copy of the disk is a consistent cut through them.

A client has a lane: slots of the disk that it writes in turn, stamp *n* to slot
``n % slots``, as fast as it can and several at once. What a slot holds tells which
stamp was written last. Issue and acknowledgement of every stamp are noted by the
clock that all processes of the machine share (``CLOCK_MONOTONIC``).

As a program: ``stamps.py URI LANE HISTORY`` writes until its standard input ends.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from rawclient import RawClient

MIB = 1 << 20
DISK_SIZE = 42 * MIB + 1235
UNTOUCHED = slice(1 * MIB, 8 * MIB)
"""What belongs to no lane."""


class Lane(NamedTuple):
    """Slots of *size* bytes, *stride* bytes apart; *depth* stamps at once.

    With *zeroing* some slots are trimmed and zeroed. Odd slots lie *fold* bytes further
    on: with that the client sends *depth* stamps at a time, as one message.
    """

    number: int
    start: int
    size: int
    stride: int
    slots: int
    depth: int
    zeroing: bool = False
    fold: int = 0

    def offset(self, stamp: int) -> int:
        slot = stamp % self.slots
        return self.start + slot * self.stride + slot % 2 * self.fold

    def kind(self, stamp: int) -> int:
        """0 for a write, 1 for a trim, 2 for zeroes; never zeros twice in one slot."""
        lap, slot = divmod(stamp, self.slots)
        return 1 + slot % 2 if self.zeroing and (lap + slot) % 3 == 1 else 0

    def content(self, stamp: int) -> bytes:
        if self.kind(stamp):
            return bytes(self.size)
        word = struct.pack("<IHH", stamp, self.number, 0xA55A)
        return (word * (self.size // 8 + 1))[: self.size]


LANES = {
    "small": Lane(1, 39 * MIB + 512, 4096, 4096, 256, 8),
    "large": Lane(3, 32 * MIB + 100, (768 << 10) + 1001, (768 << 10) + 1001, 4, 1),
    "odd": Lane(2, 32 * MIB + 100 + 4 * ((768 << 10) + 1001), 5000, 5000, 600, 4),
    "zeroing": Lane(4, 28 * MIB, 64 << 10, 64 << 10, 60, 2, zeroing=True),
    "sweep": Lane(5, 8 * MIB, 4096, (64 << 10) + 4096, 300, 4),
    "bursts": Lane(6, 512, 64, 4096, 240, 2000, fold=41 * MIB),
}


class History(NamedTuple):
    """Nanoseconds at which stamps 1, 2, 3, ... were issued and acknowledged."""

    lane: Lane
    issued: List[int]
    acked: List[int]


class Cut(NamedTuple):
    """What a copy of the disk shows of a lane: its last whole stamp."""

    history: History
    last: int

    @property
    def newest_issue(self) -> int:
        return self.history.issued[self.last - 1]

    @property
    def oldest_missing_ack(self) -> int:
        """When the first stamp that is not there was acknowledged; never if it was not written at all."""
        return self.history.acked[self.last] if self.last < len(self.history.acked) else 1 << 63


class Writers:
    """The running clients."""

    def __init__(self, uri: str, directory: Path, names: List[str]) -> None:
        self._paths = {name: directory / f"{name}.history" for name in names}
        self._processes = {name: _start(uri, name, path) for name, path in self._paths.items()}
        self.histories: List[History] = []

    def wait_for_lap(self) -> None:
        """Until every client has been through all its slots."""
        for process in self._processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == b"lap\n"

    def stop(self) -> None:
        """Let them come to an end, which fails the test if a stamp was refused, and read what they have noted."""
        for process in self._processes.values():
            process.communicate(timeout=30)
            assert process.returncode == 0
        for name, path in self._paths.items():
            issued, acked = json.loads(path.read_text())
            self.histories.append(History(LANES[name], issued, acked))

    def kill(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _start(uri: str, name: str, path: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, __file__, uri, name, str(path)]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextmanager
def writers(uri: str, directory: Path, names: Optional[List[str]] = None) -> Iterator[Writers]:
    """Clients on these lanes (or on all), from their first lap on; `Writers.stop` ends them."""
    clients = Writers(uri, directory, names or list(LANES))
    try:
        clients.wait_for_lap()
        yield clients
    finally:
        clients.kill()


def check_cut(data: bytes, histories: List[History], asked_at: int, there_at: int) -> None:
    """*data* is the disk at one instant between the two times: all that was answered by then, nothing issued later."""
    cuts = [Cut(history, _last_stamp(data, history)) for history in histories]
    for cut in cuts:
        where = f"lane {cut.history.lane.number}, stamp {cut.last}"
        assert cut.last >= sum(at < asked_at for at in cut.history.acked), f"{where}: older than the request"
        assert cut.newest_issue < there_at, f"{where}: newer than the snapshot"
    newest = max(cuts, key=lambda cut: cut.newest_issue)
    for cut in cuts:
        assert newest.newest_issue <= cut.oldest_missing_ack, (
            f"stamp {newest.last} of lane {newest.history.lane.number} is there, "
            f"though issued after lane {cut.history.lane.number} had the answer to {cut.last + 1}, which is not"
        )


def _last_stamp(data: bytes, history: History) -> int:
    """The stamp up to which all are there, and none after it."""
    lane = history.lane
    slots = {slot: data[at : at + lane.size] for slot, at in ((s, lane.offset(s)) for s in range(lane.slots))}
    last = _newest(lane, slots)
    for stamp in range(last - lane.slots + 1, last + 1):
        slot = slots[stamp % lane.slots]
        assert slot == lane.content(stamp), f"lane {lane.number}: stamp {stamp} is not whole, the last is {last}"
    return last


def _newest(lane: Lane, slots: Dict[int, bytes]) -> int:
    """The newest stamp that is whole. A large write that is not acknowledged may be there in part, from its start."""
    found = [struct.unpack_from("<IHH", slot) for slot in slots.values() if any(slot[:8])]
    assert all(number == lane.number and mark == 0xA55A for _, number, mark in found)
    last = int(max(stamp for stamp, _, _ in found))
    while lane.kind(last + 1) and not any(slots[(last + 1) % lane.slots]):
        last += 1
    slot, new, old = slots[last % lane.slots], lane.content(last), lane.content(last - lane.slots)
    if slot == new or lane.size <= 512 << 10:
        return last
    torn = next(at for at in range(0, lane.size, 8) if slot[at : at + 8] != new[at : at + 8])
    assert slot[torn + 8 :] == old[torn + 8 :], f"lane {lane.number}: stamp {last} has holes"
    slots[last % lane.slots] = old
    return last - 1


def noise_disk(path: Path) -> bytes:
    """A disk of `DISK_SIZE` bytes full of noise at *path*; its content."""
    import random

    data = random.Random(85).randbytes(DISK_SIZE)
    path.write_bytes(data)
    return data


class _Client:
    """One client at work."""

    def __init__(self, uri: str, lane: Lane) -> None:
        import nbd

        self._lane = lane
        self._handle = nbd.NBD()
        self._handle.set_uri_allow_local_file(True)
        self._handle.connect_uri(uri)
        self._buffer = nbd.Buffer.from_bytearray
        self.issued: List[int] = []
        self.acked: List[int] = []
        self._answered = 0
        self._failure = 0

    def issue(self) -> None:
        stamp = len(self.issued) + 1
        kind, at, size = self._lane.kind(stamp), self._lane.offset(stamp), self._lane.size
        self.acked.append(0)

        def on_answer(error: Any) -> int:
            self.acked[stamp - 1] = time.monotonic_ns()
            self._answered += 1
            self._failure = self._failure or getattr(error, "value", error)
            return 1

        data = bytearray() if kind else bytearray(self._lane.content(stamp))
        self.issued.append(time.monotonic_ns())
        if kind == 1:
            self._handle.aio_trim(size, at, completion=on_answer)
        elif kind == 2:
            self._handle.aio_zero(size, at, completion=on_answer)
        else:
            self._handle.aio_pwrite(self._buffer(data), at, completion=on_answer)

    def wait(self, most: int) -> None:
        """Until at most so many stamps have no answer."""
        while len(self.issued) - self._answered > most:
            self._handle.poll(-1)
        if self._failure:
            sys.exit(f"a stamp was refused: errno {self._failure}")

    def flush(self) -> None:
        self._handle.flush()

    def close(self) -> None:
        self._handle.shutdown()


class _BurstClient:
    """One client that sends many stamps as one message, and then takes the answers."""

    def __init__(self, uri: str, lane: Lane) -> None:
        self._lane = lane
        self._client = _connect(uri)
        self.issued: List[int] = []
        self.acked: List[int] = []

    def issue(self) -> None:
        from rawclient import WRITE, pack_request

        lane, first = self._lane, len(self.issued) + 1
        message = b"".join(
            pack_request(WRITE, lane.offset(stamp), lane.size, cookie=stamp) + lane.content(stamp)
            for stamp in range(first, first + lane.depth)
        )
        self.issued += [time.monotonic_ns()] * lane.depth
        self._client.send(message)

    def wait(self, _most: int) -> None:
        while len(self.acked) < len(self.issued):
            assert self._client.simple_reply()[:2] == (0, len(self.acked) + 1)
            self.acked.append(time.monotonic_ns())

    def flush(self) -> None:
        assert self._client.works()

    def close(self) -> None:
        self._client.sock.close()


def _connect(uri: str) -> RawClient:
    """A client of the Unix socket of *uri*, over TLS if that has certificates."""
    from rawclient import RawClient
    from tls_client import context_of, start_tls

    parameters = parse_qs(urlsplit(uri).query)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(parameters["socket"][0])
    client = RawClient(sock)
    if "tls-certificates" not in parameters:
        return client.negotiate()
    start_tls(client, context_of(Path(parameters["tls-certificates"][0]))).go()
    return client


def main(uri: str, name: str, path: str) -> None:
    import select

    lane = LANES[name]
    client = _BurstClient(uri, lane) if lane.fold else _Client(uri, lane)
    told = False
    while not told or not select.select([sys.stdin], [], [], 0)[0]:
        client.issue()
        client.wait(lane.depth - 1)
        if len(client.issued) % 500 == 0:
            client.flush()
        if not told and len(client.issued) > lane.slots + lane.depth:
            told = True
            print("lap", flush=True)
    client.wait(0)
    Path(path).write_text(json.dumps([client.issued, client.acked]))
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
