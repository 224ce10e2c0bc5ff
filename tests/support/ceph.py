"""Ceph on one computer: a monitor, an OSD that keeps all in memory, and a gateway that speaks S3.

Debian: ceph-mon, ceph-osd, ceph-common, radosgw. It takes a few seconds and 150 MiB to come up.
"""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path
from typing import Dict, List, Optional
from urllib.error import HTTPError
from urllib.request import urlopen

from server_process import free_port, wait_until

START = 120.0

CONFIGURATION = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}/0]
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {where}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
ms bind ipv6 = false
ms bind msgr1 = false
ms async op threads = 1
pid file = {where}/$name.pid
log file = {where}/$name.log
run dir = {where}
crash dir = {where}/crash
setuser match path =
[mon]
admin socket = {where}/$name.asok
mon data = {where}/mon
mon initial members = a
mon cluster log file = {where}/cluster.log
[osd]
admin socket = {where}/$name.asok
osd data = {where}/osd
osd objectstore = memstore
memstore device bytes = 1G
osd class load list = *
osd class default list = *
"""


class Ceph:
    """A context in which the cluster runs, with its files in *where*; ``s3()`` adds the gateway.

    ``osd`` is the process that has the data.
    """

    def __init__(self, where: Path) -> None:
        self.osd = 0
        self._where = where
        self.configuration = where / "ceph.conf"
        self._programs: List[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ceph:
        port, where = free_port(), self._where
        for name in ("mon", "osd", "crash"):
            (where / name).mkdir(parents=True)
        fsid = uuid.uuid4()
        self.configuration.write_text(CONFIGURATION.format(fsid=fsid, port=port, where=where))
        try:
            self._make_keys()
            address = f"[v2:127.0.0.1:{port}]"
            self.run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, where / "monmap")
            self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", where / "monmap", "--keyring", where / "keyring")
            self.start("ceph-mon", "-f", "-i", "a")
            self._add_osd()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_keys(self) -> None:
        keyring, everything = self._where / "keyring", ("allow *",)
        self.run("ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", *everything)
        caps = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, *everything)]
        self.run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *caps)

    def _add_osd(self) -> None:
        identity = uuid.uuid4()
        self.run("ceph", "osd", "new", identity, "0")
        key = self.run("ceph", "auth", "get-or-create", "osd.0", "mon", "allow profile osd", "osd", "allow *")
        with (self._where / "keyring").open("a") as keyring:
            keyring.write(key)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self.osd = self.start("ceph-osd", "-f", "-i", "0")
        wait_until(lambda: "1 up" in self.run("ceph", "osd", "stat"), "the OSD", START)

    def s3(self, access_key: str, secret_key: str) -> str:
        """Start the gateway, with a user who has these keys: its URL."""
        port, keys = free_port(), (f"--access-key={access_key}", f"--secret-key={secret_key}")
        self.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        self.start("radosgw", "-f", "-n", "client.admin", "--rgw-frontends", f"beast endpoint=127.0.0.1:{port}")
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url), "the gateway", START)
        return url

    def run(self, *words: object) -> str:
        """Run a program of Ceph to its end: its output."""
        return run_ceph(self.configuration, *words)

    def start(self, *words: object) -> int:
        """Start a daemon: its process id."""
        with (self._where / "output").open("ab") as output:
            program = subprocess.Popen(
                list(map(str, words)),
                env=_env(self.configuration),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._programs.append(program)
        return program.pid

    def stop(self) -> None:
        for program in reversed(self._programs):
            program.terminate()
        for program in reversed(self._programs):
            try:
                program.wait(10)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def run_ceph(configuration: Path, *words: object, content: Optional[bytes] = None) -> str:
    """Run a program of Ceph, which has *content* on its standard input, to its end: its output."""
    done = subprocess.run(
        list(map(str, words)), env=_env(configuration), input=content or b"", capture_output=True, timeout=START
    )
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}"
    return done.stdout.decode()


def _env(configuration: Path) -> Dict[str, str]:
    return {"CEPH_CONF": str(configuration), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def answers(url: str) -> bool:
    """Whether a web server does."""
    try:
        urlopen(url, timeout=5).close()
    except HTTPError:
        pass  # it says no
    except OSError:
        return False
    return True
