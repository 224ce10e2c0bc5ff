"""What clients have written, as they and operators see it: nbdinfo, libnbd and --query, over all that may happen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Dict, List, Set, Tuple

import nbd
import pytest
from caching import CacheFiles, bgctl, kill_server, query
from conftest import MIB, Start
from server_process import Server, run, wait_until

BLOCK = 4096
SIZE = 2 * MIB + 1234
BLOCKS = 513
CONTEXTS = ("base:allocation", "xnbd:cached", "xnbd:written")


@pytest.fixture
def files(tmp_path: Path) -> CacheFiles:
    return CacheFiles(tmp_path)


@pytest.fixture
def origin(start: Start, tmp_path: Path) -> Server:
    image = tmp_path / "origin.img"
    image.write_bytes(b"o" * SIZE)
    return start("--target", "--readonly", image)


def connect(server: Server, *contexts: str) -> nbd.NBD:
    client = nbd.NBD()
    for context in contexts or CONTEXTS:
        client.add_meta_context(context)
    client.connect_unix(str(server.socket))
    return client


Extents = List[Tuple[int, int]]


def status(client: nbd.NBD, length: int = SIZE, offset: int = 0, flags: int = 0) -> Dict[str, Extents]:
    """What each context says: lengths and flags."""
    told: Dict[str, Extents] = {}

    def on_extents(context: str, _offset: int, entries: List[int], _error: object) -> int:
        told[context] = list(zip(entries[::2], entries[1::2]))
        return 0

    client.block_status(length, offset, on_extents, flags)
    return told


def blocks_in(extents: Extents) -> Set[int]:
    """The blocks with a status that is not 0."""
    at = 0
    found: Set[int] = set()
    for length, flags in extents:
        if flags:
            found.update(range(at // BLOCK, -(-(at + length) // BLOCK)))
        at += length
    return found


def maps(client: nbd.NBD) -> Tuple[Set[int], Set[int]]:
    """The blocks that are cached, and those that are written."""
    told = status(client)
    return blocks_in(told["xnbd:cached"]), blocks_in(told["xnbd:written"])


def nbdinfo_map(server: Server, context: str) -> List[Tuple[int, int, int]]:
    """Offset, length and status of what nbdinfo prints."""
    out = run("nbdinfo", f"--map={context}", server.uri)[1]
    return [(int(a), int(b), int(c)) for a, b, c in re.findall(r"^ *(\d+) +(\d+) +(\d+)", out, re.MULTILINE)]


def proxy(start: Start, files: CacheFiles, origin: Server, *options: object) -> Server:
    return start(*files.arguments(origin.uri, "--readahead", "0", *options))


def test_nbdinfo_draws_both_maps(start: Start, files: CacheFiles, origin: Server) -> None:
    server = proxy(start, files, origin)
    client = connect(server)
    client.pread(3 * BLOCK, 2 * BLOCK)
    client.pwrite(b"w" * BLOCK, 3 * BLOCK)
    client.pwrite(b"w", SIZE - 1)
    last = 512 * BLOCK
    assert nbdinfo_map(server, "xnbd:cached") == [
        *((0, 2 * BLOCK, 0), (2 * BLOCK, 3 * BLOCK, 1), (5 * BLOCK, last - 5 * BLOCK, 0), (last, 1234, 1))
    ]
    assert nbdinfo_map(server, "xnbd:written") == [
        *((0, 3 * BLOCK, 0), (3 * BLOCK, BLOCK, 1), (4 * BLOCK, last - 4 * BLOCK, 0), (last, 1234, 1))
    ]
    listed = run("nbdinfo", "--list", server.uri)[1]
    assert [context in listed for context in CONTEXTS] == [True] * 3
    wait_until(lambda: query(files.control)["blocks"] == {"total": BLOCKS, "cached": 4, "written": 2}, "the count")
    assert "  written     2 blocks, 8 KiB that only exist here\n" in bgctl("--query", "--map", files.control)[1]


def test_all_contexts_are_told_at_once_or_those_that_were_asked_for(
    start: Start, files: CacheFiles, origin: Server
) -> None:
    server = proxy(start, files, origin)
    client = connect(server)
    client.pread(BLOCK, BLOCK)
    client.pwrite(bytes(2 * BLOCK), 6 * BLOCK)
    told = status(client, 16 * BLOCK)
    assert told["xnbd:cached"] == [(BLOCK, 0), (BLOCK, 1), (4 * BLOCK, 0), (2 * BLOCK, 1), (8 * BLOCK, 0)]
    assert told["xnbd:written"] == [(6 * BLOCK, 0), (2 * BLOCK, 1), (8 * BLOCK, 0)]
    assert sum(length for length, _ in told["base:allocation"]) == 16 * BLOCK
    first = status(client, 16 * BLOCK, BLOCK, nbd.CMD_FLAG_REQ_ONE)
    assert {context: len(extents) for context, extents in first.items()} == dict.fromkeys(CONTEXTS, 1)
    assert (first["xnbd:cached"], first["xnbd:written"]) == ([(BLOCK, 1)], [(5 * BLOCK, 0)])
    middle = status(client, 100, 6 * BLOCK + 50)
    assert middle["xnbd:written"] == [(100, 1)]
    assert list(status(connect(server, "xnbd:written"))) == ["xnbd:written"]


def test_a_target_has_neither_context(start: Start, tmp_path: Path) -> None:
    server = start("--target", "--create", SIZE, tmp_path / "disk.img")
    client = connect(server)
    assert [client.can_meta_context(context) for context in CONTEXTS] == [True, False, False]


Change = Callable[[nbd.NBD, int], None]

CHANGES: Dict[str, Tuple[Change, Set[int]]] = {
    "a block": (lambda client, at: client.pwrite(b"w" * BLOCK, at), {0}),
    "a part of a block": (lambda client, at: client.pwrite(b"w" * 5, at + 99), {0}),
    "with FUA": (lambda client, at: client.pwrite(b"w" * BLOCK, at, nbd.CMD_FLAG_FUA), {0}),
    "parts at both ends": (lambda client, at: client.pwrite(b"w" * (9 * BLOCK), at + 7), set(range(10))),
    "a long one": (lambda client, at: client.pwrite(b"w" * MIB, at), set(range(256))),
    "zeros": (lambda client, at: client.zero(9 * BLOCK, at), set(range(9))),
    "zeros with parts": (lambda client, at: client.zero(9 * BLOCK, at + 1), set(range(10))),
    "zeros without holes": (lambda client, at: client.zero(BLOCK, at, nbd.CMD_FLAG_NO_HOLE), {0}),
    "trim": (lambda client, at: client.trim(9 * BLOCK, at), set(range(9))),
    "a part trimmed": (lambda client, at: client.trim(100, at + 100), {0}),
}


@pytest.mark.parametrize("here", ["missing", "local", "some of it local"])
@pytest.mark.parametrize(("change", "marked"), CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_a_block_marks_it(
    start: Start, files: CacheFiles, origin: Server, change: Change, marked: Set[int], here: str
) -> None:
    server = proxy(start, files, origin)
    client, first = connect(server), 13
    if here != "missing":
        client.pread(300 * BLOCK if here == "local" else BLOCK, first * BLOCK)
    cached = maps(client)[0]
    wanted = {first + block for block in marked}
    for _ in range(2):
        change(client, first * BLOCK)
        assert maps(client) == (cached | wanted, wanted)
    kill_server(server)
    assert maps(connect(proxy(start, files, origin))) == (cached | wanted, wanted)


def test_reads_and_copies_mark_nothing(start: Start, files: CacheFiles, origin: Server) -> None:
    server = proxy(start, files, origin)
    client = connect(server)
    client.pread(100, 5000)
    client.cache(BLOCK, 100 * BLOCK)
    bgctl("--cache-all", files.control)
    assert maps(client) == (set(range(BLOCKS)), set())


def test_marks_outlive_an_end_in_good_order_and_an_adoption_marks_all(
    start: Start, files: CacheFiles, origin: Server
) -> None:
    server = proxy(start, files, origin)
    client = connect(server)
    client.pread(9 * BLOCK, 0)
    client.pwrite(bytes(BLOCK), BLOCK)
    for options, written in ((), {1}), ((), {1}), (("--adopt-cache",), set(range(9))), ((), set(range(9))):
        server.stop()
        server = proxy(start, files, origin, *options)
        assert maps(connect(server)) == (set(range(9)), written)


def test_several_servers_on_one_cache_have_one_map(start: Start, files: CacheFiles, origin: Server) -> None:
    one = proxy(start, files, origin)
    other = start(*files.arguments(origin.uri, control=files.control.with_suffix(".other")))
    clients = connect(one), connect(other)
    for number, client in enumerate(clients * 40):
        client.pwrite(bytes(BLOCK), number * BLOCK)
    assert [maps(client) for client in clients] == [(set(range(80)),) * 2] * 2


def test_after_a_switch_everything_is_only_here(start: Start, files: CacheFiles, origin: Server) -> None:
    """For clients that were there before, and if it has to be a proxy again: what was written then nobody has noted."""
    server = proxy(start, files, origin)
    client = connect(server)
    bgctl("--cache-all", files.control)
    assert maps(client) == (set(range(BLOCKS)), set())
    bgctl("--switch", files.control)
    for one in (client, connect(server)):
        assert maps(one) == (set(range(BLOCKS)),) * 2
    client.pwrite(bytes(BLOCK), 0)
    server.stop()
    assert maps(connect(proxy(start, files, origin))) == (set(range(BLOCKS)),) * 2


def test_a_damaged_map_counts_all_of_its_page_as_written(start: Start, files: CacheFiles, origin: Server) -> None:
    server = proxy(start, files, origin)
    client = connect(server)
    client.pread(20 * BLOCK, 0)
    client.pwrite(bytes(BLOCK), BLOCK)
    server.stop()
    with files.state.open("rb+") as file:
        file.seek(-80, 2)
        file.write(bytes(80))
    server = proxy(start, files, origin)
    server.wait_for_log("20 blocks count as written by clients, as they may be")
    assert maps(connect(server)) == (set(range(20)),) * 2
