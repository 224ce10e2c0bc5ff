"""The control socket: an operator's commands to a running server, as JSON lines over a Unix socket.

Nothing here waits: the owner's loop polls `ControlSocket.interests` and calls
`ControlSocket.progress`. What a client does, or fails to do, harms its own
connection only. The protocol is described in ``xnbd-bgctl(8)``.
"""

from __future__ import annotations

import json
import logging
import os
import select
from contextlib import suppress
from socket import socket
from time import monotonic
from typing import Callable, Iterator, List, Mapping, Optional, Tuple, Union

from ..errors import CommandError, XnbdError
from ..logs import Seldom, about, log
from ..system.kept import Kept
from ..system.listen import UnixSocket
from ..system.polling import poll_patiently
from .requests import Message, parse_request

Reply = Iterator[Optional[Message]]
CommandTable = Mapping[str, Callable[[Message], Reply]]
"""A command takes the request and yields the lines of its reply, or None for "nothing yet, call again soon".

It is closed (GeneratorExit) when its client goes away. It may raise `XnbdError`,
whose text the client gets. The last line need not say that it is the last. A client
that is told nothing for long gets a sign of life, so that it can tell a server that
takes its time from one that hangs.
"""

GoingOn = Mapping[str, Callable[[], Reply]]
"""Commands that the program before has begun, and how they end."""

MAXIMUM_LINE = 64 << 10
MAXIMUM_CONNECTIONS = 64
TICK = 0.1
SIGN_OF_LIFE = 1.0
"""Seconds after which a client that waits for a command is told that it does."""

_BACKLOG = 128
_OUTPUT_LIMIT = 64 << 10
_STEPS = 256
_RETRY = 1.0
_TELL_OF_SHORTAGE = 30.0
_FIRST_REQUEST_TIME = 10.0
"""Seconds that a client may take for its first request: one of NBD waits for a greeting, and for ever."""

_FOREIGN = (
    'this is a control socket, which speaks JSON lines like {"command": "query"}: '
    "use the xnbd-bgctl or xnbd-wrapper-ctl of this version, and NBD clients another socket"
)
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


def listen_for_operators(path: str) -> UnixSocket:
    """Listen at *path*, for this process's user only.

    Raises `ConfigurationError` if a live server or another kind of file is there.
    """
    listener = UnixSocket(path, _BACKLOG, mode=0o600)
    listener.socket.setblocking(False)
    return listener


