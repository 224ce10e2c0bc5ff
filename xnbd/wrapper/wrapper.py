"""The wrapper's one loop: accepts clients, forks a process for each, answers the operator, buries the dead.

It never touches a client's bytes. Signal handlers only wake the loop.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
from functools import partial
from time import monotonic
from typing import Callable, Dict, List, NamedTuple, Optional, Set

from ..errors import ConfigurationError
from ..logs import log
from ..process import set_title
from ..server.control import ControlSocket
from ..server.listen import Listeners
from ..server.watch import GRACE
from .children import SIGNALS, Children
from .client import PROGRAM, Client, Report, receive_report
from .commands import Commands
from .database import Database
from .servers import Servers

_ACCEPTS = 64
"""Clients accepted before the loop looks at everything else again."""

_RETRY_ACCEPT = 1.0
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_STOP_TIME = GRACE + 1.5
_KILL_TIME = 3.0
_ANSWER_TIME = 1.0
_PIPE_SIZE = 64 << 10


class Settings(NamedTuple):
    """*bgctl* is the command that steers a proxy's server; times in seconds."""

    servers: Servers
    bgctl: List[str]
    handshake_timeout: float


class Wrapper:
    """Serves the exports of *database* on *listeners*, and the operator at *control_path*."""

    def __init__(self, listeners: Listeners, database: Database, control_path: str, settings: Settings) -> None:
        """Raises `ConfigurationError` if the control socket cannot be had."""
        self._listeners = listeners
        self._database = database
        self._settings = settings
        self._clients: Dict[int, Optional[Report]] = {}
        self._signals: Set[int] = set()
        self._accept_at = 0.0
        self._short = False
        self._ending: Optional[_Ending] = None
        self._children = Children(self._after_fork)
        commands = Commands(database, self._children, settings.servers, settings.bgctl)
        commands.on_end_requested(self._begin_end, self._count_clients)
        self._jobs = commands
        self._control = ControlSocket(control_path, commands.table())
        self._reports, self._reports_of_clients = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports.setblocking(False)
        self._wake, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals.add(number)
