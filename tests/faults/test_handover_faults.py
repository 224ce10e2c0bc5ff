"""A client goes from worker to worker, and one of the two dies or fails on the way: at worst this client is lost.

Each test takes some of the system calls of the hand-over, drawn by chance, and each time that they are made; with
XNBD_ROUNDS in the environment, all of them.
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import List, Sequence, Set

import pytest
from conftest import Start
from injection import injected
from moving import order, worker_of_only_client
from rawclient import RawClient
from server_process import Server, is_alive, title_of, wait_until

CALLS = (
    "socketpair",
    "sendmsg",
    "recvmsg",
    "memfd_create",
    "pread64",
    "fcntl",
    "getsockopt",
    "close",
    "mmap",
    "munmap",
)

ALL = "XNBD_ROUNDS" in os.environ


def some(seed: int, calls: Sequence[str]) -> Sequence[str]:
    return calls if ALL else random.Random(seed).sample(calls, 4)


def inode_of(client: socket.socket) -> str:
    """The server's end of the connection, as ``/proc`` names it; empty if no process has it."""
    ports = f"{client.getpeername()[1]:04X} {client.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if " ".join(field.partition(":")[2] for field in fields[1:3]) == ports:
            return f"socket:[{fields[9]}]" if fields[9] != "0" else ""
    return ""


def holders_of(inode: str, server: Server) -> Set[int]:
    """The workers that have it open."""
    holders = set()
    for worker in server.workers():
        try:
            links = [os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if inode in links:
            holders.add(worker)
    return holders


def still_works(client: RawClient) -> bool:
    """Whether the client is served; it may have been lost."""
    try:
        return client.works()
    except (EOFError, ConnectionError):
        return False


def spares_of(server: Server) -> List[int]:
    return [worker for worker in server.workers() if "spare" in title_of(worker)]


class Field:
    """A server with one client that is to be moved."""

    def __init__(self, server: Server, content: bytes) -> None:
        self.server = server
        self.content = content
        self.kills = self.lost = 0

    def play(self, victim: str, fault: str) -> bool:
        """Move a new client, while a worker suffers *fault*; whether that was the end of a worker."""
        server = self.server
        wait_until(lambda: not server.busy_workers() and spares_of(server), "spare workers")
        with RawClient(server.connect(tcp=True)) as client:
            client.negotiate()
            client.read(0, 10)
            old = worker_of_only_client(server)
            wait_until(lambda: spares_of(server), "a spare worker")
            told = server.log().count("goes on") + server.log().count("stays with")
            sufferers = [old] if victim == "old" else spares_of(server)
            with injected(sufferers, fault):
                order(old)
                wait_until(
                    lambda: (
                        not all(map(is_alive, sufferers))
                        or server.log().count("goes on") + server.log().count("stays with") > told
                        or not inode_of(client.sock)
                    ),
                    f"the end of the move under {fault}",
                )
            died = not all(map(is_alive, sufferers))
            self.kills += died
            self._check(client, fault)
        return died

    def _check(self, client: RawClient, fault: str) -> None:
        server = self.server
        inode = inode_of(client.sock)
        if still_works(client):
            wait_until(
                lambda: len(holders_of(inode, server)) == 1,
                f"one worker that has the client, after {fault}: {holders_of(inode, server)}, {server.log()[-1500:]}",
            )
            assert client.read(1000, 50_000) == self.content[1000:51_000]
        else:
            self.lost += 1
        with RawClient(server.connect(tcp=True)) as other:
            other.negotiate()
            assert other.read(0, 100) == self.content[:100]
        assert server.process.poll() is None


@pytest.mark.parametrize("victim", ["old", "new"])
def test_a_worker_that_is_killed_takes_at_most_this_client_along(
    start: Start, image: Path, seed: int, victim: str
) -> None:
    server = start("--target", "--spare-workers", "1", image, tcp=True)
    server.expected_errors.append(r"orker \d+ .*died: killed by SIGKILL")
    field = Field(server, image.read_bytes())
    for call in some(seed, (*CALLS, "write")):
        step = 1
        while field.play(victim, f"{call}:signal=SIGKILL:when={step}"):
            step += 1
    assert field.lost <= field.kills


@pytest.mark.parametrize("victim", ["old", "new"])
def test_whatever_fails_on_the_way_only_this_client_can_be_lost(
    start: Start, image: Path, seed: int, victim: str
) -> None:
    server = start("--target", "--spare-workers", "1", image, tcp=True)
    server.expected_errors.append(r"worker|Error|Traceback")  # as they would elsewhere
    field = Field(server, image.read_bytes())
    for call in some(seed, [call for call in CALLS if call not in ("close", "munmap")]):  # these do what they do
        for step in range(1, 5):
            field.play(victim, f"{call}:error=ENOMEM:when={step}")
