"""xnbd-server --proxy for a test: the origin's disk, the proxy before it, and xnbd-bgctl to steer it."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import nbd
from conftest import MIB, Start
from rawclient import READ, RawClient, pack_request
from server_process import PYTHON, ROOT, Server, children_of, run, title_of, wait_until

BLOCK = 4096
DISK = 4 * MIB + 1234
"""A disk whose last block is a short one."""


def make_disk(directory: Path, size: int = DISK, name: str = "origin.img", seed: int = 4) -> Path:
    """An image of noise."""
    path = directory / name
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


class Proxy:
    """A proxy of *origin*, a URI or host and port, and the files it keeps in *directory*."""

    def __init__(self, start: Start, directory: Path, origin: object, *options: object, name: str = "cache") -> None:
        where = origin if isinstance(origin, (list, tuple)) else [origin]
        self.cache, self.bitmap = directory / f"{name}.img", directory / f"{name}.bitmap"
        self.control = directory / f"{name}{random.randrange(1 << 30)}.ctl"
        self.server: Server = start("--proxy", *options, *where, self.cache, self.bitmap, self.control)
        self.server.wait_for_log("INFO: serving ")  # the control socket is the last one to be there

    @property
    def uri(self) -> str:
        return self.server.uri

    def raw(self, **options: Any) -> RawClient:
        """A client that has negotiated."""
        return RawClient(self.server.connect()).negotiate(**options)

    def connect(self, *contexts: str) -> nbd.NBD:
        client = nbd.NBD()
        for context in contexts:
            client.add_meta_context(context)
        client.connect_unix(str(self.server.socket))
        return client

    def query(self) -> Dict[str, Any]:
        return query(self.control)

    def counter(self, name: str) -> int:
        return int(self.query()["counters"][name])

    def wait_for_counter(self, name: str, value: int) -> None:
        """A worker tells its figures a moment after its replies."""
        wait_until(lambda: self.counter(name) >= value, f"{value} {name}")
        assert self.counter(name) == value

    def cached(self) -> int:
        """Blocks."""
        return int(self.query()["blocks"]["cached"])

    def wait_for_cached(self, blocks: int) -> None:
        """The server does not count them anew for every answer."""
        wait_until(lambda: self.cached() == blocks, f"{blocks} cached blocks")

    def wait_for_queue(self, requests: int) -> None:
        wait_until(lambda: self.query()["queue"]["requests"] == requests, f"{requests} waiting requests")

    def bgctl(self, *arguments: object) -> str:
        return bgctl(*arguments, self.control)

    def refused(self, *arguments: object) -> str:
        return refused(*arguments, self.control)

    def steward(self) -> int:
        return next(pid for pid in children_of(self.server.pid) if "steward" in title_of(pid))

    def copier(self) -> Optional[int]:
        return next((pid for pid in children_of(self.steward()) if "copying" in title_of(pid)), None)


def program(*arguments: object) -> List[str]:
    """The command line of xnbd-bgctl."""
    return [PYTHON, "-W", "error", str(ROOT / "bin" / "xnbd-bgctl"), *map(str, arguments)]


def bgctl(*arguments: object) -> str:
    """What xnbd-bgctl prints; it has to succeed."""
    _, out, err = run(*program(*arguments))
    assert err == ""
    return out


def refused(*arguments: object) -> str:
    """The one line with which xnbd-bgctl fails."""
    status, out, err = run(*program(*arguments), check=False)
    assert (status, out) == (1, "")
    assert err.startswith("xnbd-bgctl: ")
    assert err.count("\n") == 1, err
    return err[len("xnbd-bgctl: ") : -1]


def query(control: Path) -> Dict[str, Any]:
    """What a server tells, asked without the start of a program."""
    answer = ask(control, command="query")
    assert "error" not in answer, answer
    return answer


def ask(control: Path, **request: object) -> Dict[str, Any]:
    """The last line that the server answers to *request*."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(control))
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile("rb") as lines:
            for line in lines:
                answer: Dict[str, Any] = json.loads(line)
                if answer.get("done"):
                    return answer
    raise AssertionError("no answer")


def reads(*places: Tuple[int, int]) -> bytes:
    """READ requests of (offset, length), whose cookies count from 1."""
    return b"".join(pack_request(READ, at, length, cookie=n) for n, (at, length) in enumerate(places, 1))


def replies(client: RawClient, *lengths: int) -> List[Tuple[int, bytes]]:
    """Cookies and data of simple replies without an error, in the order in which they come; all of one *length*."""
    answers = []
    for length in lengths:
        error, cookie, data = client.simple_reply(length)
        assert error == 0
        answers.append((cookie, data))
    return answers


def silent(client: RawClient, seconds: float = 0.3) -> bool:
    """Whether nothing comes for so long."""
    before: Optional[float] = client.sock.gettimeout()
    client.sock.settimeout(seconds)
    try:
        client.sock.recv(1, socket.MSG_PEEK)
        return False
    except socket.timeout:
        return True
    finally:
        client.sock.settimeout(before)
