"""A disk served in one of the modes, on a TCP port of 127.0.0.1, for clients in a guest."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import List

from conftest import MIB, Start
from server_process import Server, command, run

MODES: List[str] = ["target", "cow"] + ["proxy"] * ("--proxy" in run(*command("--help"))[1])
"""The modes of the program: all that it knows."""


class Exported:
    """A disk of *size* bytes whose first MiB is noise.

    ``image`` is the file behind it: the image, the golden image of a copy-on-write
    target, or the origin's. ``server`` is the one that clients use, with a socket for operators at ``control``.
    """

    def __init__(self, start: Start, directory: Path, mode: str, size: int) -> None:
        self.mode = mode
        self.image = directory / f"{mode}.img"
        with open(self.image, "wb") as file:
            file.write(random.Random(size).randbytes(MIB))
            file.truncate(size)
        self._digest = digest_of(self.image)
        self.control = directory / f"{mode}.ctl"
        if mode == "proxy":
            origin = start("--target", self.image, tcp=True)
            self.cache = directory / "cache.img"
            state = [directory / "cache.bitmap", self.control]
            self.server: Server = start("--proxy", "127.0.0.1", origin.port, self.cache, *state, tcp=True)
        else:
            kind = f"--{mode}-target" if mode == "cow" else "--target"
            self.server = start(kind, "--control", self.control, self.image, tcp=True)

    @property
    def port(self) -> int:
        return self.server.port

    def content_in(self, path: Path) -> Path:
        """Copy what clients see into the file *path*."""
        run("nbdcopy", "--flush", self.server.uri, path)
        return path

    def check_what_is_behind(self, content: Path) -> None:
        """The image of a target is what clients see; a golden image or an origin's is what it was."""
        if self.mode == "target":
            assert digest_of(self.image) == digest_of(content)
        else:
            assert digest_of(self.image) == self._digest


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(MIB), b""):
            digest.update(part)
    return digest.hexdigest()


def check_ext4(image: Path, name: str, directory: Path) -> str:
    """Check the file system in *image*, which must be clean, and return the MD5 of its file *name*."""
    run("e2fsck", "-fn", image)
    extracted = directory / "extracted"
    run("debugfs", "-R", f"dump /{name} {extracted}", image)
    digest = hashlib.md5(extracted.read_bytes()).hexdigest()
    extracted.unlink()
    return digest
