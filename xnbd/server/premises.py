"""Where a server is to be found: by clients, by operators, and by who looks for its process."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional

from ..system.kept import Kept
from ..system.listen import Listeners, UnixSocket
from ..system.process import PidFile
from ..system.service_manager import ServiceManager

if TYPE_CHECKING:
    from .upgrade.program import Program


class Surroundings(NamedTuple):
    """Who has started the server, and the program that runs, if it can be replaced by another one."""

    manager: ServiceManager
    program: Optional[Program] = None


class Premises:
    """The master's listening sockets, its pid file, and the *control* socket, of which the steward takes care."""

    def __init__(self, listeners: Listeners, pid_file: Optional[PidFile] = None) -> None:
        self.listeners = listeners
        self.pid_file = pid_file
        self.control: Optional[UnixSocket] = None
        self.metrics: Optional[Listeners] = None
        """Where metrics are asked for, of which the observer takes care."""

    @property
    def sockets(self) -> List[socket.socket]:
        """Non-blocking ones, on which clients come."""
        return self.listeners.sockets

    def close_metrics(self) -> None:
        """In a child that does not answer there."""
        for sock in [] if self.metrics is None else self.metrics.sockets:
            sock.close()

    def close_control(self) -> None:
        """A successor may listen there from now on; in a child only close the descriptor."""
        if self.control is not None:
            self.control.close()

    def tidy_up(self) -> None:
        """At the end."""
        self.listeners.tidy_up()
        self.close_control()
        if self.metrics is not None:
            self.metrics.tidy_up()
        if self.pid_file is not None:
            self.pid_file.remove()

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        return {
            "listeners": self.listeners.pack(kept),
            "control": None if self.control is None else self.control.pack(kept),
            "pid_file": None if self.pid_file is None else self.pid_file.pack(kept),
            "metrics": None if self.metrics is None else self.metrics.pack(kept),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Premises:
        """Those of the program before."""
        listeners, control, pid_file = Listeners(), packed["control"], packed["pid_file"]
        listeners.unpack(packed["listeners"])
        premises = cls(listeners, None if pid_file is None else PidFile.unpack(pid_file))
        premises.control = None if control is None else UnixSocket.unpack(control)
        if packed.get("metrics") is not None:
            premises.metrics = Listeners()
            premises.metrics.unpack(packed["metrics"])
        return premises
