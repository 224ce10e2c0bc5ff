"""The observer's life: a loop over connections, and over what has to be counted when there is time."""

from __future__ import annotations

import os
import resource
import select
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from time import monotonic
from typing import Callable, List, Mapping, Optional, Sequence

from ...logs import log
from ...metrics.exposition import OPENMETRICS, PLAIN, Family, openmetrics, plain
from ...metrics.http import HttpServer, Page, Request, Response
from ...metrics.page import page
from ...system.forking import let_signals_in
from ...system.polling import poll_patiently
from ..process_loop import ProcessLoop, Stop
from .wanted import NoSuchExport, Wanted, parse_wanted

_NICE = 5  # clients go before those who watch
_PARTING_TIME = 1.0


class Observed(ABC):
    """What is observed, as the observer's process has it open."""

    @abstractmethod
    def families(self) -> List[Family]:
        """For ``/metrics``."""

    @abstractmethod
    def status(self, wanted: Wanted) -> str:
        """For ``/status``: JSON. Raises `NoSuchExport`."""

    @abstractmethod
    def work(self) -> None:
        """Do a little of what takes long. Called when `deadline` says so."""

    @abstractmethod
    def deadline(self) -> Optional[float]:
        """When `work` wants to be called (monotonic seconds)."""


def observe(lifeline: int, listeners: Sequence[socket.socket], observe_what: Callable[[], Observed], title: str) -> int:
    """Life of the process, which ends with *lifeline* or by SIGTERM: its exit status.

    Signals are blocked when it begins. Who has asked already gets the answer in any case.
    """
    from ...system.process import set_title

    loop = ProcessLoop(lifeline)
    let_signals_in()
    set_title("metrics of", title) if title else set_title("metrics")
    os.nice(_NICE)
    _raise_limit()
    try:
        observed = observe_what()
    except OSError as error:
        log.error("metrics cannot be served: %s", error)
        return 1
    server = HttpServer(listeners, pages(observed))
    try:
        while True:
            times = [time for time in (server.deadline(), observed.deadline()) if time is not None]
            loop.wait_for(server.interests(), max(0.0, min(times) - monotonic()) if times else None)
            server.progress()
            work_at = observed.deadline()
            if work_at is not None and monotonic() >= work_at:
                observed.work()
    except Stop:
        _part(server)
        return 0
    finally:
        server.close()


def _raise_limit() -> None:
    """Six descriptors are needed for each proxy of a wrapper."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def pages(observed: Observed) -> Mapping[str, Page]:
    """By their paths."""

    def metrics(request: Request) -> Response:
        families = observed.families()
        if OPENMETRICS.partition(";")[0] in request.headers.get("accept", ""):
            return Response(openmetrics(families), OPENMETRICS)
        return Response(plain(families), PLAIN)

    def status(request: Request) -> Response:
        try:
            wanted = parse_wanted(request.query)
        except ValueError as error:
            return Response(f"{error}\n".encode(), status=400)
        try:
            return Response(observed.status(wanted).encode(), "application/json")
        except NoSuchExport:
            return Response(b"there is no such export\n", status=404)

    def index(_request: Request) -> Response:
        try:
            return page()
        except OSError as error:
            return Response(
                f"the page cannot be read: {error.strerror}; /status and /metrics can\n".encode(), status=500
            )

    return {"/": index, "/metrics": metrics, "/status": status}


def _part(server: HttpServer) -> None:
    server.leave()
    until = monotonic() + _PARTING_TIME
    while server.is_busy and monotonic() < until:
        poll = select.poll()
        for fd, events in server.interests():
            poll.register(fd, events)
        poll_patiently(poll, max(0.0, until - monotonic()) * 1000)
        server.progress()
