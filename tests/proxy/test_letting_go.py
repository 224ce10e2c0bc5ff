"""Clean blocks leave the cache while clients read and write: no wrong byte, no lost write, and their space is free."""

from __future__ import annotations

import os
import random
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Iterator, List, Set

import pytest
from caching import CacheFiles, connect, kill_server
from conftest import MIB, Start
from rawclient import READ, RawClient, pack_request
from server_process import Server, wait_until

from xnbd.proxy.letting_go import LettingGo, Run
from xnbd.proxy.state.checkpoint import ProcessState
from xnbd.proxy.state.format import layout_of
from xnbd.proxy.state.sums import Integrity
from xnbd.scoreboard.scoreboard import Scoreboard
from xnbd.storage import space

BLOCK = 4096
SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture
def origin(start: Start, tmp_path: Path, content: bytes) -> Server:
    image = tmp_path / "origin.img"
    image.write_bytes(content)
    return start("--target", "--readonly", image)


@pytest.fixture
def files(tmp_path: Path) -> CacheFiles:
    return CacheFiles(tmp_path)


@pytest.fixture
def proxy(start: Start, files: CacheFiles, origin: Server) -> Server:
    return start(*files.arguments(origin.uri, "--readahead", "0"))


@contextmanager
def letting(files: CacheFiles) -> Iterator[LettingGo]:
    """One that lets blocks go, in this process, which is none of the server's."""
    board = files.bitmap.with_suffix(".bitmap.board")
    checked = files.bitmap.with_suffix(".bitmap.checked")
    cache, bitmap, state, shared, sums, marks = (
        os.open(path, os.O_RDWR) for path in (files.image, files.bitmap, files.state, board, files.sums, checked)
    )
    layout = layout_of(SIZE)
    process = ProcessState(bitmap, state, layout, Integrity(sums, marks, layout))
    with closing(process), closing(Scoreboard(shared)) as scoreboard:
        yield LettingGo(cache, SIZE, process, scoreboard)
    os.close(cache)


def let_go(files: CacheFiles, *runs: Run, timeout: float = 60) -> int:
    with letting(files) as letting_go:
        return letting_go.let_go(list(runs) or [(0, BLOCKS)], timeout)


def allocated(files: CacheFiles) -> int:
    return files.image.stat().st_blocks * 512


def test_clean_blocks_go_with_their_space_and_are_fetched_again(
    proxy: Server, files: CacheFiles, content: bytes
) -> None:
    client = connect(proxy.uri)
    assert client.pread(SIZE, 0) == content
    client.pwrite(b"w" * 3 * BLOCK, 5 * BLOCK)
    assert let_go(files, (0, 100), (200, 300)) == 197
    assert files.cached() == [5, 6, 7, *range(100, 200), *range(300, BLOCKS)]
    assert allocated(files) <= SIZE - 197 * BLOCK + MIB
    expected = content[: 5 * BLOCK] + b"w" * 3 * BLOCK + content[8 * BLOCK :]
    assert client.pread(SIZE, 0) == expected
    assert len(files.cached()) == BLOCKS
    proxy.stop()
    assert files.is_clean()


def test_what_was_let_go_is_not_there_after_any_end(
    start: Start, proxy: Server, files: CacheFiles, origin: Server, content: bytes
) -> None:
    client = connect(proxy.uri)
    client.pread(MIB, 0)
    client.pwrite(b"w" * BLOCK, 0)
    assert let_go(files) == 255
    kill_server(proxy)
    again = connect(start(*files.arguments(origin.uri, "--readahead", "0")).uri)
    assert files.cached() == [0]
    assert again.pread(MIB, 0) == b"w" * BLOCK + content[BLOCK:MIB]


def test_who_dies_after_the_bits_are_gone_leaves_files_that_start(
    start: Start, proxy: Server, files: CacheFiles, origin: Server, content: bytes
) -> None:
    client = connect(proxy.uri)
    client.pread(MIB, 0)
    client.flush()
    with letting(files) as letting_go:
        letting_go._take_bits([(0, 100)], 1e9)
    kill_server(proxy)
    server = start(*files.arguments(origin.uri, "--readahead", "0"))
    assert files.cached() == list(range(100, 256))
    assert connect(server.uri).pread(MIB, 0) == content[:MIB]


