"""Every command of contrib/recipes.rst, in the order of the page.

A literal block of the page is a shell script, which a sentence introduces that begins
with "On ..." and ends with "::". Blocks for "the client" and "a client" run in a
virtual machine, all others here. Before that, and nowhere else, names are replaced:

- addresses 10.0.*.* by this computer's loopback, as seen from where the block runs;
- ports 85xx by free ones, always the same for the same port;
- /srv/xnbd and /run/xnbd by directories of the test.

A command that fails ends its block and fails the test; what the recipes promise is
looked at between the blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import pytest
from exported import check_ext4, digest_of
from launch import stop_daemon
from server_process import PYTHON, ROOT, free_port, run
from xnbdguest.errors import GuestError
from xnbdguest.initramfs import basic_system
from xnbdguest.machine import HOST, Guest
from xnbdguest.packages import fetch_packages

PAGE = ROOT / "contrib" / "recipes.rst"
BLOCK_TIME = 120.0
COW, SITES, MOVING, CACHE, SWAP = (
    "Everybody writes, nothing stays",
    "A proxy for each site",
    "Moving a disk, or a virtual machine with its disk",
    "A cache for a disk behind a slow line",
    "Swap space over the network",
)
GOLDEN = "Diskless clients from one golden image"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(480)]


class Block(NamedTuple):
    """A *script* of the page; *in_guest* if the page has it run on a client."""

    script: str
    in_guest: bool


def read_page(text: str) -> Dict[str, List[Block]]:
    """The blocks of each section, under the section's title; ValueError for one that nobody introduces."""
    sections: Dict[str, List[Block]] = {}
    introduction = ""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+(?=\S)|\n\n(?=    \S)", text):
        lines = paragraph.splitlines()
        if len(lines) > 1 and re.fullmatch(r"=+|-+", lines[1]):
            blocks = sections.setdefault(lines[0], [])
        elif not introduction.endswith("::"):
            introduction = paragraph.strip()
            continue
        else:
            where = re.search(r"(?:\A|[.:] )On (the|a) ([^.]*)::\Z", introduction.replace("\n", " "))
            if not where or not paragraph.startswith("    "):
                raise ValueError(f"nothing says where to run this:\n{paragraph}")
            blocks.append(Block(re.sub("(?m)^    ", "", paragraph) + "\n", where[2].startswith("client")))
        introduction = ""
    return sections


