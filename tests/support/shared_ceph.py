"""One Ceph for all tests of a run that want it at the same time, in whatever process of pytest-xdist they are.

Its holder is this file as a program. Who uses the cluster has a shared lock on the file ``users``, and the holder
lives until it gets that lock for itself: so the last user may be killed as well. Each test has images of its own.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator
from uuid import uuid4

import pytest
from ceph import START, Ceph, run_ceph
from server_process import wait_until

POOL = "rbd"
READER = "xnbd"
"""The client of Ceph who may read images, and nothing else."""

READING = ("mon", "profile rbd", "osd", f"profile rbd-read-only pool={POOL}")
"""What that client may do."""


class SharedCeph:
    """The cluster with its files in *root*, while this process uses it."""

    def __init__(self, root: Path) -> None:
        self.configuration = root / "cluster" / "ceph.conf"
        self._root = root
        self._osd = int((root / "ready").read_text())

    def run(self, *words: object, content: bytes = b"") -> str:
        """Run a program of Ceph as its administrator: its output."""
        return run_ceph(self.configuration, *words, content=content)

    def make(self, content: bytes, *options: object, snapshot: str = "snap") -> Image:
        """A new image, with a snapshot."""
        image = Image(self, f"image-{uuid4()}")
        self.run("rbd", "import", *options, "-", image.name, content=content)
        image.snap(snapshot)
        return image

    def add_client(self, name: str, *rights: object, where: Path) -> Path:
        """A configuration in *where* for a new client, who has a keyring of its own."""
        keyring = where / f"{name}.keyring"
        keyring.write_text(self.run("ceph", "auth", "get-or-create", f"client.{name}", *rights))
        return self.configure(where / f"{name}.conf", keyring=keyring)

    def configure(self, path: Path, **changed: object) -> Path:
        """Another configuration for a client at *path*."""
        words = {name.replace("_", " "): value for name, value in changed.items()}
        lines = [line for line in self.configuration.read_text().splitlines() if line.partition(" = ")[0] not in words]
        lines[1:1] = [f"{name} = {value}" for name, value in words.items()]
        new = path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        return new.rename(path)

    def shut_out(self, client: str) -> None:
        """All connections of *client*; it may make others."""
        sessions = json.loads(self.run("ceph", "daemon", self.configuration.parent / "mon.a.asok", "sessions"))
        found = [session["socket_addr"] for session in sessions if session["entity_name"] == f"client.{client}"]
        assert found
        for address in found:
            self.run("ceph", "osd", "blocklist", "add", f"{address['addr']}/{address['nonce']}", "60")

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Nothing is answered for a short while: other tests wait as well, and one test at a time may do this."""
        with (self._root / "stall").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.kill(self._osd, signal.SIGSTOP)
            try:
                yield
            finally:
                os.kill(self._osd, signal.SIGCONT)


class Line:
    """The way to *ceph*, as `relay.Relay` is one to a server."""

    def __init__(self, ceph: SharedCeph) -> None:
        self._ceph = ceph
        self._stalled = ExitStack()

    def stall(self) -> None:
        """Once, before `resume`."""
        self._stalled.enter_context(self._ceph.stalled())

    def resume(self) -> None:
        self._stalled.close()


class Image:
    """The image *name* in the pool of *ceph*."""

    def __init__(self, ceph: SharedCeph, name: str) -> None:
        self.name = name
        self._ceph = ceph

    def uri(self, snapshot: str = "@snap", *, conf: object = None, client: str = READER) -> str:
        return f"rbd:{POOL}/{self.name}{snapshot}?conf={conf or self._ceph.configuration}&id={client}"

    def snap(self, name: str) -> None:
        self.rbd("snap", "create", f"{self.name}@{name}")

    def remove_snap(self) -> None:
        """What is written later is nobody's old data."""
        self.rbd("snap", "rm", f"{self.name}@snap")

    def rbd(self, *words: object) -> str:
        return self._ceph.run("rbd", *words)

    def clone(self, *options: object, protect: bool = True) -> Image:
        """Another image that begins as this one's snapshot, yet without one."""
        child = Image(self._ceph, f"image-{uuid4()}")
        if protect:
            self.rbd("snap", "protect", f"{self.name}@snap")
        self.rbd("clone", *options, f"{self.name}@snap", child.name)
        return child

    def write(self, data: bytes, offset: int) -> None:
        """As somebody does who knows nothing of a proxy."""
        words = ["qemu-io", "-f", "raw", "-c", f"write -q -P {data[0]} {offset} {len(data)}"]
        assert len(set(data)) == 1
        self._ceph.run(*words, f"rbd:{POOL}/{self.name}:id=admin:conf={self._ceph.configuration}")


@contextmanager
def sharing(root: Path) -> Iterator[SharedCeph]:
    """The cluster with its files in *root*, which the first user starts."""
    if importlib.util.find_spec("rbd") is None:
        pytest.skip("there is no binding of Ceph: apt-get install python3-rbd")
    root.mkdir(exist_ok=True)
    with ExitStack() as stack:
        users, starting = (stack.enter_context((root / name).open("w")) for name in ("users", "starting"))
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_EX)
        if not (root / "ready").exists():
            _start_holder(root)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield SharedCeph(root)


def _start_holder(root: Path) -> None:
    """As nobody's child, for it may outlive this process."""
    ready, log = root / "ready", root / "output"
    with log.open("wb") as output:
        words = ["setsid", "--fork", sys.executable, __file__, str(root)]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True)
    wait_until(lambda: ready.exists() or "Error" in log.read_text(), "a shared Ceph", START)
    assert ready.exists(), log.read_text()


def hold(root: Path) -> None:
    """Start the cluster, and stop it when nobody uses it any more."""
    where = root / "cluster"
    shutil.rmtree(where, ignore_errors=True)
    with (root / "users").open() as users, Ceph(where) as ceph:
        ceph.run("ceph", "osd", "pool", "create", POOL, "8")
        key = ceph.run("ceph", "auth", "get-or-create", f"client.{READER}", *READING)
        with (where / "keyring").open("a") as keyring:
            keyring.write(key)
        (root / "almost").write_text(str(ceph.osd))
        (root / "almost").rename(root / "ready")
        fcntl.flock(users, fcntl.LOCK_EX)
        (root / "ready").unlink()
        ceph.stop()
        shutil.rmtree(where)


if __name__ == "__main__":
    hold(Path(sys.argv[1]))
