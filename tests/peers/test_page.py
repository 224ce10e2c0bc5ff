"""The page at / of --metrics, in Chromium: it loads, shows what /status tells, moves, and takes no name for markup."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Iterator, List
from urllib.parse import quote

import pytest
from browser import Browser, Page
from conftest import MIB, Start, StartWrapper
from proxies import DISK, Proxy, make_disk
from scraping import get, kill_observer, metrics_port, status
from server_process import free_port, wait_until
from upgrades import build, upgrade

HOSTILE = "<img src=x onerror=alert()>&lt;\u202e"
"""A name that wants to be markup, and to turn the line around."""

SHOWN = HOSTILE.replace("\u202e", "\\u202e")
SILENT = "document.querySelector('#alerts').innerText.includes('No answer from the server')"


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def tile(page: Page, label: str) -> str:
    return page.text(f"[data-tile='{label}']")


def requests_shown(count: int) -> str:
    return f"document.querySelector(\"[data-tile='Requests per second']\")?.innerText.includes('\\n{count} so far')"


def is_wide(page: Page) -> bool:
    """Whether one has to scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))


@pytest.fixture
def proxy(start: Start, tmp_path: Path) -> Proxy:
    origin = start("--target", "--readonly", make_disk(tmp_path), tcp=True)
    proxy = Proxy(start, tmp_path, ["127.0.0.1", origin.port], "--metrics", 0, "--readahead", 0)
    proxy.server.wait_for_log("INFO: metrics on ")
    return proxy


@pytest.fixture
def page(browser: Browser, proxy: Proxy) -> Iterator[Page]:
    with browser.open(url_of(metrics_port(proxy.server.log()))) as page:
        page.wait_for(requests_shown(0))
        yield page
        assert page.complaints == []


def test_it_shows_the_numbers_of_the_status_and_asks_nobody_else(page: Page, proxy: Proxy) -> None:
    port = metrics_port(proxy.server.log())
    with proxy.raw() as client:
        for number in range(3):
            client.read(number * MIB, MIB)
        client.write(0, bytes(4096))
        page.wait_for(requests_shown(4))
        page.wait_for("document.querySelector('#local').innerText !== '0.0 %'")
        told = status(port)
        assert told["workers"][0]["client"] in page.text("#clienttable")
    assert tile(page, "Read").endswith("3.00 MiB so far")
    assert tile(page, "Written").endswith("4.00 KiB so far")
    assert tile(page, "From the cache").endswith("3 misses so far")
    assert page.text("#name") == told["name"] == proxy.cache.name
    assert page.text("#what") == "proxy · 4.00 MiB"
    assert told["origin"]["address"] in page.text("#originfacts")
    share = 100 * told["blocks"]["cached"] / told["blocks"]["total"]
    assert page.text("#local") == f"{int(share * 10) / 10} %"
    assert told["version"] in page.text("#serverfacts")
    assert page.urls
    assert all(url.startswith((url_of(port), "data:")) for url in page.urls)


def test_it_moves_within_two_seconds(page: Page, proxy: Proxy) -> None:
    """Of the reads of a client; on a busy computer at least once."""
    taken: List[float] = []
    with proxy.raw() as client:
        while not taken or (min(taken) > 2 and len(taken) < 10):
            client.read(0, 4096)
            began = time.monotonic()
            page.wait_for(requests_shown(len(taken) + 1))
            taken.append(time.monotonic() - began)
    assert min(taken) <= 2, taken


