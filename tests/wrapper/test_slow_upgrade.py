"""xnbd-wrapper-ctl --upgrade on a slow computer: whoever can move does, for its time has no limit.

The programs here sleep at one step of an upgrade. The steps of a hand-over are a server's, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import StartWrapper
from rawclient import RawClient
from upgrades import LONGEST, build, parse
from wrapper_process import Wrapper

Change = tuple[str, str, str]


def slow(path: str, line: str, seconds: int) -> Change:
    """Sleep before the *line* of the file *path*."""
    indent = " " * (len(line) - len(line.lstrip()))
    return path, f"\n{line}", f"\n{indent}__import__('time').sleep({seconds})\n{line}"


SLOW_START = slow("wrapper/upgrade/movers.py", '        set_title("waits for a client to move", program=PROGRAM)', 12)
SLOW_TO_BE_READY = slow("server/handover/arrival.py", "    fields = parse_offer(offer)", 4)
SLOW_TO_TAKE = slow("server/handover/arrival.py", "    client, file = letter.fds", 3)
SLOW_TO_OFFER = slow("server/handover/departure.py", "        self.first()", 7)
SLOW_TO_GIVE = slow("server/handover/departure.py", "        with urgent():  # the client waits from now on", 3)


@pytest.fixture
def wrapper(start_wrapper: StartWrapper, image: Path) -> Wrapper:
    return start_wrapper("--imgfile", image)


def works(client: RawClient) -> bool:
    return len(client.read(0, 512)) == 512


@pytest.mark.parametrize("change", [SLOW_START, SLOW_TO_BE_READY, SLOW_TO_TAKE], ids=["start", "ready", "take"])
def test_new_processes_that_are_slow_get_their_clients(wrapper: Wrapper, tmp_path: Path, change: Change) -> None:
    path = build(tmp_path / "slow", "99.0", change, name="xnbd-wrapper")
    with wrapper.client("disk.img") as client, wrapper.client("disk.img") as other:
        assert upgraded(wrapper, "--program", path) == (2, "")
        assert works(client)
        assert works(other)


@pytest.mark.parametrize("change", [SLOW_TO_OFFER, SLOW_TO_GIVE], ids=["offer", "give"])
def test_old_processes_that_are_slow_give_their_clients_away(wrapper: Wrapper, tmp_path: Path, change: Change) -> None:
    path = build(tmp_path / "slow", "99.0", change, name="xnbd-wrapper")
    with wrapper.client("disk.img") as client:
        upgraded(wrapper, "--program", path)
        mended = build(tmp_path / "mended", "99.1", name="xnbd-wrapper")
        assert upgraded(wrapper, "--program", mended) == (1, "")
        assert works(client)


BUSY = (
    "wrapper/upgrade/arrival.py",
    "        movers.keep(min(WAITING, moves.remaining))\n",
    "        movers.keep(min(WAITING, moves.remaining))\n"
    "        if movers.spares == movers.unproven: __import__('time').sleep(3)\n",
)
"""The wrapper does not listen for longer than its processes wait in one attempt to tell it something."""

TALKATIVE = (
    "wrapper/upgrade/movers.py",
    "        ready = ClientReport(Report(os.getpid()))\n",
    "        ready = ClientReport(Report(os.getpid()))\n"
    "        self.reports.setblocking(False)\n"
    "        with suppress(BlockingIOError):\n"
    "            while True: self.reports.send(b'{\"pid\": 0}')\n",
)
"""As much is on its way to the wrapper as can be."""


def test_a_wrapper_that_does_not_listen_for_long_hears_all_the_same(wrapper: Wrapper, tmp_path: Path) -> None:
    path = build(tmp_path / "slow", "99.0", BUSY, TALKATIVE, name="xnbd-wrapper")
    with wrapper.client("disk.img") as client:
        assert upgraded(wrapper, "--program", path) == (1, "")
        wrapper.wait_for_log("the wrapper does not listen")
        assert works(client)


def upgraded(wrapper: Wrapper, *options: object) -> tuple[int, str]:
    """How many clients moved, and what is said of others."""
    outcome = parse(wrapper.ctl("--upgrade", *options, timeout=LONGEST))
    return outcome.moved, outcome.rest
