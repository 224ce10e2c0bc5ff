"""Power failures for real: the server runs in a virtual machine that is killed while clients write.

What the guest's kernel had in memory is lost; its disk stays as qemu had it. Clients
run here, and remember what was answered and flushed. The next boot must show it.
``XNBD_POWER_FAILURES`` says how often (5), for two disks each time.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import List, Tuple

import nbd
import pytest
from conftest import Start
from exported import MODES
from powered_guest import AREA, CLIENTS, FIRST_PORT, Client, Disk, PoweredGuest
from server_process import ROOT, free_port
from versions import Versions, sectors
from xnbdguest.errors import GuestError
from xnbdguest.initramfs import add_python, add_xnbd, basic_system
from xnbdguest.machine import Guest
from xnbdguest.packages import fetch_packages

DISKS = 2

FAILURES = int(os.environ.get("XNBD_POWER_FAILURES", "5"))

TRIALS: List[Tuple[str, int]] = [("target", -(-FAILURES // 4))] + [("proxy", FAILURES)] * ("proxy" in MODES)

_LONGEST_WORK = 15.0


@pytest.fixture
def powered(start: Start, tmp_path: Path, mode: str, failures: int) -> PoweredGuest:
    """Its disks have an area for each of the *failures*."""
    packages = fetch_packages()
    archive = basic_system(packages)
    add_python(archive)
    add_xnbd(archive, ROOT)
    archive.write(tmp_path / "initramfs")
    fresh = tmp_path / "fresh.img"
    fresh.write_bytes(sectors(0, [0] * (failures * AREA)))
    origin = start("--target", "--readonly", fresh, tcp=True)
    return PoweredGuest(tmp_path, packages, tmp_path / "initramfs", mode, fresh, origin.port)


def fail_while_starting(powered: PoweredGuest, disks: List[Disk], areas: int, rng: random.Random) -> None:
    """A power failure while the servers recover from the last one, or while the disks are checked."""
    guest = powered.switch_on([disk.forwarded for disk in disks])
    failure = threading.Timer(rng.uniform(0, 4), os.kill, (guest.process.pid, signal.SIGKILL))
    failure.start()
    try:
        with suppress(GuestError, nbd.Error):
            powered.serve(guest, disks)
            for disk in disks:
                disk.check(areas)
    finally:
        failure.join()
        guest.kill()


def work_until_power_fails(guest: Guest, disks: List[Disk], area: int, rng: random.Random) -> List[Client]:
    """The power fails after a random number of requests, and in the middle of others."""
    clients = [Client(disk, area, number, rng.getrandbits(32)) for disk in disks for number in range(CLIENTS)]
    for client in clients:
        client.start()
    enough, deadline = rng.randint(5, 400), time.monotonic() + _LONGEST_WORK
    while sum(client.requests for client in clients) < enough and time.monotonic() < deadline:
        time.sleep(0.001)
    guest.kill()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
        assert not client.error, client.error
    return clients


@pytest.mark.guest
@pytest.mark.timeout(120 + 120 * FAILURES)
@pytest.mark.parametrize("mode, failures", TRIALS, ids=[mode for mode, _ in TRIALS])
def test_flushed_writes_survive_and_no_block_is_wrong(
    powered: PoweredGuest, mode: str, failures: int, seed: int
) -> None:
    """Each boot checks what the failures before it have left, then works in the next area."""
    rng = random.Random(seed)
    contents = [Versions(failures * AREA) for _ in range(DISKS)]
    clients: List[Client] = []
    for area in range(failures + 1):
        disks = [Disk(f"/mnt/{i}", FIRST_PORT + i, free_port(), versions) for i, versions in enumerate(contents)]
        if area and rng.random() < 0.2:
            fail_while_starting(powered, disks, area, rng)
        guest = powered.switch_on([disk.forwarded for disk in disks])
        try:
            powered.serve(guest, disks)
            for disk in disks:
                disk.check(area)
            if area < failures:
                clients += work_until_power_fails(guest, disks, area, rng)
        finally:
            guest.kill()
    assert sum(client.requests for client in clients) >= 5 * failures
    assert sum(client.flushes for client in clients) > 0
