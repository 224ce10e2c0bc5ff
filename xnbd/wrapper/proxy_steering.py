"""``xnbd-bgctl`` for a proxy of the wrapper's, whether or not somebody serves it at the moment."""

from __future__ import annotations

from time import monotonic
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional

from ..errors import CommandError
from ..logs import log
from ..system.sockets import is_listening
from .child_output import ChildOutput
from .children import Body, Children
from .exports import ProxyExport
from .idle_server import IdleServer
from .servers import Servers

Message = Dict[str, Any]
Reply = Iterator[Optional[Message]]
Bgctl = Callable[[List[str]], Body]

_START_TIME = 10.0


class ProxySteering:
    """Runs of ``xnbd-bgctl``; *bgctl* makes of its arguments the body of a process that runs it.

    A proxy that nobody serves gets an idle server for as long as a run takes. *name_of* tells the name of an export.
    """

    def __init__(
        self, children: Children, servers: Servers, bgctl: Bgctl, name_of: Callable[[ProxyExport], str]
    ) -> None:
        self._name_of = name_of
        self._children = children
        self.servers = servers
        self._bgctl = bgctl
        self._idle_servers: List[IdleServer] = []
        self._dismissed: List[IdleServer] = []
        self._interruptible: List[ChildOutput] = []
        self.under_way = 0
        """Runs that have not ended, also if nobody waits for them any more."""

    def after_fork(self) -> None:
        """In a child: nothing that a server waits for may be held by another process."""
        for idle_server in self._idle_servers:
            idle_server.close()

    def steer(
        self,
        export: ProxyExport,
        options: List[str],
        arguments: Optional[List[str]] = None,
        *,
        then: Callable[[], None] = lambda: None,
        stop_early: bool = False,
    ) -> Reply:
        """Run ``xnbd-bgctl`` for *export*; *then* is done when it has succeeded, also if nobody waits any more.

        With *stop_early* it ends with the operator who asked for it.
        """
        words = [*options, export.control_socket_path, *(arguments or [])]
        idle_server = yield from self._attend(export)
        outcome = yield from self._run(words, idle_server, then, stop_early)
        if outcome["status"] and not idle_server and not is_listening(export.control_socket_path):
            idle_server = yield from self._attend(export)  # whoever served it has left with its last client
            outcome = yield from self._run(words, idle_server, then, stop_early)
        yield outcome

    def _run(
        self, words: List[str], idle_server: Optional[IdleServer], then: Callable[[], None], stop_early: bool
    ) -> Generator[Optional[Message], None, Message]:
        """One run of ``xnbd-bgctl``, after which *idle_server* may go: what it says on the way, and in the end."""
        failure: List[Exception] = []

        def on_end(status: int) -> None:
            self.under_way -= 1
            if idle_server:
                self._dismiss(idle_server)
            try:
                if not status:
                    then()
            except Exception as error:
                log.error("xnbd-bgctl has done its work, but: %s", error)
                failure.append(error)

        child = ChildOutput(self._children, self._bgctl(words), on_end)
        self.under_way += 1
        outcome = yield from self._follow(child, stop_early)
        if failure:
            raise failure[0]
        return outcome

    def _attend(self, export: ProxyExport) -> Generator[None, None, Optional[IdleServer]]:
        """See to it that somebody serves *export*; the idle server that was started if nobody did."""
        deadline = monotonic() + _START_TIME
        while self._is_leaving(export) and monotonic() < deadline:
            yield None
        if is_listening(export.control_socket_path):
            return None
        idle_server = IdleServer(self._children, self.servers, export, self._name_of(export))
        self._idle_servers.append(idle_server)
        deadline = monotonic() + _START_TIME
        try:
            while not is_listening(export.control_socket_path):
                if idle_server.status is not None or monotonic() > deadline:
                    raise CommandError("a server for this proxy was started and does not work: see the log")
                yield None
        except BaseException:
            self._dismiss(idle_server)
            raise
        return idle_server

    def _is_leaving(self, export: ProxyExport) -> bool:
        """Whether a former idle server may still listen, but not for long."""
        self._dismissed = [idle_server for idle_server in self._dismissed if idle_server.status is None]
        return any(
            idle_server.export.control_socket_path == export.control_socket_path for idle_server in self._dismissed
        )

    def _dismiss(self, idle_server: IdleServer) -> None:
        self._idle_servers.remove(idle_server)
        self._dismissed.append(idle_server)
        idle_server.close()

    def _follow(self, child: ChildOutput, stop_early: bool) -> Generator[Optional[Message], None, Message]:
        """What *child* says, line by line; returns the last of it, and its exit status."""
        if stop_early:
            self._interruptible.append(child)
        try:
            while child.status is None:
                output = child.output()
                yield {"output": output} if output else None
            return {"output": child.output(), "errors": child.errors(), "status": child.status}
        finally:
            if stop_early:
                self._interruptible.remove(child)
                child.stop()
            child.forget()

    def interrupt(self) -> None:
        """Stop what may be stopped at any time, because the wrapper is to end."""
        for child in self._interruptible:
            child.stop()