def test_the_map_fills_up(page: Page, proxy: Proxy) -> None:
    painted = "document.querySelector('#map').toDataURL()"
    page.wait_for("document.querySelector('#map').clientHeight > 50")
    before = page.evaluate(painted)
    with proxy.raw() as client:
        client.read(0, MIB)
        page.wait_for(f"{painted} !== '{before}'")
    proxy.bgctl("--cache-all")
    page.wait_for("document.querySelector('#local').innerText === '100 %'")
    assert page.text("#localof") == "All of the disk is here"
    assert status(metrics_port(proxy.server.log()))["blocks"]["cached"] == -(-DISK // 4096)
    with proxy.raw() as client:
        client.write(0, bytes(8192))
        page.wait_for("document.querySelector('#localof').innerText.endsWith(', 8.00 KiB written by clients')")


def test_latency_and_throughput_are_drawn(page: Page, proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.read(0, 4096)
        page.wait_for("document.querySelector(\"[data-tile='Median latency'] b\").innerText.match(/[0-9] (µs|ms|s)$/)")
    page.wait_for("document.querySelector('#throughput path.one').getAttribute('d').includes('L')")


def test_names_are_text(browser: Browser, start: Start, tmp_path: Path) -> None:
    origin = start("--target", "--readonly", "--exportname", HOSTILE, make_disk(tmp_path), tcp=True)
    cache = tmp_path / HOSTILE
    files = (cache, tmp_path / "bitmap", tmp_path / "ctl")
    proxy = start("--proxy", "--metrics", 0, f"nbd://127.0.0.1:{origin.port}/{quote(HOSTILE)}", *files)
    proxy.wait_for_log("INFO: metrics on ")
    with browser.open(url_of(metrics_port(proxy.log()))) as page:
        page.wait_for(requests_shown(0))
        assert page.text("#name") == SHOWN
        assert page.evaluate("document.title") == f"{SHOWN} · xnbd"
        assert status(metrics_port(proxy.log()))["origin"]["address"] in page.text("#originfacts")
        assert page.evaluate("document.images.length") == 0
        assert page.complaints == []


def test_the_policy_refuses_markup_and_foreign_scripts(browser: Browser, page: Page, proxy: Proxy) -> None:
    answer = get(metrics_port(proxy.server.log()), "/")
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert all("unsafe" not in part and "*" not in part for part in policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    with browser.open(url_of(metrics_port(proxy.server.log()))) as other:
        refused = "(() => { try { document.body.innerHTML = '<b>bold</b>' } catch { return true } })()"
        assert other.evaluate(refused) is True
        other.evaluate("fetch('http://127.0.0.2:9/').catch(() => null)")
        other.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2:9/x.png'}))")
        wait_until(lambda: other.evaluate("1") and len(other.complaints) >= 3, "what the console has to say")
        assert all("Content Security Policy" in text or "Trusted" in text for text in other.complaints), (
            other.complaints
        )


def test_it_goes_on_when_the_server_is_back(browser: Browser, start: Start, image: Path) -> None:
    port = free_port()
    first = start("--target", "--metrics", port, image)
    with browser.open(url_of(port)) as page:
        page.wait_for(requests_shown(0))
        first.stop()
        page.wait_for(SILENT)
        assert page.text("#live") == "no answer"
        start("--target", "--metrics", port, image).wait_for_log("INFO: metrics on ")
        page.wait_for(f"!({SILENT}) && document.querySelector('#live').innerText === 'live'")
        assert all("ERR_CONNECTION" in text or "ERR_EMPTY" in text for text in page.complaints)


def test_it_goes_on_when_the_process_for_metrics_has_died(page: Page, proxy: Proxy) -> None:
    proxy.server.expected_errors.append("the process for metrics died: killed by SIGKILL")
    kill_observer(proxy.server.pid)
    with proxy.raw() as client:
        client.read(0, 4096)
        page.wait_for(requests_shown(1))
    page.complaints.clear()


def test_it_goes_on_after_an_upgrade(page: Page, proxy: Proxy, tmp_path: Path) -> None:
    program = build(tmp_path / "next", "9.1")
    with proxy.raw() as client:
        client.read(0, 4096)
        page.wait_for(requests_shown(1))
        upgrade(proxy.control, "--program", program)
        client.read(0, 4096)
        page.wait_for(requests_shown(2))
    assert "9.1: this page came from" in page.wait_for("document.querySelector('#version').innerText")
    page.complaints[:] = [text for text in page.complaints if "ERR_" not in text]


def test_it_fits_a_phone_and_a_desk_light_and_dark(page: Page, proxy: Proxy) -> None:
    with proxy.raw() as client:
        client.read(0, 4096)
        page.wait_for("document.querySelector('#clienttable td') !== null")
        page.evaluate("document.querySelector('h1').textContent = 'n'.repeat(200)")
        for width in (320, 390, 800, 1280):
            for dark in (False, True):
                page.show(width, 800, dark=dark)
                assert not is_wide(page), width
                red = int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]"))
                assert red < 64 if dark else red > 192


def test_a_wrapper_lists_its_exports_and_shows_each(
    browser: Browser, start_wrapper: StartWrapper, tmp_path: Path
) -> None:
    hostile = tmp_path / HOSTILE
    hostile.write_bytes(bytes(MIB))
    wrapper = start_wrapper("--metrics", 0, "--imgfile", hostile, "--imgfile", make_disk(tmp_path, name="other.img"))
    wrapper.wait_for_log("INFO: metrics on ")
    with browser.open(url_of(metrics_port(wrapper.log())), width=390, height=844) as page:
        page.wait_for(requests_shown(0))
        assert page.text("#exportcount") == "2"
        assert not is_wide(page)
        with wrapper.client(hostile.name) as client:
            client.read(0, 4096)
            page.wait_for(requests_shown(1))
            page.evaluate("[...document.querySelectorAll('#exporttable a')].find(a => a.innerText[0] === '<').click()")
            page.wait_for("document.querySelector('#name').innerText.startsWith('<img')")
            page.wait_for(requests_shown(1))
            assert page.text("#name") == SHOWN
            assert "1 client;" in page.text("#clients")
            assert not is_wide(page)
        page.evaluate("document.querySelector('#back').click()")
        page.wait_for("document.querySelector('#name').innerText === 'All exports'")
        assert page.complaints == []
        page.evaluate("location.hash = '#nothing'")
        page.wait_for("document.querySelector('#alerts').innerText.includes('does not exist')")
        assert page.evaluate("document.images.length") == 0
