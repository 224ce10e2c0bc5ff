"""What clients of a disk were told, sector by sector, and clients who note it down.

Each sector has what the origin holds, and all contents that were ever sent for it
since the last comparison. A content is *answered* when its write was acknowledged,
and *flushed* when a FLUSH that was sent after that was. Whatever happens, a sector
holds its last promised content or one that was sent later: what was in flight when
a server died may have been done or not.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type

import nbd
from model import ignore_chunk, wait_for_all
from server_process import wait_until

SECTOR = 512
BLOCK = 4096
_IN_BLOCK = BLOCK // SECTOR
_LONGEST = 160


def content_of(sector: int, serial: int) -> bytes:
    """Tells where it belongs, and has no byte in common with others but by chance."""
    name = struct.pack("<II", sector, serial)
    return (name + hashlib.blake2b(name).digest() * 8)[:SECTOR]


class Ledger:
    """Of a disk whose origin holds *content*, a number of whole sectors.

    ``hot`` is the part that clients work on: its first sector, and how many there are.
    """

    def __init__(self, content: bytes) -> None:
        self.origin = content
        self.sectors = len(content) // SECTOR
        self.base = bytearray(content)
        self.hot = (0, self.sectors)
        self._lock = threading.Lock()
        self._contents: Dict[int, List[bytes]] = {}
        self._answered: Dict[int, int] = {}
        self._flushed: Dict[int, int] = {}
        self._busy: Set[int] = set()
        self._serial = 0

    def reserve(self, first: int, end: int) -> bool:
        """Have these sectors changed by one request only at a time."""
        with self._lock:
            if not self._busy.isdisjoint(range(first, end)):
                return False
            self._busy.update(range(first, end))
            return True

    def send(self, first: int, end: int, *, zeros: bool = False) -> bytes:
        """A new content of these sectors, which are reserved."""
        with self._lock:
            self._serial += 1
            data = []
            for sector in range(first, end):
                content = bytes(SECTOR) if zeros else content_of(sector, self._serial)
                self._contents.setdefault(sector, []).append(content)
                data.append(content)
            return b"".join(data)

    def answer(self, first: int, end: int) -> None:
        with self._lock:
            for sector in range(first, end):
                self._answered[sector] = len(self._contents[sector])
            self._busy.difference_update(range(first, end))

    def answered(self) -> Dict[int, int]:
        """How many contents of each sector were answered, as a FLUSH that is sent now promises them."""
        with self._lock:
            return dict(self._answered)

    def flush(self, promised: Dict[int, int]) -> None:
        with self._lock:
            for sector, number in promised.items():
                self._flushed[sector] = max(number, self._flushed.get(sector, 0))

    def trouble(self, sector: int, since: int, found: bytes) -> Optional[str]:
        """What is wrong with *found*, of which the content number *since* or a later one is to be expected."""
        contents = self._contents.get(sector, [])
        if found in contents[max(0, since - 1) :]:
            return None
        if not since and found == self.base[sector * SECTOR : (sector + 1) * SECTOR]:
            return None
        if found in contents:
            kind = f"content {contents.index(found) + 1}"
        elif found == self.origin[sector * SECTOR : (sector + 1) * SECTOR]:
            kind = "the origin's content"
        else:
            kind = "zeros" if not any(found) else f"{found[:16]!r}..."
        return f"sector {sector} (block {sector // _IN_BLOCK}) holds {kind}, and not {since} of {len(contents)}"

    def check_read(self, first: int, data: bytes, before: Dict[int, int]) -> None:
        """*data* came for a READ sent when *before* was answered."""
        with self._lock:
            for number in range(len(data) // SECTOR):
                sector, found = first + number, data[number * SECTOR : (number + 1) * SECTOR]
                since = before.get(sector, 0)
                if since or sector in self._contents or found != self.base[sector * SECTOR : (sector + 1) * SECTOR]:
                    trouble = self.trouble(sector, since, found)
                    assert not trouble or self._is_mixture(sector, since, found), f"read: {trouble}"

    def _is_mixture(self, sector: int, since: int, found: bytes) -> bool:
        """Whether a READ has met a WRITE in the middle: each byte is of a content that it may be of."""
        contents = self._contents.get(sector, [])[max(0, since - 1) :]
        if not since:
            contents = [*contents, bytes(self.base[sector * SECTOR : (sector + 1) * SECTOR])]
        return all(byte in allowed for byte, *allowed in zip(found, *contents))

    def check_files(self, cache: Path, bitmap: Path, *, power_failed: bool = False) -> int:
        """Compare with the files, and go on with what they hold. Nobody writes now. How many blocks are cached.

        What was answered has to be there; after a power failure, what was flushed.
        """
        octets = bitmap.read_bytes()
        promised = self._flushed if power_failed else self._answered
        cached, troubles = 0, []
        with cache.open("rb") as file:
            for first in range(0, self.sectors, _IN_BLOCK):
                block, end = first // _IN_BLOCK, min(first + _IN_BLOCK, self.sectors)
                if octets[block >> 3] >> (block & 7) & 1:
                    cached += 1
                    file.seek(block * BLOCK)
                    content = file.read((end - first) * SECTOR)
                    troubles += self._check_block(first, end, content, promised)
                else:
                    troubles += self._check_missing(first, end, promised)
        assert not troubles, "; ".join(troubles[:5]) + f" ({len(troubles)} sectors)"
        self._contents, self._answered, self._flushed, self._busy = {}, {}, {}, set()
        return cached

    def _check_block(self, first: int, end: int, content: bytes, promised: Dict[int, int]) -> List[str]:
        if content == self.base[first * SECTOR : end * SECTOR] and not any(s in promised for s in range(first, end)):
            return []
        troubles = []
        for sector in range(first, end):
            found = content[(sector - first) * SECTOR : (sector - first + 1) * SECTOR]
            trouble = self.trouble(sector, promised.get(sector, 0), found)
            if trouble:
                troubles.append(f"cached {trouble}")
            self.base[sector * SECTOR : (sector + 1) * SECTOR] = found
        return troubles

    def _check_missing(self, first: int, end: int, promised: Dict[int, int]) -> List[str]:
        """A block that is not cached will be the origin's."""
        start, stop = first * SECTOR, end * SECTOR
        forgotten = [sector for sector in range(first, end) if promised.get(sector, 0)]
        if not forgotten and self.base[start:stop] == self.origin[start:stop]:
            return []
        return [f"block {first // _IN_BLOCK} is forgotten, and was written"]


