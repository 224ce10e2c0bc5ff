"""A model of a disk: random requests go to a server and to a copy in memory, and both have to agree.

The requests of one round are in flight together, spread over all clients. What
changes the disk overlaps nothing that would make the outcome a matter of luck:
changes of one round lie apart, but for changes that leave the same bytes behind.
A read may overlap a change: each of its bytes is then the old or the new one.
Between rounds everything is known, so what one client wrote has to be read by all
others at once.
"""

from __future__ import annotations

import random
import select
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import nbd

LONGEST = 300_000
_BLOCK = 4096
_PATIENCE_MS = 60_000


class Change(NamedTuple):
    """Bytes from *start* on that a round replaces by *data*; a *vague* one (TRIM) may leave them as they are."""

    start: int
    data: bytes
    vague: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def goes_with(self, other: Change) -> bool:
        """Whether both may be in flight at once and the outcome is still known."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        if start >= end:
            return True
        if self.vague or other.vague:
            return False
        return self.data[start - self.start : end - self.start] == other.data[start - other.start : end - other.start]


class Model:
    """*clients* are connected to one disk that holds *content*.

    ``content`` is what the disk has to hold now. With *exact_trim* trimmed bytes
    read as zeros, else as zeros or what they were.
    """

    def __init__(
        self, clients: Sequence[nbd.NBD], content: bytes, rng: random.Random, *, exact_trim: bool = True
    ) -> None:
        self.content = bytearray(content)
        self._clients = clients
        self._rng = rng
        self._exact_trim = exact_trim
        self._changes: List[Change] = []
        self._checks: List[Callable[[], None]] = []
        self._errors: List[int] = []

    def run(self, rounds: int) -> None:
        """*rounds* rounds of requests, and a comparison of the whole disk through every client."""
        self.play(rounds)
        for client in self._clients:
            assert read_all(client) == self.content

    def play(self, rounds: int) -> None:
        """*rounds* rounds of requests, which leave parts of the disk untouched."""
        for _ in range(rounds):
            self._play_round()

    def _play_round(self) -> None:
        rng = self._rng
        self._changes, self._checks, self._errors = [], [], []
        requests = [(self._write, 5), (self._read, 4), (self._zero, 2), (self._trim, 2), (self._flush, 1)]
        requests += [(self._block_status, 2), (self._same_write, 1)]
        actions, weights = zip(*requests)
        for action in rng.choices(actions, weights, k=rng.randint(1, 12)):
            action(rng.choice(self._clients))
        wait_for_all(self._clients)
        assert not any(self._errors), f"error replies: {self._errors}"
        for check in self._checks:
            check()
        for change in self._changes:
            self._apply(change)

    def _apply(self, change: Change) -> None:
        if change.vague and not self._exact_trim:
            now = self._rng.choice(self._clients).pread(len(change.data), change.start)
            check_mixture(now, bytes(self.content[change.start : change.end]), change.data, change.start)
            self.content[change.start : change.end] = now
        else:
            self.content[change.start : change.end] = change.data

    def _range(self) -> Tuple[int, int]:
        """Offset and length: odd ones mostly, often at the ends of blocks and of the disk."""
        rng, size = self._rng, len(self.content)
        length = min(
            size, int(LONGEST ** rng.random()) if rng.random() < 0.8 else rng.choice((1, 512, _BLOCK, 131_072))
        )
        offset = rng.choice((0, size - length, rng.randint(0, size - length), rng.randint(0, size - length)))
        if rng.random() < 0.3:
            offset = min(max(0, offset // _BLOCK * _BLOCK + rng.randint(-1, 1)), size - length)
        return offset, length

    def _try_change(self, change: Change) -> bool:
        """Note *change*, unless it would meet another one of this round."""
        if not all(change.goes_with(other) for other in self._changes):
            return False
        self._changes.append(change)
        return True

    # Requests

    def _on_completion(self, error: Any) -> int:
        """Notes errors and retires the request. An assertion that fails in a callback makes libnbd abort."""
        self._errors.append(error.value)
        return 1

    def _fua(self) -> int:
        return int(nbd.CMD_FLAG_FUA) if self._rng.random() < 0.1 else 0

    def _write(self, client: nbd.NBD) -> None:
        offset, length = self._range()
        self._send_write(client, Change(offset, self._rng.randbytes(length)))

    def _same_write(self, client: nbd.NBD) -> None:
        """Overlapping writes of the same bytes, from several clients."""
        offset, length = self._range()
        data = self._rng.randbytes(length)
        for other in self._clients:
            skip = self._rng.randrange(length)
            self._send_write(other, Change(offset + skip, data[skip:]))

    def _send_write(self, client: nbd.NBD, change: Change) -> None:
        if self._try_change(change):
            client.aio_pwrite(
                nbd.Buffer.from_bytearray(bytearray(change.data)), change.start, self._on_completion, self._fua()
            )

    def _zero(self, client: nbd.NBD) -> None:
        offset, length = self._range()
        if self._try_change(Change(offset, bytes(length))):
            flags = self._rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
            client.aio_zero(length, offset, self._on_completion, flags | self._fua())

    def _trim(self, client: nbd.NBD) -> None:
        offset, length = self._range()
        if self._try_change(Change(offset, bytes(length), vague=not self._exact_trim)):
            client.aio_trim(length, offset, self._on_completion, self._fua())

    def _flush(self, client: nbd.NBD) -> None:
        client.aio_flush(self._on_completion)

    def _read(self, client: nbd.NBD) -> None:
        offset, length = self._range()
        buffer = nbd.Buffer(length)
        flags = nbd.CMD_FLAG_DF if client.can_df() and self._rng.random() < 0.3 else 0
        client.aio_pread_structured(buffer, offset, ignore_chunk, self._on_completion, flags)
        self._checks.append(lambda: self._check_read(offset, bytes(buffer.to_bytearray())))

    def _check_read(self, offset: int, got: bytes) -> None:
        old = bytes(self.content[offset : offset + len(got)])
        new = bytearray(old)
        for change in self._changes:
            start, end = max(change.start, offset), min(change.end, offset + len(got))
            if start < end:
                new[start - offset : end - offset] = change.data[start - change.start : end - change.start]
        check_mixture(got, old, bytes(new), offset)

    def _block_status(self, client: nbd.NBD) -> None:
        """Asked between rounds of changes: while one is under way nothing can be said of the answer."""
        if not client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
            return
        offset, length = self._range()
        flags = nbd.CMD_FLAG_REQ_ONE if self._rng.random() < 0.3 else 0
        self._checks.append(lambda: self._check_status(client, offset, length, flags))

    def _check_status(self, client: nbd.NBD, offset: int, length: int, flags: int) -> None:
        # The checks of a round run before its changes are applied to the copy.
        changed = bytearray(self.content)
        for change in self._changes:
            changed[change.start : change.end] = change.data
        position = offset
        for extent, status in block_status(client, offset, length, flags):
            assert extent > 0
            if status & nbd.STATE_ZERO and not self._is_vague(position, extent):
                assert not any(changed[position : position + extent]), f"bytes at {position} are no zeros"
            position += extent
        assert offset < position <= offset + length

    def _is_vague(self, offset: int, length: int) -> bool:
        return any(c.vague and c.start < offset + length and offset < c.end for c in self._changes)


def ignore_chunk(_data: bytes, _offset: int, _status: int, _error: Any) -> int:
    return 0


def check_mixture(got: bytes, old: bytes, new: bytes, offset: int) -> None:
    """Each byte of *got* is the one of *old* or of *new*; *offset* only serves the message."""
    if got in (old, new):
        return
    for index, byte in enumerate(got):
        assert byte in (old[index], new[index]), f"byte {offset + index} is {byte}, not {old[index]} or {new[index]}"


def wait_for_all(clients: Sequence[nbd.NBD]) -> None:
    """Run the connections until nothing is in flight on any of them."""
    while True:
        busy = {client.aio_get_fd(): client for client in clients if client.aio_in_flight()}
        if not busy:
            return
        poll = select.poll()
        for fd, client in busy.items():
            reads = client.aio_get_direction() & nbd.AIO_DIRECTION_READ
            writes = client.aio_get_direction() & nbd.AIO_DIRECTION_WRITE
            poll.register(fd, (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0))
        ready = poll.poll(_PATIENCE_MS)
        assert ready, "no reply to requests in flight"
        for fd, events in ready:
            # A read may complete the send that was waited for, so the direction is asked again.
            direction = busy[fd].aio_get_direction()
            if events & select.POLLIN and direction & nbd.AIO_DIRECTION_READ:
                busy[fd].aio_notify_read()
            elif direction & nbd.AIO_DIRECTION_WRITE:
                busy[fd].aio_notify_write()


def block_status(client: nbd.NBD, offset: int, length: int, flags: int = 0) -> List[Tuple[int, int]]:
    """The server's answer to one BLOCK_STATUS: pairs of length and ``base:allocation`` flags."""
    found: List[Tuple[int, int]] = []

    def collect(_context: str, _offset: int, entries: List[int], _error: Any) -> int:
        found.extend(zip(entries[::2], entries[1::2]))
        return 0

    client.block_status(length, offset, collect, flags)
    return found


def read_all(client: nbd.NBD) -> bytes:
    """The whole disk."""
    size, step = client.get_size(), 4 << 20
    return b"".join(bytes(client.pread(min(step, size - at), at)) for at in range(0, size, step))
