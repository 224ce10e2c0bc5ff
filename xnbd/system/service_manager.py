"""systemd, or another service manager that wants to hear how this program is doing (``sd_notify(3)``).

Without ``NOTIFY_SOCKET`` nobody wants to hear anything, and all here does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from time import monotonic
from typing import Callable, Dict, Mapping, Optional

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_PATIENCE = 2.0
"""Seconds that a manager may take for what it waits for; what it need not know is told another time."""

_STATUS_EVERY = 1.0
_LOOK_AGAIN = 1.0
"""Seconds after which is looked again whether a program that was not alive has come back."""


def without_manager(environment: Mapping[str, str]) -> Dict[str, str]:
    """*environment* for another program, which is no business of the service manager's."""
    return {name: value for name, value in environment.items() if name not in _VARIABLES}


class ServiceManager:
    """Whoever has started this process, as the *environment* says. It is made before this process becomes a daemon.

    The program's loop calls `progress` when it wakes up, and at `deadline` at the latest.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._pid = os.getpid()
        self.watchdog = _watchdog_seconds(environment, self._pid) if self._address else None
        """Seconds after which the manager takes a program that says nothing for dead."""
        self._beat_at = 0.0
        self._status = self._told = ""
        self._status_at = 0.0

    @property
    def listens(self) -> bool:
        return bool(self._address)

    def ready(self) -> None:
        """The program serves, for the first time or again after a reload."""
        main = "" if os.getpid() == self._pid else f"\nMAINPID={os.getpid()}"
        self._send(f"READY=1{main}", _PATIENCE)

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", _PATIENCE)

    def handing_over(self) -> None:
        """Another program is executed in this process: it says `ready`, or this one does if that fails.

        It is the one to be watched, even if this process was a daemon that its manager did not start.
        """
        if self.watchdog is not None:
            os.environ["WATCHDOG_PID"] = str(os.getpid())
        self.reloading()

    def stopping(self) -> None:
        self._send("STOPPING=1", _PATIENCE)

    def show(self, status: str) -> None:
        """What ``systemctl status`` shows from now on: it is told soon, if it is news."""
        self._status = status.replace("\n", " ")

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called (monotonic seconds)."""
        times = []
        if self.watchdog is not None:
            times.append(self._beat_at)
        if self._address and self._status != self._told:
            times.append(self._status_at)
        return min(times, default=None)

    def progress(self, is_alive: Callable[[], bool]) -> None:
        """Tell what is to be told now: the status, and the watchdog that the program *is_alive*."""
        now = monotonic()
        if self._address and self._status != self._told and now >= self._status_at:
            self._status_at = now + _STATUS_EVERY
            if self._send(f"STATUS={self._status}"):
                self._told = self._status
        if self.watchdog is not None and now >= self._beat_at:
            alive = is_alive() and self._send("WATCHDOG=1")
            self._beat_at = now + (self.watchdog / 2 if alive else min(_LOOK_AGAIN, self.watchdog / 8))

    def _send(self, state: str, patience: float = 0.0) -> bool:
        """Whether the manager has *state*: nothing is worth failing for if it does not take it."""
        if not self._address:
            return False
        where = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(patience)
                sender.sendto(state.encode("utf-8", "backslashreplace"), where)
        except OSError:
            return False
        return True


def _watchdog_seconds(environment: Mapping[str, str], pid: int) -> Optional[float]:
    """As ``sd_watchdog_enabled(3)`` has it: None if the manager does not watch the process *pid*."""
    microseconds = environment.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or not int(microseconds):
        return None
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(microseconds) / 1e6
