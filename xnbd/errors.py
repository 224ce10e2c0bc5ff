"""What can go wrong, by what has to happen next.

``ConfigurationError`` ends the program with a line for a person,
``ProtocolError`` ends one connection, ``RequestError`` becomes the error of one
reply. Anything else that escapes is a bug and ends one worker.
"""

from __future__ import annotations

import errno as numbers
import os


class XnbdError(Exception):
    """Base of the errors this program raises on purpose."""


class ConfigurationError(XnbdError):
    """The program cannot do what it was started for.

    The message is one line that says what is wrong and what to do;
    ``exit_status`` is 2 for a command line that makes no sense, else 1.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class CommandError(XnbdError):
    """A command on the control socket cannot be done; the message says why, in one line."""


class ProtocolError(XnbdError):
    """The peer said something after which the connection cannot go on."""


class Disconnected(ProtocolError):
    """The peer went away in the middle of a message."""


class TlsFailed(OSError):
    """A connection that TLS has ended, or never let begin: ``reason`` says why, in words for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(numbers.EPROTO, reason)
        self.reason = reason


class WrongName(TlsFailed):
    """The certificate is good, but for another name than the one that was asked for."""


class Refused(ProtocolError):
    """The peer's handshake of TLS has failed, and its end is worth waiting for; the message says why."""


class RequestError(XnbdError):
    """One request failed; ``errno`` says why, the connection goes on."""

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno))
        self.errno = errno


class TaskFailed(XnbdError):
    """What a process was forked for cannot be done; the message says why, ``status`` is its exit status."""

    status = 1
