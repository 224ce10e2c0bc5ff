"""Every example of README.rst, section by section, and those of the guides in contrib/doc.

Each section of the README has one example at least. Its literal blocks run one after
the other in one directory. A block that is introduced by "As root" runs in a virtual
machine, which is the client. A block that begins with "$ " shows output and does not
run. Of a guide, the blocks run that are introduced by "Try this", all in one directory;
`test_recipes` runs the recipes. `playground` says which names are replaced before.
"""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, List

import pytest
from launch import Launched, launched
from playground import Block, Playground, client_machine, read_paragraphs
from server_process import PYTHON, ROOT, free_port, run

README = ROOT / "README.rst"
GUIDES = ROOT / "contrib" / "doc"
FIRST = "xnbd"
"""The part before the first section: what is typed first."""

pytestmark = pytest.mark.timeout(480)


def read_examples(text: str) -> Dict[str, List[Block]]:
    """What runs of each section, under the section's title."""
    sections: Dict[str, List[Block]] = {}
    for paragraph in read_paragraphs(text):
        blocks = sections.setdefault(paragraph.title, [])
        if paragraph.literal and not paragraph.text.startswith("$ "):
            blocks.append(Block(paragraph.text, paragraph.introduction.endswith("As root::")))
    return sections


EXAMPLES = read_examples(README.read_text())


PROMISES: Dict[str, List[str]] = {
    "What it is": ["export-size: 67108864"],
    "Serve a disk": ["export-size: 1073741824"],
    "Use a disk": ["virtual size: 1 GiB", "read 65536/65536"],
    "Encrypt, and say who may open what": ["newstyle-fixed with TLS", "is_read_only: false"],
    "Let clients try things": ["read 65536/65536"],
    "Cache a disk of another server": ["cached      100 %", "plain target"],
    "Steer a running server": ["my.img: target, 64 MiB", '"mode": "target"'],
    "Watch it": ["xnbd_clients", "seen.ctl", "each client: 50 MiB/s"],
    "Take snapshots": [],
    "Serve many disks on one port": ['export="one.img"', 'export="two.img"', "removed two.img", "data     target"],
    "Run it as a service": [],
    "Read on": ["test_smoke"],
}
"""What is printed, of each section."""

SAME: Dict[str, List[str]] = {
    "Cache a disk of another server": ["far.img", "copy.img", "cache.img"],
    "Take snapshots": ["keep.img", "vm.img"],
}
"""Files that have the same content in the end, of each section."""


def marks_of(title: str) -> List[pytest.MarkDecorator]:
    return [pytest.mark.guest] if any(block.in_guest for block in EXAMPLES[title]) else []


GUIDE_PROMISES: Dict[str, List[str]] = {
    "protocols.rst": ["export-size: 67108864", '"done": true', '"version": 2'],
    "development.rst": ["test_cow"],
}
"""What is printed, of each guide in which there is something to try."""


def test_every_guide_with_examples_is_tried() -> None:
    assert {page.name for page in GUIDES.glob("*.rst") if "Try this" in page.read_text()} == set(GUIDE_PROMISES)


def test_every_section_has_an_example() -> None:
    assert set(EXAMPLES) - {FIRST} == set(PROMISES)
    assert not [title for title in PROMISES if not EXAMPLES[title]]


def test_readme_is_for_users() -> None:
    assert len(README.read_text().splitlines()) <= 300


@pytest.mark.parametrize("title", [pytest.param(title, marks=marks_of(title)) for title in PROMISES])
def test_example(title: str, tmp_path: Path) -> None:
    printed = run_all(EXAMPLES[title], tmp_path)
    for text in PROMISES[title]:
        assert text in printed
    assert len({(tmp_path / "srv" / name).read_bytes() for name in SAME.get(title, [])}) <= 1


@pytest.mark.parametrize("name", GUIDE_PROMISES)
def test_example_in_a_guide(name: str, tmp_path: Path) -> None:
    page = (GUIDES / name).read_text()
    tried = [
        paragraph for paragraph in read_paragraphs(page) if re.search(r"Try this\b[^.]*::$", paragraph.introduction)
    ]
    printed = run_all([Block(paragraph.text) for paragraph in tried if paragraph.literal], tmp_path)
    for text in GUIDE_PROMISES[name]:
        assert text in printed


def run_all(blocks: List[Block], directory: Path) -> str:
    """What the blocks print, one after the other in one new place."""
    with ExitStack() as stack:
        guest = None
        if any(block.in_guest for block in blocks):
            (directory / "guest").mkdir()
            guest = stack.enter_context(client_machine(directory / "guest"))
        playground = Playground(directory, guest)
        stack.callback(playground.clear)
        return "".join(playground.run(adapted(block)) for block in blocks)


def adapted(block: Block) -> Block:
    """The block, without what takes long: pytest only lists tests; files of the checkout are named in full."""
    script = re.sub(r" (?=contrib/man/|tests/)", f" {ROOT}/", block.script)
    return block._replace(script=script.replace("-m pytest ", f"-m pytest --rootdir {ROOT} --collect-only -q "))


def test_first_command_serves_a_disk(tmp_path: Path) -> None:
    setup, check = EXAMPLES[FIRST]
    prepare, _, serve = setup.script.strip().partition(" && ")
    assert (ROOT / prepare).is_file()
    assert (ROOT / check.script.strip()).is_file()
    program, *arguments = serve.split()
    port = free_port()
    where = ["--laddr", "127.0.0.1", "--lport", str(port)]
    server = [PYTHON, "-W", "error", ROOT / "bin" / Path(program).name, *arguments, *where]
    with launched(server, tmp_path / "log", cwd=tmp_path) as served:
        wait_for_start(served)
        assert int(run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}")[1]) == 1 << 30


def wait_for_start(served: Launched) -> None:
    served.wait_for_log("INFO: serving ")


@pytest.mark.parametrize(("right", "wrong"), [("--create 64M", "--create"), ("nbdinfo nbd", "nbdinfo --no nbd")])
def test_wrong_example_is_noticed(right: str, wrong: str, tmp_path: Path) -> None:
    playground = Playground(tmp_path)
    (block,) = read_examples(README.read_text().replace(right, wrong))["What it is"]
    try:
        with pytest.raises(AssertionError, match="status"):
            playground.run(block)
    finally:
        playground.clear()


def test_sections_are_not_in_each_others_way() -> None:
    """Whoever tries one after the other has servers that run on: no pid file or address is in two sections."""
    used: Dict[str, str] = {}
    for title, blocks in EXAMPLES.items():
        text = "".join(block.script for block in blocks)
        for place in set(re.findall(r"--pidfile \S+|--lport \d+|--unix \S+", text)):
            assert used.setdefault(place, title) == title


PAGES = [README, *GUIDES.glob("*.rst"), *(ROOT / ".github").iterdir()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"``((?:contrib|bin|tests|\.github)/[\w./@-]+)``", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_well_formed(page: Path) -> None:
    command = [sys.executable, "-m", "docutils", "--halt=2", "--report=2", page, "/dev/null"]
    assert run(*command) == (0, "", "")
