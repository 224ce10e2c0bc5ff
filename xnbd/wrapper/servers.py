"""The server that a client is handed over to, and how a process becomes it.

Our own xnbd-server runs in the process that has negotiated, which saves the start
of an interpreter. A command of the user's is executed, and may be a C xNBD, which
knows less.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import ConfigurationError
from ..logs import open_log, standard_stream
from ..protocol import constants as c
from ..protocol.server_handshake import Agreement, contexts_of, export_flags, feature_of
from ..scoreboard.tally import Tally
from ..server.handover.letters import Letter
from ..server.process_loop import ProcessLoop
from ..server.session.connection import Connection
from ..server.single import Passage
from ..system.service_manager import without_manager
from .children import execute
from .exports import ProxyExport, StoredExport

_ASKING_TIME = 20.0
OWN_OPTIONS = (EXTENDED, JSON, SLOW) = ("--negotiated", "--log-format", "--slow-log")
"""What a C xNBD does not know, and other versions of ours perhaps do not."""

TakeOver = Callable[[StoredExport, Connection, Agreement, Optional[Passage]], int]
"""Serves the client of a connection, in this process; the exit status."""

Receive = Callable[[StoredExport, Letter, Mapping[str, Any], ProcessLoop, Passage], int]
"""Serves the client that another process offers, with a kit, in this process; the exit status."""


class Servers(NamedTuple):
    """How disks are served: by what *take_over* does.

    *program* is what is executed there, or empty for our own server. It *knows* some of our options: without
    ``--negotiated`` it gets clients that expect simple replies. Clients may go from one of our own servers to
    another one, which does *receive*.
    """

    take_over: TakeOver
    receive: Optional[Receive] = None
    program: str = ""
    knows: Sequence[str] = OWN_OPTIONS
    cow: bool = False
    readonly: bool = False

    @property
    def extended(self) -> bool:
        """Whether the servers can be told what has been negotiated."""
        return EXTENDED in self.knows

    def flags(self, export: StoredExport) -> int:
        """The transmission flags of what the server does; DF not among them."""
        if not self.extended:
            return c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | (c.FLAG_READ_ONLY if self.readonly else 0)
        own_overlay = self.cow and not isinstance(export, ProxyExport)
        return export_flags(readonly=self.readonly, multi_conn=not own_overlay)

    def contexts(self, export: StoredExport) -> Tuple[str, ...]:
        """The meta contexts that the server knows: another one than ours may be of a version that knows but one."""
        return contexts_of("target" if self.program else export.mode)

    def describe(self, export: StoredExport) -> str:
        """A few words for clients that list the exports."""
        file = os.path.basename(export.image_path)
        if isinstance(export, ProxyExport):
            return f"disk cached in {file}"
        return f"copy-on-write disk over {file}" if self.cow else f"disk image {file}"

    @property
    def stays(self) -> str:
        """Why no client can go from its server to another one; empty if it may."""
        return "" if self.receive else "--xnbd-server"

    def become(
        self, connection: Connection, export: StoredExport, agreement: Agreement, passage: Optional[Passage] = None
    ) -> int:
        """Serve the client of *connection*, in this process; the exit status."""
        return self.take_over(export, connection, agreement, passage)


class ForeignServer(NamedTuple):
    """A *command* of the user's choice, and which options it *knows*; numbers are text as the user has written it.

    *own_words* are options of ours that it is to have, if it knows them.
    """

    command: List[str]
    knows: Sequence[str] = OWN_OPTIONS
    cow: bool = False
    readonly: bool = False
    syslog: bool = False
    log_path: Optional[str] = None
    max_queue_size: Optional[str] = None
    max_buf_size: Optional[str] = None
    file_mode: Optional[str] = None
    tally_fd: Optional[int] = None
    own_words: Sequence[Tuple[str, str]] = ()

    @property
    def extended(self) -> bool:
        """Whether it can be told what has been negotiated."""
        return EXTENDED in self.knows

    def arguments(self, export: StoredExport, fd: int, agreement: Agreement) -> List[str]:
        """The arguments with which the server takes over the client on *fd*."""
        proxy = isinstance(export, ProxyExport)
        words = ["--proxy" if proxy else "--cow-target" if self.cow else "--target"]
        words += ["--readonly"] if self.readonly or agreement.readonly else []
        words += ["--syslog"] if self.syslog else []
        words += ["--file-mode", self.file_mode] if self.file_mode and self.extended else []
        words += ["--connected-fd", str(fd)]
        words += [EXTENDED, _features(agreement)] if self.extended else []
        for option, value in self.own_words:
            words += [option, value] if option in self.knows else []
        return words + (self._of_proxy(export) if isinstance(export, ProxyExport) else [export.image_path])

    def _of_proxy(self, export: ProxyExport) -> List[str]:
        words: List[str] = []
        for option, value in (
            ("--max-queue-size", self.max_queue_size),
            ("--max-buf-size", self.max_buf_size),
            ("--target-exportname", export.remote_export_name),
        ):
            words += [option, value] if value else []
        return [*words, *export.origin_words, export.image_path, export.bitmap_path, export.control_socket_path]

    def take_over(
        self, export: StoredExport, connection: Connection, agreement: Agreement, _passage: Optional[Passage]
    ) -> int:
        """Execute the command, whose lines go to the wrapper's log; the exit status if that cannot be."""
        fd = connection.transport.fileno()
        os.set_blocking(fd, True)
        os.set_inheritable(fd, True)
        self._count_client(agreement)
        if self.log_path is not None:
            stream = standard_stream(self.log_path)
            log_fd = open_log(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if stream is None else stream
            os.dup2(log_fd, 2)
        return execute([*self.command, *self.arguments(export, fd, agreement)])

    def _count_client(self, agreement: Agreement) -> None:
        """For metrics. Of what the other program does nothing is known."""
        if self.tally_fd is not None and agreement.export is not None:
            with suppress(OSError):
                tally = Tally(self.tally_fd, agreement.export.name)
                tally.tell("clients", 1)
                tally.outlive_exec()


def _features(agreement: Agreement) -> str:
    structured = ["structured"] if agreement.structured else []
    return ",".join(["newstyle", *structured, *(feature_of(context) for context in agreement.contexts)])


def abilities(command: List[str]) -> List[str]:
    """Which of our own options the server *command* knows; its ``--help`` tells. Raises `ConfigurationError`."""
    import subprocess

    try:
        answer = subprocess.run(
            [*command, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_ASKING_TIME,
            env=without_manager(os.environ),
        )
    except OSError as error:
        raise ConfigurationError(f"--xnbd-server: cannot run {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"--xnbd-server: {command[0]} --help does not come to an end") from None
    return [option for option in OWN_OPTIONS if option.encode() in answer.stdout]
