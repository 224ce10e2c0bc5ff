"""What a steward asks of its master, and how the answer comes back.

The control socket is the steward's, but some commands are the master's: it has the
listening sockets and the workers. Each steward has a pair of sockets with its master,
made before the fork. One packet is one message, a JSON object:

- ``{"number": 1, "request": {"command": "reload"}}`` from the steward: an operator's request as it came;
- ``{"number": 1, "answer": {"done": true}}`` from the master: a line of the reply, the last one with ``done`` or
  ``error``;
- ``{"news": {...}}`` from the master: what has changed since the steward was forked;
- ``{"ping": true}`` from the master, and ``{"pong": true}`` back: whether the steward lives;
- ``{"state": "..."}`` from the steward: how the disk is doing, for the service manager;
- ``{"order": "leave"}`` from the master: another steward is to take this one's place. The number of what it says
  to that is 0.

Nobody waits in here. If the steward dies, its pair ends with it: the master drops what it
would have answered, and the next steward gets a new pair. If the operator leaves, the
answer is dropped when it comes; what was asked for is done all the same.
"""

from __future__ import annotations

import json
import select
import socket
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from ..errors import CommandError, XnbdError
from ..logs import log
from ..system.file_locks import do_nothing

if TYPE_CHECKING:
    from ..control.requests import Message
    from ..control.server import Reply

_LONGEST = 128 << 10
"""Bytes of a message: more than an operator's request may have."""


def link() -> Tuple[socket.socket, socket.socket]:
    """The ends of a new link: the steward's, and the master's. Raises `OSError`."""
    ours, masters = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, masters):
        sock.setblocking(False)
    return ours, masters


def _messages(sock: socket.socket) -> Iterator[Message]:
    """What has come. Raises `EOFError` when the other end is gone."""
    while True:
        try:
            packet = sock.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            raise EOFError
        yield json.loads(packet)


def _send(sock: socket.socket, message: Message) -> None:
    """Raises `OSError` if it cannot be sent now."""
    sock.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)


class MasterLink:
    """The steward's end: passes requests on to the master."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._count = 0
        self._answers: Dict[int, List[Message]] = {}
        """What has come for the requests that somebody waits for, by their numbers."""
        self.on_answer: Callable[[], None] = do_nothing
        self._orders: List[str] = []
        self.on_news: Callable[[Message], None] = lambda _: None

    def close(self) -> None:
        self._sock.close()

    def interests(self) -> List[Tuple[int, int]]:
        return [] if self._sock.fileno() < 0 else [(self._sock.fileno(), select.POLLIN)]

    def receive(self) -> None:
        """Take in what the master has sent. Without a master this process ends by itself, see `ProcessLoop`."""
        try:
            for message in _messages(self._sock):
                self._take(message)
        except EOFError:
            self.close()

    def _take(self, message: Message) -> None:
        if "ping" in message:
            with suppress(OSError):
                _send(self._sock, {"pong": True})
        elif "order" in message:
            self._orders.append(message["order"])
        elif "news" in message:
            self.on_news(message["news"])
        elif message["number"] in self._answers:
            self._answers[message["number"]].append(message["answer"])
            self.on_answer()

    def take_order(self, name: str) -> bool:
        """Whether the master has ordered what is called *name*, since this was asked last."""
        if name not in self._orders:
            return False
        self._orders.remove(name)
        return True

    def tell(self, command: str) -> None:
        """Have the master know; it does not answer."""
        with suppress(OSError):  # it is gone
            _send(self._sock, {"number": 0, "request": {"command": command}})

    def tell_state(self, state: str) -> bool:
        """Tell how the disk is doing; False if that has to be tried again."""
        try:
            _send(self._sock, {"state": state})
        except OSError:
            return False
        return True

    def ask(self, request: Message) -> Reply:
        """A command of the control socket: the master's reply to *request*. Raises `CommandError` if it says no."""
        self._count += 1
        number, answers = self._count, self._answers.setdefault(self._count, [])
        try:
            _send(self._sock, {"number": number, "request": request})
            while True:
                if not answers:
                    yield None
                    continue
                answer = answers.pop(0)
                if "error" in answer:
                    raise CommandError(answer["error"])
                yield answer
                if answer.get("done"):
                    return
        finally:
            del self._answers[number]


Command = Callable[["Message"], Optional["Message"]]
"""Does what a request of the steward's asks for; the answer, or None if it comes later by `StewardLink.answer`.

May raise `XnbdError`, whose text the operator gets.
"""


class StewardLink:
    """The master's end, for one steward: requests come in, and are answered by *commands*."""

    def __init__(self, sock: socket.socket, commands: Mapping[str, Command]) -> None:
        self._sock = sock
        self._commands = commands
        self.number = 0
        """Of the request that is done now: for a command that answers later."""
        self.state = ""
        """How the disk is doing, as the steward has told last."""
        self._silent_since: Optional[float] = None

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def progress(self) -> bool:
        """Do what the steward asks for; False if there is no steward at the other end any more."""
        try:
            for message in _messages(self._sock):
                self._take(message)
        except EOFError:
            return False
        return True

    def _take(self, message: Message) -> None:
        self._silent_since = None
        if "state" in message:
            self.state = message["state"]
        elif "request" in message:
            self.number = message["number"]
            answer = self._do(message["request"])
            if answer is not None:
                self.answer(self.number, answer)

    def silence(self) -> float:
        """Seconds for which the steward has not answered, as far as was asked by this; it is asked again now."""
        if self._silent_since is None:
            with suppress(OSError):
                _send(self._sock, {"ping": True})
                self._silent_since = monotonic()
            return 0.0
        return monotonic() - self._silent_since

    def answer(self, number: int, answer: Message) -> None:
        """A line of the reply to the request *number*."""
        with suppress(OSError):  # nobody is there any more who would hear it
            _send(self._sock, {"number": number, "answer": answer})

    def order(self, name: str) -> bool:
        """Have the steward do what it knows by this *name*; False if that has to be tried again, or it is gone."""
        try:
            _send(self._sock, {"order": name})
        except OSError:
            return False
        return True

    def tell(self, news: Message) -> None:
        """For a steward that was forked before."""
        with suppress(OSError):
            _send(self._sock, {"news": news})

    def _do(self, request: Message) -> Optional[Message]:
        command = self._commands.get(request["command"])
        try:
            if command is None:
                raise CommandError(f"the master knows no command {request['command']!r}")
            return command(request)
        except XnbdError as error:
            return {"done": True, "error": str(error)}
        except OSError as error:
            log.error("a command failed in the master: %s", error)
            return {"done": True, "error": f"the server cannot do that now: {error.strerror or error}; try again"}
