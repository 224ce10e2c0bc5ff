"""The recipe of ``contrib/doc/origins.rst``, command by command, with Ceph's gateway; the addresses on that page."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Iterator, List

import pytest
from ceph import Ceph
from conftest import MIB
from object_store import KEYS, Store
from playground import Block, Playground, read_paragraphs
from server_process import ROOT, run

from xnbd.origin.address import SCHEMES, beginning, parse_origin

PAGE = (ROOT / "contrib" / "doc" / "origins.rst").read_text()
RECIPE = "Golden images from S3 on every node"


@pytest.fixture
def playground(tmp_path: Path) -> Iterator[Playground]:
    (tmp_path / "place").mkdir()
    playground = Playground(tmp_path / "place")
    yield playground
    playground.clear()


def blocks() -> List[str]:
    found = [paragraph for paragraph in read_paragraphs(PAGE) if paragraph.title == RECIPE and paragraph.literal]
    return [paragraph.text for paragraph in found]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_golden_images_come_from_ceph_to_a_node(tmp_path: Path, playground: Playground) -> None:
    disk = random.Random(1).randbytes(3 * MIB)
    with Ceph(tmp_path / "ceph") as ceph:
        store = Store(ceph.s3(*KEYS.values()))
        store.make_bucket()
        store.put("debian-1.raw", disk)
        here = store.url.rpartition(":")[2]
        read_only, start, overlay, copy, end = (
            text.replace("READER", KEYS["AWS_ACCESS_KEY_ID"])
            .replace("SECRET", KEYS["AWS_SECRET_ACCESS_KEY"])
            .replace("8580", here)
            for text in blocks()
        )
        for script in (read_only, start, overlay):
            playground.run(Block(script))
        machine = playground.path("machine-1.qcow2")
        assert f"virtual size: {len(disk) // MIB} MiB" in run("qemu-img", "info", machine)[1]
        told = run("qemu-io", "-c", f"read -v {2 * MIB} 16", machine)[1]
        assert " ".join(f"{octet:02x}" for octet in disk[2 * MIB : 2 * MIB + 16]) in told
        assert "100" in playground.run(Block(copy))
    assert playground.path("debian-1.img").read_bytes() == disk
    assert run("qemu-img", "convert", "-O", "raw", machine, tmp_path / "copy.raw")[0] == 0  # without the store
    assert (tmp_path / "copy.raw").read_bytes() == disk
    playground.run(Block(end))


def test_the_page_has_all_kinds_of_addresses() -> None:
    assert {scheme for scheme in SCHEMES if beginning(scheme) not in PAGE} <= {"nbds+unix"}
    examples = re.findall(r"^``(\w+:\S+)``$", PAGE, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        assert str(parse_origin(example)) == example
