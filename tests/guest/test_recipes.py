"""Every command of contrib/doc/recipes.rst, in the order of the page.

A literal block of the page is a shell script. The sentence before it begins with
"On ..." and ends with "::". Blocks for "the client" and "a client" run in a virtual
machine, all others here; `playground` says which names are replaced before.

A command that fails ends its block and fails the test; what the recipes promise is
looked at between the blocks.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from exported import check_ext4, digest_of
from launch import stop_daemon
from playground import Block, Playground, client_machine, read_paragraphs
from server_process import ROOT, run, wait_until
from xnbdguest.errors import GuestError
from xnbdguest.machine import Guest

PAGE = ROOT / "contrib" / "doc" / "recipes.rst"
COW, SITES, MOVING, CACHE, SWAP = (
    "Everybody writes, nothing stays",
    "A proxy for each site",
    "Moving a disk, or a virtual machine with its disk",
    "A cache for a disk behind a slow line",
    "Swap space over the network",
)
TLS = "Certificates, and who may open which disk"
GOLDEN = "Diskless clients from one golden image"

pytestmark = [pytest.mark.guest, pytest.mark.timeout(480)]


def read_page(text: str) -> Dict[str, List[Block]]:
    """The blocks of each section, under the section's title; ValueError for one that nobody introduces."""
    sections: Dict[str, List[Block]] = {}
    for paragraph in read_paragraphs(text):
        blocks = sections.setdefault(paragraph.title, [])
        if paragraph.introduction.endswith("::"):
            where = re.search(r"(?:\A|[.:] )On (the|a) ([^.]*)::\Z", paragraph.introduction)
            if not where or not paragraph.literal:
                raise ValueError(f"nothing says where to run this:\n{paragraph.text}")
            blocks.append(Block(paragraph.text, where[2].startswith("client")))
    return sections


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with client_machine(tmp_path_factory.mktemp("guest")) as guest:
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
    assert {title for title, blocks in page.items() if blocks} == {GOLDEN, COW, SITES, MOVING, CACHE, SWAP, TLS}
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


def bring_to_guest(playground: Playground, source: Path, directory: Path) -> None:
    """The files of *source* into *directory*, which has the same name there as it would have here."""
    playground.guest.run(f"mkdir -p {directory}")
    for file in source.iterdir():
        content = base64.b64encode(file.read_bytes()).decode()
        playground.guest.run(f"echo {content} | base64 -d >{directory}/{file.name}")


def test_disk_with_certificates(playground: Playground, page: Dict[str, List[Block]], tmp_path: Path) -> None:
    make_authority, sign_server, sign_clients, serve, use, look, cache, revoke, reread = page[TLS]
    etc = playground.directory / "etc"
    for block in (make_authority, sign_server, sign_clients):
        playground.run(block)
    shutil.copytree(etc / "ca" / "server", etc / "tls")
    shutil.copytree(etc / "ca" / "bob", etc / "client")
    bring_to_guest(playground, etc / "ca" / "alice", etc / "client")
    playground.run(serve)
    playground.run(use)
    playground.guest.run("dd if=/dev/urandom of=/mnt/data bs=1M count=4 conv=fsync")
    digest = playground.guest.output("md5sum </mnt/data").split()[0]
    assert "is_read_only: true" in playground.run(look)
    playground.run(cache)
    near = f"nbd://127.0.0.1:{playground.port('8530')}"
    playground.guest.run("umount /mnt && nbd-client -d /dev/nbd0")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", playground.path("shared.img"), near)
    playground.run(revoke)
    shutil.copy(etc / "ca" / "ca-crl.pem", etc / "tls")
    playground.run(reread)
    wait_until(lambda: is_refused(playground, look), "the revoked client to be refused")
    assert check_ext4(playground.path("shared.img"), "data", tmp_path) == digest


def is_refused(playground: Playground, block: Block) -> bool:
    try:
        playground.run(block)
    except AssertionError:
        return True
    return False


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
