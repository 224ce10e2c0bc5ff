"""From a host to addresses, without waiting for name servers.

``getaddrinfo(3)`` returns when a name server has answered, half a minute later perhaps.
So a process of its own calls it: that can be killed at any time, where a thread would
stay until then, in the way of whoever forks.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import Any, List, Tuple

from ...errors import XnbdError
from ...system.forking import fork_with_pipe, reset_signals
from ...system.process import set_title

Candidate = Tuple[int, Any]
"""The family and the address of a socket to connect to."""

_MOST_ADDRESSES = 64
_LONGEST_ANSWER = 4096  # comes in one piece (``pipe(7)``)


class HostNotFound(XnbdError):
    """There is no address to connect to; the message says why."""


def numeric(host: str, port: int) -> List[Candidate]:
    """Where to connect to if *host* is an address, with a zone perhaps; nothing if it is a name.

    Raises `HostNotFound`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except UnicodeError:
        raise HostNotFound("no host can have this name") from None
    except OSError:
        return []
    return [(family, address) for family, _, _, _, address in found]


class Lookup:
    """The addresses of *host* on their way; always followed by `close`. Raises `HostNotFound` if that cannot be."""

    def __init__(self, host: str) -> None:
        try:
            self._pid, self._fd = fork_with_pipe("looking a host up", partial(_look_up, host))
        except OSError as error:
            raise HostNotFound(f"no process can be started to look: {error.strerror}") from error

    def fileno(self) -> int:
        """The descriptor that becomes readable when the answer is there."""
        return self._fd

    def candidates(self, port: int) -> List[Candidate]:
        """The answer, which has to be there: all addresses, the best one first. Raises `HostNotFound`."""
        reason, *hosts = os.read(self._fd, _LONGEST_ANSWER).decode("utf-8", "replace").split("\n")
        if reason or not hosts:
            raise HostNotFound(reason or "the process that looked was killed")
        return [candidate for host in hosts for candidate in numeric(host, port)]

    def close(self) -> None:
        """End it, with an answer or without."""
        os.close(self._fd)
        try:
            if not os.waitpid(self._pid, os.WNOHANG)[0]:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass  # it has ended, and with SIGCHLD ignored nobody has to wait for it


def _look_up(host: str, writing: int) -> int:
    """Life of the child."""
    _close_all_but(writing)
    _end_with_the_reader_of(writing)
    set_title("looking up", host)
    try:
        answer = "\n".join(("", *_find(host)))
    except OSError as error:
        answer = error.strerror or str(error)
    with suppress(BrokenPipeError):
        os.write(writing, answer.encode("utf-8", "replace")[:_LONGEST_ANSWER])
    return 0


def _close_all_but(kept: int) -> None:
    """Close what would hold the parent's client, locks or files when the parent ends first."""
    with os.scandir("/proc/self/fd") as listing:
        open_fds = [int(entry.name) for entry in listing]
    for fd in open_fds:
        if fd > 2 and fd != kept:
            try:
                os.close(fd)
            except OSError:
                pass  # the one of the listing itself


def _end_with_the_reader_of(writing: int) -> None:
    """Have SIGIO, which kills, when nobody holds the pipe's other end any more, however the parent ends."""
    reset_signals(signal.SIGTERM, signal.SIGINT, signal.SIGIO)
    fcntl.fcntl(writing, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(writing, fcntl.F_SETFL, fcntl.fcntl(writing, fcntl.F_GETFL) | os.O_ASYNC)


def _find(host: str) -> List[str]:
    """Numeric addresses, in the order in which the system wants them tried (``gai.conf(5)``)."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = [_with_zone(address) for _, _, _, _, address in found]
    return list(dict.fromkeys(addresses))[:_MOST_ADDRESSES]


def _with_zone(address: Any) -> str:
    host, _port, *rest = address
    return f"{host}%{rest[1]}" if rest and rest[1] else str(host)
