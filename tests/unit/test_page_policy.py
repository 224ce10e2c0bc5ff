"""The page's headers, and what is answered where it cannot be read."""

from __future__ import annotations

import base64
import hashlib
from typing import List, Optional

import pytest

from xnbd.metrics import page
from xnbd.metrics.exposition import Family
from xnbd.metrics.http import Request
from xnbd.server.observer.process import Observed, pages
from xnbd.server.observer.wanted import NoSuchExport, Wanted


class Nothing(Observed):
    """It has no disk."""

    def families(self) -> List[Family]:
        return []

    def status(self, wanted: Wanted) -> str:
        raise NoSuchExport

    def work(self) -> None:
        pass

    def deadline(self) -> Optional[float]:
        return None


def ask(path: str, query: str = "") -> tuple[int, bytes]:
    response = pages(Nothing())[path](Request("GET", path, query, {}, keep_alive=True))
    return response.status, response.body


def test_the_policy_has_the_hash_of_each_script_and_style() -> None:
    policy = page.policy(b"<style>a\nb</style><script>c</script><p>d</p>")
    for kind, text in (("style", b"a\nb"), ("script", b"c")):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy


def test_the_page_has_one_script_and_one_style_and_needs_no_other_file() -> None:
    body = page.page().body
    assert (body.count(b"<script>"), body.count(b"<style>")) == (1, 1)
    assert (body.count(b"<script"), body.count(b"<link"), body.count(b" style="), body.count(b" src=")) == (1, 1, 0, 0)


def test_a_page_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_NAME", "gone.html")
    assert ask("/") == (500, b"the page cannot be read: No such file or directory; /status and /metrics can\n")


def test_what_cannot_be_told_is_an_error_of_the_client() -> None:
    assert ask("/status", "map=many") == (400, b"map has to be a number from 1 to 16384\n")
    assert ask("/status", "export=x") == (404, b"there is no such export\n")
