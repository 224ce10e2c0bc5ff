"""A client that is held to limits: between two batches its process sleeps until what was done is paid for.

While it sleeps nothing is received, so the client's bytes stay in the socket, and it is slowed down
by that. All else goes on: what wakes a process wakes this one, and what waits for the origin is gone on
with. What was done is taken from the session's counters, so a request costs nothing more for being limited.
Requests are done before they are paid for: one that is larger than a second's worth goes through, in debt.

How much is received at once follows from what the last bytes have cost, so that no batch is worth much
more than half of the burst.
"""

from __future__ import annotations

import select
from contextlib import contextmanager
from time import monotonic
from typing import Iterator, List, Optional, Sequence, Union

from ...errors import Disconnected
from ...protocol.transmission import REQUEST
from ...scoreboard.counters import BYTES_READ, BYTES_WRITTEN, REQUESTS
from ...scoreboard.rates import NO_LIMITS, Bucket, RateBoard
from ...scoreboard.tally import Tally
from .connection import Connection

_FIRST_PORTION = REQUEST.size
_LARGEST_PORTION = 1 << 20
_MOST_READS = 64
"""READs that are received at once: the next ones may be larger than the last ones were."""

_GROWTH = 4

_PATIENCE = 30.0
"""Seconds that a client which has closed its end may have to wait before its last requests are done."""

_LOOK_EVERY = 1.0


