"""xnbd-server and xnbd-bgctl inside of a process that exists already, one that the wrapper has forked.

What takes long at the server's start is done ahead: its modules are imported, and
its command line is parsed once with placeholders, which are filled in for each client.
"""

from __future__ import annotations

import gc
import io
import sys
from typing import Any, Dict, List, Optional

from .. import __version__
from ..errors import ConfigurationError
from ..protocol.server_handshake import Agreement
from ..server.worker import GARBAGE_THRESHOLD
from ..text import one_line
from ..wrapper.exports import ProxyExport, TargetExport
from ..wrapper.servers import Servers
from . import server
from .program import trouble
from .values import parse_command_line

Arguments = Dict[str, Any]

_PLACEHOLDER = "placeholder-"


class _Line:
    """A parsed command line in which some words are placeholders."""

    def __init__(self, words: List[str]) -> None:
        self._words = words
        self._arguments = _parse(words)

    def fill(self, words: List[str]) -> Optional[Arguments]:
        """What parsing *words* would give, or None if they differ in more than the placeholders."""
        values = {}
        for ours, given in zip(self._words, words):
            if ours.startswith(_PLACEHOLDER):
                values[ours] = given
            elif ours != given:
                return None
        if len(words) != len(self._words):
            return None
        return {
            name: values.get(value, value) if isinstance(value, str) else value
            for name, value in self._arguments.items()
        }


_lines: List[_Line] = []


def load_server(servers: Servers) -> None:
    """Do ahead what every process of a client would have to do."""
    from ..origin.nbd import connection  # noqa: F401
    from ..server.steward import process  # noqa: F401
    from . import proxying, serving  # noqa: F401

    if servers.cow:
        from ..storage import cow  # noqa: F401
    proxy = ProxyExport(*(_PLACEHOLDER + field for field in ProxyExport._fields))
    for export in (
        TargetExport(_PLACEHOLDER + "image"),
        proxy._replace(remote_uri=""),
        proxy._replace(remote_uri="", remote_export_name=""),
        proxy._replace(remote_export_name=""),
    ):
        for structured, allocation in ((False, False), (True, False), (True, True)):
            words = servers.arguments(export, 0, Agreement(structured=structured, allocation=allocation))
            words[words.index("--connected-fd") + 1] = _PLACEHOLDER + "fd"
            try:
                _lines.append(_Line(words))
            except ConfigurationError:
                pass  # said when there is an export for it


def _parse(words: List[str]) -> Arguments:
    return parse_command_line(server.PROGRAM, server.__doc__ or "", words, f"{server.PROGRAM} {__version__}")


def run_server(words: List[str]) -> int:
    """What the program xnbd-server does with the arguments *words*; its exit status."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        filled = (line.fill(words) for line in _lines)
        arguments = next((found for found in filled if found is not None), None) or _parse(words)
        from .serving import serve

        return serve(server.PROGRAM, arguments, None)
    except (ConfigurationError, OSError, MemoryError) as error:
        from ..logs import complain

        ours = isinstance(error, ConfigurationError)
        complain(server.PROGRAM, one_line(str(error) if ours else trouble(error)), super_server=False)
        return error.exit_status if isinstance(error, ConfigurationError) else 1


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
