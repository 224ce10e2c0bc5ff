"""Power failures for real: the server runs in a virtual machine that is killed while clients write.

What the guest's kernel had in memory is lost; its disk stays as qemu had it. Clients
run here, and remember what was answered and flushed. The next boot must show it.
``XNBD_POWER_FAILURES`` says how often (12).
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
from powered_guest import CLIENTS, FIRST_PORT, Client, Disk, PoweredGuest
from server_process import ROOT, free_port
from versions import SECTOR, Versions, sectors
from xnbdguest.errors import GuestError
from xnbdguest.initramfs import add_python, add_xnbd, basic_system
from xnbdguest.machine import Guest
from xnbdguest.packages import fetch_packages

SIZE = 8 << 20
"""Bytes of each served disk."""

DISKS = 2

FAILURES = int(os.environ.get("XNBD_POWER_FAILURES", "12"))

TRIALS: List[Tuple[str, int]] = [("target", -(-FAILURES // 4))] + [("proxy", FAILURES)] * ("proxy" in MODES)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A disk that nobody has written yet."""
    path = tmp_path / "fresh.img"
    path.write_bytes(sectors(0, [0] * (SIZE // SECTOR)))
    return path


@pytest.fixture
def powered(request: pytest.FixtureRequest, start: Start, tmp_path: Path, fresh: Path) -> PoweredGuest:
    packages = fetch_packages()
    archive = basic_system(packages)
    add_python(archive)
    add_xnbd(archive, ROOT)
    archive.write(tmp_path / "initramfs")
    origin = start("--target", "--readonly", fresh, tcp=True)
    return PoweredGuest(tmp_path, packages, tmp_path / "initramfs", request.param, fresh, origin.port)


def new_disks(failure: int, ports: List[int]) -> List[Disk]:
    """Disks with new state, on the other half of the ports than those before them."""
    half = range(DISKS) if failure % 2 == 0 else range(DISKS, 2 * DISKS)
    return [Disk(f"/mnt/{failure}-{i}", FIRST_PORT + i, ports[i], Versions(SIZE // SECTOR)) for i in half]


def fail_soon_after_start(powered: PoweredGuest, disks: List[Disk], ports: List[int], rng: random.Random) -> None:
    """A power failure while the servers recover from the last one, or while the disks are checked."""
    guest = powered.switch_on(ports)
    failure = threading.Timer(rng.uniform(0, 4), os.kill, (guest.process.pid, signal.SIGKILL))
    failure.start()
    try:
        with suppress(GuestError, nbd.Error):
            powered.serve(guest, disks)
            for disk in disks:
                disk.check()
    finally:
        failure.join()
        guest.kill()


def work_until_power_fails(guest: Guest, disks: List[Disk], rng: random.Random) -> List[Client]:
    clients = [Client(disk, number, rng.getrandbits(32)) for disk in disks for number in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(rng.uniform(0.1, 2.5))
    guest.kill()
    for client in clients:
        client.join(20)
        assert not client.is_alive()
        assert not client.error, client.error
    return clients


@pytest.mark.timeout(120 + 40 * FAILURES)
@pytest.mark.parametrize("powered, failures", TRIALS, indirect=["powered"], ids=[mode for mode, _ in TRIALS])
def test_flushed_writes_survive_and_no_block_is_wrong(powered: PoweredGuest, failures: int, seed: int) -> None:
    """Each boot checks what the failure before it has left, then writes to new disks until the next one."""
    rng = random.Random(seed)
    before: List[Disk] = []
    clients: List[Client] = []
    for failure in range(failures + 1):
        ports = [free_port() for _ in range(2 * DISKS)]
        before = [disk._replace(forwarded=ports[disk.port - FIRST_PORT]) for disk in before]
        disks = new_disks(failure, ports) if failure < failures else []
        if before and rng.random() < 0.25:
            fail_soon_after_start(powered, before, ports, rng)
        guest = powered.switch_on(ports)
        try:
            powered.serve(guest, before + disks)
            for disk in before:
                disk.check()
                powered.remove(guest, disk)
            clients += work_until_power_fails(guest, disks, rng)
        finally:
            guest.kill()
        before = disks
    assert sum(client.requests for client in clients) > 50 * failures
    assert sum(client.flushes for client in clients) > failures
