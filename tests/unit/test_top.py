"""xnbd-bgctl --top, without a terminal and servers: figures, texts in columns, views of any size, keys."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from xnbd.cli.cache_map import coarser
from xnbd.cli.quantities import short_duration
from xnbd.cli.top.cells import fit, pad, width_of
from xnbd.cli.top.figures import WINDOW, Figures, History, quantile, sample
from xnbd.cli.top.keys import Keys
from xnbd.cli.top.notes import notes
from xnbd.cli.top.overview import notes_of
from xnbd.cli.top.servers import Server, labels
from xnbd.cli.top.views import Views

BOUNDS = [0.001, 0.01, 0.1]
NONE = {"bytes_read": 0, "bytes_written": 0, "requests": 0, "hits": 0, "misses": 0, "bytes_fetched": 0}


def worker(pid: int = 1, client: str = "192.0.2.1:5", seconds: float = 100.0, **counters: int) -> Dict[str, Any]:
    more = {"queued_requests": counters.pop("queued_requests", 0), "connected_seconds": seconds}
    return {"pid": pid, "client": client, **NONE, **more, **counters}


def answer(*workers: Dict[str, Any], reads: Optional[List[int]] = None, proxy: bool = True, **counters: int) -> Any:
    """A server's answer to a query."""
    told: Dict[str, Any] = {"counters": {**NONE, **counters}, "workers": list(workers), "disk_size": 1 << 30}
    told["durations"] = None if reads is None else {"bounds": BOUNDS, "read": reads}
    if proxy:
        told.update(blocks={"total": 8, "cached": 2}, queue={"requests": 3, "bytes": 0})
    return told


def figures(*answers: Any, every: float = 1.0) -> Figures:
    history = History("a", every)
    *_, last = [history.add(number * every, told) for number, told in enumerate(answers)]
    return last


def test_rates_are_those_since_the_answer_before() -> None:
    found = figures(
        answer(bytes_read=5),
        answer(bytes_read=1000, requests=10),
        answer(bytes_read=5000, bytes_written=10, requests=30, bytes_fetched=8),
        every=2.0,
    )
    assert (found.read, found.written, found.requests, found.fetched) == (2000, 5, 10, 4)
    assert (found.cached, found.waiting) == (0.25, 3)


def test_one_answer_has_no_rates() -> None:
    found = figures(answer(bytes_read=5, requests=3, reads=[]))
    assert (found.read, found.requests, found.hits, found.p50, found.waiting) == (None, None, None, None, 3)


def test_an_answer_that_came_early_does_not_make_the_rate_a_guess() -> None:
    history = History("a", 1.0)
    *_, found = [history.add(at, answer(bytes_read=read)) for at, read in ((0.0, 0), (1.0, 1000), (1.01, 1000))]
    assert found.read == pytest.approx(990, abs=1)


def test_hits_and_percentiles_are_those_of_the_window() -> None:
    answers = [answer(hits=10 * n, misses=n, reads=[n, n, 0, 0]) for n in range(40)]
    assert figures(*answers[:5]).hits == pytest.approx(10 / 11)
    answers += [answer(hits=390, misses=39, reads=[39, 39, 0, 0])] * (int(WINDOW) + 2)
    idle = figures(*answers)
    assert (idle.hits, idle.p50, idle.took["read"]) == (None, None, (None, None))


def test_a_target_has_no_hits_and_nothing_that_waits() -> None:
    found = figures(answer(proxy=False), answer(proxy=False, requests=5, hits=5))
    assert (found.hits, found.fetched, found.cached, found.waiting) == (None, None, None, None)


def test_without_metrics_there_are_no_percentiles() -> None:
    found = figures(answer(), answer(requests=5))
    assert (found.p50, found.p99, found.took, found.requests) == (None, None, {}, 5)


def test_commands_count_together_and_each_for_itself() -> None:
    before, after = answer(reads=[0, 0, 0, 0]), answer(reads=[98, 0, 0, 0])
    after["durations"]["flush"] = [0, 0, 2, 0]
    found = figures(before, after)
    assert found.took["read"] == pytest.approx((0.0005, 0.00099), rel=0.02)
    assert found.took["flush"][0] == pytest.approx(0.055)
    assert (found.p50, found.p99) == pytest.approx((0.00051, 0.055), rel=0.02)


def test_a_server_that_counts_anew_is_another_one() -> None:
    for new in (answer(bytes_read=1), answer(bytes_read=900, reads=[1, 0, 0, 0])):
        found = figures(answer(bytes_read=500, reads=[2, 0, 0, 0]), new)
        assert (found.read, found.p50) == (None, None)


def test_clients_have_rates_of_their_own() -> None:
    before = answer(worker(1, bytes_read=100), worker(2))
    after = answer(worker(1, bytes_read=300, queued_requests=2), worker(3, seconds=0.4, requests=7), worker(4))
    known, new, moved = figures(before, after).clients
    assert (known.read, known.waiting) == (200, 2)
    assert (new.requests, new.seconds) == (7, 0.4)
    assert (moved.read, moved.requests) == (None, None), "it was with another process before"