@pytest.mark.parametrize("oldstyle", [False, True])
def test_replies_that_a_client_has_not_taken_yet_keep_their_content(
    start: Start, files: CacheFiles, origin: Server, content: bytes, oldstyle: bool
) -> None:
    """A client has asked for everything, and takes nothing; an old one has to get it in order."""
    options = ["--readahead", "0", *(["--oldstyle"] if oldstyle else [])]
    proxy = start(*files.arguments(origin.uri, *options))
    with RawClient(proxy.connect()) as client:
        if oldstyle:
            client.receive(152)
        else:
            client.negotiate()
        for at in range(0, SIZE, MIB):
            client.send(pack_request(READ, at, MIB, cookie=at // MIB))
        wait_until(lambda: len(files.cached()) == BLOCKS, "all blocks")
        assert let_go(files) == BLOCKS
        for _ in range(0, SIZE, MIB):
            error, cookie, data = client.simple_reply(MIB)
            assert not error
            assert data == content[cookie * MIB : (cookie + 1) * MIB], cookie


def test_readers_and_writers_never_see_it(proxy: Server, files: CacheFiles, content: bytes) -> None:
    """Four clients read and write parts of their own, at random, while all that is clean goes again and again."""
    ends = threading.Event()
    troubles: List[str] = []

    def work(number: int) -> None:
        rng, client, mine = random.Random(number), connect(proxy.uri), bytearray(content)
        first = number * BLOCKS // 4
        while not ends.is_set() and not troubles:
            block, count = first + rng.randrange(BLOCKS // 4 - 16), rng.randrange(1, 16)
            at, length = block * BLOCK + rng.randrange(BLOCK), count * BLOCK - BLOCK + 1
            if rng.random() < 0.4 and block < first + BLOCKS // 16:  # what was written does not go any more
                data = rng.randbytes(length)
                client.pwrite(data, at)
                mine[at : at + length] = data
            elif client.pread(length, at) != mine[at : at + length]:
                troubles.append(f"client {number} at {at}")
        if client.pread(SIZE // 4, first * BLOCK) != mine[first * BLOCK : first * BLOCK + SIZE // 4]:
            troubles.append(f"client {number} in the end")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    rng, gone = random.Random(9), 0
    with letting(files) as letting_go:
        while gone < 3000 and not troubles:
            first = rng.randrange(BLOCKS - 512) & ~7
            gone += letting_go.let_go([(at, at + 64) for at in range(first, first + 512, 64)], 60)
    ends.set()
    for thread in threads:
        thread.join()
    assert not troubles


def test_a_target_after_the_switch_lets_nothing_go(proxy: Server, files: CacheFiles, content: bytes) -> None:
    client = connect(proxy.uri)
    client.pread(SIZE, 0)
    with letting(files) as letting_go:
        letting_go._scoreboard.mode = 2
        assert letting_go.let_go([(0, BLOCKS)], 10) == 0


def test_no_durable_bit_is_over_a_block_whose_space_is_given_back(
    proxy: Server, files: CacheFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, there = connect(proxy.uri), BLOCKS - 256
    client.pread(there * BLOCK, 0)  # not all of it, for then nothing could be let go
    client.flush()
    punched: Set[int] = set()
    assert durable_bits(files) == set(range(there))
    real = space.punch_hole

    def punch(fd: int, offset: int, length: int) -> None:
        blocks = set(range(offset // BLOCK, (offset + length) // BLOCK))
        assert not blocks & durable_bits(files)
        punched.update(blocks)
        real(fd, offset, length)

    monkeypatch.setattr(space, "punch_hole", punch)
    assert let_go(files, (0, 128), (512, 640)) == 256
    assert punched == {*range(128), *range(512, 640)}
    assert durable_bits(files) == set(range(there)) - punched


def durable_bits(files: CacheFiles) -> Set[int]:
    layout = layout_of(SIZE)
    octets = files.state.read_bytes()[layout.durable : layout.durable + layout.bitmap_size]
    return {block for block in range(layout.blocks) if octets[block >> 3] >> (block & 7) & 1}
