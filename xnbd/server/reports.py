"""What workers tell the master through a pipe that they share: each report is one write of ``SIZE`` bytes.

Fields of text with tabs between them, the last one padded with spaces. A program ignores fields that it does
not know, and takes those that are missing for empty: after an upgrade the workers are of another version.
"""

from __future__ import annotations

from typing import NamedTuple

SIZE = 256
"""The kernel writes so much in one piece (``PIPE_BUF`` is 4,096)."""

_LONGEST_REASON = 100


class Report(NamedTuple):
    """Worker *pid* serves *peer*, or nobody if that is empty.

    Its client has just gone over to the worker *moved_to*; or has come from the worker *moved_from*, and has waited
    *pause* seconds meanwhile. Or it was to go, and *stays* for this reason.
    """

    pid: int
    peer: str = ""
    moved_to: int = 0
    moved_from: int = 0
    pause: float = 0.0
    stays: str = ""

    @property
    def is_of_move(self) -> bool:
        """Whether it answers the order to hand a client over."""
        return bool(self.moved_to or self.moved_from or self.stays)

    def pack(self) -> bytes:
        reason = self.stays.replace("\t", " ")[:_LONGEST_REASON]
        fields = (self.pid, self.peer, self.moved_to, self.moved_from, f"{self.pause:.6f}", reason)
        return "\t".join(map(str, fields)).encode()[:SIZE].ljust(SIZE)


def parse_report(data: bytes) -> Report:
    """One report of ``SIZE`` bytes."""
    pid, peer, moved_to, moved_from, pause, stays, *_ = [
        *data.decode("utf-8", "replace").rstrip(" ").split("\t"),
        *[""] * 6,
    ]
    return Report(int(pid), peer, int(moved_to or 0), int(moved_from or 0), float(pause or 0), stays)
