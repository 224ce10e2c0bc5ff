"""The C program that the benchmark shows beside the server: it has to move the right bytes to be a limit."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from server_process import ROOT, free_port, run, wait_until

SIZE = 8 << 20


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("spin", [0, 150])
def test_what_is_written_is_read_again(tmp_path: Path, spin: int) -> None:
    program, image, data, copy = (tmp_path / name for name in ("limit", "image", "data", "copy"))
    run("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, ROOT / "contrib" / "bench" / "limit.c")
    data.write_bytes(os.urandom(SIZE))
    image.write_bytes(bytes(SIZE))
    port = free_port()
    server = subprocess.Popen([program, "--spin", str(spin), str(port), image])
    try:
        wait_until(lambda: accepts(port), "the server")
        uri = f"nbd://127.0.0.1:{port}"
        run("nbdcopy", data, uri)
        run("nbdcopy", uri, copy)
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 5M", "-c", "read -P 7 1M 5M", "-c", "flush", uri)
    finally:
        server.kill()
        server.wait()
    assert copy.read_bytes() == data.read_bytes()
    assert image.read_bytes()[1 << 20 : 6 << 20] == b"\x07" * (5 << 20)
