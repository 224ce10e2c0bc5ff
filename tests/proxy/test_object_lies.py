"""A proxy of a web server that lies, fails and cuts: no wrong byte, no block marked as cached that is not."""

from __future__ import annotations

import random
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from caching import BLOCK, CacheFiles, Reading, connect, query
from conftest import MIB, Start
from launch import fails
from model import read_all
from server_process import Server, wait_until
from web_origin import Answer, Asked, WebOrigin

from xnbd.origin.address import parse_origin
from xnbd.origin.base import Data, OriginLost, Terms
from xnbd.origin.objects import origin as objects
from xnbd.origin.objects.address import parse_uri
from xnbd.origin.objects.origin import ObjectOrigin
from xnbd.origin.probe import probe

SIZE = MIB + 1234
Twist = Callable[[Asked, Answer], Answer]


@pytest.fixture
def web() -> Iterator[WebOrigin]:
    server = WebOrigin(random.Random(190).randbytes(SIZE))
    yield server
    server.close()


@pytest.fixture
def proxy(start: Start, files: CacheFiles, web: WebOrigin) -> Server:
    return start(*files.arguments(web.uri(), "--readahead", "0"))


def read(proxy: Server, block: int) -> int:
    """The error of a READ of *block*."""
    return Reading(connect(proxy.uri), block * BLOCK, BLOCK).wait()


def with_headers(**headers: str) -> Twist:
    return lambda asked, answer: answer._replace(
        headers={**answer.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
    )


def whole(asked: Asked, answer: Answer) -> Answer:
    """A range is answered with the whole object."""
    return Answer(200, {"ETag": '"one"'}, bytes(SIZE))


# At the start

AT_THE_START = [
    (whole, "it answers a range of bytes with the whole object: it cannot be read in parts"),
    (lambda _, answer: answer._replace(headers={"Content-Range": answer.headers["Content-Range"]}), "neither ETag nor"),
    (with_headers(Content_Range="bytes 4096-8191/9999"), "it sent other bytes than were asked for"),
    (with_headers(Content_Range="bytes 0-4095/*"), "it does not tell which bytes it sent"),
    (lambda *_: Answer(416, {}), "its disk is empty (0 bytes)"),
    (lambda *_: Answer(500, {}), "HTTP status 500 Internal Server Error"),
    (lambda *_: Answer(0, {}), "it closed the connection too early"),
    (
        lambda *_: Answer(400, {}, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"),
        "AuthorizationHeaderMalf",
    ),
    (lambda *_: Answer(301, {}), "is the region the right one?"),
]


@pytest.mark.parametrize(("twist", "message"), AT_THE_START)
def test_what_makes_no_sense_is_told_at_the_start(web: WebOrigin, twist: Twist, message: str) -> None:
    web.twist = twist
    with pytest.raises(OriginLost) as lost:
        probe(parse_origin(web.uri()), timeout=20)
    assert message in str(lost.value)
    assert "\n" not in str(lost.value)


def test_a_server_that_says_nothing_is_given_up_at_the_start(web: WebOrigin) -> None:
    silent = threading.Event()

    def wait(_: Asked, answer: Answer) -> Answer:
        silent.wait(20)
        return answer

    web.twist = wait
    with pytest.raises(OriginLost, match=r"no answer within 0\.5 s"):
        probe(parse_origin(web.uri()), timeout=0.5)
    silent.set()


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1, (1 << 63) - 1])
def test_a_size_that_no_file_can_have_is_refused(files: CacheFiles, web: WebOrigin, size: int) -> None:
    web.twist = with_headers(Content_Range=f"bytes 0-4095/{size}")
    told = fails(*files.arguments(web.uri()))[1]
    reasons = f"its disk has {size} bytes, more than any file can have", "the file system has no files of that size"
    assert any(reason in told for reason in (*reasons, "No space left on device"))  # as it is with a tmpfs
    assert "ulimit" not in told


def test_an_empty_object_is_told_as_one(files: CacheFiles) -> None:
    empty = WebOrigin(b"")
    told = fails(*files.arguments(empty.uri()))[1]
    empty.close()
    assert told.strip().endswith(f"origin {empty.uri()}: its disk is empty (0 bytes)")


