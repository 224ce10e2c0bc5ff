#!/usr/bin/env python3
"""A Ceph on one computer with a disk in it, for the benchmark: rbd/disk@snap, until it is stopped.

Usage:
  cephorigin.py PORT DIRECTORY IMAGE

Its files are in DIRECTORY, the disk is a copy of IMAGE. Listens on 127.0.0.1 once the disk is there, for nobody
but who wants to know that.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from ceph import Ceph


def main(port: str, directory: str, image: str) -> None:
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit())  # at any moment: nothing is left behind
    with Ceph(Path(directory)) as ceph, socket.socket() as sock:
        ceph.run("ceph", "osd", "pool", "create", "rbd", "8")
        ceph.run("rbd", "import", image, "rbd/disk")
        ceph.run("rbd", "snap", "create", "rbd/disk@snap")
        sock.bind(("127.0.0.1", int(port)))
        sock.listen()
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
