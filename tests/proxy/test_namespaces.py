"""Servers of two PID namespaces, as two containers have them, on one cache: no stranger is signalled or written to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Iterator, List, NamedTuple

import nbd
import pytest
from caching import BLOCK, CacheFiles, ask, bgctl, connect, query
from conftest import MIB, Start
from launch import Launched, launched
from mounts import small_tmpfs
from server_process import Server, children_of, command, title_of, wait_until

SIZE = 4 * MIB
STRANGERS = 60
"""In the first container: more than the second has processes, so that each of those has the number of one."""

_INIT = 'i=0; while [ $i -lt "$0" ]; do sleep 1000 & i=$((i+1)); done; exec "$@"'


class Container:
    """A server of a PID namespace in which a lot else runs."""

    def __init__(self, server: Launched, socket: Path, control: Path) -> None:
        self.server = server
        self.control = control
        self.uri = f"nbd+unix:///?socket={socket}"
        server.wait_for_log("INFO: serving ")
        (self.master,) = children_of(server.process.pid)

    def strangers(self) -> int:
        return sum(title_of(pid).startswith("sleep") for pid in children_of(self.master))


def end(server: Launched) -> None:
    """All of the container, for unshare takes no other signal."""
    server.process.kill()
    server.process.wait()


class Pair(NamedTuple):
    files: CacheFiles
    first: Container
    second: Container


@pytest.fixture
def pair(start: Start, tmp_path: Path) -> Iterator[Pair]:
    """Proxies of a disk of nothing but ``o``; where their cache lies there are no clones."""
    origin = tmp_path / "origin.img"
    origin.write_bytes(b"o" * SIZE)
    far: Server = start("--target", "--readonly", origin)
    with ExitStack() as stack:
        directory = stack.enter_context(small_tmpfs(tmp_path / "shared", "64M"))
        files = CacheFiles(directory)
        containers: List[Container] = []
        for number, strangers in enumerate((STRANGERS, 0)):
            socket, control = tmp_path / f"{number}.sock", tmp_path / f"{number}.control"
            words = command(*files.arguments(far.uri, "--unix", socket, control=control))
            inside = [
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                _INIT,
                str(strangers),
                *words,
            ]
            server = stack.enter_context(launched(inside, tmp_path / f"{number}.log"))
            stack.callback(end, server)
            containers.append(Container(server, socket, control))
        yield Pair(files, *containers)


def test_a_switch_reaches_the_other_namespace_and_no_stranger(pair: Pair) -> None:
    """A client that sleeps in the other container has its worker change over, too."""
    client = connect(pair.second.uri)
    client.pread(BLOCK, 0)
    bgctl("--cache-all", pair.first.control)
    workers = ask(pair.first.control, "switch")["workers"]
    assert workers >= 8
    assert "changes over later" not in pair.first.server.log()
    assert pair.first.strangers() == STRANGERS
    client.pwrite(b"n" * BLOCK, 0, nbd.CMD_FLAG_FUA)
    assert bytes(connect(pair.first.uri).pread(2 * BLOCK, 0)) == b"n" * BLOCK + b"o" * BLOCK
    assert query(pair.second.control)["mode"] == "target"


def test_a_snapshot_that_the_other_namespace_could_not_keep_blocks_for_is_refused(pair: Pair) -> None:
    bgctl("--cache-all", pair.first.control)
    bgctl("--switch", pair.first.control)
    status, _, complaint = bgctl("--snapshot", pair.second.control, check=False)
    assert status == 1
    assert "another PID namespace (container)" in complaint
    assert list(pair.files.image.parent.glob("*snapshot*")) == []


def test_usage_is_told_of_processes_of_the_own_namespace_only(pair: Pair) -> None:
    clients = [connect(container.uri) for container in (pair.first, pair.second)]
    for client in clients:
        client.pread(BLOCK, 0)
    wait_until(lambda: len(query(pair.first.control)["workers"]) == 2, "both clients")
    workers = query(pair.first.control)["workers"]
    assert sorted("memory_bytes" in worker for worker in workers) == [False, True]