def test_the_refusal_of_a_start_is_one_line(files: CacheFiles, web: WebOrigin) -> None:
    web.twist = whole
    assert "it cannot be read in parts" in fails(*files.arguments(web.uri()))[1]


# What the conditions are


@pytest.mark.parametrize(
    ("etag", "header", "value"),
    [
        ('"one"', "if-match", '"one"'),
        ('W/"one"', "if-unmodified-since", "Sat, 28 Nov 2026 12:00:00 GMT"),
        (None, "if-unmodified-since", "Sat, 28 Nov 2026 12:00:00 GMT"),
    ],
)
def test_each_read_says_which_object_it_wants(
    start: Start, files: CacheFiles, web: WebOrigin, etag: str, header: str, value: str
) -> None:
    web.etag = etag
    proxy = start(*files.arguments(web.uri()))
    assert read_all(connect(proxy.uri)) == web.disk
    reads = [asked for asked in web.asked if (asked.start, asked.stop) != (0, BLOCK)]
    assert reads
    assert {asked.headers.get(header) for asked in reads} == {value}


# Another object

CHANGES: List[Tuple[str, Twist]] = [
    ("412", lambda asked, answer: Answer(412, {})),
    ("its ETag", with_headers(ETag='"two"')),
    ("no ETag", lambda asked, answer: answer._replace(headers={"Content-Range": answer.headers["Content-Range"]})),
    (
        "its size",
        lambda asked, answer: answer._replace(
            headers={**answer.headers, "Content-Range": f"bytes {asked.start}-{asked.stop - 1}/{SIZE + 5}"}
        ),
    ),
    ("416", lambda asked, answer: Answer(416, {})),
]


@pytest.mark.parametrize(("_name", "twist"), CHANGES, ids=[name for name, _ in CHANGES])
def test_a_reply_of_another_object_is_no_part_of_the_disk(
    proxy: Server, files: CacheFiles, web: WebOrigin, _name: str, twist: Twist
) -> None:
    """Also where the server minds no condition. The former object comes back, and its blocks with it."""
    web.heeds_conditions = False
    assert read(proxy, 0) == 0
    web.twist = lambda asked, answer: twist(asked, answer) if asked.start else answer
    proxy.expected_errors = ["THE DISK THERE HAS CHANGED"]
    assert read(proxy, 100) == 5
    assert read(proxy, 0) == 0
    assert files.cached() == list(range(64))
    assert proxy.log().count("THE DISK THERE HAS CHANGED") == 1
    assert "with --clear-bitmap, which also forgets what clients have written" in proxy.log()
    web.twist = lambda asked, answer: answer
    wait_until(lambda: read(proxy, 100) == 0, "the former object")
    assert read_all(connect(proxy.uri)) == web.disk


def test_a_change_in_the_middle_of_many_reads_mixes_nothing(proxy: Server, files: CacheFiles, web: WebOrigin) -> None:
    """The server minds no condition, and sends another object from some read on."""
    proxy.expected_errors = ["THE DISK THERE HAS CHANGED"]
    old, count = web.disk, 0
    web.heeds_conditions = False

    def change(asked: Asked, answer: Answer) -> Answer:
        nonlocal count
        count += 1
        if count == 3:
            web.disk, web.etag = old[::-1], '"two"'
        return answer

    web.twist = change
    client = connect(proxy.uri)
    readings = [Reading(client, at, BLOCK) for at in range(0, MIB, 64 << 10)]
    errors = [reading.wait() for reading in readings]
    assert 5 in errors
    image, cached = files.image.read_bytes(), files.cached()
    assert all(
        image[block * BLOCK : (block + 1) * BLOCK] == old[block * BLOCK : (block + 1) * BLOCK] for block in cached
    )


# What passes


def now_and_then(bad: Callable[[Answer], Answer]) -> Twist:
    rng = random.Random(7)
    return lambda asked, answer: bad(answer) if rng.random() < 0.3 else answer