class Writer(threading.Thread):
    """A client of the server at *uri* who changes and reads the disk at random, and notes it in *ledger*.

    It ends when *stop* is set, and when the connection breaks. ``failure`` is what
    must not happen: an error reply is, unless it *may_fail*.
    """

    def __init__(self, uri: str, ledger: Ledger, seed: int, stop: threading.Event, *, may_fail: bool = False) -> None:
        super().__init__(daemon=True)
        self.failure: Optional[BaseException] = None
        self.batches = 0
        self.longest = 0.0
        self._uri = uri
        self._ledger = ledger
        self._rng = random.Random(seed)
        self._stop_event = stop
        self._may_fail = may_fail
        self._checks: List[Callable[[], None]] = []
        self._broken = False

    def run(self) -> None:
        client = nbd.NBD()
        client.set_request_structured_replies(self._rng.random() < 0.5)
        try:
            client.set_uri_allow_local_file(True)
            client.connect_uri(self._uri)
        except nbd.Error:
            return  # the server is dead already
        try:
            while not self._stop_event.is_set() and not self._broken:
                began = time.monotonic()
                self._play(client)
                self.batches += 1
                self.longest = max(self.longest, time.monotonic() - began)
            client.shutdown()
        except nbd.Error:
            if client.aio_is_ready():
                raise
        except BaseException as failure:
            self.failure = failure

    def _play(self, client: nbd.NBD) -> None:
        """Some requests at once. A connection that breaks leaves what is in flight unanswered."""
        actions = [self._write] * 6 + [self._read] * 4 + [self._zero, self._trim, self._flush, self._flush]
        self._checks = []
        for _ in range(self._rng.randint(1, 8)):
            self._rng.choice(actions)(client)
        wait_for_all([client])
        for check in self._checks:
            check()

    def _range(self) -> Tuple[int, int]:
        rng, (start, sectors) = self._rng, self._ledger.hot
        length = min(sectors, int(_LONGEST ** rng.random()))
        first = start + rng.randrange(sectors - length + 1)
        if rng.random() < 0.4:
            first = first // _IN_BLOCK * _IN_BLOCK
            length = min(max(1, length // _IN_BLOCK) * _IN_BLOCK, self._ledger.sectors - first)
        return first, first + length

    def _completion(self, on_success: Callable[[], None], error: Any) -> int:
        """An assertion that fails in a callback makes libnbd abort: it is kept for later."""
        if not error.value:
            try:
                on_success()
            except BaseException as failure:
                self.failure = self.failure or failure
        elif error.value in (errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET):
            self._broken = True
        elif not self._may_fail:
            self._checks.append(partial(self._on_error, error.value))
        return 1

    def _on_error(self, number: int) -> None:
        raise AssertionError(f"error reply: {os.strerror(number)}")

    def _write(self, client: nbd.NBD) -> None:
        first, end = self._range()
        if self._ledger.reserve(first, end):
            data = nbd.Buffer.from_bytearray(bytearray(self._ledger.send(first, end)))
            flags, on_success = self._durably(first, end)
            client.aio_pwrite(data, first * SECTOR, partial(self._completion, on_success), flags)

    def _durably(self, first: int, end: int) -> Tuple[int, Callable[[], None]]:
        """Flags of a change of these sectors, and what its success means."""
        answer = partial(self._ledger.answer, first, end)
        if self._rng.random() > 0.05:
            return 0, answer

        def answer_durably() -> None:
            answer()
            after = self._ledger.answered()
            self._ledger.flush({sector: after[sector] for sector in range(first, end)})

        return nbd.CMD_FLAG_FUA, answer_durably

    def _zero(self, client: nbd.NBD) -> None:
        first, end = self._range()
        if self._ledger.reserve(first, end):
            self._ledger.send(first, end, zeros=True)
            flags, on_success = self._durably(first, end)
            flags |= self._rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
            completion = partial(self._completion, on_success)
            client.aio_zero((end - first) * SECTOR, first * SECTOR, completion, flags)

    def _trim(self, client: nbd.NBD) -> None:
        """On a cache in a file, trimmed bytes are zeros."""
        first, end = self._range()
        if self._ledger.reserve(first, end):
            self._ledger.send(first, end, zeros=True)
            flags, on_success = self._durably(first, end)
            client.aio_trim((end - first) * SECTOR, first * SECTOR, partial(self._completion, on_success), flags)

    def _flush(self, client: nbd.NBD) -> None:
        promised = self._ledger.answered()
        client.aio_flush(partial(self._completion, partial(self._ledger.flush, promised)))

    def _read(self, client: nbd.NBD) -> None:
        first, end = self._range()
        buffer, before = nbd.Buffer((end - first) * SECTOR), self._ledger.answered()

        def check() -> None:
            self._ledger.check_read(first, bytes(buffer.to_bytearray()), before)

        client.aio_pread_structured(
            buffer, first * SECTOR, ignore_chunk, partial(self._completion, partial(self._checks.append, check))
        )


class Crowd:
    """Several writers at once, on the servers at *uris* in turn."""

    def __init__(
        self,
        uris: List[str],
        count: int,
        ledger: Ledger,
        rng: random.Random,
        *,
        may_fail: bool = False,
        kind: Type[Writer] = Writer,
    ) -> None:
        self._stop = threading.Event()
        self._writers = [
            kind(uris[number % len(uris)], ledger, rng.getrandbits(32), self._stop, may_fail=may_fail)
            for number in range(count)
        ]
        for writer in self._writers:
            writer.start()

    @property
    def batches(self) -> int:
        return sum(writer.batches for writer in self._writers)

    def take_longest(self) -> float:
        """Seconds that the slowest of all batches has taken since this was asked last."""
        longest = max(writer.longest for writer in self._writers)
        for writer in self._writers:
            writer.longest = 0.0
        return longest

    def wait_for(self, batches: int) -> None:
        """Until so many more of them are done, or somebody has failed."""
        wanted = self.batches + batches
        wait_until(lambda: self.batches >= wanted or self.failed, "clients' answers", 30)

    @property
    def failed(self) -> bool:
        return any(writer.failure is not None or not writer.is_alive() for writer in self._writers)

    def finish(self) -> None:
        """Have all of them come to an end. Raises what they met that must not happen."""
        self._stop.set()
        for writer in self._writers:
            writer.join(60)
            assert not writer.is_alive(), "a client got no answer"
        for writer in self._writers:
            if writer.failure is not None:
                raise writer.failure