class Playground:
    """Where blocks run: *directory* of this computer, and *guest*."""

    def __init__(self, directory: Path, guest: Guest) -> None:
        self.directory = directory
        self.guest = guest
        self._ports: Dict[str, str] = {}
        for name in ("srv", "run", "bin"):
            (directory / name).mkdir()
        for program in ("xnbd-server", "xnbd-bgctl", "xnbd-wrapper", "xnbd-wrapper-ctl"):
            shim = directory / "bin" / program
            shim.write_text(f'#!/bin/sh\nexec "{PYTHON}" -W error "{ROOT}/bin/{program}" "$@"\n')
            shim.chmod(0o755)

    def path(self, name: str) -> Path:
        """A file that the page has in /srv/xnbd."""
        return self.directory / "srv" / name

    def run(self, block: Block) -> str:
        """The block's output; AssertionError or GuestError if one of its commands fails."""
        if block.in_guest:
            script = self._with_real_names(block.script, HOST)
            return self.guest.output(f"set -eu\n{script}", timeout=BLOCK_TIME)
        return self._run_here(self._with_real_names(block.script, "127.0.0.1"))

    def port(self, number: str) -> str:
        if number not in self._ports:
            self._ports[number] = str(free_port())
        return self._ports[number]

    def _with_real_names(self, script: str, host: str) -> str:
        script = re.sub(r"\b10\.0\.\d+\.\d+\b", host, script)
        script = re.sub(r"\b85\d\d\b", lambda match: self.port(match[0]), script)
        return re.sub(r"/(srv|run)/xnbd\b", rf"{self.directory}/\1", script)

    def _run_here(self, script: str) -> str:
        path = f"{self.directory}/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
        output = self.directory / "output"
        with open(output, "w+") as file:
            done = subprocess.run(
                ["bash", "-eu", "-o", "pipefail", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=BLOCK_TIME,
                env={**os.environ, "PATH": path},
            )
        assert done.returncode == 0, f"status {done.returncode}:\n{script}\n{output.read_text()}"
        return output.read_text()

    def clear(self) -> None:
        """End what a recipe has left."""
        self.guest.run(
            "umount /mnt /changes /golden; swapoff -a; nbd-client -d /dev/nbd0;"
            "while nbd-client -c /dev/nbd0; do sleep 0.05; done",
            check=False,
        )
        if (self.directory / "run" / "wrapper.ctl").exists():
            self._run_here(f"xnbd-wrapper-ctl --socket {self.directory}/run/wrapper.ctl --shutdown")
        for pid_file in self.directory.glob("*/*.pid"):
            stop_daemon(pid_file)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("guest")
    packages = fetch_packages()
    archive = basic_system(packages)
    archive.add_file(next(packages.modules.rglob("overlay.ko")), "/modules/99-overlay.ko")
    archive.add_bytes(f"/lib/modules/{packages.modules.name}/modules.dep", b"nbd.ko:\n")  # for modprobe
    archive.write(directory / "initramfs")
    with Guest(directory, "client", packages, directory / "initramfs", processors=2) as guest:
        yield guest


@pytest.fixture(scope="module")
def page() -> Dict[str, List[Block]]:
    return read_page(PAGE.read_text())


@pytest.fixture
def playground(tmp_path: Path, guest: Guest) -> Iterator[Playground]:
    playground = Playground(tmp_path, guest)
    try:
        yield playground
    finally:
        playground.clear()


@pytest.fixture
def golden(playground: Playground, page: Dict[str, List[Block]]) -> str:
    """Make the golden image; returns its digest."""
    system = playground.path("system")
    system.mkdir()
    (system / "motto").write_text("all clients alike\n")
    (make,) = page[GOLDEN]
    playground.run(make)
    return digest_of(playground.path("golden.img"))


def test_every_block_is_in_a_recipe_that_is_tested(page: Dict[str, List[Block]]) -> None:
    assert {title for title, blocks in page.items() if blocks} == {GOLDEN, COW, SITES, MOVING, CACHE, SWAP}
    assert sum(map(len, page.values())) == PAGE.read_text().count("::\n")


def test_clients_with_disks_of_their_own(playground: Playground, page: Dict[str, List[Block]], golden: str) -> None:
    serve, connect, leave, end = page[COW]
    playground.run(serve)
    for _ in range(2):
        playground.run(connect)
        assert playground.guest.output("cat /mnt/motto") == "all clients alike"
        playground.guest.run("test ! -e /mnt/new && echo mine >/mnt/new && echo other >/mnt/motto && sync")
        playground.run(leave)
        playground.guest.run("while nbd-client -c /dev/nbd0; do sleep 0.05; done")
    playground.run(end)
    assert digest_of(playground.path("golden.img")) == golden


def test_site_with_a_proxy(playground: Playground, page: Dict[str, List[Block]], golden: str) -> None:
    serve, cache, connect, detach, leave = page[SITES]
    playground.run(serve)
    playground.run(cache)
    playground.run(connect)
    assert playground.guest.output("cat /mnt/motto") == "all clients alike"
    playground.guest.run("echo mine >/mnt/motto")
    playground.run(detach)
    stop_daemon(playground.directory / "run" / "golden.pid")
    playground.guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert playground.guest.output("cat /golden/motto /mnt/motto").split("\n") == ["all clients alike", "mine"]
    playground.run(leave)
    assert digest_of(playground.path("golden.img")) == digest_of(playground.path("site.img")) == golden


def test_disk_that_moves(playground: Playground, page: Dict[str, List[Block]], tmp_path: Path) -> None:
    serve, use, cache, change_over, detach, end, restart = page[MOVING]
    playground.run(serve)
    playground.run(use)
    playground.guest.run("dd if=/dev/urandom of=/mnt/data bs=1M count=8 conv=fsync")
    digest = playground.guest.output("md5sum </mnt/data").split()[0]
    playground.run(cache)
    playground.run(change_over)
    before = digest_of(playground.path("old.img"))
    playground.run(detach)
    playground.run(end)
    playground.guest.run("echo 3 >/proc/sys/vm/drop_caches; cp /mnt/data /mnt/copy; sync")
    playground.guest.run("umount /mnt")
    playground.run(restart)
    assert check_ext4(playground.path("new.img"), "copy", tmp_path) == digest
    assert digest_of(playground.path("old.img")) == before


def test_cache_for_a_slow_line(playground: Playground, page: Dict[str, List[Block]]) -> None:
    serve, cache, bring, move, follow = page[CACHE]
    playground.run(serve)
    with open(playground.path("far.img"), "r+b") as file:
        file.write(os.urandom(1 << 20))
    playground.run(cache)
    assert "proxy" in playground.run(bring)
    control = playground.directory / "run" / "near.ctl"
    playground.run(move)
    playground.run(follow)
    near = f"nbd://127.0.0.1:{playground.port('8526')}"
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", playground.path("far.img"), near)
    report = playground.run(Block(f"xnbd-bgctl --query {control}", in_guest=False))
    assert f"nbd://127.0.0.1:{playground.port('8527')}" in report
    assert "100 %" in report


def test_swap_space(playground: Playground, page: Dict[str, List[Block]]) -> None:
    serve, use, give_back = page[SWAP]
    playground.run(serve)
    playground.run(use)
    assert "/dev/nbd0" in playground.guest.output("cat /proc/swaps")
    playground.run(give_back)
    assert "/dev/nbd0" not in playground.guest.output("cat /proc/swaps")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("--cache-all", "--cache-everything"), ("--lport", "--port"), ("near.bitmap", "near.img")],
)
def test_wrong_command_is_noticed(playground: Playground, right: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match="status"):
        for block in read_page(PAGE.read_text().replace(right, wrong))[CACHE]:
            playground.run(block)


def test_wrong_command_on_a_client_is_noticed(playground: Playground) -> None:
    blocks = read_page(PAGE.read_text().replace("mkswap", "makeswap"))[SWAP]
    playground.run(blocks[0])
    with pytest.raises(GuestError, match="makeswap"):
        playground.run(blocks[1])


def test_block_that_nobody_introduces_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing says"):
        read_page("Title\n=====\n\nThen::\n\n    true\n")


def test_proxy_in_the_readme(playground: Playground) -> None:
    text = (ROOT / "README.rst").read_text()
    section = text[text.index("\nA disk that lives elsewhere\n") : text.index("\nOptions that matter\n")]
    (found,) = re.findall(r"::\n\n((?:    .*\n|\n)+)", section)
    directory = playground.path("")
    script = found.replace(".venv/bin/", "").replace("localhost", "127.0.0.1")
    output = playground.run(Block(f"cd {directory}\n{script}", in_guest=False))
    assert "cached      100 %" in output
    assert (directory / "copy.img").read_bytes() == (directory / "far.img").read_bytes()
    assert (directory / "cache.img").stat().st_size == 64 << 20
    stop_daemon(directory / "proxy.pid")