@pytest.mark.parametrize(
    "bad",
    [
        lambda answer: Answer(500, {}),
        lambda answer: Answer(503, {}),
        lambda answer: Answer(429, {}),
        lambda answer: Answer(0, {}),
        lambda answer: answer._replace(body=answer.body[:100]),
        lambda answer: answer._replace(body=answer.body[:-1], length=len(answer.body)),
        lambda answer: answer._replace(body=answer.body + b"x"),
        lambda answer: answer._replace(headers={**answer.headers, "Content-Range": f"bytes 1-4096/{SIZE}"}),
    ],
    ids=["500", "503", "429", "closed", "short", "cut", "long", "other range"],
)
def test_what_fails_now_and_then_is_asked_for_again(
    start: Start, files: CacheFiles, web: WebOrigin, bad: Callable[[Answer], Answer]
) -> None:
    proxy = start(*files.arguments(web.uri(), "--fetch-size", "16K"))
    web.twist = now_and_then(bad)
    assert read_all(connect(proxy.uri)) == web.disk


def test_a_body_without_end_is_left_once_it_is_too_long(proxy: Server, web: WebOrigin) -> None:
    honest, sent, most = web.serve, [], 256 * MIB

    def pour(handler: BaseHTTPRequestHandler) -> None:
        headers = f"ETag: {web.etag}\r\nContent-Length: {1 << 40}\r\nContent-Range: bytes 262144-524287/{SIZE}"
        handler.close_connection = True
        count = 0
        try:
            handler.wfile.write(f"HTTP/1.1 206 Told\r\n{headers}\r\n\r\n".encode())
            while count < most:
                count += handler.wfile.write(bytes(MIB))
        except OSError:
            pass  # who has asked has gone
        sent.append(count)

    client = connect(proxy.uri)
    client.pread(1, 0)
    web.serve = pour  # type: ignore[method-assign]
    reading = Reading(client, 262144, BLOCK)
    wait_until(lambda: reading.is_done() or len(sent) >= 2, "a second attempt")
    assert max(sent) < most // 4
    web.serve = honest  # type: ignore[method-assign]
    assert reading.content() == web.disk[262144 : 262144 + BLOCK]


class Sink:
    """Takes what comes for reads whose tokens are their offsets."""

    def __init__(self) -> None:
        self.data: Dict[int, bytes] = {}
        self.done: Dict[int, int] = {}

    def on_data(self, token: int, offset: int, data: Data) -> None:
        assert token == offset
        assert token not in self.data
        self.data[token] = bytes(data)

    def on_hole(self, token: int, offset: int, length: int) -> None:
        raise AssertionError("an object has no holes")

    def on_extents(self, token: int, extents: object) -> None:
        raise AssertionError("nobody has asked")

    def on_done(self, token: int, error: int) -> None:
        self.done[token] = error


def test_a_reply_may_be_cut_at_every_byte(web: WebOrigin) -> None:
    """Nothing of it comes through; the whole one, which comes next, does."""
    sink, first = Sink(), web.answer(Asked("/disk.raw", BLOCK, 2 * BLOCK, {})).to_bytes()
    head = first.index(b"\r\n\r\n") + 4
    cuts = [*range(head + 8), *range(head + 8, head + BLOCK, 197), head + BLOCK - 1]
    web.disk *= len(cuts) * BLOCK // SIZE + 2
    left = {(number + 1) * BLOCK: cut for number, cut in enumerate(cuts)}
    asked_for = list(left)

    def cut_once(asked: Asked, answer: Answer) -> Answer:
        return answer._replace(cut=left.pop(asked.start)) if asked.start in left else answer

    web.twist = cut_once
    origin = ObjectOrigin(parse_uri(web.uri(), None, None), sink, Terms())
    origin.start()
    while not origin.ready:
        origin.wait()
    for offset in asked_for:
        origin.read(offset, offset, BLOCK)
    while origin.outstanding:
        origin.wait()
    origin.close()
    assert sink.done == dict.fromkeys(asked_for, 0)
    assert sink.data == {offset: web.disk[offset : offset + BLOCK] for offset in asked_for}
    assert len(web.asked) >= 2 * len(cuts) + 1