class ControlSocket:
    """Accepts operators, and runs *commands* of several of them at once.

    A forked process calls `close` first of all, or a client that the parent
    disconnects would not notice.
    """

    def __init__(self, where: Union[str, UnixSocket], commands: CommandTable) -> None:
        """*where* is a path, or what listens there already. Raises like `listen_for_operators`."""
        self._listener = listen_for_operators(where) if isinstance(where, str) else where
        self._commands = commands
        self._owner = os.getpid()
        self._connections: List[_Connection] = []
        self._accept_at: Optional[float] = None
        self._shortages = Seldom(_TELL_OF_SHORTAGE)

    def pack(self, kept: Kept) -> Message:
        """For the next program of this process, with the names of the commands that run: what they do ends here."""
        return {
            "listener": self._listener.pack(kept),
            "connections": [connection.pack(kept) for connection in self._connections],
        }

    @classmethod
    def unpack(cls, packed: Message, commands: CommandTable, going_on: GoingOn) -> ControlSocket:
        """That of the program before."""
        control = cls(UnixSocket.unpack(packed["listener"]), commands)
        control._connections = [_Connection.unpack(one, commands, going_on) for one in packed["connections"]]
        return control

    def running(self) -> List[str]:
        """The commands that have begun and not ended."""
        return [connection.command for connection in self._connections if connection.command]

    def leave(self) -> None:
        """Another process accepts from now on: what was asked for here is answered, and then connections end."""
        self._listener.close()
        for connection in self._connections:
            connection.finish()

    @property
    def has_connections(self) -> bool:
        return bool(self._connections)

    def interests(self) -> List[Tuple[int, int]]:
        """Descriptors and what to poll them for; a mask of 0 is for the client's leaving."""
        accepts = self._accept_at is None and self._listener.socket.fileno() >= 0
        listener = [(self._listener.socket.fileno(), select.POLLIN)] if accepts else []
        return listener + [(connection.fileno(), connection.mask()) for connection in self._connections]

    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called, whatever the descriptors do (monotonic seconds)."""
        deadlines = [self._accept_at, *(connection.deadline() for connection in self._connections)]
        return min((time for time in deadlines if time is not None), default=None)

    def hurry(self) -> None:
        """Something has happened: have every command that waits look at once."""
        for connection in self._connections:
            connection.hurry()

    def progress(self) -> None:
        """Do all that can be done without waiting."""
        poll = select.poll()
        for fd, mask in self.interests():
            poll.register(fd, mask)
        ready = dict(poll_patiently(poll, 0))
        if self._accept_at is not None and monotonic() >= self._accept_at:
            self._accept_at = None
        for connection in list(self._connections):
            if not connection.progress(ready.get(connection.fileno(), 0)):
                self._drop(connection)
        if self._listener.socket.fileno() in ready:
            self._accept()

    def close(self) -> None:
        """End everything, and remove the socket's file in the process that made it.

        In a forked process only close the descriptors.
        """
        self._listener.close()
        for connection in self._connections:
            if os.getpid() == self._owner:
                connection.close()
            else:
                connection.abandon()
        if os.getpid() == self._owner:
            self._connections.clear()

    def _accept(self) -> None:
        for _ in range(MAXIMUM_CONNECTIONS):
            try:
                sock, _address = self._listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                text = "cannot accept on the control socket, trying again every second: %s"
                self._shortages.log(logging.ERROR, text, error.strerror, extra=about(error=error))
                self._accept_at = monotonic() + _RETRY
                return
            self._admit(_Connection(sock, self._commands))

    def _admit(self, connection: _Connection) -> None:
        """Take *connection* in; at the limit the one that has been idle for longest makes room."""
        if len(self._connections) >= MAXIMUM_CONNECTIONS:
            idle = [other for other in self._connections if other.waits_for_client()]
            if not idle:
                connection.refuse(f"{MAXIMUM_CONNECTIONS} clients are connected already: try again later")
                return
            self._drop(min(idle, key=lambda other: other.active_at))
        self._connections.append(connection)

    def _drop(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        connection.close()


class _Connection:
    """One client: its requests are answered one after the other, and read no sooner than the answers are taken."""

    def __init__(self, sock: socket, commands: CommandTable) -> None:
        sock.setblocking(False)
        self.active_at = monotonic()
        self._sock = sock
        self._commands = commands
        self._input = bytearray()
        self._output = bytearray()
        self._reply: Optional[Reply] = None
        self.command = ""
        """The one that runs."""
        self._step_at = 0.0
        self._told_at = 0.0
        self._unfinished = False
        self._no_more_input = False
        self._speaks_until: Optional[float] = self.active_at + _FIRST_REQUEST_TIME

    def pack(self, kept: Kept) -> Message:
        """For the next program of this process."""
        return {
            "fd": kept(self._sock.fileno()),
            "input": self._input.decode("latin-1"),
            "output": self._output.decode("latin-1"),
            "ended": self._no_more_input,
            "until": self._speaks_until,
            "command": self.command,
        }

    @classmethod
    def unpack(cls, packed: Message, commands: CommandTable, going_on: GoingOn) -> _Connection:
        """As for `ControlSocket.unpack`."""
        connection = cls(socket(fileno=packed["fd"]), commands)
        connection._input += packed["input"].encode("latin-1")
        connection._output += packed["output"].encode("latin-1")
        connection._no_more_input, connection._speaks_until = packed["ended"], packed["until"]
        connection._unfinished = True
        if packed["command"]:
            connection.command = packed["command"]
            connection._reply = going_on[connection.command]()
        return connection

    def fileno(self) -> int:
        return self._sock.fileno()

    def mask(self) -> int:
        reads = self._reply is None and not self._no_more_input and not self._is_full()
        return (select.POLLIN if reads else 0) | (select.POLLOUT if self._output else 0)

    def deadline(self) -> Optional[float]:
        if self._speaks_until is not None:
            return self._speaks_until
        if self._is_full() or (self._reply is None and not self._unfinished):
            return None
        return 0.0 if self._unfinished else self._step_at

    def hurry(self) -> None:
        self._step_at = 0.0

    def waits_for_client(self) -> bool:
        return self._reply is None or bool(self._output)

    def progress(self, events: int) -> bool:
        """Do what the poll's *events* and the time allow; False if the connection is over."""
        if events & _GONE:
            return False
        try:
            if events & select.POLLIN:
                self._receive()
            self._send()
            self._unfinished = self._work()
            if self._speaks_until is not None and monotonic() >= self._speaks_until:
                self._refuse_all(f"no request came in {_FIRST_REQUEST_TIME:g} s; {_FOREIGN}")
        except OSError:
            return False
        return bool(self._output) or self._reply is not None or self._unfinished or not self._no_more_input

    def finish(self) -> None:
        """Read what has come, and no more: the connection ends when that is answered."""
        with suppress(OSError):
            self._receive()
        self._no_more_input = True

    def refuse(self, reason: str) -> None:
        """Say *reason*, as far as that goes without waiting, and close."""
        self._put(_failure(reason))
        try:
            self._send()
        except OSError:
            pass  # it has left already
        self.close()

    def close(self) -> None:
        self._sock.close()
        self._end_reply()

    def abandon(self) -> None:
        """Close the descriptor only: the command runs in another process."""
        self._sock.close()

    def _is_full(self) -> bool:
        return len(self._output) >= _OUTPUT_LIMIT

    def _receive(self) -> None:
        data = self._sock.recv(MAXIMUM_LINE)
        self._no_more_input = not data
        self._input += data
        self.active_at = monotonic()

    def _send(self) -> None:
        if not self._output:
            return
        try:
            sent = self._sock.send(self._output)
        except BlockingIOError:
            return
        del self._output[:sent]
        self.active_at = monotonic()

    def _work(self) -> bool:
        """Answer requests; tells whether there is more to do at once."""
        for _ in range(_STEPS):
            if self._is_full() or not self._advance():
                return False
            self._send()
        return True

    def _advance(self) -> bool:
        """One step of the command that runs, or the start of the next one; False if that has to wait."""
        if self._reply is not None:
            return monotonic() >= self._step_at and self._step(self._reply)
        line = self._take_line()
        if line is None:
            return False
        self._start(line)
        return True

    def _take_line(self) -> Optional[bytes]:
        if self._input and not self._input.startswith(b"{"):
            self._refuse_all(_FOREIGN)
        end = self._input.find(b"\n", 0, MAXIMUM_LINE + 1)
        if end < 0 and len(self._input) > MAXIMUM_LINE:
            self._refuse_all(f"a request has at most {MAXIMUM_LINE} bytes")
        if end < 0 and not (self._no_more_input and self._input):
            return None
        line = bytes(self._input[:end] if end >= 0 else self._input)
        del self._input[: len(line) + 1]
        self._speaks_until = None
        return line

    def _refuse_all(self, reason: str) -> None:
        """Say *reason*, and hear no more: the connection ends when that is sent."""
        self._put(_failure(reason))
        self._input.clear()
        self._no_more_input = True
        self._speaks_until = None

    def _start(self, line: bytes) -> None:
        try:
            request = parse_request(line)
            command = self._commands.get(request["command"])
            if command is None:
                known = ", ".join(self._commands)
                raise CommandError(f"there is no command {request['command'][:40]!r} here, only: {known}")
            self._reply = command(request)
            self.command = request["command"]
            self._step_at = 0.0
            self._told_at = monotonic()
        except Exception as error:
            self._fail(error)

    def _step(self, reply: Reply) -> bool:
        """The next line of *reply*; False if there is none yet."""
        try:
            message = next(reply, {"done": True})
            if message is None:
                self._step_at = monotonic() + TICK
                if monotonic() < self._told_at + SIGN_OF_LIFE:
                    return False
                message = {"waiting": True}
            self._put(message)
            if message.get("done"):
                self._end_reply()
        except Exception as error:
            self._fail(error)
        return True

    def _fail(self, error: Exception) -> None:
        if isinstance(error, XnbdError):
            self._put(_failure(str(error)))
        elif isinstance(error, OSError):
            log.error("a command on the control socket failed: %s", error)
            self._put(_failure(f"the server cannot do that now: {error.strerror or error}; try again"))
        else:
            log.error("a command on the control socket failed", exc_info=error)
            self._put(_failure("internal error"))
        self._end_reply()

    def _put(self, message: Message) -> None:
        self._told_at = monotonic()
        self._output += json.dumps(message, allow_nan=False).encode() + b"\n"

    def _end_reply(self) -> None:
        reply, self._reply, self.command = self._reply, None, ""
        if reply is not None:
            end_reply(reply)


def end_reply(reply: Reply) -> None:
    """Nobody wants more of it: what the command has begun comes to its end."""
    close = getattr(reply, "close", None)
    if close is None:
        return
    try:
        close()
    except Exception:
        log.exception("a command on the control socket failed at its end")


def _failure(reason: str) -> Message:
    return {"done": True, "error": reason}
