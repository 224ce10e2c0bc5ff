"""What the wrapper's processes tell it, through a socket of datagrams that all of them write to.

Each report is a JSON object. A program passes over members that it does not know, and takes those that are missing for
their defaults: after an upgrade the processes are of another version.
"""

from __future__ import annotations

import json
import socket
from typing import NamedTuple, Optional

from ..logs import log

_TIME = 2.0
_LARGEST = 64 << 10


class ClientReport(NamedTuple):
    """The process *pid* serves the client at *peer*, which has chosen *export*; or can work and has none yet.

    If that export is a proxy which was switched past the wrapper, *switched_image* is its cache image. Its client has
    just gone over to the process *moved_to*; or has come from the process *moved_from*, and has waited *pause* seconds
    meanwhile. Or it cannot go, and *stays* for this reason.
    """

    pid: int
    peer: str = ""
    export: str = ""
    switched_image: str = ""
    moved_to: int = 0
    moved_from: int = 0
    pause: float = 0.0
    stays: str = ""

    @property
    def is_of_move(self) -> bool:
        """Whether it tells of a client that moves, or that cannot."""
        return bool(self.moved_to or self.moved_from or self.stays)


def receive_report(reports: socket.socket) -> Optional[ClientReport]:
    """The next report, if there is one."""
    try:
        fields = json.loads(reports.recv(_LARGEST))
    except BlockingIOError:
        return None
    return ClientReport(**{name: value for name, value in fields.items() if name in ClientReport._fields})


def send_report(reports: socket.socket, report: ClientReport) -> None:
    reports.settimeout(_TIME)
    try:
        reports.send(json.dumps(report._asdict()).encode())
    except OSError as error:  # the wrapper is gone or hangs: this client has a server all the same
        log.info("the wrapper does not listen: %s", error)