@pytest.mark.parametrize("told", [{}, {"counters": {}}, {"counters": 5}, {"counters": NONE, "workers": [{}]}])
def test_an_answer_that_makes_no_sense_is_refused(told: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        sample(0.0, told)


# Percentiles


@pytest.mark.parametrize(
    ("buckets", "part", "seconds"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([], 0.5, None),
        ([100, 0, 0, 0], 0.5, 0.0005),
        ([0, 100, 0, 0], 0.5, 0.0055),
        ([0, 100, 0, 0], 1.0, 0.01),
        ([99, 0, 1, 0], 0.99, 0.001),
        ([98, 0, 2, 0], 0.99, 0.055),
        ([0, 0, 0, 5], 0.5, 0.1),
    ],
)
def test_quantiles(buckets: List[int], part: float, seconds: Optional[float]) -> None:
    assert quantile(BOUNDS, buckets, part) == (None if seconds is None else pytest.approx(seconds))


def test_quantiles_are_in_the_bucket_of_the_request(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        times = sorted(rng.choice((0.0005, 0.004, 0.07)) for _ in range(rng.randrange(1, 300)))
        buckets = [sum(low < time <= high for time in times) for low, high in zip([0, *BOUNDS], [*BOUNDS, 9])]
        for part in (0.5, 0.99):
            exact = times[max(0, -int(-part * len(times) // 1) - 1)]
            found = quantile(BOUNDS, buckets, part)
            assert found is not None
            place = next(n for n, bound in enumerate(BOUNDS) if exact <= bound)
            assert (BOUNDS[place - 1] if place else 0) <= found <= BOUNDS[place] * 1.0001


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0us"),
        (2.1e-5, "21us"),
        (1.24e-3, "1.2ms"),
        (0.0123, "12ms"),
        (0.35, "350ms"),
        (2.34, "2.3s"),
        (10, "10.0s"),
    ],
)
def test_short_durations(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text


# Texts in columns


def test_texts_are_cut_by_the_columns_that_they_take() -> None:
    assert width_of("e\u0301日本") == 5
    for text in ("plain text", "日本語の名前", "e\u0301" * 9, "", "x"):
        for columns in range(12):
            assert width_of(fit(text, columns)) <= columns
            assert width_of(pad(text, columns)) == columns
    assert (fit("plain text", 6), fit("plain", 5), pad("日本", 5)) == ("plain~", "plain", "日本 ")


def test_servers_are_called_by_what_tells_them_apart() -> None:
    assert labels(["/run/a.ctl", "b.ctl"]) == {"/run/a.ctl": "a.ctl", "b.ctl": "b.ctl"}
    assert labels(["/run/1/x", "/run/2/x"]) == {"/run/1/x": "1/x", "/run/2/x": "2/x"}
    assert labels(["/x", "x"]) == {"/x": "/x", "x": "x"}
    assert labels(["/run/\x1b[2J"]) == {"/run/\x1b[2J": "\\x1b[2J"}


def test_a_coarser_map_looks_empty_or_full_only_if_it_is() -> None:
    assert coarser([0, 0, 1, 1, 0, 1, 0.5, 0.5], 4) == [0, 1, 0.5, 0.5]
    assert coarser([0.0] * 999 + [1e-9], 1) == [0.001]
    assert coarser([1.0] * 999 + [0.999], 1) == [0.999]
    assert coarser([0.3, 1], 40) == [0.3, 1]


# Keys


def keys(*parts: bytes) -> List[str]:
    """What is made of what comes in *parts*, with a pause behind the last one."""
    made = Keys()
    return [*(name for part in parts for name in made.take(part)), *made.finish()]


def test_keys_that_come_in_parts_are_whole() -> None:
    assert keys(b"\x1b", b"[", b"A", b"\x1bOB\r", b"q") == ["up", "down", "enter", "q"]
    assert keys(b"\x1b") == ["back"]
    assert keys(b"\x1b", b"q") == ["back", "q"]
    assert keys(b"\x1b[1;5A\x1b[15~x\xc3\xa4<>r") == ["<", ">", "r"]


# Views


def servers_with(directory: Path, *answers: Any) -> List[Server]:
    """Servers that have answered; None is one that never will."""
    found = []
    for number, told in enumerate(answers):
        server = Server(str(directory / str(number)), f"server{number}", 1.0, 30.0)
        server.progress()
        if told is not None:
            shares = [0.0] * 100 + [0.5] * 100 + [1.0] * 100
            for at in (0.0, 1.0):
                server.take({**told, "map": shares}, at)
        found.append(server)
    return found


def text_of(views: Views, columns: int = 80, rows: int = 24) -> str:
    return "\n".join(line.text for line in views.lines(columns, rows))


def test_views_of_any_size_have_as_many_lines(tmp_path: Path) -> None:
    servers = servers_with(tmp_path, *[answer(*(worker(pid) for pid in range(n))) for n in range(9)], None)
    views = Views(servers, "utf-8")
    for press in ("", "enter", "down"):
        views.press(press)
        for columns in (1, 20, 80, 400):
            for rows in (1, 2, 3, 5, 8, 13, 24, 60):
                assert len(views.lines(columns, rows)) == rows


def test_in_80_columns_nothing_is_cut_that_has_a_usual_length(tmp_path: Path) -> None:
    views = Views(servers_with(tmp_path, answer(worker()), answer(proxy=False)), "utf-8")
    assert all(width_of(line.text) <= 80 for line in views.lines(80, 24))
    for heading in ("READ/s", "WRITE/s", "REQS/s", "P50", "P99", "HITS", "CACHED", "WAIT", "CLIENT"):
        assert heading in text_of(views)


def test_the_map_is_asked_for_where_it_is_shown(tmp_path: Path) -> None:
    servers = servers_with(tmp_path, answer(), answer())
    views = Views(servers, "utf-8")
    assert "MAP" not in text_of(views, 80)
    assert [server.map_every for server in servers] == [None, None]
    assert re.search(r"\|·+░?▒+▓?█+\|", text_of(views, 120))
    assert all(server.map_every for server in servers)
    views.press("down")
    views.press("enter")
    assert "a character" in text_of(views, 80)
    assert [server.map_every for server in servers] == [None, 0.0]


def test_a_server_that_is_selected_is_in_sight(tmp_path: Path) -> None:
    views = Views(servers_with(tmp_path, *[answer(worker())] * 40), "utf-8")
    for number in range(40):
        shown = [line for line in views.lines(80, 24) if line.style == "\x1b[7m"]
        assert [line.text.split()[0] for line in shown] == [sorted(f"server{n}" for n in range(40))[number]]
        views.press("down")
    assert "to 40 shown" in text_of(views)


def test_servers_are_sorted_by_what_keys_choose(tmp_path: Path) -> None:
    waiting = [answer() for _ in range(3)]
    for told, requests in zip(waiting, (5, 70, 30)):
        told["queue"]["requests"] = requests
    views = Views(servers_with(tmp_path, *waiting, answer(proxy=False), None), "utf-8")

    def order() -> List[str]:
        return [line[6] for line in text_of(views).splitlines() if re.match(r"server\d ", line)]

    assert order() == ["0", "1", "2", "3", "4"]
    while "< > by WAIT " not in text_of(views):
        views.press(">")
    assert order() == ["1", "2", "0", "3", "4"]
    views.press("r")
    assert "by WAIT, reversed" in text_of(views)
    assert order() == ["0", "2", "1", "3", "4"]
    for _ in range(40):
        views.press("<")
        text_of(views)


def test_clients_that_read_and_write_most_come_first(tmp_path: Path) -> None:
    server = Server(str(tmp_path / "none"), "a", 1.0, 30.0)
    busy = [worker(pid, f"client{pid}", bytes_read=100 * pid, bytes_written=1000 * (pid == 2)) for pid in range(5)]
    server.take(answer(*(worker(pid, f"client{pid}") for pid in range(5))), 0.0)
    server.take(answer(*busy), 1.0)
    shown = [line.split()[0] for line in text_of(Views([server], "utf-8")).splitlines() if line.startswith("client")]
    assert shown == ["client2", "client4", "client3", "client1", "client0"]


# Notes


def test_what_is_wrong_is_said_before_what_is_under_way() -> None:
    told = {
        "origin": {"state": "unreachable", "error": "Connection refused"},
        "write_back_failure": {"seconds_since": 125.0, "error": "Input/output error"},
        "warnings": ["server-cert.pem expires in 3 days"],
        "limited_clients": 2,
        "cache_all": {"copied_bytes": 1 << 29, "total_bytes": 1 << 30, "rate": 1 << 20},
    }
    assert list(notes(told)) == [
        "write-back failed 2 min 5 s ago, no FLUSH succeeds: Input/output error",
        "the origin is unreachable: Connection refused",
        "server-cert.pem expires in 3 days",
        "limits hold 2 clients now (--limit)",
        "--cache-all: 50.0 %, 1 MiB/s",
    ]
    assert list(notes({"origin": {"state": "idle"}, "cache_all": None, "write_back_failure": None})) == []


def test_there_are_only_so_many_notes(tmp_path: Path) -> None:
    servers = servers_with(tmp_path, *[{**answer(), "warnings": ["one", "two"]}] * 5)
    assert notes_of(servers) == ["server0: one", "server0: two", "server1: one", "... and 8 more"]
    assert notes_of(servers_with(tmp_path, *[answer()] * 5)) == [
        "no P50 and P99, for want of --metrics: server0, server1, server2 and 2 more"
    ]


def test_a_server_that_is_away_has_its_reason_in_the_view_of_it_alone(tmp_path: Path) -> None:
    views = Views(servers_with(tmp_path, None), "utf-8")
    views.press("enter")
    assert re.match(rf"server0: away 0\.0 s: there is no control socket {tmp_path}/0: ", text_of(views))
