"""One disk at several origins: who fails or is slow is left for the others, and no client notices."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set

import nbd
import pytest
from caching import BLOCK, CacheFiles, Reading, ask, bgctl, connect, query
from certificates import Certificates
from conftest import MIB, Start
from launch import fails
from lying_origin import (
    NONE,
    Asked,
    LyingOrigin,
    Visitor,
    chunk,
    data_chunk,
    error_chunk,
    hole_chunk,
    status_chunk,
)
from model import Model, read_all
from nbdkit_origin import NbdkitOrigin
from scraping import metrics_port, scrape
from server_process import Server, wait_until
from upgrades import upgrade
from web_server import WebServer

from xnbd.proxy.state.sums import sums_size

SIZE = 16 * MIB + 1234
ROUNDS = int(os.environ.get("XNBD_SEVERAL_ROUNDS", "40"))
"""Of the model; some thousands for the long form."""

PATIENT = 8.0
"""Seconds that a loaded computer may take for what should take less than one."""

Ask = Callable[[], List[Dict[str, Any]]]


@pytest.fixture
def disk() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def image(tmp_path: Path, disk: bytes) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(disk)
    return path


@pytest.fixture
def first(tmp_path: Path, image: Path) -> Iterator[NbdkitOrigin]:
    with NbdkitOrigin(tmp_path, "first", image) as origin:
        yield origin


@pytest.fixture
def second(tmp_path: Path, image: Path) -> Iterator[NbdkitOrigin]:
    with NbdkitOrigin(tmp_path, "second", image) as origin:
        yield origin


@pytest.fixture
def proxy(start: Start, files: CacheFiles, first: NbdkitOrigin, second: NbdkitOrigin) -> Server:
    return start(*files.arguments(first.uri, "--origin", second.uri, "--readahead", 0))


@pytest.fixture
def places(files: CacheFiles) -> Ask:
    return lambda: list(query(files.control)["origin"]["endpoints"])


class Reader:
    """Reads one block after the other that nobody has read before, and compares it with *disk*."""

    def __init__(self, server: Server, disk: bytes) -> None:
        self._client = connect(server.uri)
        self._disk = disk
        self._blocks = list(range(SIZE // BLOCK))
        random.Random(7).shuffle(self._blocks)

    def next(self) -> float:
        """Reads the next one: seconds that it took."""
        at = self._blocks.pop() * BLOCK
        began = time.monotonic()
        assert self._client.pread(BLOCK, at) == self._disk[at : at + BLOCK]
        return time.monotonic() - began

    def read_until(self, condition: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.next()
            return condition()

        wait_until(look, what)


def test_one_is_killed_while_clients_read_and_comes_back(
    proxy: Server, first: NbdkitOrigin, second: NbdkitOrigin, places: Ask, disk: bytes
) -> None:
    reader = Reader(proxy, disk)
    reader.read_until(lambda: all(place["state"] == "connected" for place in places()), "both origins")
    first.kill()
    reader.read_until(lambda: places()[0]["state"] == "unreachable", "the loss")
    told = places()
    assert told[0]["error"]
    assert told[1]["state"] == "connected"
    assert f"origin {first.uri}: " in proxy.log()
    assert "; the others are asked" in proxy.log()
    first.start()
    reader.read_until(lambda: places()[0]["state"] == "connected", "its return")
    proxy.wait_for_log(f"origin {first.uri}: is there again")
    second.kill()
    for _ in range(10):
        reader.next()
    assert sum(place["bytes"] for place in places()) >= 10 * BLOCK


def test_one_that_is_silent_is_left_and_answers_again(
    start: Start, files: CacheFiles, tmp_path: Path, image: Path, first: NbdkitOrigin, places: Ask, disk: bytes
) -> None:
    with NbdkitOrigin(tmp_path, "slow", image, delay=300) as slow:
        proxy = start(*files.arguments(slow.uri, "--origin", first.uri, "--readahead", 0))
        reader = Reader(proxy, disk)
        reader.read_until(lambda: places()[1]["share"] is not None and places()[1]["share"] > 0.6, "the quick one")
        first.stop()
        assert reader.next() < PATIENT
        took = [reader.next() for _ in range(4)]
        assert max(took) < PATIENT
        first.go_on()
        before = places()[1]["bytes"]
        reader.read_until(lambda: places()[1]["bytes"] >= before + 8 * BLOCK, "the return of the quick one")
        assert min(reader.next() for _ in range(8)) < 0.3


def test_a_copy_takes_from_both_and_survives_the_loss_of_one(
    start: Start, files: CacheFiles, tmp_path: Path, image: Path, disk: bytes, places: Ask
) -> None:
    with NbdkitOrigin(tmp_path, "a", image, delay=40) as one, NbdkitOrigin(tmp_path, "b", image, delay=40) as two:
        start(*files.arguments(one.uri, "--origin", two.uri))
        assert ask(files.control, "cache-all", wait=False)["done"]
        wait_until(lambda: all(place["bytes"] >= 2 * MIB for place in places()), "blocks from both")
        two.kill()
        wait_until(lambda: query(files.control)["blocks"]["cached"] == -(-SIZE // BLOCK), "the whole disk")
        assert files.image.read_bytes() == disk
        told = places()
        assert sum(place["bytes"] for place in told) == SIZE
        assert sum(place["share"] for place in told) == pytest.approx(1)


def test_errors_of_one_are_none(proxy: Server, first: NbdkitOrigin, second: NbdkitOrigin, disk: bytes) -> None:
    reader = Reader(proxy, disk)
    first.failing.touch()
    for _ in range(30):
        reader.next()
    second.failing.touch()
    client = connect(proxy.uri)
    with pytest.raises(nbd.Error) as error:
        client.pread(2 * MIB, 8 * MIB)
    assert error.value.errnum == errno.EIO
    first.failing.unlink()
    second.failing.unlink()
    assert read_all(client) == disk


def test_the_last_one_is_waited_for(proxy: Server, first: NbdkitOrigin, second: NbdkitOrigin, disk: bytes) -> None:
    client = connect(proxy.uri)
    assert client.pread(BLOCK, 0) == disk[:BLOCK]
    first.kill()
    second.kill()
    reading = Reading(client, 3 * MIB, BLOCK)
    proxy.wait_for_log(" for it, trying again")
    assert not reading.is_done()
    second.start()
    assert reading.content() == disk[3 * MIB : 3 * MIB + BLOCK]


def test_one_of_another_size_is_refused(
    start: Start, files: CacheFiles, tmp_path: Path, first: NbdkitOrigin, disk: bytes, places: Ask
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    with NbdkitOrigin(tmp_path, "other", other) as wrong:
        status, line = fails(*files.arguments(first.uri, "--origin", wrong.uri))
        assert status == 1
        reason = f"origin {wrong.uri}: its disk has {MIB} bytes, and that of {first.uri} {SIZE}"
        assert f"{reason}: name origins of one and the same disk" in line
        start(*files.arguments(first.uri)).stop()
        proxy = start(*files.arguments(first.uri, "--origin", wrong.uri, "--readahead", 0))
        proxy.expected_errors = [f"it has {MIB} bytes, not {SIZE} as before; it is not used"]
        reader = Reader(proxy, disk)
        reader.read_until(lambda: places()[1]["state"] == "refused", "the refusal")
        answer = ask(files.control, "reconnect", uri=f"{first.uri} {wrong.uri}")
        assert answer["error"] == f"the disk at {wrong.uri} has {MIB} bytes, not {SIZE}; nothing was changed"
        shutil.copyfile(tmp_path / "disk.img", other)
        wrong.kill()
        wrong.start()
        reader.read_until(lambda: places()[1]["state"] == "connected", "the right disk")


def test_an_origin_among_those_that_are_given_has_to_be_the_first_one_of_before(
    start: Start, files: CacheFiles, tmp_path: Path, image: Path, first: NbdkitOrigin, second: NbdkitOrigin
) -> None:
    start(*files.arguments(first.uri)).stop()
    start(*files.arguments(second.uri, "--origin", first.uri)).stop()
    _, line = fails(*files.arguments(second.uri))
    assert "is of the origin" in line
    status, line = fails(*files.arguments(first.uri, "--origin", first.uri))
    assert (status, line) == (2, f"xnbd-server: origin {first.uri}: is named twice\n")
    status, line = fails(*files.arguments(first.uri, *(w for n in range(8) for w in ("--origin", f"nbd://h/{n}"))))
    assert (status, line) == (2, "xnbd-server: a disk has at most 8 origins, not 9\n")


def test_no_password_is_taken_or_shown(files: CacheFiles) -> None:
    status, line = fails(*files.arguments("nbd://h/d", "--origin", "https://me:secret@h/disk.raw"))
    assert status == 2
    assert "secret" not in line
    assert "no user and no password belong in an address" in line


def test_it_starts_while_one_is_away(
    start: Start, files: CacheFiles, first: NbdkitOrigin, second: NbdkitOrigin, disk: bytes
) -> None:
    first.kill()
    proxy = start(*files.arguments(first.uri, "--origin", second.uri))
    assert f"origin {first.uri}: " in proxy.log()
    assert read_all(connect(proxy.uri)) == disk


def test_several_are_kept_by_an_upgrade_and_replaced_by_a_reconnection(
    proxy: Server, files: CacheFiles, first: NbdkitOrigin, second: NbdkitOrigin, disk: bytes, places: Ask
) -> None:
    client = connect(proxy.uri)
    upgrade(files.control)
    assert client.pread(MIB, 0) == disk[:MIB]
    assert [place["address"] for place in places()] == [first.uri, second.uri]
    bgctl("--reconnect", files.control, second.uri)
    assert "endpoints" not in query(files.control)["origin"]
    first.kill()
    assert client.pread(MIB, MIB) == disk[MIB : 2 * MIB]
    bgctl("--reconnect", "--origin", second.uri, files.control, first.uri)
    assert client.pread(MIB, 2 * MIB) == disk[2 * MIB : 3 * MIB]
    assert [place["bytes"] for place in places()] == [0, MIB]
    _, text, _ = bgctl("--query", files.control)
    assert f"2 of the same disk\n              connected, 1 connection\n              {first.uri}\n" in text
    assert "100 % of what has come" in text


def test_metrics_tell_of_each(
    start: Start, files: CacheFiles, first: NbdkitOrigin, second: NbdkitOrigin, disk: bytes
) -> None:
    proxy = start(*files.arguments(first.uri, "--origin", second.uri, "--readahead", 0, "--metrics", 0))
    reader, port = Reader(proxy, disk), metrics_port(proxy.log())

    def told(name: str) -> List[float]:
        return [scrape(port)(name, origin=origin.uri) for origin in (first, second)]

    reader.read_until(lambda: sum(told("xnbd_origin_endpoint_bytes_total")) > 0, "bytes")
    second.kill()
    reader.read_until(lambda: told("xnbd_origin_endpoint_up") == [1, 0], "the loss")


# Objects


@pytest.fixture
def web(tmp_path: Path, image: Path, certificates: Certificates) -> Iterator[WebServer]:
    root = tmp_path / "www"
    root.mkdir()
    for name in ("one.raw", "two.raw"):
        shutil.copy2(image, root / name)
    with WebServer(tmp_path, root, certificates.server) as server:
        yield server


def test_an_object_and_an_nbd_server(
    start: Start, files: CacheFiles, web: WebServer, first: NbdkitOrigin, disk: bytes, places: Ask
) -> None:
    proxy = start(*files.arguments(first.uri, "--origin", web.uri("one.raw"), "--readahead", 0))
    client = connect(proxy.uri)
    assert client.pread(MIB, 0) == disk[:MIB]
    wait_until(lambda: bool(client.pread(BLOCK, 2 * MIB)) and places()[1]["version"], "the version of the object")
    first.kill()
    assert read_all(client) == disk
    assert places()[1]["bytes"] > SIZE // 2


def test_a_changed_object_is_left_for_the_other_one(
    start: Start, files: CacheFiles, tmp_path: Path, web: WebServer, disk: bytes, places: Ask
) -> None:
    proxy = start(*files.arguments(web.uri("one.raw"), "--origin", web.uri("two.raw"), "--readahead", 0))
    reader = Reader(proxy, disk)
    reader.read_until(lambda: all(place["version"] for place in places()), "both versions")
    proxy.expected_errors = ["THE DISK THERE HAS CHANGED. Nothing is read there any more; the other origins are asked"]
    new = tmp_path / "new"
    new.write_bytes(bytes(SIZE))
    os.utime(new, (1, 1))  # nginx makes the ETag of size and time, which has seconds
    new.rename(tmp_path / "www" / "one.raw")
    reader.read_until(lambda: places()[0]["state"] == "refused", "the change")
    assert places()[0]["changed"]
    assert read_all(connect(proxy.uri)) == disk


def test_two_objects_with_different_versions_are_not_the_same_disk(
    files: CacheFiles, web: WebServer, tmp_path: Path
) -> None:
    os.utime(tmp_path / "www" / "two.raw", (1, 1))
    status, line = fails(*files.arguments(web.uri("one.raw"), "--origin", web.uri("two.raw")))
    assert status == 1
    assert f"origin {web.uri('two.raw')}: it has another disk, ETag " in line


# Anything at any time


def test_clients_notice_nothing_as_long_as_one_origin_lives(
    start: Start, files: CacheFiles, tmp_path: Path, image: Path, disk: bytes, seed: int
) -> None:
    """Origins are killed, stopped and made to fail at random, while clients read and write and a copy goes on."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        origins = [
            stack.enter_context(NbdkitOrigin(tmp_path, f"origin{n}", image, delay=rng.choice((0, 2, 20))))
            for n in range(3)
        ]
        others = [word for origin in origins[1:] for word in ("--origin", origin.uri)]
        proxy = start(*files.arguments(origins[0].uri, *others))
        clients = [connect(proxy.uri) for _ in range(3)]
        trouble = Trouble(origins, random.Random(seed + 1))
        stack.callback(trouble.end)
        model = Model(clients, disk, rng)
        model.play(ROUNDS // 2)
        assert ask(files.control, "cache-all", wait=False)["done"]
        model.run(ROUNDS - ROUNDS // 2)
        assert trouble.count


class Trouble:
    """Does something to one of *origins* at a time, again and again."""

    def __init__(self, origins: List[NbdkitOrigin], rng: random.Random) -> None:
        self.count = 0
        self._origins = origins
        self._rng = rng
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._rng.uniform(0, 0.3)):
            origin, kind = self._rng.choice(self._origins), self._rng.randrange(3)
            self.count += 1
            if kind == 0:
                origin.kill()
                self._over.wait(self._rng.uniform(0, 1))
                origin.start()
            elif kind == 1:
                origin.stop()
                self._over.wait(self._rng.uniform(0, 2))
                origin.go_on()
            else:
                origin.failing.touch()
                self._over.wait(self._rng.uniform(0, 1))
                origin.failing.unlink()


PIECE = 64 * BLOCK
SPOILED = (4 * PIECE, SIZE // PIECE * PIECE)
"""Offsets of the READs that one origin begins to answer, and another one answers: in the disk, and at its end."""

Spoil = Callable[[Visitor, Asked], None]


def in_odd_chunks(visitor: Visitor, asked: Asked, disk: bytes) -> None:
    """Answer *asked* in chunks that end where no block ends, a hole where there is one among them."""
    at, end = asked.offset, asked.offset + asked.length
    while at < end:
        stop = min(end, at + 5 * 512)
        is_hole = not any(disk[at:stop])
        visitor.send(
            hole_chunk(asked.cookie, at, stop - at, 0) if is_hole else data_chunk(asked.cookie, at, disk[at:stop], 0)
        )
        at = stop
    visitor.send(chunk(asked.cookie, NONE))


def hang_up(visitor: Visitor, asked: Asked) -> None:
    time.sleep(0.02)  # so that what was sent is taken before the connection is seen to be gone
    visitor.reset()
    raise EOFError


HALF_ANSWERS: Dict[str, Spoil] = {
    "stalls": lambda visitor, asked: visitor.wait_until_gone(),
    "hangs up": hang_up,
    "has an error": lambda visitor, asked: visitor.send(error_chunk(asked.cookie, errno.EIO)),
}


@pytest.mark.parametrize("odd", [False, True], ids=["whole", "odd chunks"])
@pytest.mark.parametrize("way", HALF_ANSWERS)
def test_sums_are_right_where_one_begins_an_answer_and_another_one_gives_it(
    start: Start, files: CacheFiles, tmp_path: Path, way: str, odd: bool
) -> None:
    disk = random.Random(5).randbytes(SIZE - 9 * BLOCK) + bytes(9 * BLOCK)

    def spoil(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        while True:
            asked = visitor.request()
            whole = disk[asked.offset : asked.offset + asked.length]
            if asked.command == 7:
                visitor.send(status_chunk(asked.cookie, (asked.length, 0)))
            elif asked.offset in SPOILED and asked.length > BLOCK:
                void = bytes(byte ^ 1 for byte in whole)
                visitor.send(data_chunk(asked.cookie, asked.offset, void[: 16 * BLOCK], 0))
                visitor.send(data_chunk(asked.cookie, asked.offset + 32 * BLOCK, void[32 * BLOCK : -1536], 0))
                spoiled.add(asked.offset)
                HALF_ANSWERS[way](visitor, asked)
            else:
                visitor.send(data_chunk(asked.cookie, asked.offset, whole))

    def answer(visitor: Visitor) -> None:
        visitor.negotiate(SIZE)
        while True:
            asked = visitor.request()
            time.sleep(0.05)  # the other one is asked first
            if asked.command == 7:
                visitor.send(status_chunk(asked.cookie, (asked.length, 0)))
            elif odd:
                in_odd_chunks(visitor, asked, disk)
            else:
                visitor.send(data_chunk(asked.cookie, asked.offset, disk[asked.offset : asked.offset + asked.length]))

    spoiled: Set[int] = set()
    with LyingOrigin(tmp_path / "one", spoil) as one, LyingOrigin(tmp_path / "two", answer) as two:
        arguments = files.arguments(one.uri, "--origin", two.uri, "--readahead", 0)
        proxy = start(*arguments)
        client = connect(proxy.uri)
        for at in SPOILED:
            for block in range(8):  # so that the first one is known to be the quicker one
                client.pread(BLOCK, 2 * SPOILED[0] + at // 2 + 2 * block * BLOCK)
            if at + PIECE < SIZE:
                assert client.pread(PIECE, at + PIECE) == disk[at + PIECE : at + 2 * PIECE]
            length = min(PIECE, SIZE - at)
            assert client.pread(length, at) == disk[at : at + length]
        client.shutdown()
        size = files.sums.stat().st_size
        status, told, _ = bgctl("--scrub", files.control, check=False)
        assert status == 0, told
        assert spoiled
        proxy.stop()
        proxy = start(*arguments)
        assert files.sums.stat().st_size == size == sums_size(-(-SIZE // BLOCK))
        assert query(files.control)["counters"]["damaged"] == 0


def test_sums_that_are_too_long_are_cut_and_serve_on(start: Start, files: CacheFiles, first: NbdkitOrigin) -> None:
    arguments = files.arguments(first.uri, "--origin-timeout", 3)
    proxy = start(*arguments)
    content = connect(proxy.uri).pread(MIB, 0)
    proxy.stop()
    size = files.sums.stat().st_size
    with files.sums.open("ab") as file:
        file.write(bytes(100))
    first.kill()
    proxy = start(*arguments)
    assert connect(proxy.uri).pread(MIB, 0) == content
    assert files.sums.stat().st_size == size
