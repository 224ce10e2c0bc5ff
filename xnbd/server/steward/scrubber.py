"""Checking all blocks that were fetched, and fetching the damaged ones again, in a process of its own.

What was checked is known from nothing but the map of checked blocks, so that it may end
at any time. A damaged block counts as missing as soon as it is found.
"""

from __future__ import annotations

import mmap
import os
import struct
from time import monotonic
from typing import Dict, Iterator, NamedTuple, Set, Tuple

from ...errors import TaskFailed
from ...proxy.image import ProxyImage
from ...proxy.state.sums import RUN
from ...storage.blocks import BLOCK, block_count
from ...storage.image import Ticket
from ...text import counted
from ..disk import Disk
from ..process_loop import ProcessLoop

_FIGURES = struct.Struct("=5Q")
_LOOK_AROUND = 0.1
_MOST_OUTSTANDING = 256
_PATIENCE = 10.0
"""Seconds without an origin, once all is checked, after which damaged blocks are left missing."""


class ScrubFigures(NamedTuple):
    """How far it is: *position* in bytes of the disk, and how many blocks were checked, damaged and fetched again.

    Those that clients have written have no checksums, and are not checked.
    """

    position: int = 0
    checked: int = 0
    damaged: int = 0
    repaired: int = 0
    written: int = 0


class ScrubMemory:
    """The figures, in memory of a steward and its child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def tell(self, figures: ScrubFigures) -> None:
        self._memory[: _FIGURES.size] = _FIGURES.pack(*figures)

    def read(self) -> ScrubFigures:
        return ScrubFigures(*_FIGURES.unpack_from(self._memory))


class Scrubber:
    """Checks all of one disk, *rate* bytes a second at most (0: as fast as it goes), in a process without a client."""

    def __init__(self, disk: Disk, image: ProxyImage, loop: ProcessLoop, memory: ScrubMemory, rate: int) -> None:
        self._disk = disk
        self._loop = loop
        self._bitmap = image.bitmap
        self._blocks = block_count(image.size)
        self._size = image.size
        self._verification = image.verification
        self._fetcher = image.fetcher
        self._fetcher.arrivals.passes_on = False  # what cannot be kept is of no use here
        self._memory = memory
        self._rate = rate
        self._figures = ScrubFigures()
        self._allowed_at = monotonic()
        self._outstanding: Dict[Ticket, int] = {}
        self._error = 0

    def run(self) -> None:
        """Return when all is checked and right, or the disk is no proxy any more. Raises `TaskFailed`, and `Stop`."""
        busy = self._check(self._units())
        while busy and self._disk.stays_proxy():
            self._wait(_LOOK_AROUND)
            busy = self._check(iter(sorted(busy)))
        until = monotonic() + _PATIENCE
        while self._outstanding and self._disk.stays_proxy():
            self._wait(_LOOK_AROUND)
            if not self._fetcher.trouble:
                until = monotonic() + _PATIENCE
            elif monotonic() > until:
                self._fail(self._fetcher.trouble)
        if self._error and self._disk.stays_proxy():
            self._fail(os.strerror(self._error))

    def _units(self) -> Iterator[Tuple[int, int]]:
        """All that is local, in pieces that are checked at once."""
        for first, end, local in self._bitmap.runs(0, self._blocks):
            while local and first < end:
                stop = min(end, first - first % RUN + RUN)
                yield first, stop
                first = stop

    def _check(self, units: Iterator[Tuple[int, int]]) -> Set[Tuple[int, int]]:
        """Returns the units of which another process had some blocks in hand."""
        busy = set()
        for first, end in units:
            self._pause((end - first) * BLOCK)
            if not self._disk.stays_proxy():
                break
            if not self._check_unit(first, end):
                busy.add((first, end))
        self._tell(position=self._size)
        return busy

    def _check_unit(self, first: int, end: int) -> bool:
        self._disk.place.enter()
        try:
            if not self._disk.stays_proxy():
                return True
            damaged = self._verification.check_again(first, end)
        except OSError as error:
            raise TaskFailed(f"cannot read the cache image at byte {first * BLOCK}: {error.strerror}") from error
        finally:
            self._disk.place.leave()
        if damaged is None:
            return False
        for block in damaged:
            ticket = self._fetcher.need(block, block + 1)
            if ticket is not None:
                self._outstanding[ticket] = block
        self._count(first, end, len(damaged))
        return True

    def _count(self, first: int, end: int, damaged: int) -> None:
        figures, written = self._figures, self._verification.written_among(first, end)
        self._tell(
            position=end * BLOCK,
            checked=figures.checked + end - first - written,
            damaged=figures.damaged + damaged,
            written=figures.written + written,
        )

    def _tell(self, **changes: int) -> None:
        self._figures = self._figures._replace(**changes)
        self._memory.tell(self._figures)
        self._disk.place.tell()

    def _pause(self, length: int) -> None:
        """Until *length* bytes may be checked, and not too many damaged blocks are on their way."""
        self._wait(0)
        while self._must_pause() and self._disk.stays_proxy():
            self._wait(min(_LOOK_AROUND, max(0.001, self._allowed_at - monotonic())))
        if self._rate:
            self._allowed_at = max(self._allowed_at, monotonic() - _LOOK_AROUND) + length / self._rate

    def _must_pause(self) -> bool:
        crowded = len(self._outstanding) >= _MOST_OUTSTANDING and not self._fetcher.trouble
        return crowded or monotonic() < self._allowed_at

    def _wait(self, timeout: float) -> None:
        """Let the origin's replies come for so long."""
        if not timeout and not self._outstanding:
            self._loop.check()
            return
        self._loop.wait((), 0, timeout, results=True)
        finished, self._fetcher.finished = self._fetcher.finished, []
        for ticket in finished:
            if self._outstanding.pop(ticket, None) is not None:
                self._error = self._error or ticket.error
                self._tell(repaired=self._figures.repaired + (not ticket.error))

    def _fail(self, reason: str) -> None:
        left = self._figures.damaged - self._figures.repaired
        blocks = counted(left, "damaged block")
        count = "counts" if left == 1 else "count"
        raise TaskFailed(f"{blocks} could not be fetched again, and {count} as missing: {reason}")
