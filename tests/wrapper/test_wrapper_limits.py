"""Limits on clients of a wrapper's exports."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import MIB, StartWrapper
from rawclient import READ, RawClient
from server_process import PATIENCE
from wrapper_process import Wrapper, fails


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        path.write_bytes(bytes(2 * MIB))
    return paths


def in_debt(wrapper: Wrapper, name: str) -> RawClient:
    """A client that has to wait for a long time before its next request is done, which it has sent."""
    client = wrapper.client(name)
    assert client.write(0, bytes(MIB)) == 0
    client.request(READ, 0, 512, cookie=5)
    return client


def waits(client: RawClient) -> bool:
    client.sock.settimeout(0.5)
    try:
        client.receive(16)
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(60)
    return False


def test_limits_of_one_export_are_changed_while_its_clients_sleep(
    start_wrapper: StartWrapper, disks: list[Path]
) -> None:
    wrapper = start_wrapper("--imgfile", disks[0], "--imgfile", disks[1], "--limit-rate", "1K")
    with in_debt(wrapper, "a.img") as one, in_debt(wrapper, "b.img") as other:
        assert waits(one)
        printed = wrapper.ctl("--limit-rate", 0, "--limit-iops-total", 1000, "--limit", "a.img")
        assert printed == "each client: no limit\nall together: 1,000 requests/s\nat once: what 0.1 s allow\n"
        assert one.simple_reply(512)[:2] == (0, 5)
        assert waits(other)
        assert wrapper.ctl("--limit", "b.img").startswith("each client: 1 KiB/s\n")
        wrapper.ctl("--limit-rate", "1G", "--limit", disks[1])  # its other name
        assert other.simple_reply(512)[:2] == (0, 5)


def test_all_clients_of_an_export_share_a_limit(start_wrapper: StartWrapper, disks: list[Path]) -> None:
    wrapper = start_wrapper("--imgfile", disks[0], "--imgfile", disks[1], "--limit-rate-total", "1K")
    with in_debt(wrapper, "a.img"), wrapper.client("a.img") as heir, wrapper.client("b.img") as free:
        began = time.monotonic()
        free.read(0, 100)
        heir.read(0, 400)  # at once, because its own part is untouched
        heir.request(READ, 0, 512, cookie=5)
        assert waits(heir)
        assert time.monotonic() - began < PATIENCE


def test_a_reload_limits_clients_that_are_connected(
    start_wrapper: StartWrapper, disks: list[Path], tmp_path: Path
) -> None:
    limits = tmp_path / "limits"
    limits.write_text("limit-rate 1K\n")
    wrapper = start_wrapper("--imgfile", disks[0], "--limits", limits)
    with in_debt(wrapper, "a.img") as client:
        limits.write_text("limit-rate 1G\n")
        assert "limit-rate 1024 -> 1073741824" in wrapper.ctl("--reload")
        assert client.simple_reply(512)[:2] == (0, 5)


def test_limits_that_were_set_outlive_an_upgrade(start_wrapper: StartWrapper, disks: list[Path]) -> None:
    wrapper = start_wrapper("--imgfile", disks[0])
    with wrapper.client("a.img") as client:
        wrapper.ctl("--limit-rate", "1K", "--limit", "a.img")
        assert "1 client moved" in wrapper.ctl("--upgrade")
        assert wrapper.ctl("--limit", "a.img").startswith("each client: 1 KiB/s\n")
        assert client.write(0, bytes(MIB)) == 0
        client.request(READ, 0, 512, cookie=5)
        assert waits(client)
        wrapper.ctl("--limit-rate", 0, "--limit", "a.img")
        assert client.simple_reply(512)[:2] == (0, 5)


def test_what_cannot_be_limited_is_said(start_wrapper: StartWrapper, disks: list[Path], tmp_path: Path) -> None:
    wrapper = start_wrapper("--imgfile", disks[0])
    assert "there is no export 'c.img'" in wrapper.refuses("--limit", "c.img")
    command = "--xnbd-server", "/bin/true"
    assert "--xnbd-server and --limit-rate do not go together" in fails(tmp_path, *command, "--limit-rate", "1M")[1]
