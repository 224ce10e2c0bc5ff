"""Running servers, each started when it is first needed and stopped whatever happens."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import psutil

from .errors import ProbeFailed
from .flavours import FLAVOURS, Flavour, Place

START_TIME = 60.0
STOP_TIME = 10.0
POLL = 0.02


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether *condition* comes true within *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


class Server:
    """A server on 127.0.0.1 that answers when the constructor returns; raises ProbeFailed if it does not start.

    ``origin`` is the server behind it, if it needs one.
    """

    def __init__(self, name: str, flavour: Flavour, image: Path, directory: Path, origin: Optional[Server]) -> None:
        self.name = name
        self.export = flavour.export
        self.origin = origin
        self._flavour = flavour
        self._place = Place(image, free_port(), directory, origin.port if origin else 0)
        self._process: Optional[psutil.Process] = None
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def port(self) -> int:
        return self._place.port

    @property
    def certificates(self) -> Optional[Path]:
        """With what its clients have to use TLS; None if they must not."""
        return self._place.certificates if self._flavour.tls else None

    @property
    def control_socket(self) -> Path:
        """Where `xnbd-bgctl` finds it, if it is a proxy of ours."""
        return self._place.control_socket

    def processes(self) -> List[psutil.Process]:
        """The server's process, first, and all its descendants."""
        if self._process is None:
            return []
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_alive(self) -> bool:
        process = self._process
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Its process does nothing, while the kernel keeps its connections open: as a relay, it is a stalled link."""
        process = self.processes()[0]
        process.suspend()
        try:
            yield
        finally:
            process.resume()

    def stop(self) -> None:
        """End the server, in good order if it can."""
        if self._process is None and self._flavour.daemon:
            wait_until(self._find_daemon, 1.0)
        processes = self.processes()
        if not processes:
            return
        _signal(processes[0], signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, STOP_TIME)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, STOP_TIME)
        self._process = None

    def _start(self) -> None:
        command = self._flavour.command(self._place)
        log_path = self._place.directory / "log"
        with log_path.open("wb") as log:
            # A session of its own: Ctrl-C is for the benchmark, which then stops the servers.
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if self._flavour.daemon:
            started.wait(START_TIME)
            wait_until(self._find_daemon, START_TIME)
        else:
            self._process = psutil.Process(started.pid)
        if not wait_until(lambda: self._greets() or not self.is_alive(), START_TIME) or not self.is_alive():
            said = log_path.read_text(errors="replace").strip()
            raise ProbeFailed(f"{self.name} did not start: {' / '.join(said.splitlines()[-3:])}")

    def _find_daemon(self) -> bool:
        try:
            self._process = psutil.Process(int(self._place.pid_file.read_text()))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return False
        return True

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
                if self._flavour.foreign:
                    return True
                return sock.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        except OSError:
            return False


class Fleet:
    """All servers of a run, on one *image*; leaving the context stops them."""

    def __init__(self, image: Path, directory: Path) -> None:
        self._image = image
        self._directory = directory
        self._running: Dict[str, Server] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave servers behind; stopping them takes a bounded time.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            for server in reversed(list(self._running.values())):  # origins after what needs them
                server.stop()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    @contextmanager
    def lend(self, name: str) -> Iterator[Server]:
        """A server of the flavour *name*, for one sample; raises ProbeFailed if it does not outlive that."""
        fresh = FLAVOURS[name].fresh
        server = self._provide(name)
        try:
            yield server
            if not server.is_alive():
                raise ProbeFailed(f"{name} has died")
        finally:
            if fresh:
                server.stop()
                del self._running[name]
                shutil.rmtree(self._directory / name, ignore_errors=True)

    def _provide(self, name: str) -> Server:
        """The running server of the flavour *name*, or a new one with all that is behind it."""
        server = self._running.get(name)
        if server is None:
            behind = FLAVOURS[name].origin
            origin = self._provide(behind) if behind else None
            server = self._running[name] = self._start(name, origin)
        elif not server.is_alive():
            del self._running[name]  # the next sample gets a new one
            raise ProbeFailed(f"{name} has died between two samples")
        return server

    def _start(self, name: str, origin: Optional[Server]) -> Server:
        directory = self._directory / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return Server(name, FLAVOURS[name], self._image, directory, origin)


def free_port() -> int:
    """A TCP port that was free a moment ago on 127.0.0.1."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
