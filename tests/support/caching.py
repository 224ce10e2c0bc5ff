"""Real proxies on one cache, for tests that start, kill and compare them."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import nbd
from model import ignore_chunk
from origin_programs import is_listening
from server_process import (
    PATIENCE,
    PYTHON,
    ROOT,
    Server,
    children_of,
    is_alive,
    run,
    state_of,
    title_of,
    wait_until,
)

from xnbd.proxy.state.format import layout_of

BLOCK = 4096


def _blocks(octets: bytes) -> List[int]:
    return [block for block in range(8 * len(octets)) if octets[block >> 3] >> (block & 7) & 1]


class CacheFiles:
    """Where a cache has its files in *directory*."""

    def __init__(self, directory: Path, name: str = "cache") -> None:
        self.image = directory / f"{name}.img"
        self.bitmap = directory / f"{name}.bitmap"
        self.state = directory / f"{name}.bitmap.state"
        self.sums = directory / f"{name}.bitmap.sums"
        self.control = directory / f"{name}.control"

    def arguments(self, origin: object, *options: object, control: object = None) -> List[str]:
        """Of a proxy of *origin*, an URI."""
        words = ["--proxy", *options, origin, self.image, self.bitmap, control or self.control]
        return [str(word) for word in words]

    def cached(self) -> List[int]:
        """The blocks that are marked as local."""
        return _blocks(self.bitmap.read_bytes())

    def written(self, size: int) -> List[int]:
        """The blocks that clients have written, of a disk of *size* bytes."""
        layout = layout_of(size)
        return _blocks(self.state.read_bytes()[layout.written : layout.written + layout.bitmap_size])

    def clean(self, size: int) -> List[int]:
        """The blocks that are local, and that no client has written."""
        return sorted({*self.cached()} - {*self.written(size)})

    def takes(self) -> int:
        """Bytes that the cache image takes on its file system."""
        return self.image.stat().st_blocks * 512

    def is_clean(self) -> bool:
        """Whether the state file says that it was closed cleanly: flag 1 at offset 16."""
        with self.state.open("rb") as file:
            return bool(file.read(20)[16] & 1)

    def remove(self) -> None:
        for path in self.image.parent.glob(f"{self.image.stem}.*"):
            path.unlink()


def connect(uri: str, *, structured: bool = True) -> nbd.NBD:
    client = nbd.NBD()
    client.set_request_structured_replies(structured)
    if structured:
        client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.set_uri_allow_local_file(True)
    client.connect_uri(uri)
    return client


class Reading:
    """A READ, or with *data* a WRITE, that is under way."""

    def __init__(self, client: nbd.NBD, offset: int, length: int) -> None:
        self._client = client
        self._buffer = nbd.Buffer(length)
        self._errors: List[int] = []
        self._cookie = client.aio_pread_structured(self._buffer, offset, ignore_chunk, self._on_completion)

    def _on_completion(self, error: object) -> int:
        self._errors.append(error.value)  # type: ignore[attr-defined]
        return 1

    def is_done(self) -> bool:
        self._client.poll(0)
        return bool(self._errors)

    def wait(self) -> int:
        """The error, or 0."""
        wait_until(self.is_done, "the reply")
        return self._errors[0]

    def content(self) -> bytes:
        assert self.wait() == 0
        return bytes(self._buffer.to_bytearray())


def ask(control: Path, command: str, **arguments: object) -> Dict[str, Any]:
    """Send one command to a control socket: the last line of its answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(control))
        sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        with sock.makefile("r") as lines:
            for line in lines:
                answer = json.loads(line)
                if "done" in answer or "error" in answer or command == "query":
                    return dict(answer)
    raise AssertionError(f"{command}: no answer")


def query(control: Path) -> Dict[str, Any]:
    """What the steward tells, which may come a moment after the server listens."""
    answers: List[Dict[str, Any]] = []

    def try_once() -> bool:
        try:
            answers.append(ask(control, "query"))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    wait_until(try_once, f"an answer at {control}")
    return answers[0]


def bgctl(*arguments: object, check: bool = True) -> Tuple[int, str, str]:
    """Run xnbd-bgctl. The one path among its arguments is a control socket: it may come after the server's socket."""
    (control,) = (argument for argument in arguments if isinstance(argument, Path))
    wait_until(lambda: is_listening(control), f"{control} to listen")
    return run(PYTHON, ROOT / "bin" / "xnbd-bgctl", *arguments, check=check)


def descendants(pid: int) -> List[int]:
    """All processes below *pid*."""
    found = []
    for child in children_of(pid):
        found += [child, *descendants(child)]
    return found


def by_kind(server: Server) -> Dict[str, List[int]]:
    """The processes of a server by what they do."""
    kinds: Dict[str, List[int]] = {"master": [server.pid]}
    for pid in descendants(server.pid):
        title = title_of(pid)
        for kind in ("worker for", "spare worker", "steward", "copying", "keeping"):
            if kind in title:
                kinds.setdefault(kind, []).append(pid)
    return kinds


def kill(pids: List[int]) -> None:
    """SIGKILL, all at once; those that are gone already do not count."""
    for pid in pids:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass


def hold(pid: int) -> List[int]:
    """Stop *pid* and all processes below it, when this returns: none does anything more. Returns who they are."""
    held: Set[int] = set()
    while True:
        found = {pid, *descendants(pid)} - held  # until all are held some may still fork
        if not found:
            return list(held)
        for one in found:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGSTOP)
        wait_until(lambda: all(state_of(one) in "TZX" for one in found), f"{found} to stop")  # noqa: B023
        held |= found


def release(pids: List[int]) -> None:
    """The end of a `hold`."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill_server(server: Server) -> None:
    """SIGKILL to all of its processes at once, none of which is left when this returns."""
    if server.process.poll() is not None:
        return
    pids = hold(server.pid)
    kill(pids)
    server.process.wait()
    wait_until_gone(pids)


def wait_until_gone(pids: List[int], seconds: float = PATIENCE) -> None:
    wait_until(lambda: not any(is_alive(pid) for pid in pids), f"the end of processes {pids}", seconds)
