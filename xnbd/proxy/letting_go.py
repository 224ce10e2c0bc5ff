"""Letting clean blocks go: the origin has them too, and their space is given back.

But for damaged blocks (`proxy.verification`) a bit is taken back nowhere else. The order,
in a process that serves nobody:

1. Lock the blocks, so that nobody fills or writes them, if their bits can be believed.
2. Close the gate: no request is half done. Take the bits back of those that are local and
   clean now, and see which processes sleep with replies that point to blocks.
3. Open the gate. From now on the blocks are missing for everybody; who wants one finds it
   locked, and tries again.
4. Have those processes copy what they hold (`scoreboard.holders`), and wait until they have.
   If one does not, the bits are set again, and nothing has happened.
5. Make a checkpoint: the durable copy loses the bits.
6. Give the space back, that of blocks which were missing before included, and unlock.

Who dies on the way leaves bits that are gone from the live bitmap only, on a marked page,
which a start understands (`proxy.state.copies`), or space that is still taken.
"""

from __future__ import annotations

import errno
import math
from time import monotonic, sleep
from typing import List, Tuple

from ..logs import log
from ..scoreboard.holders import Hold
from ..scoreboard.layout import PROXY
from ..scoreboard.scoreboard import Scoreboard
from ..storage import space
from ..storage.blocks import block_start, block_stop, bytes_of
from ..system.file_locks import RangeLocks
from .state.checkpoint import ProcessState

_NAP = 1e-3
_CHECKPOINT_TIMEOUT = 60.0
"""Seconds for which a checkpoint of another process is waited for: slow disks take long, and only the blocks wait."""

_HELD = "a client does not take replies that point to the blocks"

Run = Tuple[int, int]
"""The first block, and the end."""


class LettingGo:
    """Lets clean blocks go of the cache of *size* bytes behind *cache_fd*, whose bitmap is in *state*."""

    def __init__(self, cache_fd: int, size: int, state: ProcessState, scoreboard: Scoreboard) -> None:
        self._cache_fd = cache_fd
        self._size = size
        self._state = state
        self._scoreboard = scoreboard
        self._locks = RangeLocks(state.fd)
        self.gives_space_back = True
        """As far as is known. Else what is gone stays in the image, and is written over when it comes again."""
        self._stuck: List[Hold] = []
        self._gate_timeout = math.inf

    def let_go(self, wanted: List[Run], timeout: float, gate_timeout: float = math.inf) -> int:
        """Let go what is clean of the *wanted* runs; those that others have in hand stay. The number of blocks.

        Raises `TimeoutError` after *timeout* seconds if some process does not come out of the gate (*gate_timeout*),
        or does not copy what it holds, and `OSError`; then the blocks are there as before, or missing, with their
        space taken. Who did not copy it in time keeps everything here as long as it holds the same.
        """
        return self._do(wanted, timeout, gate_timeout, with_local=True)

    def free(self, wanted: List[Run], timeout: float, gate_timeout: float = math.inf) -> None:
        """Give the space of what is missing of the *wanted* runs back; the rest as `let_go`."""
        self._do(wanted, timeout, gate_timeout, with_local=False)

    def _do(self, wanted: List[Run], timeout: float, gate_timeout: float, *, with_local: bool) -> int:
        self._stuck = self._scoreboard.holders.still(self._stuck)
        if self._stuck:
            raise TimeoutError(_HELD)
        self._gate_timeout = gate_timeout
        until = monotonic() + timeout
        locked = [run for run in wanted if self._is_believed(run) and self._locks.try_acquire(*bytes_of(*run))]
        try:
            return self._let_go(locked, until, with_local=with_local) if locked else 0
        finally:
            for run in locked:
                self._locks.release(*bytes_of(*run))

    def _is_believed(self, run: Run) -> bool:
        """Whether the bits of these blocks are right, as far as anybody can tell after a kill (`proxy.state.pages`)."""
        try:
            self._state.pages.look(*run)
        except OSError:  # the log has it
            return False
        return True

    def _let_go(self, locked: List[Run], until: float, *, with_local: bool) -> int:
        taken, holds = self._take_bits(locked if with_local else [], until)
        try:
            self._wait_for(holds, until)
        except TimeoutError:
            self._stuck = self._scoreboard.holders.still(holds)
            for run in taken:
                self._state.bitmap.set(*run)
            raise
        if self._scoreboard.mode == PROXY:
            self._state.checkpoint(self._cache_fd, timeout=_CHECKPOINT_TIMEOUT)
            for run in locked:
                self._free(*run)
        return sum(end - first for first, end in taken)

    def _free(self, first: int, end: int) -> None:
        """Give the space of all these blocks back that are missing, which are locked, where that is possible."""
        for run_first, run_end, local in self._state.bitmap.runs(first, end):
            if self.gives_space_back and not local:
                at = block_start(run_first)
                self._punch(at, block_stop(run_end - 1, self._size) - at)

    def _punch(self, offset: int, length: int) -> None:
        try:
            space.punch_hole(self._cache_fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self.gives_space_back = False
            log.warning(
                "space of the cache image cannot be given back there: the limit holds for what is cached, "
                "and the image may take as much as the disk"
            )

    def _take_bits(self, locked: List[Run], until: float) -> Tuple[List[Run], List[Hold]]:
        """The runs whose bits are gone, and who may still send them."""
        scoreboard = self._scoreboard
        with scoreboard.gate.closed(min(self._gate_timeout, max(0.0, until - monotonic()))):
            if scoreboard.mode != PROXY:
                return [], []
            taken = [run for first, end in locked for run in self._clean(first, end)]
            for run in taken:
                self._state.integrity.checked.clear(*run)
                self._state.bitmap.clear(*run)
            return taken, scoreboard.holders.now()

    def _clean(self, first: int, end: int) -> List[Run]:
        """The runs of blocks that are local, and that no client has written."""
        bitmap, written = self._state.bitmap, self._state.written
        unmarked = [(start, stop) for start, stop, marked in written.runs(first, end) if not marked]
        return [(a, b) for start, stop in unmarked for a, b, local in bitmap.runs(start, stop) if local]

    def _wait_for(self, holds: List[Hold], until: float) -> None:
        """Until nobody holds what was held. Raises `TimeoutError`."""
        if not holds:
            return
        self._scoreboard.holders.call()
        while self._scoreboard.holders.still(holds):
            if monotonic() > until:
                raise TimeoutError(_HELD)
            sleep(_NAP)