class Pace:
    """The limits of one client: *counts* are what its session does, *board* says what holds.

    The *tally*, if there are metrics, is told who has to wait.
    """

    def __init__(self, board: RateBoard, connection: Connection, counts: Sequence[int], tally: Optional[Tally]) -> None:
        self._board = board
        self._tally = tally
        self._has_waited = self._is_late = False
        self._connection = connection
        self._counts = counts
        self._own = (Bucket(), Bucket())
        self._parts = (Bucket(), Bucket())
        self._generation = b""
        self._rates = NO_LIMITS
        self._go_at = 0.0
        self._portion = _FIRST_PORTION
        self._received = 0
        self._unbooked = [0, 0]
        self._export_paid = 0.0
        self._leaves_at: Optional[float] = None
        self._seen = self._done()
        self._written = counts[BYTES_WRITTEN]

    def way(self) -> Union[Pace, Connection]:
        """By what the session receives now: this, or, as long as there are no limits, the connection itself."""
        if self._board.generation != self._generation:
            self._renew()
        return self if self._rates.is_limited else self._connection

    def debts(self) -> List[float]:
        """What another process goes on with: until when the client has paid for bytes and requests."""
        self.remaining()
        return [bucket.until for bucket in self._own]

    def take_over(self, debts: Sequence[float]) -> None:
        """Go on with what another process has told by `debts`."""
        self.way()
        for bucket, until in zip(self._own, debts):
            bucket.until = until if bucket.rate else 0.0
        self._go_at = max(bucket.until for bucket in self._own) - self._rates.burst

    def receive(self, view: memoryview) -> Optional[int]:
        """What `Connection.receive` does, when it is time for that."""
        if not self._wait(mid_message=False):
            return None
        return self._note(self._connection.receive(self.portion_of(view)))

    def receive_more(self, view: memoryview) -> Optional[int]:
        """What `Connection.receive_more` does, when it is time for that."""
        if not self._wait(mid_message=True):
            return None
        if self._received:  # and nothing is done yet: the message is longer than that
            self._portion = min(_GROWTH * self._portion, _LARGEST_PORTION)
        return self._note(self._connection.receive_more(self.portion_of(view)))

    def receive_now(self, view: memoryview) -> Optional[int]:
        """What `Connection.receive_now` does, for a caller that knows that nothing is `remaining`."""
        return self._note(self._connection.receive_now(self.portion_of(view)))

    def portion_of(self, view: memoryview) -> memoryview:
        """As much of it as may be received at once."""
        return view[: self._portion]

    def _note(self, received: Optional[int]) -> Optional[int]:
        if received:
            self._received += received
            self._is_late, self._has_waited = self._is_late or self._has_waited, False
        return received

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the process sleeps because of limits."""
        began, tally = monotonic(), self._tally
        if tally is not None:
            tally.tell("limited", 1)
        try:
            yield
        finally:
            self._has_waited = True
            if tally is not None:
                tally.tell("limited", 0)
                tally.count("limited_nanoseconds", int((monotonic() - began) * 1e9))

    def remaining(self) -> float:
        """Seconds until the client may send more; 0 or less: it may."""
        if self.way() is not self:
            return 0.0
        self._book()
        return self._go_at - monotonic()

    def _wait(self, *, mid_message: bool) -> bool:
        """Sleep until the client may send more; False if the process was woken before.

        Whoever is to stop in the middle of a message is to have the rest of it at once.
        """
        loop = self._connection.loop
        seconds = self.remaining()
        if seconds <= 0 or (mid_message and loop.stopping):
            return True
        if self._leaves_at is None:
            if self._sleep(seconds, select.POLLRDHUP, mid_message=mid_message):
                self._leaves_at = monotonic() + _PATIENCE
        elif monotonic() > self._leaves_at:
            raise Disconnected("client left, and had to wait because of limits")
        elif self._sleep(min(seconds, _LOOK_EVERY), 0, mid_message=mid_message):
            return True  # there is nobody any more who could be slowed down
        return (mid_message and loop.stopping) or self.remaining() <= 0

    def _sleep(self, seconds: float, events: int, *, mid_message: bool) -> bool:
        with self.waiting():
            return self._connection.sleep(seconds, events, mid_message=mid_message)

    def _renew(self) -> None:
        """There are other limits. What was done as long as there were none is free."""
        was_limited, now = self._rates.is_limited, monotonic()
        self._generation, self._rates = self._board.generation, self._board.rates
        buckets = (*self._own, *self._parts)
        for bucket, rate in zip(buckets, self._rates):
            bucket.change(int(rate), now)
        self._export_paid = 0.0
        if not was_limited:
            self._seen, self._written = self._done(), self._counts[BYTES_WRITTEN]
            self._go_at, self._portion, self._received = 0.0, _FIRST_PORTION, 0
            return
        self._go_at = max(bucket.until for bucket in buckets) - self._rates.burst

    def _done(self) -> List[int]:
        counts = self._counts
        return [counts[BYTES_READ] + counts[BYTES_WRITTEN], counts[REQUESTS]]

    def _book(self) -> None:
        """Pay for what was done since the last time."""
        done = self._done()
        amounts = [now - before for now, before in zip(done, self._seen)]
        if not any(amounts) and not any(self._unbooked):
            return
        self._seen = done
        self._count_late(amounts[1])
        now = monotonic()
        ahead = self._go_at
        seconds = max(bucket.charge(amount, now) for bucket, amount in zip(self._own, amounts))
        paid = max(bucket.until for bucket in self._own)
        if any(bucket.rate for bucket in self._parts):
            before = [max(bucket.until, now) for bucket in self._parts]
            shared = self._charge_export(amounts, now)
            paid = max(paid, shared)
            seconds = max(seconds, *(bucket.until - was for bucket, was in zip(self._parts, before)))
        self._go_at = max(ahead, paid - self._rates.burst)
        self._adapt(seconds, amounts[1])

    def _count_late(self, requests: int) -> None:
        """So many *requests* were done, perhaps of those that were received after a wait."""
        if self._is_late and requests:
            self._is_late = False
            if self._tally is not None:
                self._tally.count("limited_requests", requests)

    def _charge_export(self, amounts: Sequence[int], now: float) -> float:
        """When the client's part in the export's buckets is paid for."""
        self._unbooked = [more + left for more, left in zip(amounts, self._unbooked)]
        paid = self._board.charge(self._unbooked, self._parts, now)
        if paid is None:  # another process books at this moment, or has been stopped there: as if there were no others
            seconds = max(more / bucket.rate if bucket.rate else 0.0 for more, bucket in zip(amounts, self._parts))
            self._export_paid = max(self._export_paid, now) + seconds
        else:
            self._export_paid, self._unbooked = paid, [0, 0]
        return self._export_paid

    def _adapt(self, seconds: float, requests: int) -> None:
        """What was received has cost so many *seconds*."""
        received, self._received = self._received, 0
        written = self._counts[BYTES_WRITTEN]
        wrote, self._written = written != self._written, written
        if seconds <= 0 or not requests or not received:
            return
        portion = int(received / seconds * self._rates.burst / 2)
        portion = max(received // requests, min(portion, _GROWTH * self._portion))
        most = _LARGEST_PORTION if wrote else _MOST_READS * REQUEST.size
        self._portion = max(REQUEST.size, min(portion, most) // REQUEST.size * REQUEST.size)
