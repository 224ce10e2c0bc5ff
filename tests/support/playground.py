"""Where the commands of README and recipes run: a directory of this computer, and a virtual machine as a client.

Before a block runs, and nowhere else, names are replaced:

- addresses 10.0.*.* and ``localhost`` by this computer's loopback, as seen from where the block runs;
- ports 85xx by free ones, always the same for the same port;
- /srv/xnbd, /run/xnbd and /etc/xnbd by directories of the test, and .venv/bin/ by the programs under test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional

from launch import stop_daemon
from server_process import PYTHON, ROOT, free_port
from xnbdguest.initramfs import basic_system
from xnbdguest.machine import HOST, Guest
from xnbdguest.packages import fetch_packages

BLOCK_TIME = 120.0


class Block(NamedTuple):
    """A *script* of a page; *in_guest* if the page has it run on a client."""

    script: str
    in_guest: bool = False


class Paragraph(NamedTuple):
    """A text, or a part of a *literal* block up to an empty line; *introduction* is the text before it, in one line."""

    title: str
    introduction: str
    text: str
    literal: bool


def read_paragraphs(page: str) -> Iterator[Paragraph]:
    """The paragraphs of a page of reStructuredText, each with the title of its section."""
    title = introduction = ""
    was_literal = False
    for paragraph in re.split(r"\n(?:[ \t]*\n)+(?=\S)|\n\n(?=    \S)", page):
        lines = paragraph.splitlines()
        if len(lines) > 1 and re.fullmatch(r"=+|-+", lines[-1]):
            title, introduction, was_literal = lines[-2], "", False
            continue
        literal = introduction.endswith("::") and paragraph.startswith("    ")
        if was_literal and not literal:
            introduction = ""
        text = re.sub("(?m)^    ", "", paragraph) + "\n" if literal else paragraph
        yield Paragraph(title, introduction, text, literal)
        introduction = introduction if literal else " ".join(paragraph.split())
        was_literal = literal


class Playground:
    """Where blocks run: *directory* of this computer, and *guest*, if there is one. Both stay the caller's."""

    def __init__(self, directory: Path, guest: Optional[Guest] = None) -> None:
        self.directory = directory
        self._guest = guest
        self._ports: Dict[str, str] = {}
        for name in ("srv", "run", "etc", "bin"):
            (directory / name).mkdir()
        for program in ("xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"):
            self._make_shim(program, f'"{PYTHON}" -W error "{ROOT}/bin/{program}"')
        self._make_shim("python", f'"{sys.executable}"')

    def _make_shim(self, program: str, command: str) -> None:
        shim = self.directory / "bin" / program
        shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        shim.chmod(0o755)

    @property
    def guest(self) -> Guest:
        assert self._guest is not None, "there is no client"
        return self._guest

    def path(self, name: str) -> Path:
        """A file that a page has in /srv/xnbd, or in the directory where one works."""
        return self.directory / "srv" / name

    def run(self, block: Block) -> str:
        """The block's output; AssertionError or GuestError if one of its commands fails."""
        if block.in_guest:
            return self.guest.output(f"set -eu\n{self._with_real_names(block.script, HOST)}", timeout=BLOCK_TIME)
        return self._run_here(self._with_real_names(block.script, "127.0.0.1"))

    def port(self, number: str) -> str:
        if number not in self._ports:
            self._ports[number] = str(free_port())
        return self._ports[number]

    def _with_real_names(self, script: str, host: str) -> str:
        script = re.sub(r"\b(10\.0\.\d+\.\d+|localhost)\b", host, script)
        script = re.sub(r"\b85\d\d\b", lambda match: self.port(match[0]), script)
        script = re.sub(r"/(srv|run|etc)/xnbd\b", rf"{self.directory}/\1", script)
        return script.replace(".venv/bin/", "")

    def _run_here(self, script: str) -> str:
        path = f"{self.directory}/bin:/usr/bin:/bin:/usr/sbin:/sbin"  # Debian's python3 first: nbdsh needs its modules
        output = self.directory / "output"
        with open(output, "w+") as file:
            done = subprocess.run(
                ["bash", "-eu", "-o", "pipefail", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=BLOCK_TIME,
                env={**os.environ, "PATH": path},
                cwd=self.directory / "srv",
            )
        assert done.returncode == 0, f"status {done.returncode}:\n{script}\n{output.read_text()}"
        return output.read_text()

    def clear(self) -> None:
        """End what the blocks have left."""
        if self._guest is not None:
            self._guest.run(
                "umount /mnt /changes /golden; swapoff -a; nbd-client -d /dev/nbd0;"
                "while nbd-client -c /dev/nbd0; do sleep 0.05; done",
                check=False,
            )
        for socket in self.directory.glob("*/wrapper.ctl"):
            self._run_here(f"xnbd-wrapper-ctl --socket {socket} --shutdown")
        for pid_file in self.directory.glob("*/*.pid"):
            stop_daemon(pid_file)


@contextmanager
def client_machine(directory: Path) -> Iterator[Guest]:
    """A virtual machine with Linux's client and what the pages use there."""
    packages = fetch_packages()
    archive = basic_system(packages)
    archive.add_file(next(packages.modules.rglob("overlay.ko")), "/modules/99-overlay.ko")
    archive.add_bytes(f"/lib/modules/{packages.modules.name}/modules.dep", b"nbd.ko:\n")  # for modprobe
    archive.write(directory / "initramfs")
    with Guest(directory, "client", packages, directory / "initramfs", processors=2) as guest:
        yield guest
