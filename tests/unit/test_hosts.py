"""By which names the observer may be asked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from xnbd.metrics import hosts
from xnbd.metrics.hosts import OwnNames


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OwnNames:
    """Of a computer that calls itself Box."""
    files = {"_HOSTS": "127.0.0.1 localhost\n127.0.1.1 box.lan Box # host.other\n10.0.0.1 other.lan\n"}
    files["_RESOLVER"] = "; search no.example\nnameserver 10.0.0.1\nsearch Example.ORG sub.example.org.\n"
    for name, text in files.items():
        monkeypatch.setattr(hosts, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    return OwnNames()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:9555", "192.0.2.7:80", "[::1]", "[fe80::1]:9555", "localhost", "LocalHost.:1",
     "a.localhost", "box", "BOX:9555", "box.lan", "box.example.org", "box.sub.example.org:80"],
)  # fmt: skip
def test_own_names(names: OwnNames, host: str) -> None:
    assert names.include(host)


@pytest.mark.parametrize(
    "host",
    ["", ":80", "elsewhere.example", "localhost.example", "box.example", "box.no.example", "other.lan", "host.other",
     "127.0.0.1.example", "127.0.0.1, elsewhere.example", "user@localhost", "localhost/x", "[localhost]", "::1", "a b",
     "box:80:80", "2130706433", "0x7f.1"],
)  # fmt: skip
def test_names_of_others(names: OwnNames, host: str) -> None:
    assert not names.include(host)


def test_a_computer_without_those_files(names: OwnNames, tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    assert names.include("box") and not names.include("box.lan")
