"""The Linux kernel's own client, in a virtual machine: file systems, swap space, a server that is started again."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import MIB, Start
from exported import MODES, Exported, check_ext4
from mounts import mounted
from server_process import ROOT, kill_all, run, wait_until
from snapshots import take_by_signal
from upgrades import UPGRADES, upgrade
from xnbdguest.initramfs import add_python, basic_system
from xnbdguest.machine import HOST, Guest
from xnbdguest.packages import Packages, fetch_packages

DATA = 32
"""MiB of noise in the guest's /data/noise."""

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def packages() -> Packages:
    return fetch_packages()


@pytest.fixture(scope="module")
def initramfs(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "initramfs"
    archive = basic_system(packages)
    archive.write(path)
    add_python(archive)
    archive.add_file(ROOT / "tests" / "support" / "kernel_nbd.py", "/kernel_nbd.py")
    archive.write(path.with_name("initramfs-with-python"))
    return path


@pytest.fixture(scope="module")
def machine(packages: Packages, initramfs: Path) -> Iterator[Guest]:
    """With two processors: on one, the kernel would use one of four connections only."""
    with_python = initramfs.with_name("initramfs-with-python")
    with Guest(initramfs.parent, "client", packages, with_python, memory=384, processors=2) as guest:
        guest.run(f"mkdir /data && dd if=/dev/urandom of=/data/noise bs=1M count={DATA}")
        yield guest


@pytest.fixture
def guest(machine: Guest, start: Start) -> Iterator[Guest]:
    """The machine, whose disk is let go of before the servers that *start* has started end: also after a failure."""
    yield machine
    let_go(machine)


@pytest.fixture(scope="module")
def small_machine(packages: Packages, initramfs: Path) -> Iterator[Guest]:
    """With 16 MB of free memory."""
    with Guest(initramfs.parent, "small", packages, initramfs, memory=96) as guest:
        yield guest


@pytest.fixture
def small_guest(small_machine: Guest, start: Start) -> Iterator[Guest]:
    """The small machine, whose disk is let go of as *guest*'s is."""
    yield small_machine
    let_go(small_machine)


def let_go(guest: Guest) -> None:
    """Disconnect the disk, whatever a test has left on it; the next test is to find the machine as the first did."""
    guest.run("touch /run/stop; swapoff -a; umount -l /mnt", check=False)
    disconnect(guest)


@pytest.fixture(scope="module")
def noise(machine: Guest) -> str:
    """The MD5 of the machine's /data/noise."""
    return machine.output("md5sum </data/noise").split()[0]


def connect(guest: Guest, port: int, connections: int = 1, options: str = "") -> None:
    guest.run(f"nbd-client {options} -C {connections} {HOST} {port} /dev/nbd0 && blockdev --getsize64 /dev/nbd0")


def disconnect(guest: Guest) -> None:
    guest.run("nbd-client -d /dev/nbd0; until ! nbd-client -c /dev/nbd0; do sleep 0.02; done")


def drop_caches(guest: Guest) -> None:
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")


@pytest.mark.parametrize(("mode", "connections"), [(mode, 1 if mode == "target" else 4) for mode in MODES])
def test_file_system(start: Start, tmp_path: Path, guest: Guest, noise: str, mode: str, connections: int) -> None:
    disk = Exported(start, tmp_path, mode, 256 * MIB)
    connect(guest, disk.port, connections)
    wait_until(lambda: len(disk.server.busy_workers()) == connections, "a worker for each connection")
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt")
    guest.run("cp /data/noise /mnt/removed & dd if=/data/noise of=/mnt/data bs=1M conv=fsync; wait")
    guest.run("rm /mnt/removed && sync && fstrim /mnt")
    drop_caches(guest)
    assert guest.output("md5sum </mnt/data").split()[0] == noise
    guest.run("umount /mnt && e2fsck -fn /dev/nbd0")
    disconnect(guest)
    wait_until(lambda: not disk.server.busy_workers(), "the workers to be free")
    content = disk.content_in(tmp_path / "content")
    assert check_ext4(content, "data", tmp_path) == noise
    disk.check_what_is_behind(content)


def test_fstrim_gives_space_back(start: Start, tmp_path: Path, guest: Guest) -> None:
    disk = Exported(start, tmp_path, "target", 256 * MIB)
    connect(guest, disk.port)
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && cp /data/noise /mnt/data && sync")
    full = disk.image.stat().st_blocks * 512
    guest.run("rm /mnt/data && sync && fstrim /mnt")
    assert disk.image.stat().st_blocks * 512 <= full - DATA * MIB * 9 // 10
    guest.run("umount /mnt")
    disconnect(guest)


def test_a_file_system_in_use_mounts_clean_from_a_snapshot(
    start: Start, tmp_path: Path, guest: Guest, noise: str
) -> None:
    """Here, on the host, after its journal was replayed: to it the snapshot is a power failure."""
    disk = Exported(start, tmp_path, "target", 256 * MIB)
    connect(guest, disk.port, 4)
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && cp /data/noise /mnt/data && sync")
    start_churn(guest)
    for count in range(1, 4):
        guest.run(f"until [ $(cat /run/turns) -ge {20 * count} ]; do sleep 0.1; done", timeout=180)
        check_snapshot(take_by_signal(disk.server, disk.image).path, tmp_path / "mounted", noise)
    stop_churn(guest)
    disconnect(guest)


CHURN = """
i=0; while [ ! -e /run/stop ]; do
i=$((i+1)); d=/mnt/d$((i%7)); mkdir -p $d; dd if=/data/noise of=$d/f$((i%30)) bs=10k count=$((i%40)) 2>/dev/null
mv $d/f$((i%30)) $d/g$((i%20)); [ $((i%5)) != 0 ] || sync; rm -rf /mnt/d$(((i+3)%7))/g1*
echo $i >/run/turns.new; mv /run/turns.new /run/turns
done
"""
"""Files come, go, are renamed and overwritten; /run/turns tells how often, and is never empty."""


def start_churn(guest: Guest) -> None:
    guest.run(f"rm -f /run/stop; echo 0 >/run/turns; ({CHURN}) >/run/churn 2>&1 &")


def stop_churn(guest: Guest) -> None:
    guest.run("touch /run/stop; until umount /mnt; do sleep 0.1; done; [ ! -s /run/churn ] || cat /run/churn")


def check_snapshot(path: Path, directory: Path, noise: str) -> None:
    directory.mkdir(exist_ok=True)
    with mounted(path, directory):
        digest = hashlib.md5((directory / "data").read_bytes()).hexdigest()
    assert digest == noise
    run("e2fsck", "-fn", path)


SWAPPING_PROCESS = """
BEGIN {
    for (i = 0; i < 12000; i++) page[i] = sprintf("%04000d", i)
    while ((getline line <"/proc/self/status") > 0) if (line ~ /VmSwap/) print line
    for (i = 0; i < 12000; i++) if (page[i] != sprintf("%04000d", i)) { print "wrong", i; exit 1 }
    print "all right"
}
"""
"""Fills 48 MB of memory and looks at them again; for awk."""


@contextmanager
def swap_space(guest: Guest, port: int) -> Iterator[None]:
    connect(guest, port, options="-swap")
    guest.run("mkswap /dev/nbd0 && swapon /dev/nbd0")
    try:
        yield
    finally:
        guest.run("swapoff /dev/nbd0")
        disconnect(guest)


@pytest.mark.parametrize("mode", MODES)
def test_process_that_swaps(start: Start, tmp_path: Path, small_guest: Guest, mode: str) -> None:
    disk = Exported(start, tmp_path, mode, 256 * MIB)
    with swap_space(small_guest, disk.port):
        said = small_guest.output(f"awk '{SWAPPING_PROCESS}'", timeout=300).split()
    assert said[-2:] == ["all", "right"]
    assert int(said[said.index("VmSwap:") + 1]) > 12 << 10


# Upgrades, in one mode each unless there are to be many (``XNBD_UPGRADES``)


def modes(one: str) -> List[str]:
    return [one] if UPGRADES <= 3 else MODES


def complaints(guest: Guest) -> str:
    """What the guest's kernel says of the disk, but for its size and its mounts."""
    return guest.output("dmesg | grep -E 'nbd0|I/O error' | grep -vE 'capacity change|mount' || true")


@pytest.mark.parametrize("mode", modes("proxy"))
def test_a_mounted_file_system_goes_through_upgrades(
    start: Start, tmp_path: Path, guest: Guest, noise: str, mode: str
) -> None:
    disk = Exported(start, tmp_path, mode, 256 * MIB)
    connect(guest, disk.port, 4)
    guest.run("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && cp /data/noise /mnt/data && sync; dmesg -c >/dev/null")
    start_churn(guest)
    outcomes = []
    for _ in range(UPGRADES):
        turns = int(guest.output("cat /run/turns"))
        outcomes.append(upgrade(disk.control))
        guest.run(f"until [ $(cat /run/turns) -gt {turns + 1} ]; do sleep 0.1; done", timeout=180)
    stop_churn(guest)
    drop_caches(guest)
    guest.run("e2fsck -fn /dev/nbd0")
    assert complaints(guest) == ""
    disconnect(guest)
    assert [(outcome.moved, outcome.rest) for outcome in outcomes] == [(4, "")] * UPGRADES
    assert check_ext4(disk.content_in(tmp_path / "content"), "data", tmp_path) == noise


@pytest.mark.parametrize("mode", modes("target"))
def test_a_process_that_swaps_goes_through_upgrades(
    start: Start, tmp_path: Path, small_guest: Guest, mode: str
) -> None:
    disk = Exported(start, tmp_path, mode, 256 * MIB)
    with swap_space(small_guest, disk.port):
        small_guest.run("dmesg -c >/dev/null")
        small_guest.run(f"rm -f /run/swapped; (awk '{SWAPPING_PROCESS}' >/run/said 2>&1; touch /run/swapped) &")
        upgrades = 0
        while upgrades < UPGRADES or small_guest.run("test -e /run/swapped", check=False).status:
            assert upgrade(disk.control).rest == ""
            upgrades += 1
        assert complaints(small_guest) == ""
        assert small_guest.output("cat /run/said").split()[-2:] == ["all", "right"]


def start_again(start: Start, disk: Exported) -> None:
    start("--target", "--laddr", "127.0.0.1", "--lport", disk.port, disk.image)


def test_synced_data_is_there_after_the_server_was_killed(
    start: Start, tmp_path: Path, guest: Guest, noise: str
) -> None:
    disk = Exported(start, tmp_path, "target", 256 * MIB)
    connect(guest, disk.port, 4)
    guest.run("dd if=/data/noise of=/dev/nbd0 bs=1M conv=fsync")
    kill_all(disk.server.pid)
    disk.server.process.wait()
    disconnect(guest)
    start_again(start, disk)
    connect(guest, disk.port, 4)
    drop_caches(guest)
    assert guest.output(f"head -c {DATA}m /dev/nbd0 | md5sum").split()[0] == noise
    disconnect(guest)


def test_writes_wait_for_a_server_that_was_killed(start: Start, tmp_path: Path, guest: Guest, noise: str) -> None:
    disk = Exported(start, tmp_path, "target", 256 * MIB)
    guest.run(f"python3 /kernel_nbd.py connect {HOST} {disk.port}")
    # Again and again, so that it cannot be done before the server is killed.
    write = "dd if=/data/noise of=/dev/nbd0 bs=256k oflag=direct conv=fsync 2>/run/dd"
    enough = "if [ -e /run/last ]; then touch /run/done; exit; fi"
    guest.run(f"rm -f /run/last /run/done /run/failed; (while {write}; do {enough}; done; touch /run/failed) &")
    wait_until(lambda: disk.image.stat().st_blocks * 512 > 4 * MIB, "the first writes")
    kill_all(disk.server.pid)
    disk.server.process.wait()
    start_again(start, disk)
    guest.run("[ ! -e /run/failed ]")
    guest.run(f"touch /run/last; python3 /kernel_nbd.py reconnect {HOST} {disk.port}")
    guest.run("until [ -e /run/done ]; do [ ! -e /run/failed ] || { cat /run/dd; exit 1; }; sleep 0.1; done")
    drop_caches(guest)
    assert guest.output(f"head -c {DATA}m /dev/nbd0 | md5sum").split()[0] == noise
    disconnect(guest)
