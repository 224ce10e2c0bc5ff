"""xnbd-server and xnbd-bgctl inside of a process that exists already, one that the wrapper has forked.

What takes long at the server's start is done ahead: its modules are imported, and the
wrapper's own options are checked. A client's server gets its options without a command line.
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

from ..errors import ConfigurationError
from ..protocol.server_handshake import Agreement
from ..scoreboard.rates import NO_LIMITS, Rates
from ..server.configuration import Configuration
from ..server.handover.arrival import refuse_offer
from ..server.handover.letters import Letter
from ..server.process_loop import ProcessLoop
from ..server.session.connection import Connection
from ..server.session.parking import QueueLimits
from ..server.single import Passage
from ..server.worker import GARBAGE_THRESHOLD
from ..system.process import whole_path
from ..text import one_line
from ..wrapper.exports import ProxyExport, StoredExport
from . import server
from .options import CowOptions, Expected, Introduced, LogOptions, ServerOptions, TargetOptions
from .program import begin, trouble


def load_ahead(*, cow: bool) -> None:
    """Do what every process of a client would have to do."""
    from ..origin.nbd import connection  # noqa: F401
    from ..server.steward import process  # noqa: F401
    from . import proxying, server_options, serving  # noqa: F401

    if cow:
        from ..storage import cow as _cow  # noqa: F401


class OwnServer(NamedTuple):
    """What all servers of the wrapper have in common; *queue_limits* and *cache_limit* are those of proxies.

    *rates* hold for exports of which the file behind *rates_fd* says nothing.
    """

    cow: bool = False
    readonly: bool = False
    log: LogOptions = LogOptions()
    queue_limits: QueueLimits = QueueLimits()
    tally_fds: Sequence[int] = ()
    rates: Rates = NO_LIMITS
    rates_fd: Optional[int] = None
    cache_limit: Optional[int] = None

    def take_over(
        self, export: StoredExport, connection: Connection, agreement: Agreement, passage: Optional[Passage]
    ) -> int:
        """Serve the client of *connection*, in this process; the exit status."""
        name = "" if agreement.export is None else agreement.export.name
        introduced = Introduced(connection, agreement._replace(export=None, ordered=False), passage)
        return self._serve(export, introduced, name)

    def receive(
        self, export: StoredExport, offer: Letter, kit: Mapping[str, Any], loop: ProcessLoop, passage: Passage
    ) -> int:
        """Serve the client that another process offers, in this process; the exit status. Raises `Stop`."""
        return self._serve(export, Expected(offer, kit, loop, passage), kit["name"])

    def _serve(self, export: StoredExport, client: Union[Introduced, Expected], name: str) -> int:
        from .serving import serve

        gc.set_threshold(GARBAGE_THRESHOLD)
        try:
            options = self._with_shared(self.options(export, client), name)
            begin(server.PROGRAM, options.log, None, None)
            return serve(options, None)
        except (ConfigurationError, OSError, MemoryError) as error:
            from ..logs import complain

            reason = one_line(str(error) if isinstance(error, ConfigurationError) else trouble(error))
            complain(server.PROGRAM, reason, super_server=False)
            if isinstance(client, Expected):
                refuse_offer(client.offer, reason)
            return error.exit_status if isinstance(error, ConfigurationError) else 1

    def _with_shared(self, options: ServerOptions, name: str) -> ServerOptions:
        """Those of a server of the export *name*, with what all servers of the wrapper share."""
        configuration = options.configuration.with_rates(self.rates)
        return options._replace(
            export_name=name, tally_fds=self.tally_fds, rates_fd=self.rates_fd, configuration=configuration
        )

    def options(self, export: StoredExport, client: Union[Introduced, Expected]) -> ServerOptions:
        """For that *client*. Raises `ConfigurationError` if one file is to be two things."""
        from .server_options import refuse_shared_files

        paths = {name: whole_path(path, name) for name, path in self._files(export).items()}
        refuse_shared_files(paths)
        if isinstance(export, ProxyExport):
            return self._proxy(export, paths, client)
        path = paths[self._image]
        disk = CowOptions(path, self.readonly) if self.cow else TargetOptions(path, self.readonly)
        return ServerOptions(disk, client, self.log)

    def _proxy(self, export: ProxyExport, paths: Dict[str, str], client: Union[Introduced, Expected]) -> ServerOptions:
        from .proxy_options import ProxyOptions

        limits = self.queue_limits
        cache = (paths["CACHE_DISK_IMAGE"], paths["CACHE_BITMAP_IMAGE"])
        return ServerOptions(
            ProxyOptions(export.origin, *cache, self.readonly, cache_limit=self.cache_limit),
            client,
            self.log,
            configuration=Configuration(max_queue_size=limits.requests, max_buf_size=limits.buffered),
            control_path=paths["CONTROL_SOCKET_PATH"],
        )

    @property
    def _image(self) -> str:
        return "BASE_DISK_IMAGE" if self.cow else "DISK_IMAGE"

    def _files(self, export: StoredExport) -> Dict[str, str]:
        """The server's files, by the names that they have on a command line."""
        log = {"--logpath": self.log.path} if self.log.path else {}
        if not isinstance(export, ProxyExport):
            return {self._image: export.image_path, **log}
        return {
            "CACHE_DISK_IMAGE": export.image_path,
            "CACHE_BITMAP_IMAGE": export.bitmap_path,
            "CONTROL_SOCKET_PATH": export.control_socket_path,
            **log,
        }


def _stream(fd: int) -> io.TextIOWrapper:
    file = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def run_bgctl(words: List[str]) -> int:
    """What the program xnbd-bgctl does with the arguments *words*; its exit status."""
    from .bgctl import main

    # What the wrapper itself had there may be closed or full; this process has files in their place.
    sys.stdout, sys.stderr = _stream(1), _stream(2)
    try:
        main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
