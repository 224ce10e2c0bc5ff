"""A guest that serves disks, and clients here that use them until its power fails."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import List, NamedTuple

import nbd
from server_process import run
from versions import SECTOR, Versions
from xnbdguest.machine import HOST, Guest
from xnbdguest.packages import Packages

FIRST_PORT = 8520
"""Of the guest's ports that can be reached from here."""

CLIENTS = 2
"""How many use one disk at once."""

AREA = 8192
"""Sectors, 4 MiB, that are used between two failures, and only read afterwards."""

UNIT = 32
"""Sectors, 16 KiB, that belong to one client: two clients share every byte of the bitmap."""

_SERVER = "python3 -W error /opt/xnbd/bin/xnbd-server --spare-workers 1 --laddr 0.0.0.0"


class Disk(NamedTuple):
    """One served disk: its directory and port in the guest, the port here, and what its clients know."""

    directory: str
    port: int
    forwarded: int
    versions: Versions

    def connect(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.connect_tcp("127.0.0.1", str(self.forwarded))
        return handle

    def check(self, areas: int) -> None:
        """Read the first *areas*: every sector must be what it may be."""
        handle = self.connect()
        for area in range(areas):
            data = bytes(handle.pread(AREA * SECTOR, area * AREA * SECTOR))
            wrong = self.versions.recover(area * AREA, data)
            assert not wrong, "\n".join([f"{len(wrong)} sectors of {self.directory}:", *wrong[:20]])
        handle.shutdown()


class PoweredGuest:
    """Has one virtual disk with a file system for everything; on again after each failure.

    *mode* is the servers'; a target begins with a copy of *fresh*, a proxy's origin
    is on *origin_port* here.
    """

    def __init__(
        self, directory: Path, packages: Packages, initramfs: Path, mode: str, fresh: Path, origin_port: int
    ) -> None:
        self._directory = directory
        self._packages = packages
        self._initramfs = initramfs
        self._mode = mode
        self._origin_port = origin_port
        self._state = directory / "state.img"
        contents = directory / "contents"
        contents.mkdir()
        (contents / "fresh.img").write_bytes(fresh.read_bytes())
        with open(self._state, "wb") as file:
            file.truncate((64 << 20) + 4 * fresh.stat().st_size)
        run("mkfs.ext4", "-q", "-d", contents, self._state)

    def switch_on(self, ports: List[int]) -> Guest:
        """Boot; *ports* here lead to the guest's from FIRST_PORT on.

        The guest's kernel is made to write back early and without order, so that
        each failure leaves another mixture of old and new. qemu need not sync: this
        computer goes on.
        """
        guest = Guest(
            self._directory,
            "guest",
            self._packages,
            self._initramfs,
            memory=320,
            disks=[f"file={self._state},format=raw,cache=unsafe"],
            forwards={port: FIRST_PORT + i for i, port in enumerate(ports)},
        )
        guest.__enter__()
        guest.run("mount -t ext4 -o data=writeback,noatime /dev/vda /mnt")
        guest.run("cd /proc/sys/vm; echo 10 >dirty_writeback_centisecs; echo 30 >dirty_expire_centisecs")
        return guest

    def serve(self, guest: Guest, disks: List[Disk]) -> None:
        """Start a server for each; returns when all listen."""
        for disk in disks:
            command = f"{_SERVER} --lport {disk.port} {self._mode_and_files(disk)}"
            make = f"mkdir -p {disk.directory}"
            if self._mode == "target":
                make += f"; cp -n /mnt/fresh.img {disk.directory}/image; sync"
            guest.run(f"{make}; {command} >/run/{disk.port}.log 2>&1 & echo $! >/run/{disk.port}.pid")
        for disk in disks:
            log, pid = f"/run/{disk.port}.log", f"$(cat /run/{disk.port}.pid)"
            started = f"until grep -q 'INFO: serving' {log}; do kill -0 {pid} || exit 1; sleep 0.1; done"
            assert guest.run(started, check=False).status == 0, guest.output(f"cat {log}")

    def _mode_and_files(self, disk: Disk) -> str:
        if self._mode == "target":
            return f"--target {disk.directory}/image"
        files = f"{disk.directory}/cache {disk.directory}/bitmap /run/{disk.port}.ctl"
        return f"--proxy {HOST} {self._origin_port} {files}"


class Client(threading.Thread):
    """Uses an area at random until the connection breaks; ``error`` is what it has read wrong."""

    def __init__(self, disk: Disk, area: int, number: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(seed)
        self._versions = disk.versions
        self._area = area
        self._number = number
        self._handle = disk.connect()
        self.requests = 0
        self.flushes = 0
        self.error = ""

    def run(self) -> None:
        try:
            while not self.error:
                self._step()
                self.requests += 1
        except nbd.Error:
            pass

    def _step(self) -> None:
        choice = self._random.random()
        if choice < 0.06:
            self._flush()
        elif choice < 0.3:
            self._read(*self._any_place())
        else:
            self._write(*self._any_place(), lasting=choice > 0.95)

    def _any_place(self) -> List[int]:
        """First sector and count, within a unit of this client."""
        unit = self._random.randrange(AREA // UNIT // CLIENTS) * CLIENTS + self._number
        first = self._random.randrange(UNIT)
        return [self._area * AREA + unit * UNIT + first, self._random.randint(1, UNIT - first)]

    def _flush(self) -> None:
        covered = self._versions.begin_flush()
        self._handle.flush()
        self._versions.end_flush(covered)
        self.flushes += 1

    def _read(self, first: int, count: int) -> None:
        if self._handle.pread(count * SECTOR, first * SECTOR) != self._versions.content(first, count):
            self.error = f"sectors {first}..{first + count - 1} are not what was written"

    def _write(self, first: int, count: int, *, lasting: bool) -> None:
        data = self._versions.begin_write(first, count)
        self._handle.pwrite(data, first * SECTOR, nbd.CMD_FLAG_FUA if lasting else 0)
        self._versions.end_write(first, count, lasting)
