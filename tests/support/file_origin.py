"""An origin that is no NBD server: a file that threads read, for the tests of the seam that `xnbd.origin.base` is.

As a program it is the prefix of a server's command line, which then knows URIs like ``test:///PATH``:
``python file_origin.py python -W error bin/xnbd-server ARGUMENTS``. While there is no file at PATH the origin
is lost.
"""

from __future__ import annotations

import errno
import os
import queue
import runpy
import select
import signal
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from xnbd.origin import address  # noqa: E402
from xnbd.origin.base import Origin, OriginAddress, OriginLost, Sink, Terms  # noqa: E402

PREFIX = [sys.executable, __file__]

_BLOCK = 4096
_MAXIMUM_READ = 64 << 10
_THREADS = 2


class FileAddress(NamedTuple):
    path: str

    def __str__(self) -> str:
        return f"test://{self.path}"

    @property
    def local_files(self) -> Dict[str, int]:
        return {self.path: os.R_OK}

    @property
    def fetch_size(self) -> int:
        return _BLOCK

    @property
    def starts_threads(self) -> bool:
        return True

    @property
    def place(self) -> str:
        return str(self)

    def overrules(self, noted: OriginAddress) -> bool:
        return False

    def common(self, version: str) -> str:
        return ""

    def warnings(self) -> List[str]:
        return []

    def open(self, sink: Sink, terms: Terms) -> Origin:
        return FileOrigin(self, sink, terms)


class FileOrigin(Origin):
    """Threads put what they have done into a queue, and a byte into a pipe; `progress` tells the sink."""

    def __init__(self, place: FileAddress, sink: Sink, terms: Terms) -> None:
        self.heard_at = monotonic()
        self._place = place
        self._sink = sink
        self._terms = terms
        self._size: Optional[int] = None
        self._asked: Dict[int, Any] = {}
        self._numbers = 0
        self._jobs: queue.SimpleQueue[Optional[Callable[[], Callable[[], None]]]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._threads: List[threading.Thread] = []

    @property
    def ready(self) -> bool:
        return self._size is not None

    @property
    def size(self) -> int:
        return self._size or 0

    @property
    def maximum_read(self) -> int:
        return _MAXIMUM_READ

    @property
    def can_tell_zeros(self) -> bool:
        return True

    @property
    def outstanding(self) -> int:
        return len(self._asked)

    @property
    def deadline(self) -> Optional[float]:
        return None

    def unfinished(self) -> List[Any]:
        return list(self._asked.values())

    def interests(self) -> List[Tuple[int, int]]:
        return [(self._reading, select.POLLIN)]

    def start(self) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._threads = [threading.Thread(target=self._live) for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._jobs.put(self._look)

    def read(self, token: Any, offset: int, length: int) -> None:
        assert 0 < length <= _MAXIMUM_READ
        number = self._note(token)
        self._jobs.put(lambda: self._read(number, offset, length))

    def query_extents(self, token: Any, offset: int, length: int) -> None:
        number = self._note(token)
        self._jobs.put(lambda: self._find_extents(number, offset, length))

    def _note(self, token: Any) -> int:
        self._numbers += 1
        self._asked[self._numbers] = token
        return self._numbers

    def push(self) -> None:
        pass  # nothing is queued here: the threads have it

    def progress(self) -> None:
        try:
            while os.read(self._reading, 4096):
                pass
        except BlockingIOError:
            pass
        while not self._results.empty():
            self.heard_at = monotonic()
            self._results.get()()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for fd in (self._reading, self._writing):
            if fd >= 0:
                os.close(fd)
        self._reading = self._writing = -1

    # In the threads; what they return is called by `progress`

    def _live(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                result = job()
            except OSError as error:
                result = self._losing(error)
            self._results.put(result)
            os.write(self._writing, b".")

    def _losing(self, error: OSError) -> Callable[[], None]:
        def lose() -> None:
            self.close()
            raise OriginLost(f"origin {self._place}: {error.strerror}")

        return lose

    def _look(self) -> Callable[[], None]:
        size = os.stat(self._place.path).st_size
        if self._terms.expected_size not in (None, size):
            raise OSError(errno.EINVAL, f"its disk has {size} bytes")

        def tell() -> None:
            self._size = size

        return tell

    def _content(self, offset: int, length: int) -> bytes:
        with open(self._place.path, "rb") as file:
            data = os.pread(file.fileno(), length, offset)
        assert len(data) == length
        return data

    def _read(self, number: int, offset: int, length: int) -> Callable[[], None]:
        """The answer comes in two pieces, the second one first, where there is more than one block."""
        data = self._content(offset, length)
        cut = length // 2 // _BLOCK * _BLOCK

        def tell() -> None:
            token = self._asked.pop(number)
            for at, piece in ((cut, data[cut:]), (0, data[:cut])):
                if piece.strip(b"\0"):
                    self._sink.on_data(token, offset + at, piece)
                elif piece:
                    self._sink.on_hole(token, offset + at, len(piece))
            self._sink.on_done(token, 0)

        return tell

    def _find_extents(self, number: int, offset: int, length: int) -> Callable[[], None]:
        data = self._content(offset, length)
        blocks = [data[at : at + _BLOCK] for at in range(0, length, _BLOCK)]

        def tell() -> None:
            token = self._asked.pop(number)
            self._sink.on_extents(token, [(len(block), not block.strip(b"\0")) for block in blocks])
            self._sink.on_done(token, 0)

        return tell


def _parse(uri: str, port: Optional[str], export_name: Optional[str]) -> FileAddress:
    assert port is None and export_name is None
    return FileAddress(uri[len("test://") :])


def register() -> None:
    """All that a new kind of origin needs outside its module."""
    address.SCHEMES["test"] = lambda: _parse


if __name__ == "__main__":
    register()
    program = sys.argv.index(str(ROOT / "bin" / "xnbd-server"))
    sys.argv = sys.argv[program:]
    runpy.run_path(sys.argv[0], run_name="__main__")