def read_all_of(origin: ObjectOrigin, blocks: range) -> None:
    """Ask for them all, and wait for all."""
    for block in blocks:
        origin.read(block * BLOCK, block * BLOCK, BLOCK)
    while origin.outstanding:
        origin.wait()


def test_how_many_reads_are_under_way_follows_from_how_long_they_take(
    web: WebOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many that share a slow line would all come at its end, and pass for silence."""
    at_once, most, lock, sink = 0, 0, threading.Lock(), Sink()

    def count(_: Asked, answer: Answer) -> Answer:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.1)
        with lock:
            at_once -= 1
        return answer

    origin = ObjectOrigin(parse_uri(web.uri(), None, None), sink, Terms())
    origin.start()
    while not origin.ready:
        origin.wait()
    web.twist = count
    monkeypatch.setattr(objects, "_SLOW", 0.05)
    monkeypatch.setattr(objects, "_QUICK", 0.01)
    read_all_of(origin, range(1, 9))
    assert most <= 2
    web.twist = lambda asked, answer: answer
    monkeypatch.setattr(objects, "_QUICK", 1000)
    read_all_of(origin, range(10, 50))
    together = threading.Barrier(16, timeout=60)

    def meet(_: Asked, answer: Answer) -> Answer:
        together.wait()
        return answer

    web.twist = meet
    read_all_of(origin, range(100, 116))
    origin.close()
    assert not together.broken
    assert len(sink.done) == 8 + 40 + 16


def test_a_server_that_only_fails_is_told_as_lost(proxy: Server, files: CacheFiles, web: WebOrigin) -> None:
    client = connect(proxy.uri)
    client.pread(1, 0)
    web.twist = lambda asked, answer: Answer(503, {})
    reading = Reading(client, 600 << 10, 1)
    proxy.wait_for_log("HTTP status 503 Service Unavailable; 1 request waits for it, trying again")
    assert query(files.control)["origin"]["state"] == "unreachable"
    web.twist = lambda asked, answer: answer
    assert reading.content() == web.disk[600 << 10 : (600 << 10) + 1]


def test_an_object_that_has_gone_comes_back(proxy: Server, web: WebOrigin) -> None:
    client = connect(proxy.uri)
    client.pread(1, 0)
    web.twist = lambda asked, answer: Answer(404, {})
    reading = Reading(client, 600 << 10, 1)
    proxy.wait_for_log("there is no such object; 1 request waits for it, trying again")
    web.twist = lambda asked, answer: answer
    assert reading.content() == web.disk[600 << 10 : (600 << 10) + 1]


def test_a_silent_server_is_left_after_the_origin_timeout(start: Start, files: CacheFiles, web: WebOrigin) -> None:
    proxy = start(*files.arguments(web.uri(), "--origin-timeout", "3"))
    client, silent = connect(proxy.uri), threading.Event()
    client.pread(1, 0)

    def wait(_: Asked, answer: Answer) -> Answer:
        silent.wait(30)
        return answer

    web.twist = wait
    assert Reading(client, 600 << 10, 1).wait() == 5
    assert client.pread(1, 1) == web.disk[1:2]
    silent.set()
    web.twist = lambda asked, answer: answer
    wait_until(lambda: Reading(client, 600 << 10, 1).wait() == 0, "an answer")


def test_a_password_does_not_follow_a_redirect_to_another_host(
    start: Start, tmp_path: Path, files: CacheFiles, web: WebOrigin
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login alice password x\n")
    netrc.chmod(0o600)

    def redirect(asked: Asked, answer: Answer) -> Answer:
        if asked.target == "/disk.raw":
            return Answer(302, {"Location": f"http://localhost:{web.port}/there"})
        return answer

    web.twist = redirect
    proxy = start(*files.arguments(web.uri()), env={"NETRC": str(netrc)})
    assert connect(proxy.uri).pread(9, 0) == web.disk[:9]
    assert all(("authorization" in asked.headers) == (asked.target == "/disk.raw") for asked in web.asked)
