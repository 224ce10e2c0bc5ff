"""What the wrapper's processes tell it, through a socket of datagrams that all of them write to.

Each report is a JSON object. A program passes over members that it does not know, and takes those that are missing for
their defaults: after an upgrade the processes are of another version.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Dict, Mapping, NamedTuple, Optional

from ..logs import log
from ..server.reports import Report

Fields = Dict[str, Any]

_TIME = 2.0
_LARGEST = 64 << 10


class ClientReport(NamedTuple):
    """The *report* of a process whose client has chosen *export*; or that has no client yet.

    If that export is a proxy which was switched past the wrapper, *switched_image* is its cache image.
    """

    report: Report
    export: str = ""
    switched_image: str = ""

    def fields(self) -> Fields:
        return {**self.report._asdict(), "export": self.export, "switched_image": self.switched_image}

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> ClientReport:
        report = Report(**{name: value for name, value in fields.items() if name in Report._fields})
        return cls(report, fields.get("export", ""), fields.get("switched_image", ""))


def receive_report(reports: socket.socket) -> Optional[ClientReport]:
    """The next report, if there is one."""
    try:
        return ClientReport.of_fields(json.loads(reports.recv(_LARGEST)))
    except BlockingIOError:
        return None


def send_report(reports: socket.socket, report: ClientReport) -> bool:
    """Whether the wrapper will hear it; it may be gone, or hang, and this client has a server all the same."""
    reports.settimeout(_TIME)
    try:
        reports.send(json.dumps(report.fields()).encode())
    except OSError as error:
        log.info("the wrapper does not listen: %s", error)
        return False
    return True
