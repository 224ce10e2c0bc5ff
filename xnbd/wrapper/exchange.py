"""Where the wrapper's processes offer their clients to each other when the program has become the next one."""

from __future__ import annotations

import socket
from functools import partial
from typing import List, NamedTuple, Sequence

from ..server.handover.arrival import refuse_offer, take_offer
from ..server.reports import Report
from ..server.single import Passage
from ..system.kept import Kept
from .exports import StoredExport, fields_of
from .reports import ClientReport, send_report


class Exchange(NamedTuple):
    """A pair of sockets: what is sent to *offering* is read from *offers*, by whoever waits for a client."""

    offers: socket.socket
    offering: socket.socket

    @classmethod
    def new(cls) -> Exchange:
        """Raises `OSError`."""
        return cls(*socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))

    def pack(self, kept: Kept) -> List[int]:
        """For the next program of this process."""
        return [kept(sock.fileno()) for sock in self]

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> Exchange:
        """That of the program before."""
        return cls(*(socket.socket(fileno=fd) for fd in packed))

    def passage(self, name: str, export: StoredExport, reports: socket.socket) -> Passage:
        """For a client of *export*, which is called *name*, in its process."""
        return Passage(self.offering, {"name": name, "export": fields_of(export)}, partial(_tell, reports, name))

    def refuse_all(self) -> None:
        """Nobody waits for clients; a process that was stopped when it was to offer its own may do so much later."""
        while True:
            offer = take_offer(self.offers, with_kit=True)
            if offer is None:
                return
            refuse_offer(offer, "no upgrade is under way any more")


def _tell(reports: socket.socket, export: str, report: Report) -> None:
    send_report(reports, ClientReport(report, export))
